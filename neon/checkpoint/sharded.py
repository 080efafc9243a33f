"""Tensors that are spread over processes, in a folder: written and read by torch.distributed.checkpoint.

Each process writes its part, and `.metadata` says where everything lies. That is a pickle, which torch would run: here
it is interpreted first, as those of checkpoints are, and refused if it names anything but what torch writes there. What
is not a tensor would be a pickle, too: it is neither written nor read.
"""

import contextlib
import io
import pickle
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed import checkpoint
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from neon.checkpoint.stand_ins import stand_in
from neon.checkpoint.unpickler import Blob, Budget, Global, Machine, Opaque, Refused
from neon.runtime.files import is_file_name, write_failure

METADATA = ".metadata"
_OF_METADATA = "torch.distributed.checkpoint.metadata"
_NOTED = {
    *((_OF_METADATA, name) for name in ("Metadata", "TensorStorageMetadata", "TensorProperties", "StorageMeta")),
    *((_OF_METADATA, name) for name in ("ChunkStorageMetadata", "MetadataIndex", "_MEM_FORMAT_ENCODING")),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    ("pathlib", "PosixPath"),
    ("pathlib._local", "PosixPath"),
}
"""what torch writes there beside sizes and dtypes; not BytesStorageMetadata, which stands for a pickle elsewhere"""


def write_shards(folder: Path, tensors: Mapping[str, Tensor], world_size: int) -> None:
    """Write what this process has of `tensors` to a folder that is there; to be called by all processes.

    Raises:
        WorkError: the disk is full or fails.
    """
    try:
        with _without_notes():
            writer = checkpoint.FileSystemWriter(folder)
            checkpoint.save(dict(tensors), storage_writer=writer, no_dist=world_size == 1)
    except CheckpointException as error:
        raise _first(error, folder) from error


def read_shards(folder: Path, tensors: Mapping[str, Tensor], world_size: int) -> None:
    """Fill `tensors`, spread over the processes in whatever way, from a folder; to be called by all of them.

    Raises an exception of any kind if the folder is damaged, or holds others.
    """
    try:
        with _without_notes():
            checkpoint.load(dict(tensors), storage_reader=_Reader(folder), no_dist=world_size == 1)
    except CheckpointException as error:
        raise _first(error, folder) from error


def shapes_in(folder: Path) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Shape and dtype of each tensor in a folder; an exception of any kind if it is damaged."""
    entries = read_metadata(folder / METADATA).state_dict_metadata
    return {
        name: (entry.size, entry.properties.dtype)
        for name, entry in entries.items()
        if isinstance(entry, TensorStorageMetadata)
    }


def read_metadata(path: Path) -> Metadata:
    """What `.metadata` says, of which nothing is run.

    Raises an exception of any kind if it is damaged; `Refused` if it names what does not belong there.
    """
    content = path.read_bytes()
    Machine(Blob(content, 0, len(content)), Budget(len(content)), _known).run()
    metadata = _Unpickler(io.BytesIO(content)).load()
    if not isinstance(metadata, Metadata) or not isinstance(metadata.storage_data, dict):
        raise ValueError("it is no metadata of shards")
    if not all(is_file_name(place.relative_path) for place in metadata.storage_data.values()):
        raise Refused("it names a file elsewhere")
    return metadata


class _Reader(checkpoint.FileSystemReader):
    """torch's reader, which unpickles the metadata unseen."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        metadata = read_metadata(Path(self.path) / METADATA)
        if metadata.storage_meta is not None:
            metadata.storage_meta.load_id = self.load_id
        return metadata


class _Unpickler(pickle.Unpickler):
    """Makes what was interpreted before, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if _known(module, name) is None:
            raise Refused(f"it names {module}.{name}")
        return super().find_class(module, name)


def _known(module: str, name: str) -> Global | None:
    if (module, name) in _NOTED:

        def noted(machine: Machine, *arguments: Any) -> Opaque:
            return Opaque(name, {})

        return Global(module, name, call=noted, new=noted)
    is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
    return stand_in(module, name) if is_dtype or (module, name) == ("torch", "Size") else None


@contextlib.contextmanager
def _without_notes() -> Iterator[None]:
    with warnings.catch_warnings():  # that one process works alone, as it is told to
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def _first(error: CheckpointException, folder: Path) -> Exception:
    """The failure of the lowest rank that has one."""
    cause = error.failures[min(error.failures)][0]
    if isinstance(cause, OSError):
        return write_failure(cause, folder)
    return cause if isinstance(cause, Exception) else RuntimeError(str(cause))
