"""Reading every published checkpoint format without running anything from it, and writing safetensors atomically.

`open_checkpoint` gives names, shapes and dtypes at once and tensors one by one; `load_state` gives all tensors.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from neon.checkpoint.common import Checkpoint, Constructor, TensorSpec
    from neon.checkpoint.formats import load_state, open_checkpoint
    from neon.checkpoint.pickle_format import PickleCheckpoint, PickleWriter
    from neon.checkpoint.safetensors_format import SafetensorsWriter, save_safetensors, stream_safetensors
    from neon.checkpoint.torch_format import save_torch

__all__ = [
    "Checkpoint",
    "Constructor",
    "PickleCheckpoint",
    "PickleWriter",
    "SafetensorsWriter",
    "TensorSpec",
    "load_state",
    "open_checkpoint",
    "save_safetensors",
    "save_torch",
    "stream_safetensors",
]

_MODULES = {
    **dict.fromkeys(("Checkpoint", "Constructor", "TensorSpec"), "common"),
    **dict.fromkeys(("load_state", "open_checkpoint"), "formats"),
    **dict.fromkeys(("PickleCheckpoint", "PickleWriter"), "pickle_format"),
    **dict.fromkeys(("SafetensorsWriter", "save_safetensors", "stream_safetensors"), "safetensors_format"),
    "save_torch": "torch_format",
}


def __getattr__(name: str) -> Any:
    """Import torch only where it is needed: `neon.checkpoint.header` does without, and half its time."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
