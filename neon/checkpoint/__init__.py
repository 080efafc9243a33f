"""Reading every published checkpoint format without running anything from it, and writing safetensors atomically.

`open_checkpoint` gives names, shapes and dtypes at once and tensors one by one; `load_state` gives all tensors.
"""

import os

import torch

from neon.checkpoint.common import Checkpoint, Constructor, TensorSpec
from neon.checkpoint.formats import open_checkpoint
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


def load_state(path: str | os.PathLike[str], key: str | None = None) -> dict[str, torch.Tensor]:
    """The state dict of a checkpoint as tensors of its own on the CPU; arguments and errors as `open_checkpoint`."""
    with open_checkpoint(path, key) as checkpoint:
        return {name: checkpoint.tensor(name) for name in checkpoint.names()}
