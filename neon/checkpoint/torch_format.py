"""torch files (.pth, .pt, .ckpt): archives and the streams before torch 1.6, written with the nesting they had.

Both are read by the interpreter that reads pickles: torch's own unpickler makes what a file asks for, such as 4 GB of
zeros. Values that lie in the file as they are stay there until they are asked for.
"""

import mmap
import os
import pickle
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any

import torch

from neon.checkpoint.common import Checkpoint
from neon.checkpoint.inert_pickler import inert_pickler
from neon.checkpoint.located import LocatedCheckpoint
from neon.checkpoint.nestings import Choice
from neon.checkpoint.pickle_format import PickleCheckpoint, content_of_pickle
from neon.checkpoint.stand_ins import check_stream_head, stand_in, typed_storage
from neon.checkpoint.unpickler import (
    SHOWN,
    Blob,
    Budget,
    Corrupt,
    Machine,
    NotWeights,
    Record,
    Refused,
    Storage,
)
from neon.errors import RequestError, WorkError
from neon.runtime.files import atomic_write

_ZIP = b"PK\x03\x04"
_LEGACY = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19"  # the pickled magic number before torch 1.6
_LOCAL_HEADER = 30
_ENCRYPTED = 1
_PACKED = (zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)
_PUBLISHED = "torch_utils.persistence"


def is_torch(head: bytes) -> bool:
    return head.startswith((_ZIP, _LEGACY))


def open_torch(path: Path, key: str | None) -> Checkpoint:
    """A torch file; errors as those of `open_checkpoint`."""
    checkpoint = TorchCheckpoint.open(path, key)
    if not checkpoint.is_published_network:
        return checkpoint
    checkpoint.close()
    return TrainingState.open(path, key)


class TorchCheckpoint(LocatedCheckpoint):
    """A torch file. It is read with plain reads: resident memory stays the caller's buffers, whatever its size."""

    format = "torch"

    def __init__(self, path: Path, file: IO[bytes], choice: Choice, content: Any) -> None:
        super().__init__(path, file, choice, content)
        self._content = content

    @staticmethod
    def _content_of(file: IO[bytes], data: mmap.mmap, budget: Budget) -> Any:
        return (
            _content_of_archive(file, data, budget) if data[: len(_ZIP)] == _ZIP else _content_of_stream(data, budget)
        )

    @property
    def is_published_network(self) -> bool:
        """Whether the weights are those of a network of NVIDIA's layout, and not a state dict."""
        origin = self._choice.content.origin if isinstance(self._choice.content, Record) else None
        return origin is not None and origin.maker.module == _PUBLISHED

    def save_with(self, path: str | os.PathLike[str], tensors: Mapping[str, torch.Tensor]) -> None:
        """Write the whole object this file holds with `tensors` as the state dict's. Errors as `save_torch`.

        Objects of classes that are not loaded are written as they were read.
        """
        slots = self._choice.slots
        try:
            for name, tensor in tensors.items():
                needs_grad = self._tensors[name].parameter
                slots[name].container[slots[name].at] = (
                    tensor if needs_grad is None else torch.nn.Parameter(tensor, needs_grad)
                )
            with mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_COPY) as data:
                save_torch(path, self._content, inert_pickler(data))
        except RecursionError:
            raise RequestError(f"{path}: {self.path} nests too deep to be copied; write .safetensors instead") from None
        finally:
            for name, slot in slots.items():
                slot.container[slot.at] = self._tensors[name]


class TrainingState(PickleCheckpoint):
    """A torch archive of networks of NVIDIA's layout, which their training resumes from."""

    can_be_copied = False
    _content_of = staticmethod(TorchCheckpoint._content_of)


def save_torch(path: str | os.PathLike[str], content: Any, pickler: type[Any] | None = None) -> None:
    """`torch.save`, atomically; `pickler` in place of Python's. Errors as `atomic_write`."""
    module = pickle if pickler is None else SimpleNamespace(__name__="inert", Pickler=pickler)
    with atomic_write(path) as file:
        try:
            torch.save(content, file, pickle_module=module)
        except RuntimeError as error:
            # torch's writer, closing after a failed write, hides the failure behind an error of its own.
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            if isinstance(error, RecursionError):
                raise
            raise WorkError(f"{path}: writing failed ({_first_line(error)}); nothing was written") from error


