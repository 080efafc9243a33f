"""What `Machine` has in place of the globals that checkpoints name; none of them is imported or called.

A global is one of these: a function of torch's, numpy's or the publishers' that a function here stands for; a class
of layers or configurations, whose objects become records; or a class (or a function) whose results are noted as they
stand in the file and looked into by nobody, `Opaque`: harmless types of Python and numpy, and whatever is neither of
Python's library nor of torch. Every other name is refused: a file that holds one was made to be run.
"""

import math
import re
import sys
from _compat_pickle import IMPORT_MAPPING
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from neon.checkpoint.unpickler import (
    SHOWN,
    Blob,
    Corrupt,
    Global,
    Machine,
    Opaque,
    Record,
    Refused,
    Setting,
    Storage,
    Tensor,
)

_LAYERS = re.compile(r"(torch\.(nn|optim|amp|cuda\.amp|utils\.data)|timm|omegaconf|typing)(\.\w+)*")
_NUMPY = re.compile(
    r"numpy\.(ndarray|dtype|generic|bool_?|u?int\d*|float\d*|complex\d*|str_|bytes_)"
    r"|numpy\.(_?core\.(multiarray\._reconstruct|multiarray\.scalar|numeric\._frombuffer)|dtypes\.\w+)"
    r"|numpy\.random\.(_pickle|mtrand|bit_generator|_generator|_mt19937|_pcg64|_philox|_sfc64)\.\w+"
)
_PYTHON = re.compile(
    r"pathlib\.(_local\.)?(Pure)?(Posix|Windows)?Path|datetime\.(datetime|date|time|timedelta|timezone)"
    r"|collections\.(deque|defaultdict|Counter)|argparse\.Namespace|types\.SimpleNamespace"
    r"|(builtins|__builtin__)\.(frozenset|complex|slice|range|xrange|object)"
    r"|decimal\.Decimal|fractions\.Fraction|uuid\.UUID|random\.Random"
)
_TORCH = re.compile(
    r"torch\.(device|Tensor|nn\.parameter\.\w+|serialization\._get_layout|per_(tensor|channel)_\w+)"
    r"|torch\.distributed\.(tensor|_tensor|device_mesh)(\.\w+)*"
)
_UNREAD = re.compile(r"torch\._utils\._rebuild_(sparse_|q|meta_|nested_|device_|xla_)?(tensor|wrapper)\w*")
_KNOWN = {*sys.stdlib_module_names, *IMPORT_MAPPING, "torch", "numpy", "timm", "omegaconf"}
_NAME = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*")
_MAX_DIMS = 64
_MAX_ELEMENTS = 1 << 62
_MAGIC = 0x1950A86A20F9469CFC6C
_OLD_STYLE = 1001


def stand_in(module: str, name: str) -> Global | None:
    """What stands for a global that a checkpoint names; None where it may not be named."""
    listed = _LISTED.get((module, name))
    if listed or not (_NAME.fullmatch(module) and name.isidentifier() and len(module) + len(name) < SHOWN):
        return listed
    if _LAYERS.fullmatch(module):
        # Layers and configuration values depend on the versions of the libraries that wrote the file, so that any
        # class of these libraries is taken; their functions are not, which no checkpoint calls.
        is_setting = module.startswith("omegaconf.") and name.endswith(("Config", "Node"))
        return Global(module, name, new=lambda machine: Setting() if is_setting else Record(name, {}))
    dotted = f"{module}.{name}"
    harmless = any(pattern.fullmatch(dotted) for pattern in (_PYTHON, _NUMPY, _TORCH, _UNREAD))
    if harmless or not _is_known(module):

        def noted(machine: Machine, *arguments: Any) -> Opaque:
            return Opaque(name, {})

        return Global(module, name, call=noted, new=noted)
    return None


def _is_known(module: str) -> bool:
    """Whether a module is of Python or of a library whose names are looked at one by one."""
    return module.partition(".")[0] in _KNOWN


def is_unread_tensor(value: Any) -> bool:
    """Whether it is a tensor that is not read here: sparse, quantized, of no storage, of a subclass."""
    return isinstance(value, Opaque) and value.origin is not None and bool(_UNREAD.fullmatch(value.origin.maker.name))


# What stands for the calls. A TypeError or ValueError in them is a call with unknown arguments.


def _persistent_object(machine: Machine, content: dict[str, Any]) -> Record:
    # Of its keys (type, version, module_src, class_name, state), the source text is what must never be touched.
    if type(content) is not dict or content.get("type") != "class":
        raise TypeError
    class_name, state = content.get("class_name"), content.get("state")
    if not (isinstance(class_name, str) and class_name.isidentifier() and len(class_name) <= SHOWN):
        raise TypeError
    if type(state) not in (dict, type(None)):
        raise TypeError
    return Record(class_name, {} if state is None else state)


