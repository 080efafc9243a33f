"""Pickles as plain data: NVIDIA-style networks become records, and nothing that a file names is ever called.

Python's own unpickler calls what the file tells it to. `Machine` interprets the few instructions that such files
consist of by itself: a global is a row of a table below or a class whose objects become inert, a call is a function
of this module that checks its arguments, and anything else is refused before it has an effect. What comes out are
numbers, texts, containers, `Record`s, `Setting`s, `Tensor`s and `Blob`s; raw data is located and not read. The
instructions are those of `pickletools`.
"""

import math
import mmap
import pickle
import pickletools
import re
import struct
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

_ALLOWED = "only networks of NVIDIA's layout, tensors, plain containers and numpy scalars are read from a pickle"
_INERT = re.compile(r"(torch\.nn|timm|omegaconf|typing)(\.\w+)*")  # modules whose classes may be named
_MAX_STEPS = 1_000_000  # a network for CIFAR-10 as published takes 60,000
_MAX_DIMS = 32
_MAX_ELEMENTS = 1 << 62
_MAGIC = 0x1950A86A20F9469CFC6C
_OLD_STYLE = 1001
_SHOWN = 100


class Refused(Exception):  # noqa: N818 - says what happened to the file; callers turn it into a RequestError
    """The pickle asks for something that is not read from a file: "it names os.system, and only ... are read"."""


class Corrupt(Exception):  # noqa: N818
    """The pickle is not what it claims to be: truncated, out of bounds, or of an unknown layout."""


@dataclass
class Budget:
    """What reading one file may cost, so that a small file cannot keep the program busy or fill the memory."""

    file_bytes: int
    steps: int = _MAX_STEPS
    text_bytes: int = field(init=False)

    def __post_init__(self) -> None:
        self.text_bytes = self.file_bytes

    def spend(self) -> None:
        self.steps -= 1
        if self.steps < 0:
            raise Refused("it takes more steps to read than any network does")


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


@dataclass(frozen=True, eq=False)
class Record:
    """An object of a class that is not loaded: the bare name of the class and the instance's attributes."""

    class_name: str
    state: dict[Any, Any]


@dataclass(eq=False)
class Setting:
    """A value of a training configuration (omegaconf): a list, a dictionary, or a node around a number or text.

    The configuration that it is part of, to which it refers in the file, is not kept: whoever reads a keyword of a
    network has no business with the logger's settings.
    """

    content: Any = "???"  # omegaconf's mark of what is missing


@dataclass(frozen=True, eq=False)
class Storage:
    """The raw little-endian values that tensors look into."""

    blob: Blob
    dtype: torch.dtype

    @property
    def numel(self) -> int:
        return self.blob.size // self.dtype.itemsize


