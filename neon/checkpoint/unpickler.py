"""Pickles as plain data: networks and other objects become records, and nothing that a file names is ever called.

Python's own unpickler calls what the file tells it to. `Machine` interprets the few instructions that checkpoints
consist of by itself: a global is what `stand_ins` has in its place, a call is a function there that checks its
arguments or an object that is noted and not made, and anything else is refused before it has an effect. What comes
out are numbers, texts, containers, `Record`s, `Setting`s, `Tensor`s and `Blob`s; raw data is located and not read.
The instructions are those of `pickletools`.
"""

import math
import mmap
import pickle
import pickletools
import struct
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

SHOWN = 100
"""characters of a name that errors show"""
_ALLOWED = "only networks, tensors, plain containers and harmless objects beside them are read from a pickle"
_MAX_STEPS = 1_000_000  # a network for CIFAR-10 as published takes 60,000
_BYTES_PER_STEP = 64  # of the file, for more steps: training states of large networks hold many tensors
_MAX_UNPACKED = 8  # bytes that a file may stand for, for each that it has
_ALWAYS_UNPACKED = 1 << 20
_KEY_STEPS = 100  # so few keys of several parts that hashing and comparing them ends in time
_MAX_KEY = 1 << 63


class Refused(Exception):  # noqa: N818 - says what happened to the file; callers turn it into a RequestError
    """The pickle asks for something that is not read from a file: "it names os.system, and only ... are read"."""


class NotWeights(Exception):  # noqa: N818
    """The file is of another kind than one of weights: "a TorchScript archive, ...; save its state_dict()"."""


class Corrupt(Exception):  # noqa: N818
    """The pickle is not what it claims to be: truncated, out of bounds, or of an unknown layout."""


@dataclass
class Budget:
    """What reading one file may cost, so that a small file cannot keep the program busy or fill the memory.

    `steps` are of the machine and of every walk through what it made; `room` is how many bytes the tensors of one
    state dict may take, and those that members of an archive are unpacked to.
    """

    file_bytes: int
    steps: int = 0
    text_bytes: int = field(init=False)
    unpacked_bytes: int = field(init=False)

    def __post_init__(self) -> None:
        self.steps = self.steps or _MAX_STEPS + self.file_bytes // _BYTES_PER_STEP
        self.text_bytes = self.file_bytes
        self.unpacked_bytes = self.room = _MAX_UNPACKED * self.file_bytes + _ALWAYS_UNPACKED

    def spend(self, steps: int = 1) -> None:
        self.steps -= steps
        if self.steps < 0:
            raise Refused("it takes more steps to read than any network does")

    def unpack(self, count: int) -> None:
        """Count bytes that do not lie in the file as they are."""
        self.unpacked_bytes -= count
        if self.unpacked_bytes < 0:
            raise Refused(f"it unpacks to more than {_MAX_UNPACKED} times its size")


@dataclass(frozen=True, eq=False)
class Blob:
    """Bytes of a file that were not read: `data[start:stop]`, `data` being the mapped file or bytes decoded from it."""

    data: mmap.mmap | bytes
    start: int
    stop: int

    @property
    def size(self) -> int:
        return self.stop - self.start

    def read(self) -> bytes:
        return self.data[self.start : self.stop]


@dataclass(eq=False)
class Origin:
    """How a file makes an object that is not made here: enough to write it as it was read."""

    maker: "Global"
    role: str  # "call" or "new"
    arguments: tuple[Any, ...]
    state: tuple[Any, ...] = ()  # what the object is then given as its state, if anything
    items: list[Any] = field(default_factory=list)  # appended to it
    entries: dict[Any, Any] = field(default_factory=dict)  # set in it


@dataclass(eq=False)
class Record:
    """An object of a class that is not loaded: the bare name of the class and the instance's attributes."""

    class_name: str
    state: dict[Any, Any]
    origin: Origin | None = field(default=None, repr=False)


@dataclass(eq=False)
class Opaque(Record):
    """A record of a class that no network consists of, whatever it was made of and given."""


@dataclass(eq=False)
class Setting:
    """A value of a training configuration (omegaconf): a list, a dictionary, or a node around a number or text.

    The configuration that it is part of, to which it refers in the file, is kept for writing it again only: whoever
    reads a keyword of a network has no business with the logger's settings.
    """

    content: Any = "???"  # omegaconf's mark of what is missing
    origin: Origin | None = field(default=None, repr=False)


@dataclass(eq=False)
class Storage:
    """The raw little-endian values that tensors look into."""

    blob: Blob
    dtype: torch.dtype