def _content_of_archive(file: IO[bytes], data: mmap.mmap, budget: Budget) -> Any:
    """The content of a torch archive: a pickle in `<name>/data.pkl` and storages in `<name>/data/<key>`."""
    with zipfile.ZipFile(file) as archive:
        members = {entry.filename: entry for entry in archive.infolist()}
        folder = min((name for name in members if name.endswith("/data.pkl")), key=len, default="")[: -len("data.pkl")]
        if not folder:
            raise NotWeights(
                "a zip archive without data.pkl, not a torch file; expected a state dict or a dictionary that holds one"
            )
        if f"{folder}constants.pkl" in members:
            raise NotWeights(
                "a TorchScript archive (a program with its weights), which is not run; save its weights with "
                "torch.save(torch.jit.load(FILE).state_dict(), 'weights.pth') and name that file"
            )

        def member(name: str) -> Blob:
            if folder + name not in members:
                raise Corrupt(f"the archive has no {name[:SHOWN]!r}")
            return _member(archive, members[folder + name], data, budget)

        if f"{folder}byteorder" in members and member("byteorder").read() != b"little":
            raise Refused("it was written on a big-endian machine")
        storages: dict[str, Storage] = {}

        def storage(identity: Any) -> Storage:
            dtype, key, numel = typed_storage(identity)
            found = storages.get(key)
            if found is None:
                found = storages[key] = Storage(member(f"data/{key}"), dtype)
            _check_size(found, dtype, numel)
            return found

        return content_of_pickle(Machine(member("data.pkl"), budget, stand_in, persistent=storage))


def _member(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, data: mmap.mmap, budget: Budget) -> Blob:
    """Where a member lies in the file, or what it unpacks to."""
    if entry.flag_bits & _ENCRYPTED or entry.compress_type not in (zipfile.ZIP_STORED, *_PACKED):
        raise Refused(f"{entry.filename[:SHOWN]!r} is encrypted or packed in a way that torch does not write")
    if entry.compress_type != zipfile.ZIP_STORED:
        budget.unpack(entry.file_size)
        with archive.open(entry) as packed:
            content = packed.read(entry.file_size)
        return Blob(content, 0, len(content))
    header = data[entry.header_offset : entry.header_offset + _LOCAL_HEADER]
    if not header.startswith(_ZIP):
        raise Corrupt(f"{entry.filename[:SHOWN]!r} does not lie in the archive where its directory says")
    name_length, extra_length = struct.unpack("<HH", header[-4:])
    start = entry.header_offset + _LOCAL_HEADER + name_length + extra_length
    if start + entry.file_size > len(data):
        raise Corrupt("the archive ends early")
    return Blob(data, start, start + entry.file_size)


def _content_of_stream(data: mmap.mmap, budget: Budget) -> Any:
    """The content of a file before torch 1.6: pickles, then each storage with the number of its elements before it."""
    storages: dict[str, Storage] = {}

    def persistent(identity: Any) -> Any:
        if type(identity) is tuple and len(identity) == 4 and identity[0] == "module":
            return identity[1]  # a class, and the text of its source
        dtype, key, numel = typed_storage(identity)
        if not 0 <= numel <= len(data) // dtype.itemsize:
            raise Corrupt(f"a storage claims {numel} elements of {dtype} in a file of {len(data)} bytes")
        storage = storages.setdefault(key, Storage(Blob(data, 0, numel * dtype.itemsize), dtype))
        _check_size(storage, dtype, numel)
        return storage

    machine = Machine(Blob(data, 0, len(data)), budget, stand_in, persistent)
    check_stream_head(machine)
    content, keys = machine.run(), machine.run()
    if type(keys) is not list or sorted(keys) != sorted(storages):
        raise Corrupt("the storages that it lists are not those that it uses")
    for key in keys:
        storage = storages[key]
        numel = machine.number(8)
        _check_size(storage, storage.dtype, numel)
        storage.blob = machine.locate(storage.blob.size)
    return content


def _check_size(storage: Storage, dtype: torch.dtype, numel: int) -> None:
    if storage.dtype != dtype or storage.blob.size != numel * dtype.itemsize:
        raise Corrupt(f"a storage claims {numel} elements of {dtype} and has {storage.blob.size} bytes")


def _first_line(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:200]
