"""Writing files so that a reader, or a killed run, sees the old file or the new one and nothing between."""

import contextlib
import errno
import hashlib
import json
import math
import os
import secrets
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from neon.errors import RequestError, WorkError

_BAD_PLACE = (
    *(errno.EACCES, errno.EPERM, errno.EROFS),
    *(errno.ENOENT, errno.ENOTDIR, errno.EEXIST, errno.ELOOP, errno.ENAMETOOLONG),
)


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike[str], *, overwrite: bool = True, flush: bool = True) -> Iterator[IO[bytes]]:
    """Open a temporary binary file beside `path`; on success flush it to the disk and rename it to `path`.

    `flush=False` leaves the flushing to the system: for many small files that are cheap to make again.

    On any exception the temporary file is removed and `path` is left as it was. The parent folder is
    created if needed.

    Raises:
        RequestError: `path` exists and `overwrite` is false, `path` is a folder, or its folder refuses writing.
        WorkError: the disk is full or fails while writing.
    """
    path = Path(path)
    try:
        partial = _partial(path, overwrite=overwrite)
        file = open(partial, "wb")  # noqa: SIM115 - closed below; only a file that was opened is removed
    except OSError as error:
        raise write_failure(error, path) from error
    try:
        with file:
            yield file
            file.flush()
            if flush:
                os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        raise write_failure(error, path) from error
    finally:
        partial.unlink(missing_ok=True)


def check_writable(path: str | os.PathLike[str], *, overwrite: bool) -> None:
    """Create the folder of `path` and raise now, before any work, what `atomic_write` would raise at the end."""
    try:
        probe = _partial(Path(path), overwrite=overwrite)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise write_failure(error, path) from error


def _partial(path: Path, *, overwrite: bool) -> Path:
    """A temporary name beside `path`, whose folder exists then; a RequestError if `path` may not be written."""
    if path.is_dir():
        raise RequestError(f"{path}: cannot write a file here, this is a folder; name a file inside it")
    if path.exists() and not overwrite:
        raise RequestError(f"{path}: already exists; choose another name or pass --overwrite to replace it")
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")


def check_not_input(path: str | os.PathLike[str], source: str | os.PathLike[str]) -> None:
    """Raise a RequestError if the output `path` is the input `source`, through whatever link."""
    with contextlib.suppress(OSError):  # what cannot be looked up is no input; check_writable names its trouble
        if Path(path).samefile(source):
            raise RequestError(f"{path}: the output is the input {source}; choose another name")


def write_failure(error: OSError, path: str | os.PathLike[str]) -> RequestError | WorkError:
    """The error to raise when writing `path` failed with `error`: a bad place is a bad request, a full disk is not."""
    reason = error.strerror or str(error)
    if error.errno in _BAD_PLACE:
        return RequestError(f"{path}: cannot write here ({reason}); choose a folder you may write to")
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return WorkError(f"{path}: the disk is full ({reason}); nothing was written, free some space and run again")
    return WorkError(f"{path}: writing failed ({reason}); nothing was written")


def as_json(value: Any) -> Any:
    """`value` as JSON can hold it: tuples become lists, numbers that are not finite their names, such as "inf"."""
    if isinstance(value, dict):
        return {str(key): as_json(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [as_json(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write `value` as indented JSON, atomically."""
    with atomic_write(path) as file:
        file.write((json.dumps(as_json(value), indent=2, allow_nan=False) + "\n").encode())


def append_json(path: str | os.PathLike[str], entry: dict[str, Any]) -> None:
    """Append `entry` as one line; half a line that a killed run left at the end stays a line of its own."""
    line = json.dumps(entry).encode() + b"\n"
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a+b") as file:
            if file.seek(0, os.SEEK_END):
                file.seek(-1, os.SEEK_END)
                line = line if file.read(1) == b"\n" else b"\n" + line
            file.write(line)
    except OSError as error:
        raise write_failure(error, path) from error


def hashes(files: Mapping[str, Path | None]) -> dict[str, str | None]:
    """The SHA-256 of each file, under its name here; None of what is no file."""
    return {name: None if path is None else sha256_file(path) for name, path in files.items()}


def sha256_file(path: str | os.PathLike[str]) -> str:
    """The SHA-256 of a file as hexadecimal digits. Other threads run meanwhile."""
    digest = hashlib.sha256()
    # With blocks of 1 MB a thread that merges beside this one waits for the interpreter lock: 3.4 s instead of 2.0 s.
    buffer = memoryview(bytearray(1 << 23))
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
    return digest.hexdigest()