@dataclass(frozen=True, eq=False)
class Tensor:
    """A view of a storage that lies inside it; offset and strides in elements of its dtype."""

    storage: Storage
    dtype: torch.dtype  # of the storage, or any over one of bytes
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    parameter: bool | None = None  # whether it requires gradients; None: it is no parameter

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def extent(self) -> int:
        """Elements of the storage from the first to the last one of the tensor."""
        if 0 in self.shape:
            return 0
        return 1 + sum((size - 1) * stride for size, stride in zip(self.shape, self.strides, strict=True))

    @property
    def is_contiguous(self) -> bool:
        return 0 in self.shape or all(
            size == 1 or stride == math.prod(self.shape[axis + 1 :])
            for axis, (size, stride) in enumerate(zip(self.shape, self.strides, strict=True))
        )

    @property
    def blob(self) -> Blob:
        """The bytes from its first to its last element."""
        start = self.storage.blob.start + self.offset * self.dtype.itemsize
        return Blob(self.storage.blob.data, start, start + self.extent * self.dtype.itemsize)


@dataclass(frozen=True, eq=False)
class Global:
    """A global that a pickle may name: what stands for calling it or making a new object of it, if either is allowed.

    Both take the machine first, then the arguments of the pickle.
    """

    module: str
    bare_name: str
    call: Callable[..., Any] | None = None
    new: Callable[..., Any] | None = None
    dtype: torch.dtype | None = None  # that it is, or that of the storage class it is

    @property
    def name(self) -> str:
        return f"{self.module}.{self.bare_name}"


