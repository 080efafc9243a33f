"""Pickles in the layout of NVIDIA's and IMM's published networks, and hostile ones, for tests and benchmarks."""

import copy
import io
import os
import pickle
import sys
import types
from collections import defaultdict
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import nn

from imm.networks import DiTBlock

# The published files hold the source text of their classes, which the publisher's own loader executes.
SOURCE = 'raise RuntimeError("a loader must never execute the source text of a pickle")\n'
NUMPY_MODULES = ("numpy.core.multiarray", "numpy._core.multiarray")  # before numpy 2 and since
_PERSISTENT = ("torch_utils.persistence", "_reconstruct_persistent_obj")
_DICT = ("dnnlib.util", "EasyDict")
_OURS = ("edm.", "imm.", "neon.")  # what stands for published classes, and objects that no published file holds
_CONFIGURATION = {
    "Metadata": "omegaconf.base",
    "ContainerMetadata": "omegaconf.base",
    "AnyNode": "omegaconf.nodes",
    "ListConfig": "omegaconf.listconfig",
    "DictConfig": "omegaconf.dictconfig",
}
_CLASSES = {name: type(name, (), {"__module__": module}) for name, module in _CONFIGURATION.items()}


@dataclass
class Persistent:
    """An object of a publisher's class, to be pickled with its source text."""

    class_name: str
    state: dict[str, Any] | None
    keywords: dict[str, Any] = field(default_factory=dict)
    arguments: tuple[Any, ...] = ()


def persistent(module: nn.Module, keywords: Mapping[str, Any], arguments: tuple[Any, ...] = ()) -> Persistent:
    """A live network of ours as an object of the published class of that name."""
    state = {name: value for name, value in vars(module).items() if not type(value).__module__.startswith(_OURS)}
    return Persistent(type(module).__name__, state, dict(keywords), arguments)


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


def imm_snapshot(network: nn.Module, keywords: Mapping[str, Any], canary: str = "") -> dict[str, Any]:
    """The content of a file of IMM: the preconditioned network and the data set; no augmentation.

    Args:
        network: an `IMMPrecond`, or any module.
        keywords: of its constructor, as JSON. Lists and dictionaries become parts of a whole training configuration.
        canary: text that stands elsewhere in that configuration and in the description of the data set.
    """
    configuration = configured({"logger": {"project": "imm", "note": canary}, "network": dict(keywords)})
    kept = configured_keywords(configuration)
    ema = persistent(with_normalisations(network), kept)
    assert ema.state is not None
    if "mixed_precision" in ema.state:
        ema.state["mixed_precision"] = ema.state["mixed_precision"] or torch.float32
    if model := ema.state["_modules"].get("model"):
        ema.state["_modules"]["model"] = persistent(model, kept)
    return {"ema": ema, "augment_pipe": None, "dataset_kwargs": EasyDict(path=canary, use_labels=True, xflip=False)}


def write_imm_pickle(
    path: str | os.PathLike[str], network: nn.Module, keywords: Mapping[str, Any], *, canary: str = ""
) -> None:
    """Write a live network as IMM's training writes its snapshots; arguments as those of `imm_snapshot`."""
    Path(path).write_bytes(dumps(imm_snapshot(network, keywords, canary)))


def with_normalisations(network: nn.Module) -> nn.Module:
    """A copy of `network` whose transformer blocks, if it has any, hold normalisations as published ones do."""
    network = copy.deepcopy(network)
    for module in network.modules():
        if isinstance(module, DiTBlock):
            width = module.attn.proj.in_features
            module.norm1, module.norm2 = (nn.LayerNorm(width, eps=1e-6, elementwise_affine=False) for _ in range(2))
    return network


def configured(content: Any, key: str | int | None = None, parent: Any = None) -> Any:
    """JSON as an object of omegaconf's, with the attributes that omegaconf 2.3 pickles."""
    is_list, is_dict = isinstance(content, list | tuple), isinstance(content, dict)
    value = _CLASSES["ListConfig" if is_list else "DictConfig" if is_dict else "AnyNode"]()
    metadata = _CLASSES["ContainerMetadata" if is_list or is_dict else "Metadata"]()
    vars(metadata).update(
        ref_type=Any,
        object_type=list if is_list else dict if is_dict else None,
        optional=True,
        key=key,
        flags={},
        flags_root=False,
        resolver_cache=defaultdict(dict),
    )
    vars(value).update(_metadata=metadata, _parent=parent)
    if is_list or is_dict:
        vars(metadata).update(key_type=int if is_list else Any, element_type=Any)
    if is_list:
        vars(value)["_content"] = [configured(item, index, value) for index, item in enumerate(content)]
    elif is_dict:
        vars(value)["_content"] = {name: configured(item, name, value) for name, item in content.items()}
    else:
        vars(value)["_val"] = content
    return value


def configured_keywords(configuration: Any) -> dict[str, Any]:
    """What a constructor gets by `**configuration.network`: numbers, texts, and objects for lists and dictionaries."""
    values = configuration._content["network"]._content
    return {name: vars(value).get("_val", value) for name, value in values.items()}


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

    names = ("torch_utils", "dnnlib", _DICT[0], "omegaconf", *_CONFIGURATION.values())
    modules = {name: types.ModuleType(name) for name in names}
    vars(modules[_DICT[0]])[_DICT[1]] = EasyDict
    for name, cls in _CLASSES.items():
        vars(modules[_CONFIGURATION[name]])[name] = cls
    for function, (module, name) in ((reconstruct, _PERSISTENT), (scalar, (numpy_module, "scalar"))):
        function.__module__, function.__qualname__, function.__name__ = module, name, name
        modules[module] = types.ModuleType(module)
        vars(modules[module])[name] = function
    vars(modules[numpy_module])["_reconstruct"] = np.zeros(1).__reduce__()[0]
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
        if isinstance(value, nn.Module) and type(value).__module__.startswith(_OURS):
            keywords = {"init": {"init_mode": "xavier_uniform", "init_weight": np.sqrt(0.2)}}
            value = self._made.setdefault(id(value), persistent(value, keywords))
        if isinstance(value, Persistent):
            state = value.state
            if state is not None:
                state = {**state, "_init_args": value.arguments, "_init_kwargs": value.keywords}
            if state is not None and "skip_scale" in state:
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
