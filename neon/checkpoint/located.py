"""What pickles and torch files have in common: tensors that were located in the file and are read when asked for."""

import contextlib
import errno
import gc
import mmap
import zipfile
import zlib
from abc import abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, TypeVar

import numpy as np
import torch

from neon.checkpoint.common import Checkpoint, Constructor, TensorSpec, bytes_of, read_values
from neon.checkpoint.nestings import Choice, choose
from neon.checkpoint.unpickler import Blob, Budget, Corrupt, NotWeights, Record, Refused, Setting
from neon.errors import RequestError

_MAX_DEPTH = 64  # of values in keywords
_MAX_NAME = 1000
_MAX_VALUES = 10_000  # in the keywords of a constructor
_AGAIN = "download it again"

SomeCheckpoint = TypeVar("SomeCheckpoint", bound="LocatedCheckpoint")


class LocatedCheckpoint(Checkpoint):
    """A file whose tensors were located and not read: opening costs no more than a look at what lies between them."""

    def __init__(self, path: Path, file: IO[bytes], choice: Choice, content: Any) -> None:
        """`content`: all that the file holds, for those that write it again."""
        self._tensors = {name: slot.tensor for name, slot in choice.slots.items()}
        specs = {name: TensorSpec(tensor.shape, tensor.dtype) for name, tensor in self._tensors.items()}
        super().__init__(path, specs, key=choice.key, candidates=choice.candidates)
        self._file = file
        self._choice = choice
        self._flat: tuple[str, torch.Tensor] | None = None

    @classmethod
    def open(cls: type[SomeCheckpoint], path: Path, key: str | None) -> SomeCheckpoint:
        """Errors as those of `open_checkpoint`."""
        file = open(path, "rb")  # noqa: SIM115 - closed by close()
        try:
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data, _no_garbage_collection():
                budget = Budget(len(data))
                content = cls._content_of(file, data, budget)
                choice = choose(path, content, key, cls.format, budget)
            return cls(path, file, choice, content)
        except BaseException as error:
            file.close()
            if isinstance(error, RequestError) or not isinstance(error, Exception):
                raise
            raise _refusal(path, cls.format, error) from None

    @staticmethod
    @abstractmethod
    def _content_of(file: IO[bytes], data: mmap.mmap, budget: Budget) -> Any:
        """What the file holds, as plain data; `data` is the file, mapped. Whatever it raises is the file's fault."""

    @property
    def has_constructor(self) -> bool:
        return isinstance(self._choice.content, Record) and "_init_kwargs" in self._choice.content.state

    @property
    def constructor(self) -> Constructor | None:
        network = self._choice.content
        if not self.has_constructor:
            return None
        if network.state.get("_init_args"):
            raise RequestError(
                f"{self.path}: {network.class_name} was built with positional arguments, whose meaning the file does "
                "not say; expected keywords only"
            )
        try:
            keywords = _as_json(network.state["_init_kwargs"], Budget(0, steps=_MAX_VALUES))
            return Constructor(network.class_name, dict(keywords))
        except (Refused, Corrupt, TypeError, ValueError) as error:
            raise RequestError(
                f"{self.path}: {network.class_name} was built with keywords that cannot be read ({error}); expected "
                "numbers, texts, lists and dictionaries"
            ) from None

    def read(self, name: str, start: int, out: torch.Tensor) -> None:
        tensor = self._tensors[name]
        if tensor.is_contiguous:
            self._read_blob(name, tensor.blob, start * out.element_size(), out)
            return
        if self._flat is None or self._flat[0] != name:
            # One tensor is kept flattened: that is a copy, to be made once and not per chunk.
            values = torch.empty(tensor.extent, dtype=out.dtype)
            self._read_blob(name, tensor.blob, 0, values)
            self._flat = (name, values.as_strided(tensor.shape, tensor.strides).reshape(-1))
        out.copy_(self._flat[1][start : start + out.numel()])

    def _read_blob(self, name: str, blob: Blob, offset: int, out: torch.Tensor) -> None:
        if isinstance(blob.data, bytes):
            view = bytes_of(out)
            view[:] = blob.data[blob.start + offset : blob.start + offset + len(view)]
        else:
            read_values(self._file, blob.start + offset, out, self.path, name)

    def close(self) -> None:
        self._file.close()


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Leave the many new containers alone while a pickle is read: looking through them takes a third of the time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _refusal(path: Path, kind: str, error: Exception) -> RequestError:
    """What is wrong with a file, of whatever reading it raised: damaged ones make libraries raise anything."""
    if isinstance(error, Refused):
        return RequestError(f"{path}: refused, {error}; ask for a plain state dict or safetensors")
    if isinstance(error, NotWeights):
        return RequestError(f"{path}: {error}")
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return RequestError(f"{path}: too little memory to look into it; free some, or raise the limit (ulimit -v)")
    if isinstance(error, OSError) and error.strerror:
        return RequestError(
            f"{path}: cannot be read ({error.strerror}); check the path, its permissions and the memory"
        )
    if isinstance(error, zipfile.BadZipFile | zlib.error | EOFError):
        return RequestError(f"{path}: truncated or corrupt torch archive ({error or 'its end is missing'}); {_AGAIN}")
    reason = str(error) if isinstance(error, Corrupt) else type(error).__name__  # of others, any text may come
    return RequestError(f"{path}: truncated or corrupt {kind} file ({reason}); {_AGAIN}")


def _as_json(value: Any, budget: Budget, depth: int = 0) -> Any:
    budget.spend()
    if depth > _MAX_DEPTH:
        raise Corrupt("values nest too deep")
    if isinstance(value, Setting):
        if isinstance(value.content, str) and ("${" in value.content or value.content == "???"):
            raise Corrupt("one stands for another value of the configuration that it was part of")
        return _as_json(value.content, budget, depth + 1)
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, bool | int | float) or (isinstance(value, str) and len(value) <= _MAX_NAME):
        return value
    if isinstance(value, list | tuple):
        return [_as_json(item, budget, depth + 1) for item in value]
    if isinstance(value, dict) and all(isinstance(name, str) for name in value):
        return {name: _as_json(item, budget, depth + 1) for name, item in value.items()}
    raise Corrupt(f"one is a {type(value).__name__}")
