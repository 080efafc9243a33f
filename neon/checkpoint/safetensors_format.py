"""safetensors files: read in chunks into memory of the caller's, written as a stream.

Layout: 8 bytes little-endian length of the header, the header (JSON, padded with spaces), the tensors' bytes.
"""

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError, safe_open

from neon.checkpoint.common import Checkpoint, TensorSpec, bytes_of, read_values
from neon.errors import RequestError
from neon.runtime.files import atomic_write

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_MAX_HEADER = 100_000_000  # the limit of the safetensors library
_METADATA = "__metadata__"
_AGAIN = "download or copy the file again"


def is_safetensors(head: bytes) -> bool:
    return len(head) > 8 and head[8:9] == b"{"


class SafetensorsCheckpoint(Checkpoint):
    """A safetensors file. It is read with plain reads, not mapped: resident memory stays the caller's buffers."""

    format = "safetensors"

    def __init__(self, path: Path, header: dict[str, Any], data_start: int) -> None:
        metadata = header.pop(_METADATA, {})
        entries = sorted(header.items(), key=lambda item: item[1]["data_offsets"])
        specs = {name: TensorSpec(tuple(entry["shape"]), _dtype(path, name, entry["dtype"])) for name, entry in entries}
        super().__init__(path, specs, metadata=metadata)
        self._offsets = {name: data_start + entry["data_offsets"][0] for name, entry in entries}
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115 - closed by close()

    @classmethod
    def open(cls, path: Path, key: str | None) -> "SafetensorsCheckpoint":
        if key:
            raise RequestError(f"{path}: no nesting {key!r}, a safetensors file has none; leave the key out")
        header, data_start = _read_header(path)
        if not header.keys() - {_METADATA}:
            raise RequestError(f"{path}: the file holds no tensors; expected a state dict")
        return cls(path, header, data_start)

    def read(self, name: str, start: int, out: torch.Tensor) -> None:
        read_values(self._file, self._offsets[name] + start * out.element_size(), out, self.path, name)

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
    layout = aligned({name: TensorSpec.of(tensor) for name, tensor in tensors.items()})
    with stream_safetensors(path, layout, metadata, overwrite=overwrite) as writer:
        for name in layout:
            writer.write(tensors[name].detach().cpu().reshape(-1).contiguous())


def aligned(specs: Mapping[str, TensorSpec]) -> dict[str, TensorSpec]:
    """The same specs, widest elements first and otherwise in order, so that every tensor starts aligned."""
    return dict(sorted(specs.items(), key=lambda item: -item[1].dtype.itemsize))


def check_storable(path: Path, specs: Mapping[str, TensorSpec]) -> None:
    """Raise a RequestError if a safetensors file cannot hold a tensor of these."""
    for name, spec in specs.items():
        if spec.dtype not in _DTYPE_NAMES or name == _METADATA:
            raise RequestError(f"{path}: safetensors cannot hold {name} of {spec.dtype}; choose another output format")


def _header_bytes(layout: Mapping[str, TensorSpec], metadata: Mapping[str, str]) -> bytes:
    header: dict[str, Any] = {_METADATA: dict(metadata)} if metadata else {}
    offset = 0
    for name, spec in layout.items():
        end = offset + spec.nbytes
        header[name] = {"dtype": _DTYPE_NAMES[spec.dtype], "shape": list(spec.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _read_header(path: Path) -> tuple[dict[str, Any], int]:
    """The header as JSON, checked by the safetensors library against the file, and where the tensors start."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > _MAX_HEADER:
            raise RequestError(f"{path}: corrupt header (its length reads {length} bytes); download the file again")
        if size < 8 + length:
            raise RequestError(f"{path}: truncated, {size} bytes where the header alone has {8 + length}; {_AGAIN}")
        text = file.read(length)
    try:
        header = json.loads(text)
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != _METADATA]
        expected = 8 + length + max(ends, default=0)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise RequestError(f"{path}: corrupt header (not a table of tensors); {_AGAIN}") from None
    if size < expected:
        raise RequestError(f"{path}: truncated, {size} bytes where the header promises {expected}; {_AGAIN}")
    try:
        with safe_open(path, framework="pt"):  # offsets, shapes, dtypes, overlaps and holes
            pass
    except SafetensorError as error:
        raise RequestError(f"{path}: corrupt header ({error}); {_AGAIN}") from None
    return header, 8 + length


def _dtype(path: Path, name: str, code: str) -> torch.dtype:
    try:
        return _DTYPES[code]
    except KeyError:
        raise RequestError(f"{path}: tensor {name} has dtype {code}, which torch cannot merge or convert") from None
