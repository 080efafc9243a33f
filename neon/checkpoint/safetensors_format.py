"""safetensors files: read in chunks into memory of the caller's, written as a stream; `header` says how they look."""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any

import torch

from neon.checkpoint.common import Checkpoint, TensorSpec, bytes_of, read_values, specs_of
from neon.checkpoint.header import DTYPE_NAMES, METADATA, dtype_name, entries_in_order, read_header
from neon.errors import RequestError
from neon.runtime.files import atomic_write, write_failure

_DTYPES = {code: getattr(torch, name) for code, name in DTYPE_NAMES.items()}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}


class SafetensorsCheckpoint(Checkpoint):
    """A safetensors file. It is read with plain reads, not mapped: resident memory stays the caller's buffers."""

    format = "safetensors"

    def __init__(self, path: Path, header: dict[str, Any], data_start: int) -> None:
        entries = entries_in_order(header)
        dtypes = {name: getattr(torch, dtype_name(path, name, entry["dtype"])) for name, entry in entries}
        specs = {name: TensorSpec(tuple(entry["shape"]), dtypes[name]) for name, entry in entries}
        super().__init__(path, specs, metadata=header.get(METADATA, {}))
        self._offsets = {name: data_start + entry["data_offsets"][0] for name, entry in entries}
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115 - closed by close()

    @classmethod
    def open(cls, path: Path, key: str | None) -> "SafetensorsCheckpoint":
        if key:
            raise RequestError(f"{path}: no nesting {key!r}, a safetensors file has none; leave the key out")
        return cls(path, *read_header(path))

    def read(self, name: str, start: int, out: torch.Tensor) -> None:
        read_values(self._file, self._offsets[name] + start * out.element_size(), out, self.path, name)

    def offset(self, name: str) -> int:
        """Where in the file the values of a tensor begin."""
        return self._offsets[name]

    def close(self) -> None:
        self._file.close()


class SafetensorsWriter:
    """Writes the header at once, then takes the tensors' values in the order of `layout`, in chunks of any size."""

    def __init__(self, file: IO[bytes], layout: Mapping[str, TensorSpec], metadata: Mapping[str, str]) -> None:
        self._file = file
        self._layout = layout
        self._left = sum(spec.nbytes for spec in layout.values())
        self._header = _header_bytes(layout, metadata)
        file.write(self._header)

    def write(self, values: torch.Tensor) -> None:
        """Append `values` (1-D, contiguous, CPU) of the tensor whose turn it is."""
        view = bytes_of(values)
        self._left -= len(view)
        self._file.write(view)

    def replace_metadata(self, metadata: Mapping[str, str]) -> None:
        """Rewrite the metadata with values of the same length: a hash known only after the last byte was read."""
        header = _header_bytes(self._layout, metadata)
        assert len(header) == len(self._header), "replaced metadata must keep its length"
        self._file.seek(0)
        self._file.write(header)
        self._file.seek(0, os.SEEK_END)

    def check_complete(self) -> None:
        assert self._left == 0, f"{self._left} bytes of tensors were not written"


def rewrite_metadata(
    path: Path, layout: Mapping[str, TensorSpec], before: Mapping[str, str], after: Mapping[str, str]
) -> None:
    """Replace the metadata of a written file by others of the same length; errors as `atomic_write`."""
    old, new = _header_bytes(layout, before), _header_bytes(layout, after)
    assert len(old) == len(new), "replaced metadata must keep its length"
    try:
        with open(path, "r+b") as file:
            assert file.read(len(old)) == old, "another header"
            file.seek(0)
            file.write(new)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise write_failure(error, path) from error


@contextlib.contextmanager
def stream_safetensors(
    path: str | os.PathLike[str],
    layout: Mapping[str, TensorSpec],
    metadata: Mapping[str, str],
    *,
    overwrite: bool = True,
) -> Iterator[SafetensorsWriter]:
    """A writer of `path`, which appears when the block ends well and stays as it was when it does not.

    Values are to be written in the order of `layout` (see `aligned`). Errors as `atomic_write`.
    """
    with atomic_write(path, overwrite=overwrite) as file:
        writer = SafetensorsWriter(file, layout, metadata)
        yield writer
        writer.check_complete()


def save_safetensors(
    path: str | os.PathLike[str],
    tensors: Mapping[str, torch.Tensor],
    metadata: Mapping[str, str],
    *,
    overwrite: bool = True,
) -> None:
    """Write tensors of any device and layout (tied ones in full) to `path`, atomically. Errors as `atomic_write`."""
    with atomic_write(path, overwrite=overwrite) as file:
        _write_all(file, tensors, metadata)


def safetensors_sha256(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> str:
    """The SHA-256 of the file that `save_safetensors` would write, as hexadecimal digits."""
    digest = hashlib.sha256()
    _write_all(SimpleNamespace(write=digest.update), tensors, metadata)
    return digest.hexdigest()


def _write_all(file: Any, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> None:
    layout = aligned(specs_of(tensors))
    writer = SafetensorsWriter(file, layout, metadata)
    for name in layout:
        writer.write(tensors[name].detach().cpu().reshape(-1).contiguous())
    writer.check_complete()


def aligned(specs: Mapping[str, TensorSpec]) -> dict[str, TensorSpec]:
    """The same specs, widest elements first and otherwise in order, so that every tensor starts aligned."""
    return dict(sorted(specs.items(), key=lambda item: -item[1].dtype.itemsize))


def check_storable(path: Path, specs: Mapping[str, TensorSpec]) -> None:
    """Raise a RequestError if a safetensors file cannot hold a tensor of these."""
    for name, spec in specs.items():
        if spec.dtype not in _CODES or name == METADATA:
            raise RequestError(f"{path}: safetensors cannot hold {name} of {spec.dtype}; choose another output format")


def _header_bytes(layout: Mapping[str, TensorSpec], metadata: Mapping[str, str]) -> bytes:
    header: dict[str, Any] = {METADATA: dict(metadata)} if metadata else {}
    offset = 0
    for name, spec in layout.items():
        end = offset + spec.nbytes
        header[name] = {"dtype": _CODES[spec.dtype], "shape": list(spec.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
