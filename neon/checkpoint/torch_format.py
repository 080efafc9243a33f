"""torch files (.pth, .pt, .ckpt): read through torch's restricted unpickler, written with the nesting they had."""

import argparse
import os
import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from neon.checkpoint.common import Checkpoint, choose_key, find_nestings, specs_of
from neon.errors import RequestError, WorkError
from neon.runtime.files import atomic_write

_ZIP = b"PK\x03\x04"
_LEGACY = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19"  # the pickled magic number before torch 1.6
_EXPECTED = "expected a state dict or a dictionary that holds one"


def is_torch(head: bytes) -> bool:
    return head.startswith((_ZIP, _LEGACY))


class TorchCheckpoint(Checkpoint):
    """A torch file, mapped into memory where its format allows."""

    format = "torch"

    def __init__(self, path: Path, content: Any, nestings: Mapping[str, Any], key: str) -> None:
        self._content = content
        self._state = nestings[key]
        self._tensors = _tensors_in(self._state)
        for name, tensor in self._tensors.items():
            if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_meta:
                raise RequestError(f"{path}: {name} is a sparse, quantized or meta tensor; expected plain tensors")
        super().__init__(path, specs_of(self._tensors), key=key, candidates=tuple(nestings))
        self._flat: tuple[str, torch.Tensor] | None = None

    @classmethod
    def open(cls, path: Path, key: str | None) -> "TorchCheckpoint":
        content = _load(path)
        nestings = find_nestings(content, lambda value: isinstance(value, Mapping) and bool(_tensors_in(value)))
        if not nestings:
            raise RequestError(f"{path}: no tensors by name in it (it holds a {type(content).__name__}); {_EXPECTED}")
        return cls(path, content, nestings, choose_key(path, nestings, key))

    def read(self, name: str, start: int, out: torch.Tensor) -> None:
        if self._flat is None or self._flat[0] != name:
            # One tensor is kept flattened: for a strided one that is a copy, to be made once and not per chunk.
            self._flat = (name, self._tensors[name].detach().reshape(-1))
        out.copy_(self._flat[1][start : start + out.numel()])

    def save_with(self, path: str | os.PathLike[str], tensors: Mapping[str, torch.Tensor]) -> None:
        """Write the whole object this file holds with `tensors` as the state dict's. Errors as `save_torch`."""
        try:
            for name, tensor in tensors.items():
                old = self._tensors[name]
                is_parameter = isinstance(old, torch.nn.Parameter)
                self._state[name] = torch.nn.Parameter(tensor, old.requires_grad) if is_parameter else tensor
            save_torch(path, self._content)
        finally:
            self._state.update(self._tensors)


def save_torch(path: str | os.PathLike[str], content: Any) -> None:
    """`torch.save`, atomically. Errors as `atomic_write`."""
    with atomic_write(path) as file:
        try:
            torch.save(content, file)
        except RuntimeError as error:
            # torch's writer, closing after a failed write, hides the failure behind an error of its own.
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise WorkError(f"{path}: writing failed ({_first_line(error)}); nothing was written") from error


def _load(path: Path) -> Any:
    mapped = _is_mappable(path)
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # published checkpoints keep their arguments
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL (\S+)", str(error)) or re.search(r"(?:class|function) '?([\w.]+)'?", str(error))
        needs = f"it needs {named[1]}" if named else _first_line(error)
        raise RequestError(
            f"{path}: refused, {needs}, and only tensors, plain containers and argparse.Namespace are read from a "
            "pickle; ask for a plain state dict or safetensors"
        ) from None
    except Exception as error:  # a corrupt pickle can raise anything
        raise RequestError(f"{path}: not a readable torch file ({_first_line(error)}); download it again") from None


def _is_mappable(path: Path) -> bool:
    """Whether the file is a torch archive whose entries lie in it uncompressed; False for the format before 1.6."""
    with open(path, "rb") as file:
        if file.read(len(_ZIP)) != _ZIP:
            return False
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except zipfile.BadZipFile:
        raise RequestError(f"{path}: truncated torch archive (its end is missing); download it again") from None
    except (ValueError, NotImplementedError) as error:  # names or versions in its directory that nothing writes
        raise RequestError(f"{path}: not a readable torch archive ({_first_line(error)}); download it again") from None
    if not any(entry.filename.endswith("/data.pkl") for entry in entries):
        raise RequestError(f"{path}: a zip archive without data.pkl, not a torch file; {_EXPECTED}")
    return all(entry.compress_type == zipfile.ZIP_STORED for entry in entries)


def _tensors_in(state: Mapping[Any, Any]) -> dict[str, torch.Tensor]:
    return {k: v for k, v in state.items() if isinstance(k, str) and isinstance(v, torch.Tensor)}


def _first_line(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:200]