def _ordered_dict(machine: Machine) -> OrderedDict[Any, Any]:
    return OrderedDict()


def _dict(machine: Machine) -> dict[Any, Any]:
    return {}


def _enumerated(machine: Machine, value: str) -> str:
    if type(value) is not str:
        raise TypeError
    return value


def _set(machine: Machine, values: list[Any]) -> set[Any]:
    if type(values) is not list:
        raise TypeError
    return set(map(machine.key, values))


def _size(machine: Machine, sizes: tuple[Any, ...]) -> torch.Size:
    if type(sizes) is not tuple or any(type(size) is not int for size in sizes):
        raise TypeError
    return torch.Size(sizes)


def _attribute(machine: Machine, owner: Any, name: Any) -> Opaque:
    """A member of an enumeration, as Python 3.11 pickles them."""
    if not isinstance(owner, Global) or _is_known(owner.module) or type(name) is not str or not name.isidentifier():
        raise TypeError
    return Opaque(name, {})


def _encode(machine: Machine, text: str, encoding: str) -> Blob:
    """Bytes as protocol 2 keeps them: text whose characters are the bytes."""
    if type(text) is not str or encoding != "latin1":
        raise TypeError
    machine.budget.text_bytes -= len(text)  # the same text could be encoded again and again
    if machine.budget.text_bytes < 0:
        raise Refused("it decodes to more bytes than it has")
    return Blob(text.encode("latin1"), 0, len(text))


def _bytes(machine: Machine) -> Blob:
    return Blob(b"", 0, 0)


def _byte_array(machine: Machine, *content: Any) -> Opaque:
    if content and not isinstance(content[0], Blob | str):  # of a number, it would be so many zeros
        raise TypeError
    return Opaque("bytearray", {})


def _numpy_dtype(machine: Machine, code: Any, align: bool = False, copy: bool = True) -> np.dtype[Any] | Opaque:
    if code in ("b1", *(f"{kind}{size}" for kind in "iu" for size in (1, 2, 4, 8)), "f2", "f4", "f8"):
        return np.dtype(code)
    return Opaque("dtype", {})


def _numpy_scalar(machine: Machine, dtype: Any, raw: Any) -> np.generic | Opaque:
    if not isinstance(dtype, np.dtype):
        return Opaque("scalar", {})
    if not isinstance(raw, Blob) or raw.size != dtype.itemsize:
        raise TypeError
    return np.frombuffer(raw.read(), dtype)[0]


