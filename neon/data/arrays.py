"""Arrays of `.npy` and `.npz` files, whose sizes are looked at before anything is allocated; nothing is unpickled."""

import ast
import math
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

from neon.data.storage import Archive
from neon.errors import RequestError, reason

MAGIC = b"\x93NUMPY"
LARGEST_HEADER = 10_000
LARGEST_ARRAY = 1 << 30
"""bytes of an array in an `.npz`: a covariance of 11,585 features"""


def read_arrays(
    path: str | os.PathLike[str], names: Sequence[str], optional: Sequence[str] = (), *, contents: str
) -> dict[str, Any]:
    """The arrays `names` of an `.npz`, and those of `optional` that it holds; all others are left unread.

    `contents`: what messages say is in the file.

    Raises:
        RequestError: the file is missing or damaged, lacks one of `names`, or holds something else than numbers there.
    """
    archive, held = _opened(path, names, contents)
    expected = _expected(names)
    path = Path(path)
    if missing := set(names) - set(held):
        raise RequestError(f"{path}: no array {' or '.join(sorted(missing))}, found {sorted(held)[:8]}; {expected}")
    arrays = {}
    for name in (*names, *(set(optional) & set(held))):
        entry = f"{name}.npy"
        with archive.open(entry, LARGEST_ARRAY + LARGEST_HEADER) as stream:
            arrays[name] = read_array(stream, archive.entries[entry].file_size)
    return arrays


def array_names(path: str | os.PathLike[str], *, contents: str) -> list[str]:
    """The names of all arrays of an `.npz`, in its order; errors as of `read_arrays`."""
    return _opened(path, (), contents)[1]


def _expected(names: Sequence[str]) -> str:
    return "expected an .npz" + (f" with arrays {' and '.join(names)}" if names else "")


def _opened(path: str | os.PathLike[str], names: Sequence[str], contents: str) -> tuple[Archive, list[str]]:
    """The archive at `path`, and the names of its arrays; `names` are those that are expected."""
    path, expected = Path(path), _expected(names)
    if not path.exists():
        raise RequestError(f"{path}: no such file; {expected}")
    try:
        with open(path, "rb") as file:
            bare = file.read(len(MAGIC)) == MAGIC
    except OSError as error:
        raise RequestError(f"{path}: cannot be read ({reason(error)}); {expected}") from error
    if bare:
        raise RequestError(f"{path}: holds one bare array; {expected}")
    archive = Archive(path, f".npz {contents}")
    return archive, [name.removesuffix(".npy") for name in archive.entries if name.endswith(".npy")]


def read_array(stream: IO[bytes], size: int) -> np.ndarray:
    """The array of an `.npy` file of `size` bytes.

    Raises:
        ValueError: it is damaged, holds something else than numbers, or is not of the size that its header says.
    """
    start = stream.read(8)
    if start[:6] != MAGIC or start[6:7] not in (b"\1", b"\2", b"\3"):
        raise ValueError("no array that numpy wrote")
    width = 2 if start[6] == 1 else 4
    length = int.from_bytes(stream.read(width), "little")
    if length > LARGEST_HEADER:
        raise ValueError(f"a header of {length} bytes")
    dtype, shape, order = _parse(stream.read(length))
    promised, held = math.prod(shape) * dtype.itemsize, size - 8 - width - length
    if promised != held:
        raise ValueError(f"{held} bytes for {dtype} of shape {list(shape)}")
    data = stream.read(promised)
    if len(data) != promised:
        raise ValueError("it ends early")
    return np.frombuffer(bytearray(data), dtype).reshape(shape, order=order)


def _parse(header: bytes) -> tuple[np.dtype[Any], tuple[int, ...], Any]:
    """dtype, shape and order ("C" or "F") of a header such as `{'descr': '<f8', 'fortran_order': False, ...}`."""
    try:
        text = re.sub(r"(?<=[0-9])L\b", "", header.decode())  # Python 2 wrote long numbers so
        fields = ast.literal_eval(text.strip())
        descr, fortran, shape = fields["descr"], fields["fortran_order"], fields["shape"]
    except (ValueError, SyntaxError, LookupError, TypeError, MemoryError, RecursionError):
        raise ValueError("its header is damaged") from None
    if not isinstance(descr, str) or not re.fullmatch(r"[<>|=]?([biuf][0-9]{1,2}|U[0-9]{1,3})", descr):
        raise ValueError(f"it holds {descr!r:.40}, expected numbers or a name")
    if not isinstance(shape, tuple) or len(shape) > 8 or not all(type(side) is int and side >= 0 for side in shape):
        raise ValueError(f"its shape is {shape!r:.40}")
    try:
        return np.dtype(descr), shape, "F" if fortran else "C"
    except TypeError:
        raise ValueError(f"it holds {descr!r}, expected numbers") from None