class Machine:
    """Runs the pickles that lie one after another in a blob.

    Args:
        globals: what stands for the global of a module and name; None where it may not be named.
        persistent: what stands for a persistent id; None where these do not belong.
    """

    def __init__(
        self,
        blob: Blob,
        budget: Budget,
        globals: Callable[[str, str], Global | None],
        persistent: Callable[[Any], Any] | None = None,
    ) -> None:
        self.budget = budget
        self.stream_head = b""  # the first three pickles of an old-style stream, once they were run: all begin alike
        self._data, self._position, self._stop = blob.data, blob.start, blob.stop
        self._globals = globals
        self._persistent = persistent
        self._memo: dict[int, Any] = {}
        self._stack: list[Any] = []
        self._marked: list[list[Any]] = []

    def run(self) -> Any:
        """The content of the next pickle."""
        self._memo, self._stack, self._marked = {}, [], []
        budget, data = self.budget, self._data
        while self._position < self._stop:
            code = data[self._position]
            self._position += 1
            if code == _STOP:
                break
            budget.steps -= 1  # not by a call, which would take a tenth of the time
            if budget.steps < 0:
                budget.spend()
            step = _STEPS.get(code)
            if step is None:
                raise Refused(f"it uses the instruction {_INSTRUCTIONS.get(code, code)}, and {_ALLOWED}")
            step(self)
        else:
            raise Corrupt("it ends early")
        [content] = self._stack
        if self._marked:
            raise Corrupt("it stops inside a container")
        return content

    def skip(self, known: bytes) -> bool:
        """Pass over pickles that were run before; False if others follow, or if `known` is empty."""
        end = self._position + len(known)
        if not known or end > self._stop or self._data[self._position : end] != known:
            return False
        self._position = end
        return True

    @property
    def rest(self) -> Blob:
        """What follows the pickles that were run."""
        return Blob(self._data, self._position, self._stop)

    def _advance(self, count: int) -> int:
        """Where the next `count` bytes start."""
        start = self._position
        if count > self._stop - start:
            raise Corrupt("it ends early")
        self._position = start + count
        return start

    def _take(self, count: int) -> bytes:
        return self._data[self._advance(count) : self._position]

    def locate(self, count: int) -> Blob:
        """The next `count` bytes, not read."""
        return Blob(self._data, self._advance(count), self._position)

    def _byte(self) -> int:
        return self._data[self._advance(1)]

    def number(self, count: int) -> int:
        """An unsigned little-endian integer of `count` bytes."""
        return int.from_bytes(self._take(count), "little")

    def _line(self) -> str:
        end = self._data.find(b"\n", self._position, self._stop)
        if end < 0:
            raise Corrupt("it ends early")
        return self._take(end + 1 - self._position)[:-1].decode()

    def _push(self, value: Any) -> None:
        self._stack.append(value)

    def _pop_to_mark(self) -> list[Any]:
        values, self._stack = self._stack, self._marked.pop()
        return values

    def _mark(self) -> None:
        self._marked.append(self._stack)
        self._stack = []

    def _protocol(self) -> None:
        if self._byte() > pickle.HIGHEST_PROTOCOL:
            raise Corrupt("it is of an unknown protocol")

    def _frame(self) -> None:
        if self.number(8) > self._stop - self._position:
            raise Corrupt("it ends early")

    def _float(self) -> None:
        self._push(struct.unpack(">d", self._take(8))[0])

    def _text(self, count: int) -> None:
        self._push(self._take(self.number(count)).decode())

    def _text_or_bytes(self, count: int) -> None:
        """What is a text or bytes in Python 2."""
        blob = self.locate(self.number(count))
        try:
            self._push(blob.read().decode())
        except UnicodeDecodeError:
            self._push(blob)

    def _tuple(self, count: int) -> None:
        values = tuple(self._stack[-count:])
        if len(values) < count:
            raise Corrupt("a tuple lacks values")
        self._stack[-count:] = [values]

    def _append(self, values: list[Any]) -> None:
        target = self._stack[-1]
        (target.origin.items if _is_opaque(target) else self._top(list)).extend(values)

    def _set_items(self, values: list[Any]) -> None:
        target = self._stack[-1]
        entries = target.origin.entries if _is_opaque(target) else self._top(dict, OrderedDict)
        for key, value in zip(values[::2], values[1::2], strict=True):
            entries[self.key(key)] = value

    def _add_items(self, values: list[Any]) -> None:
        self._top(set).update(map(self.key, values))

    def _top(self, *types: type) -> Any:
        if type(self._stack[-1]) not in types:
            raise Corrupt(f"it adds items to a {type(self._stack[-1]).__name__}")
        return self._stack[-1]

    def key(self, value: Any) -> Any:
        """`value`, if a dictionary or set can take it in a moment."""
        if type(value) is tuple:  # of plain values: hashing tuples of tuples of tuples can take for ever
            self.budget.spend(_KEY_STEPS + len(value))
            plain = all(_is_plain(part) for part in value)
        else:
            plain = _is_plain(value) or isinstance(value, Record | Global | Blob | np.generic)
        if not plain:
            raise Corrupt(f"it uses a {type(value).__name__} as a key")
        return value

    def _pop_items(self, count: int) -> list[Any]:
        values = self._stack[-count:]
        del self._stack[-count:]
        return values

    def _pop(self) -> None:
        if not self._stack:
            raise Corrupt("it drops a value that is not there")
        self._stack.pop()

    def _find_global(self, module: Any, name: Any) -> Global:
        stand_in = self._globals(module, name) if isinstance(module, str) and isinstance(name, str) else None
        if stand_in is None:
            raise Refused(f"it names {_shown(f'{module}.{name}')}, and {_ALLOWED}")
        return stand_in

    def _global(self) -> None:
        module = self._line()
        self._push(self._find_global(module, self._line()))

    def _stack_global(self) -> None:
        name, module = self._stack.pop(), self._stack.pop()
        self._push(self._find_global(module, name))

    def _reduce(self) -> None:
        arguments, function = self._stack.pop(), self._stack.pop()
        self._push(self.called(function, "call", arguments))

    def _new_object(self) -> None:
        arguments, cls = self._stack.pop(), self._stack.pop()
        self._push(self.called(cls, "new", arguments))

    def called(self, function: Any, role: str, arguments: Any) -> Any:
        name = function.name if isinstance(function, Global) else f"a {type(function).__name__}"
        stand_in = getattr(function, role) if isinstance(function, Global) else None
        if stand_in is None or not isinstance(arguments, tuple):
            raise Refused(f"it calls {name}, and {_ALLOWED}")
        try:
            made = stand_in(self, *arguments)
        except (TypeError, ValueError, OverflowError):
            raise Corrupt(f"it calls {name} with unknown arguments") from None
        if isinstance(made, Record | Setting) and made.origin is None:
            made.origin = Origin(function, role, arguments)
        return made

    def _build(self) -> None:
        state, target = self._stack.pop(), self._stack[-1]
        if isinstance(target, Record) and not target.state and type(state) is dict:
            target.state.update(state)
        elif isinstance(target, Setting) and type(state) is dict:
            target.content = state["_val"] if "_val" in state else state["_content"]
        elif isinstance(target, np.dtype) and type(state) is tuple and len(state) > 1 and state[1] in ("<", "|", "="):
            pass  # the byte order is that of the raw data read here
        elif type(target) is OrderedDict and type(state) is dict and state.keys() == {"_metadata"}:
            vars(target).update(state)  # versions of torch's modules
        elif not _is_opaque(target):
            raise Refused(f"it sets the state of a {_class_of(target)}, and {_ALLOWED}")
        if isinstance(target, Record | Setting):
            assert target.origin is not None
            target.origin.state = (state,)

    def _persistent_id(self) -> None:
        if self._persistent is None:
            raise Refused(f"it refers to an object outside the file by a persistent id, and {_ALLOWED}")
        self._push(self._persistent(self._stack.pop()))

    def _remember(self, index: int) -> None:
        self._memo[index] = self._stack[-1]

    def _recall(self, index: int) -> None:
        self._push(self._memo[index])


