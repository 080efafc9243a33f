"""The header of a safetensors file, read without torch: what `neon inspect` shows of it needs no more.

Layout: 8 bytes little-endian length of the header, the header (JSON, padded with spaces), the tensors' bytes.
"""

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from neon.errors import RequestError

METADATA = "__metadata__"
"""the entry of the header that is no tensor"""
DTYPE_NAMES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "C64": "complex64",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U64": "uint64",
    "U32": "uint32",
    "U16": "uint16",
    "U8": "uint8",
    "BOOL": "bool",
}
"""torch's names of the format's dtypes; those that torch cannot merge or convert are not in it"""
_MAX_HEADER = 100_000_000  # the limit of the safetensors library
_AGAIN = "download or copy the file again"


def is_safetensors(head: bytes) -> bool:
    """Whether a file that begins with `head` can be one."""
    return len(head) > 8 and head[8:9] == b"{"


def read_header(path: Path) -> tuple[dict[str, Any], int]:
    """The header as JSON, checked by the safetensors library against the file, and where the tensors start.

    Raises:
        RequestError: the header is damaged, the file cut short, or there are no tensors in it.
    """
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
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != METADATA]
        expected = 8 + length + max(ends, default=0)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise RequestError(f"{path}: corrupt header (not a table of tensors); {_AGAIN}") from None
    if size < expected:
        raise RequestError(f"{path}: truncated, {size} bytes where the header promises {expected}; {_AGAIN}")
    try:
        with safe_open(path, framework="np"):  # offsets, shapes, dtypes, overlaps and holes
            pass
    except SafetensorError as error:
        raise RequestError(f"{path}: corrupt header ({error}); {_AGAIN}") from None
    if not header.keys() - {METADATA}:
        raise RequestError(f"{path}: the file holds no tensors; expected a state dict")
    return header, 8 + length


def entries_in_order(header: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Names and entries of the tensors, in the order of their bytes."""
    tensors = ((name, entry) for name, entry in header.items() if name != METADATA)
    return sorted(tensors, key=lambda item: item[1]["data_offsets"])


def dtype_name(path: Path, name: str, code: str) -> str:
    """torch's name of a dtype; a RequestError if torch cannot merge or convert it."""
    if code not in DTYPE_NAMES:
        raise RequestError(f"{path}: tensor {name} has dtype {code}, which torch cannot merge or convert")
    return DTYPE_NAMES[code]