def _rebuild_tensor(
    machine: Machine,
    storage: Storage,
    offset: int,
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    requires_grad: bool = False,
    hooks: object = None,
    metadata: object = None,
    dtype: torch.dtype | None = None,
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
    dtype = storage.dtype if dtype is None else dtype
    tensor = Tensor(storage, dtype, offset, shape, strides)
    held = storage.blob.size // dtype.itemsize
    if tensor.extent and offset + tensor.extent > held:
        raise Corrupt(f"a tensor of shape {list(shape)} reaches outside its storage of {held} elements")
    if tensor.nbytes > machine.budget.room:
        raise Refused(f"a tensor of shape {list(shape)} repeats elements of its storage; it must be saved whole")
    return tensor


def _rebuild_tensor_of_bytes(
    machine: Machine,
    storage: Storage,
    offset: int,
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    requires_grad: bool,
    hooks: object,
    dtype: Global,
    metadata: object = None,
) -> Tensor:
    """A tensor of a dtype that has no class of storages: the storage is one of bytes."""
    if not isinstance(dtype, Global) or dtype.dtype is None:
        raise TypeError
    return _rebuild_tensor(machine, storage, offset, shape, strides, requires_grad, hooks, metadata, dtype.dtype)


def _rebuild_parameter(machine: Machine, tensor: Any, requires_grad: bool, hooks: object, *state: object) -> Any:
    if not isinstance(tensor, Tensor | Opaque) or len(state) > 1:
        raise TypeError
    return replace(tensor, parameter=bool(requires_grad)) if isinstance(tensor, Tensor) else tensor


def _rebuild_of_type(machine: Machine, function: Any, cls: Any, arguments: Any, state: Any) -> Any:
    """A tensor of a subclass, or with attributes of its own: read as what it is made of."""
    if not isinstance(function, Global) or function.call is None or not isinstance(arguments, tuple):
        raise TypeError
    made = machine.called(function, "call", arguments)
    if not isinstance(made, Tensor | Opaque):
        raise TypeError
    return made


def typed_storage(identity: Any) -> tuple[torch.dtype, str, int]:
    """dtype, key and number of elements from the persistent id of a storage; where it lived is of no interest."""
    if not (type(identity) is tuple and len(identity) in (5, 6) and identity[0] == "storage"):
        raise Corrupt("a persistent id is not that of a storage")
    _, cls, key, location, numel, *views = identity
    dtype = cls.dtype if isinstance(cls, Global) and cls.bare_name.endswith("Storage") else None
    if dtype is None or type(key) is not str or type(location) is not str or type(numel) is not int or any(views):
        raise Corrupt("the persistent id of a storage is of an unknown layout")
    return dtype, key, numel


def check_stream_head(machine: Machine) -> None:
    """Run the first three pickles of a stream of torch.save before 1.6; Corrupt if they are not those."""
    magic, protocol, system = (machine.run() for _ in range(3))
    if (magic, protocol) != (_MAGIC, _OLD_STYLE) or system.get("little_endian") is not True:
        raise Corrupt("a storage is not a little-endian stream of torch.save")


def old_style_storage(machine: Machine, blob: Blob) -> Storage:
    """The one storage in a stream of torch.save before 1.6, located and not read.

    Five pickles (magic number, protocol 1001, a dict that says `little_endian`, the persistent id of the storage, the
    list of its key), then the number of elements as 8 bytes and the raw values.
    """
    if not isinstance(blob, Blob):
        raise TypeError
    inner = Machine(blob, machine.budget, _storage_class, persistent=typed_storage)
    if not inner.skip(machine.stream_head):
        check_stream_head(inner)
        machine.stream_head = Blob(blob.data, blob.start, inner.rest.start).read()
    (dtype, key, numel), keys = inner.run(), inner.run()
    counted = inner.number(8)
    if keys != [key] or counted != numel or inner.rest.size != numel * dtype.itemsize:
        raise Corrupt(f"a storage claims {numel} elements of {dtype} and has {inner.rest.size} bytes")
    return Storage(inner.rest, dtype)


_STORAGE_DTYPES = {
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
    "ComplexDouble": torch.complex128,
    "ComplexFloat": torch.complex64,
    "QInt8": torch.qint8,
    "QInt32": torch.qint32,
    "QUInt8": torch.quint8,
    "QUInt4x2": torch.quint4x2,
    "QUInt2x4": torch.quint2x4,
}
_STORAGES = {
    (module, name): Global(module, name, dtype=dtype)
    for module, name, dtype in (
        *(("torch", f"{name}Storage", dtype) for name, dtype in _STORAGE_DTYPES.items()),
        ("torch", "UntypedStorage", torch.uint8),
        ("torch.storage", "UntypedStorage", torch.uint8),
    )
}
_CALLS: tuple[tuple[str, str, Callable[..., Any]], ...] = (
    ("torch_utils.persistence", "_reconstruct_persistent_obj", _persistent_object),
    ("collections", "OrderedDict", _ordered_dict),
    ("torch", "Size", _size),
    ("torch._utils", "_rebuild_parameter", _rebuild_parameter),
    ("torch._utils", "_rebuild_parameter_with_state", _rebuild_parameter),
    ("torch._utils", "_rebuild_tensor", _rebuild_tensor),
    ("torch._utils", "_rebuild_tensor_v2", _rebuild_tensor),
    ("torch._utils", "_rebuild_tensor_v3", _rebuild_tensor_of_bytes),
    ("torch._tensor", "_rebuild_from_type_v2", _rebuild_of_type),
    ("torch.storage", "_load_from_bytes", old_style_storage),
    ("numpy.core.multiarray", "scalar", _numpy_scalar),
    ("numpy._core.multiarray", "scalar", _numpy_scalar),
    ("numpy", "dtype", _numpy_dtype),
    ("builtins", "set", _set),
    ("builtins", "bytes", _bytes),
    ("builtins", "getattr", _attribute),
    ("builtins", "bytearray", _byte_array),
    ("__builtin__", "set", _set),  # of Python 2, as torch writes them to this day
    ("__builtin__", "bytes", _bytes),
    ("__builtin__", "getattr", _attribute),
    ("__builtin__", "bytearray", _byte_array),
    ("_codecs", "encode", _encode),
    ("timm.layers.format", "Format", _enumerated),
)
_TYPES = ("dict", "list", "tuple", "str", "unicode", "int", "long", "float", "bool")  # with those of Python 2
_LISTED = {
    **_STORAGES,
    **{(module, name): Global(module, name, call=call) for module, name, call in _CALLS},
    ("dnnlib.util", "EasyDict"): Global("dnnlib.util", "EasyDict", call=_dict, new=_dict),
    **{
        ("torch", name): Global("torch", name, dtype=value)
        for name, value in vars(torch).items()
        if isinstance(value, torch.dtype)
    },
    **{(module, name): Global(module, name) for module in ("builtins", "__builtin__") for name in _TYPES},
}


def _storage_class(module: str, name: str) -> Global | None:
    return _STORAGES.get((module, name))