def _is_plain(value: Any) -> bool:
    if type(value) is int:  # such numbers have hashes of their own; of greater ones, many can have the same
        return -_MAX_KEY <= value < _MAX_KEY
    return type(value) in (str, float, bool, type(None))


def _is_opaque(value: Any) -> bool:
    return isinstance(value, Opaque)


def _class_of(value: Any) -> str:
    return value.class_name if isinstance(value, Record) else type(value).__name__


def _shown(text: str) -> str:
    return text[:SHOWN] if text[:SHOWN].isprintable() else repr(text[:SHOWN])


_INSTRUCTIONS = {ord(instruction.code): instruction.name for instruction in pickletools.opcodes}
_STOP = pickle.STOP[0]
_STEPS: dict[int, Callable[[Machine], None]] = {
    code[0]: step
    for code, step in {
        pickle.PROTO: Machine._protocol,
        pickle.FRAME: Machine._frame,
        pickle.NONE: lambda m: m._push(None),
        pickle.NEWTRUE: lambda m: m._push(True),
        pickle.NEWFALSE: lambda m: m._push(False),
        pickle.BININT: lambda m: m._push(int.from_bytes(m._take(4), "little", signed=True)),
        pickle.BININT1: lambda m: m._push(m._byte()),
        pickle.BININT2: lambda m: m._push(m.number(2)),
        pickle.LONG1: lambda m: m._push(int.from_bytes(m._take(m._byte()), "little", signed=True)),
        pickle.BINFLOAT: Machine._float,
        pickle.SHORT_BINUNICODE: lambda m: m._text(1),
        pickle.BINUNICODE: lambda m: m._text(4),
        pickle.BINUNICODE8: lambda m: m._text(8),
        pickle.SHORT_BINBYTES: lambda m: m._push(m.locate(m._byte())),
        pickle.BINBYTES: lambda m: m._push(m.locate(m.number(4))),
        pickle.BINBYTES8: lambda m: m._push(m.locate(m.number(8))),
        pickle.BYTEARRAY8: lambda m: m._push(m.locate(m.number(8))),
        pickle.EMPTY_TUPLE: lambda m: m._push(()),
        pickle.TUPLE1: lambda m: m._tuple(1),
        pickle.TUPLE2: lambda m: m._tuple(2),
        pickle.TUPLE3: lambda m: m._tuple(3),
        pickle.TUPLE: lambda m: m._push(tuple(m._pop_to_mark())),
        pickle.EMPTY_LIST: lambda m: m._push([]),
        pickle.APPEND: lambda m: m._append(m._pop_items(1)),
        pickle.APPENDS: lambda m: m._append(m._pop_to_mark()),
        pickle.EMPTY_DICT: lambda m: m._push({}),
        pickle.SETITEM: lambda m: m._set_items(m._pop_items(2)),
        pickle.SETITEMS: lambda m: m._set_items(m._pop_to_mark()),
        pickle.BINSTRING: lambda m: m._text_or_bytes(4),
        pickle.SHORT_BINSTRING: lambda m: m._text_or_bytes(1),
        pickle.EMPTY_SET: lambda m: m._push(set()),
        pickle.ADDITEMS: lambda m: m._add_items(m._pop_to_mark()),
        pickle.FROZENSET: lambda m: m._push(frozenset(map(m.key, m._pop_to_mark()))),
        pickle.MARK: Machine._mark,
        pickle.POP: Machine._pop,
        pickle.POP_MARK: lambda m: m._pop_to_mark().clear(),
        pickle.BINPUT: lambda m: m._remember(m._byte()),
        pickle.LONG_BINPUT: lambda m: m._remember(m.number(4)),
        pickle.MEMOIZE: lambda m: m._remember(len(m._memo)),
        pickle.BINGET: lambda m: m._recall(m._byte()),
        pickle.LONG_BINGET: lambda m: m._recall(m.number(4)),
        pickle.GLOBAL: Machine._global,
        pickle.STACK_GLOBAL: Machine._stack_global,
        pickle.REDUCE: Machine._reduce,
        pickle.NEWOBJ: Machine._new_object,
        pickle.BUILD: Machine._build,
        pickle.BINPERSID: Machine._persistent_id,
    }.items()
}
