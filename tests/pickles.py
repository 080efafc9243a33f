"""Pickles in the layout of NVIDIA's published networks, and hostile ones, to read in tests and benchmarks."""

import io
import os
import pickle
import sys
import types
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import nn

# The published files hold the source text of their classes, which the publisher's own loader executes.
SOURCE = 'raise RuntimeError("a loader must never execute the source text of a pickle")\n'
NUMPY_MODULES = ("numpy.core.multiarray", "numpy._core.multiarray")  # before numpy 2 and since
_PERSISTENT = ("torch_utils.persistence", "_reconstruct_persistent_obj")
_DICT = ("dnnlib.util", "EasyDict")


@dataclass
class Persistent:
    """An object of a publisher's class, to be pickled with its source text."""

    class_name: str
    state: dict[str, Any]
    keywords: dict[str, Any] = field(default_factory=dict)
    arguments: tuple[Any, ...] = ()


def persistent(module: nn.Module, keywords: Mapping[str, Any], arguments: tuple[Any, ...] = ()) -> Persistent:
    """A live network of `edm` as an object of the published class of that name."""
    return Persistent(type(module).__name__, dict(vars(module)), dict(keywords), arguments)


def snapshot(module: nn.Module, keywords: Mapping[str, Any]) -> dict[str, Any]:
    """The content of a published file: the network, the loss, the augmentation (with a buffer), the data set."""
    pipe = nn.Module()
    pipe.register_buffer("Hz_geom", torch.linspace(0, 1, 12))
    return {
        "ema": persistent(module, keywords),
        "loss_fn": Persistent("EDMLoss", {"P_mean": -1.2, "P_std": 1.2, "sigma_data": 0.5}),
        "augment_pipe": Persistent("AugmentPipe", dict(vars(pipe)), {"p": 0.12}),
        "dataset_kwargs": {"class_name": "training.dataset.ImageFolderDataset", "use_labels": True, "max_size": 50000},
    }


@dataclass
class Call:
    """Pickled as a call of `function`, which unpickling in the ordinary way carries out."""

    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    state: Any = None  # handed to the result by BUILD


def dumps(content: Any, *, numpy_module: str = NUMPY_MODULES[1], location: str = "cpu", protocol: int = 4) -> bytes:
    """`content` pickled in the published layout, with the names of one numpy and tensors tagged with a device."""
    file = io.BytesIO()
    with published_modules(numpy_module):
        _Pickler(file, protocol, numpy_module=numpy_module, location=location).dump(content)
    return file.getvalue()


def save_training_state(path: str | os.PathLike[str], network: Persistent, optimizer_state: dict[str, Any]) -> None:
    """A published training state: a torch archive of a network and its optimiser."""
    module = types.ModuleType("published")
    vars(module)["Pickler"] = _Pickler
    with published_modules():
        torch.save({"net": network, "optimizer_state": optimizer_state}, path, pickle_module=module)


def published_modules(numpy_module: str = NUMPY_MODULES[1]) -> AbstractContextManager[Any]:
    """Makes the globals that the files name importable, as pickling and unpickling in the ordinary way need."""

    def scalar(dtype: np.dtype[Any], raw: bytes) -> Any:
        return np.frombuffer(raw, dtype)[0]

    def reconstruct(meta: dict[str, Any]) -> dict[str, Any]:
        return meta

    modules = {name: types.ModuleType(name) for name in ("torch_utils", "dnnlib", _DICT[0])}
    vars(modules[_DICT[0]])[_DICT[1]] = EasyDict
    for function, (module, name) in ((reconstruct, _PERSISTENT), (scalar, (numpy_module, "scalar"))):
        function.__module__, function.__qualname__, function.__name__ = module, name, name
        modules[module] = types.ModuleType(module)
        vars(modules[module])[name] = function
    return mock.patch.dict(sys.modules, modules)


class EasyDict(dict[str, Any]):
    """The publisher's dictionary."""

    __module__ = _DICT[0]


# Pieces of hand-made pickles, for what no pickler writes.


def text(value: str) -> bytes:
    return pickle.BINUNICODE + len(value.encode()).to_bytes(4, "little") + value.encode()


def named(module: str, name: str) -> bytes:
    return text(module) + text(name) + pickle.STACK_GLOBAL


def program(*parts: bytes) -> bytes:
    return pickle.PROTO + b"\x04" + b"".join(parts) + pickle.STOP


class _Pickler(pickle.Pickler):
    def __init__(
        self, file: Any, protocol: int, *, numpy_module: str = NUMPY_MODULES[1], location: str = "cpu"
    ) -> None:
        super().__init__(file, protocol)
        self._numpy_module, self._location = numpy_module, location
        self._made: dict[int, Persistent] = {}  # one stand-in for each module, however often it is met

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, nn.Module) and type(value).__module__.startswith("edm."):
            keywords = {"init": {"init_mode": "xavier_uniform", "init_weight": np.sqrt(0.2)}}
            value = self._made.setdefault(id(value), persistent(value, keywords))
        if isinstance(value, Persistent):
            state = {**value.state, "_init_args": value.arguments, "_init_kwargs": value.keywords}
            if "skip_scale" in state:
                state["skip_scale"] = np.float64(state["skip_scale"])
            meta = {"type": "class", "version": 6, "module_src": SOURCE, "class_name": value.class_name}
            return vars(sys.modules[_PERSISTENT[0]])[_PERSISTENT[1]], ({**meta, "state": state},)
        if isinstance(value, Call):
            return value.function, value.arguments, *([] if value.state is None else [value.state])
        if isinstance(value, np.generic):
            return vars(sys.modules[self._numpy_module])["scalar"], (value.dtype, value.tobytes())
        if isinstance(value, torch.storage.TypedStorage):
            return torch.storage._load_from_bytes, (old_style(value, self._location),)
        return NotImplemented


def old_style(storage: torch.storage.TypedStorage, location: str = "cpu") -> bytes:
    """A storage as torch before 1.6 wrote it, tagged with the device it is said to come from."""
    file = io.BytesIO()
    torch.save(storage, file, _use_new_zipfile_serialization=False)
    return file.getvalue().replace(text("cpu"), text(location), 1)