@dataclass(frozen=True, eq=False)
class Tensor:
    """A view of a storage that lies inside it and shows none of its elements twice; offset and strides in elements."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

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
        start = self.storage.blob.start + self.offset * self.storage.dtype.itemsize
        return Blob(self.storage.blob.data, start, start + self.extent * self.storage.dtype.itemsize)


@dataclass(frozen=True, eq=False)
class Global:
    """A global that a pickle may name: what stands for calling it or making a new object of it, if either is allowed.

    Both take the machine first, then the arguments of the pickle.
    """

    name: str
    call: Callable[..., Any] | None = None
    new: Callable[..., Any] | None = None
    dtype: torch.dtype | None = None  # of the storage class it is


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

    def _locate(self, count: int) -> Blob:
        return Blob(self._data, self._advance(count), self._position)

    def _byte(self) -> int:
        return self._data[self._advance(1)]

    def _number(self, count: int) -> int:
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
        if self._number(8) > self._stop - self._position:
            raise Corrupt("it ends early")

    def _float(self) -> None:
        self._push(struct.unpack(">d", self._take(8))[0])

    def _text(self, count: int) -> None:
        self._push(self._take(self._number(count)).decode())

    def _tuple(self, count: int) -> None:
        values = tuple(self._stack[-count:])
        if len(values) < count:
            raise Corrupt("a tuple lacks values")
        self._stack[-count:] = [values]

    def _append(self, values: list[Any]) -> None:
        self._top(list).extend(values)

    def _set_items(self, values: list[Any]) -> None:
        target = self._top(dict, OrderedDict)
        for key, value in zip(values[::2], values[1::2], strict=True):
            target[_key(key)] = value

    def _add_items(self, values: list[Any]) -> None:
        self._top(set).update(map(_key, values))

    def _top(self, *types: type) -> Any:
        if type(self._stack[-1]) not in types:
            raise Corrupt(f"it adds items to a {type(self._stack[-1]).__name__}")
        return self._stack[-1]

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
        self._push(self._called(function, "call", arguments))

    def _new_object(self) -> None:
        arguments, cls = self._stack.pop(), self._stack.pop()
        self._push(self._called(cls, "new", arguments))

    def _called(self, function: Any, role: str, arguments: Any) -> Any:
        name = function.name if isinstance(function, Global) else f"a {type(function).__name__}"
        stand_in = getattr(function, role) if isinstance(function, Global) else None
        if stand_in is None or not isinstance(arguments, tuple):
            raise Refused(f"it calls {name}, and {_ALLOWED}")
        try:
            return stand_in(self, *arguments)
        except (TypeError, ValueError, OverflowError):
            raise Corrupt(f"it calls {name} with unknown arguments") from None

    def _build(self) -> None:
        state, target = self._stack.pop(), self._stack[-1]
        if isinstance(target, Record) and not target.state and type(state) is dict:
            target.state.update(state)
        elif isinstance(target, Setting) and type(state) is dict:
            target.content = state["_val"] if "_val" in state else state["_content"]
        elif isinstance(target, np.dtype) and type(state) is tuple and len(state) > 1 and state[1] in ("<", "|", "="):
            pass  # the byte order is that of the raw data read here
        elif type(target) is OrderedDict and type(state) is dict and state.keys() == {"_metadata"}:
            pass  # versions of torch's modules
        else:
            raise Refused(f"it sets the state of a {_class_of(target)}, and {_ALLOWED}")

    def _persistent_id(self) -> None:
        if self._persistent is None:
            raise Refused(f"it refers to an object outside the file by a persistent id, and {_ALLOWED}")
        self._push(self._persistent(self._stack.pop()))

    def _remember(self, index: int) -> None:
        self._memo[index] = self._stack[-1]

    def _recall(self, index: int) -> None:
        self._push(self._memo[index])


def _key(value: Any) -> Any:
    # Only values without parts: hashing tuples of tuples of tuples can take for ever.
    if type(value) not in (str, int, float, bool, type(None)):
        raise Corrupt(f"it uses a {type(value).__name__} as a key")
    return value


def _class_of(value: Any) -> str:
    return value.class_name if isinstance(value, Record) else type(value).__name__


def _shown(text: str) -> str:
    return text[:_SHOWN] if text[:_SHOWN].isprintable() else repr(text[:_SHOWN])


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
        pickle.BININT2: lambda m: m._push(m._number(2)),
        pickle.LONG1: lambda m: m._push(int.from_bytes(m._take(m._byte()), "little", signed=True)),
        pickle.BINFLOAT: Machine._float,
        pickle.SHORT_BINUNICODE: lambda m: m._text(1),
        pickle.BINUNICODE: lambda m: m._text(4),
        pickle.BINUNICODE8: lambda m: m._text(8),
        pickle.SHORT_BINBYTES: lambda m: m._push(m._locate(m._byte())),
        pickle.BINBYTES: lambda m: m._push(m._locate(m._number(4))),
        pickle.BINBYTES8: lambda m: m._push(m._locate(m._number(8))),
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
        pickle.EMPTY_SET: lambda m: m._push(set()),
        pickle.ADDITEMS: lambda m: m._add_items(m._pop_to_mark()),
        pickle.MARK: Machine._mark,
        pickle.POP: Machine._pop,
        pickle.POP_MARK: lambda m: m._pop_to_mark().clear(),
        pickle.BINPUT: lambda m: m._remember(m._byte()),
        pickle.LONG_BINPUT: lambda m: m._remember(m._number(4)),
        pickle.MEMOIZE: lambda m: m._remember(len(m._memo)),
        pickle.BINGET: lambda m: m._recall(m._byte()),
        pickle.LONG_BINGET: lambda m: m._recall(m._number(4)),
        pickle.GLOBAL: Machine._global,
        pickle.STACK_GLOBAL: Machine._stack_global,
        pickle.REDUCE: Machine._reduce,
        pickle.NEWOBJ: Machine._new_object,
        pickle.BUILD: Machine._build,
        pickle.BINPERSID: Machine._persistent_id,
    }.items()
}


# What stands for the calls. A TypeError or ValueError in them is a call with unknown arguments.


def _persistent_object(machine: Machine, content: dict[str, Any]) -> Record:
    # Of its keys (type, version, module_src, class_name, state), the source text is what must never be touched.
    if type(content) is not dict or content.get("type") != "class":
        raise TypeError
    class_name, state = content.get("class_name"), content.get("state")
    if not (isinstance(class_name, str) and class_name.isidentifier() and len(class_name) <= _SHOWN):
        raise TypeError
    if type(state) not in (dict, type(None)):
        raise TypeError
    return Record(class_name, {} if state is None else state)


def _ordered_dict(machine: Machine) -> OrderedDict[Any, Any]:
    return OrderedDict()


def _dict(machine: Machine) -> dict[Any, Any]:
    return {}


def _default_dict(machine: Machine, factory: object = None) -> dict[Any, Any]:
    return {}  # what it would call for absent keys stays uncalled


def _enumerated(machine: Machine, value: str) -> str:
    if type(value) is not str:
        raise TypeError
    return value


def _set(machine: Machine, values: list[Any]) -> set[Any]:
    if type(values) is not list:
        raise TypeError
    return set(map(_key, values))


def _encode(machine: Machine, text: str, encoding: str) -> Blob:
    """Bytes as protocol 2 keeps them: text whose characters are the bytes."""
    if type(text) is not str or encoding != "latin1":
        raise TypeError
    machine.budget.text_bytes -= len(text)  # the same text could be encoded again and again
    if machine.budget.text_bytes < 0:
        raise Refused("it decodes to more bytes than it has")
    return Blob(text.encode("latin1"), 0, len(text))


def _numpy_dtype(machine: Machine, code: str, align: bool = False, copy: bool = True) -> np.dtype[Any]:
    if code not in ("b1", *(f"{kind}{size}" for kind in "iu" for size in (1, 2, 4, 8)), "f2", "f4", "f8"):
        raise TypeError
    return np.dtype(code)


def _numpy_scalar(machine: Machine, dtype: np.dtype[Any], raw: Blob) -> int | float | bool:
    if not isinstance(dtype, np.dtype) or not isinstance(raw, Blob) or raw.size != dtype.itemsize:
        raise TypeError
    return np.frombuffer(raw.read(), dtype)[0].item()


def _rebuild_tensor(
    machine: Machine,
    storage: Storage,
    offset: int,
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    requires_grad: bool,
    hooks: object,
    metadata: object = None,
) -> Tensor:
    if type(shape) is not tuple or type(strides) is not tuple or not isinstance(storage, Storage) or metadata:
        raise TypeError
    if (
        len(shape) != len(strides)
        or len(shape) > _MAX_DIMS
        or any(type(n) is not int for n in (offset, *shape, *strides))
    ):
        raise TypeError
    numbers = (offset, *shape, *strides)
    if min(numbers) < 0 or max(numbers) > _MAX_ELEMENTS or math.prod(max(size, 1) for size in shape) > _MAX_ELEMENTS:
        raise Corrupt("a tensor has a size, stride or offset out of range")
    tensor = Tensor(storage, offset, shape, strides)
    if tensor.extent and offset + tensor.extent > storage.numel:
        raise Corrupt(f"a tensor of shape {list(shape)} reaches outside its storage of {storage.numel} elements")
    reach = 0  # of the axes with smaller strides
    for stride, size in sorted(zip(strides, shape, strict=True)) if tensor.extent else ():
        if size > 1:
            if stride <= reach:
                raise Refused(
                    f"a tensor of shape {list(shape)} repeats elements of its storage; it must be saved whole"
                )
            reach += (size - 1) * stride
    return tensor


def _rebuild_parameter(machine: Machine, tensor: Tensor, requires_grad: bool, hooks: object, *state: object) -> Tensor:
    if not isinstance(tensor, Tensor) or len(state) > 1:
        raise TypeError
    return tensor


def typed_storage(identity: Any) -> tuple[torch.dtype, str, int]:
    """dtype, key and number of elements from the persistent id of a storage; where it lived is of no interest."""
    if not (type(identity) is tuple and len(identity) in (5, 6) and identity[0] == "storage"):
        raise Corrupt("a persistent id is not that of a storage")
    _, cls, key, location, numel, *views = identity
    dtype = cls.dtype if isinstance(cls, Global) else None
    if dtype is None or type(key) is not str or type(location) is not str or type(numel) is not int or any(views):
        raise Corrupt("the persistent id of a storage is of an unknown layout")
    return dtype, key, numel


def old_style_storage(machine: Machine, blob: Blob) -> Storage:
    """The one storage in a stream of torch.save before 1.6, located and not read.

    Five pickles (magic number, protocol 1001, a dict that says `little_endian`, the persistent id of the storage, the
    list of its key), then the number of elements as 8 bytes and the raw values.
    """
    if not isinstance(blob, Blob):
        raise TypeError
    inner = Machine(blob, machine.budget, _storage_global, persistent=typed_storage)
    if not inner.skip(machine.stream_head):
        magic, protocol, system = (inner.run() for _ in range(3))
        if (magic, protocol) != (_MAGIC, _OLD_STYLE) or system.get("little_endian") is not True:
            raise Corrupt("a storage is not a little-endian stream of torch.save")
        machine.stream_head = Blob(blob.data, blob.start, inner.rest.start).read()
    (dtype, key, numel), keys = inner.run(), inner.run()
    counted = inner._number(8)
    if keys != [key] or counted != numel or inner.rest.size != numel * dtype.itemsize:
        raise Corrupt(f"a storage claims {numel} elements of {dtype} and has {inner.rest.size} bytes")
    return Storage(inner.rest, dtype)


_DTYPES = {
    "Double": torch.float64,
    "Float": torch.float32,
    "Half": torch.float16,
    "BFloat16": torch.bfloat16,
    "Long": torch.int64,
    "Int": torch.int32,
    "Short": torch.int16,
    "Char": torch.int8,
    "Byte": torch.uint8,
    "Bool": torch.bool,
}
_TYPES = ("dict", "list", "tuple", "str", "unicode", "int", "long", "float", "bool")  # with those of Python 2
_STORAGES = {
    ("torch", f"{name}Storage"): Global(f"torch.{name}Storage", dtype=dtype) for name, dtype in _DTYPES.items()
}
_NETWORKS = {
    **_STORAGES,
    **{
        (module, name): Global(f"{module}.{name}", call=call, new=new)
        for module, name, call, new in (
            ("torch_utils.persistence", "_reconstruct_persistent_obj", _persistent_object, None),
            ("collections", "OrderedDict", _ordered_dict, None),
            ("collections", "defaultdict", _default_dict, None),
            ("dnnlib.util", "EasyDict", _dict, _dict),
            ("torch._utils", "_rebuild_parameter", _rebuild_parameter, None),
            ("torch._utils", "_rebuild_parameter_with_state", _rebuild_parameter, None),
            ("torch._utils", "_rebuild_tensor_v2", _rebuild_tensor, None),
            ("torch.storage", "_load_from_bytes", old_style_storage, None),
            ("numpy.core.multiarray", "scalar", _numpy_scalar, None),
            ("numpy._core.multiarray", "scalar", _numpy_scalar, None),
            ("numpy", "dtype", _numpy_dtype, None),
            ("builtins", "set", _set, None),
            ("__builtin__", "set", _set, None),
            ("_codecs", "encode", _encode, None),
            ("timm.layers.format", "Format", _enumerated, None),
        )
    },
    **{("torch", str(dtype).removeprefix("torch.")): Global(str(dtype)) for dtype in _DTYPES.values()},
    **{(module, name): Global(f"{module}.{name}") for module in ("builtins", "__builtin__") for name in _TYPES},
}


def network_global(module: str, name: str) -> Global | None:
    """What stands for a global that a file of networks names: a function or type of the table, or an inert class.

    Objects of the inert classes are records of what they hold. Layers and configuration values depend on the
    versions of the libraries that wrote the file, so that any class of these libraries is taken.
    """
    listed = _NETWORKS.get((module, name))
    if listed or not (_INERT.fullmatch(module) and name.isidentifier() and len(module) + len(name) < _SHOWN):
        return listed
    is_setting = module.startswith("omegaconf.") and name.endswith(("Config", "Node"))
    return Global(f"{module}.{name}", new=lambda machine: Setting() if is_setting else Record(name, {}))


def _storage_global(module: str, name: str) -> Global | None:
    return _STORAGES.get((module, name))
