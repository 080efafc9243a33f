"""Writing files so that a reader, or a killed run, sees the old file or the new one and nothing between."""

import contextlib
import csv
import errno
import fcntl
import hashlib
import io
import json
import math
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import IO, Any, TypeVar, get_args, get_origin, get_type_hints

from neon.errors import RequestError, WorkError, reason

T = TypeVar("T")
LARGEST_INDEX = 100_000_000
"""bytes of an index of shards, as of a safetensors header"""
PIPELINE_FILE = "model_index.json"
"""of a diffusers pipeline; its components lie in sub folders"""
LONGEST_NAME = 255
"""of a file, in bytes: what common file systems take"""
_BAD_PLACE = (
    *(errno.EACCES, errno.EPERM, errno.EROFS),
    *(errno.ENOENT, errno.ENOTDIR, errno.EEXIST, errno.ELOOP, errno.ENAMETOOLONG),
)


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike[str], *, overwrite: bool = True, flush: bool = True) -> Iterator[IO[bytes]]:
    """Open a temporary binary file beside `path`; on success flush it to the disk and rename it to `path`.

    `flush=False` leaves the flushing to the system: for many small files that are cheap to make again.

    On any exception the temporary file is removed and `path` is left as it was; what a killed process left of it goes
    with the next one that writes `path`. The parent folder is created if needed.

    Raises:
        RequestError: `path` exists and `overwrite` is false, `path` is a folder, or its folder refuses writing.
        WorkError: the disk is full or fails while writing.
    """
    path = Path(path)
    try:
        partial, file = _open_partial(path, overwrite=overwrite)
    except OSError as error:
        raise write_failure(error, path) from error
    lock = os.dup(file.fileno())  # holds until the file has its name, or is gone
    try:
        with file:
            yield file
            file.flush()
            if flush:
                os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException as error:
        partial.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise write_failure(error, path) from error
        raise
    finally:
        os.close(lock)


def check_writable(path: str | os.PathLike[str], *, overwrite: bool, flag: str | None = "--overwrite") -> None:
    """Create the folder of `path` and raise now, before any work, what `atomic_write` would raise at the end.

    `flag` is that by which users say `overwrite`; None: they cannot.
    """
    try:
        probe, file = _open_partial(Path(path), overwrite=overwrite, flag=flag)
        with file:
            probe.unlink()
    except OSError as error:
        raise write_failure(error, path) from error


def partial_path(path: Path) -> Path:
    """Where a file grows before it is whole, unless two processes write it at once."""
    return path.with_name(f".{path.name}.partial")


def _open_partial(path: Path, *, overwrite: bool, flag: str | None = "--overwrite") -> tuple[Path, IO[bytes]]:
    """An empty temporary file beside `path`, locked; a RequestError if `path` may not be written.

    It is the one of `partial_path`, also where a killed process has left it, or one of another name if a living
    process writes that (or locks do not work here).
    """
    if path.is_dir():
        raise RequestError(f"{path}: cannot write a file here, this is a folder; name a file inside it")
    if path.exists() and not overwrite:
        replace = "" if flag is None else f" or pass {flag} to replace it"
        raise RequestError(f"{path}: already exists; choose another name{replace}")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = partial_path(path)
    with contextlib.suppress(OSError):
        file = open(partial, "wb", opener=_open_as_it_is)  # noqa: SIM115 - the caller closes it
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(file.fileno()), partial.stat()):  # not renamed by its writer meanwhile
                file.truncate()
                return partial, file
        except BlockingIOError:  # a living process writes it
            pass
        except OSError:  # no locks here, so no process writes it
            partial.unlink(missing_ok=True)
        file.close()
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    return partial, open(partial, "wb")


def _open_as_it_is(path: str, flags: int) -> int:
    return os.open(path, (flags & ~os.O_TRUNC) | os.O_NOFOLLOW, 0o666)


def is_file_name(value: object) -> bool:
    """Whether `value`, of an index, can be the name of a file beside it: no path, and nothing that no system takes."""
    plain = isinstance(value, str) and value.isprintable() and value not in ("", "..") and Path(value).name == value
    return plain and len(str(value).encode()) <= LONGEST_NAME


def weight_map(index: Path) -> dict[str, str]:
    """File by name of tensor, of an index of shards: `{"weight_map": {"net.weight": "model-0.safetensors", ...}}`.

    Raises:
        ValueError: it is none, is larger than 100 MB, or names files that cannot lie beside it.
    """
    size = index.stat().st_size
    if size > LARGEST_INDEX:
        raise ValueError(f"a text of {size} bytes")
    try:
        where: Any = json.loads(index.read_bytes())["weight_map"]
    except (ValueError, LookupError, TypeError, RecursionError):
        raise ValueError("no index of shards in it (no weight_map in JSON)") from None
    if not isinstance(where, dict) or not where:
        raise ValueError("its weight_map does not say which file each tensor lies in")
    if outside := [name for name in where.values() if not is_file_name(name)]:
        raise ValueError(f"names the shard {outside[0]!r}, which cannot lie beside it")
    return where


