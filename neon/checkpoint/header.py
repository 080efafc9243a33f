"""The header of a safetensors file, read without torch: what `neon inspect` shows of it needs no more.

Layout: 8 bytes little-endian length of the header, the header (JSON, padded with spaces), the tensors' bytes.
"""

import json
import math
import re
from pathlib import Path
from typing import Any

from neon.errors import RequestError, one_line

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
_WIDTHS = {code: int((re.search(r"\d+", code) or "8")[0]) // 8 for code in DTYPE_NAMES}  # in bytes
_MAX_DIMS = 64
_MAX_ELEMENTS = 1 << 62
_MAX_HEADER = 100_000_000  # the limit of the safetensors library
_AGAIN = "download or copy the file again"


def is_safetensors(head: bytes) -> bool:
    """Whether a file that begins with `head` can be one."""
    return len(head) > 8 and head[8:9] == b"{"


def read_header(path: Path) -> tuple[dict[str, Any], int]:
    """The header as JSON, checked against the file, and where the tensors start.

    Plain reads: the library's own check maps the file, for which a limit on memory may leave no room.

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
        header = json.loads(text.decode(), object_pairs_hook=_without_duplicates)
        _check_metadata(header.get(METADATA, {}))
        end = _check_entries(header)
    except _DamagedError as error:
        raise RequestError(f"{path}: corrupt header ({one_line(error)}); {_AGAIN}") from None
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise RequestError(f"{path}: corrupt header (not a table of tensors); {_AGAIN}") from None
    expected = 8 + length + end
    if size < expected:
        raise RequestError(f"{path}: truncated, {size} bytes where the header promises {expected}; {_AGAIN}")
    if size > expected:
        raise RequestError(f"{path}: corrupt header ({size - expected} bytes follow the last tensor); {_AGAIN}")
    if not header.keys() - {METADATA}:
        raise RequestError(f"{path}: the file holds no tensors; expected a state dict")
    return header, 8 + length


class _DamagedError(ValueError):
    """What is wrong with a header."""


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        raise _DamagedError("a name is taken twice")
    return table


def _check_metadata(metadata: Any) -> None:
    if type(metadata) is not dict or any(type(value) is not str for value in metadata.values()):
        raise _DamagedError("its metadata is no table of texts")
    for text in (*metadata, *metadata.values()):
        _check_text(text)


def _check_text(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise _DamagedError("a text in it is half a character, which cannot be written") from None


def _check_entries(header: dict[str, Any]) -> int:
    """Where the last tensor ends; `_DamagedError` unless each fills its bytes, and they follow each other."""
    end = 0
    for name, entry in entries_in_order(header):
        _check_text(name)
        shape, (start, stop) = entry["shape"], entry["data_offsets"]
        if type(shape) is not list or any(type(number) is not int for number in (start, stop, *shape)):
            raise _DamagedError(f"the numbers of {name} are none")
        if min(shape, default=0) < 0 or len(shape) > _MAX_DIMS or math.prod(max(n, 1) for n in shape) > _MAX_ELEMENTS:
            raise _DamagedError(f"{name} has the shape {shape}")
        if start != end or stop < start:
            raise _DamagedError(f"{name} begins at byte {start}, and the one before it ends at {end}")
        width = _WIDTHS.get(entry["dtype"])  # None: of a dtype that torch does not read
        if width is not None and width * math.prod(shape) != stop - start:
            raise _DamagedError(f"{name} of {entry['dtype']} {shape} has {stop - start} bytes")
        end = stop
    return end


def entries_in_order(header: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Names and entries of the tensors, in the order of their bytes."""
    tensors = ((name, entry) for name, entry in header.items() if name != METADATA)
    return sorted(tensors, key=lambda item: item[1]["data_offsets"])


def dtype_name(path: Path, name: str, code: str) -> str:
    """torch's name of a dtype; a RequestError if torch cannot merge or convert it."""
    if code not in DTYPE_NAMES:
        raise RequestError(f"{path}: tensor {name} has dtype {code}, which torch cannot merge or convert")
    return DTYPE_NAMES[code]