def check_not_input(path: str | os.PathLike[str], source: str | os.PathLike[str]) -> None:
    """Raise a RequestError if the output `path` is the input `source`, through whatever link."""
    with contextlib.suppress(OSError):  # what cannot be looked up is no input; check_writable names its trouble
        if Path(path).samefile(source):
            raise RequestError(f"{path}: the output is the input {source}; choose another name")


def write_failure(error: OSError, path: str | os.PathLike[str]) -> RequestError | WorkError:
    """The error to raise when writing `path` failed with `error`: a bad place is a bad request, a full disk is not."""
    why = reason(error)
    if error.errno in _BAD_PLACE:
        return RequestError(f"{path}: cannot write here ({why}); choose a folder you may write to")
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return WorkError(f"{path}: the disk is full ({why}); nothing was written, free some space and run again")
    return WorkError(f"{path}: writing failed ({why}); nothing was written")


def disk_full(error: Exception, part: Path) -> WorkError:
    """The error to raise when what is downloaded to `part` finds no room there."""
    free = shutil.disk_usage(part.parent).free // 1_000_000
    why = f"{getattr(error, 'strerror', None) or error}, {free} MB free"
    return WorkError(f"{part}: writing failed ({why}); make room, or raise `ulimit -f`, and run again to go on")


def as_json(value: Any) -> Any:
    """`value` as JSON can hold it: tuples become lists, numbers that are not finite their names, such as "inf"."""
    if isinstance(value, dict):
        return {str(key): as_json(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [as_json(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def from_json(kind: type[T], entry: Any) -> T:
    """The dataclass `kind` of its fields as JSON (those that are no JSON built before); a ValueError if they are not.

    A float may be written as an integer.
    """
    if not isinstance(entry, dict):
        raise ValueError(f"{type(entry).__name__} instead of a table")
    hints = get_type_hints(kind)
    for name, value in entry.items():
        hint = hints.get(name)
        kinds = {get_origin(one) or one for one in (get_args(hint) if isinstance(hint, UnionType) else (hint,))}
        if type(value) not in kinds and not (type(value) is int and float in kinds):
            raise ValueError(f"{name} is {value!r}" if name in hints else f"{name} is not known")
    try:
        return kind(**entry)
    except TypeError as error:  # a field is missing
        raise ValueError(str(error)) from error


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write `value` as indented JSON, atomically."""
    with atomic_write(path) as file:
        file.write((json.dumps(as_json(value), indent=2, allow_nan=False) + "\n").encode())


def write_csv(path: str | os.PathLike[str], columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Write a table as CSV, atomically: the `csv_text` of it."""
    with atomic_write(path) as file:
        file.write(csv_text(columns, rows).encode(errors="backslashreplace"))  # a damaged log may hold half a character


def csv_text(columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> str:
    """A table as CSV: the names of `columns`, and a line for each row.

    Figures in full, nothing where a row has none, and tables as JSON.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    for row in rows:
        cells = (row.get(name) for name in columns)
        writer.writerow([json.dumps(as_json(cell)) if isinstance(cell, dict) else cell for cell in cells])
    return text.getvalue()


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


def read_json_lines(path: str | os.PathLike[str]) -> Iterator[dict[str, Any]]:
    """The tables that `append_json` has left in a file, in order, if there is one; half a line is passed over."""
    for line in Path(path).read_bytes().splitlines() if Path(path).exists() else ():
        with contextlib.suppress(ValueError):
            entry = json.loads(line)
            if isinstance(entry, dict):
                yield entry


def hashes(files: Mapping[str, Path | None]) -> dict[str, str | None]:
    """The SHA-256 of each file, under its name here; None of what is no file."""
    return {name: None if path is None else sha256_file(path) for name, path in files.items()}


def sha256_file(path: str | os.PathLike[str]) -> str:
    """The SHA-256 of a file as hexadecimal digits. Other threads run meanwhile.

    Of a folder, or an index of the shards of a checkpoint: that of the names and hashes of the files there, and of a
    pipeline those of its components, too.
    """
    path = Path(path)
    parts = _parts(path)
    if parts is not None:
        folder = path if path.is_dir() else path.parent
        lines = (f"{sha256_file(part)}  {part.relative_to(folder).as_posix()}\n" for part in parts)
        return hashlib.sha256("".join(lines).encode()).hexdigest()
    digest = hashlib.sha256()
    # With blocks of 1 MB a thread that merges beside this one waits for the interpreter lock: 3.4 s instead of 2.0 s.
    buffer = memoryview(bytearray(1 << 23))
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
    return digest.hexdigest()


def _parts(path: Path) -> list[Path] | None:
    """The files that stand behind a folder or an index of shards; None: it is a file of its own."""
    if path.is_dir():
        if (path / PIPELINE_FILE).is_file():
            visible = ("[!.]*", "[!.]*/[!.]*")  # downloads leave folders such as .cache, which tell when they were made
            return sorted(part for names in visible for part in path.glob(names) if part.is_file())
        return sorted(part for part in path.iterdir() if part.is_file())
    if not path.name.endswith(".index.json"):
        return None
    try:
        shards = {path.parent / name for name in weight_map(path).values()}
    except ValueError:
        return None
    return sorted(part for part in shards if part.is_file()) or None
