"""A run folder: one process at work in it, one identity, so that a killed run continues and two never mix."""

import contextlib
import errno
import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from neon.errors import RequestError, WorkError, one_line, warn
from neon.runtime.files import as_json, check_writable, partial_path, write_json
from neon.runtime.signals import Stopped

if TYPE_CHECKING:
    from neon.runtime.distributed import Processes

RUN_FILE = "run.json"
LOCK_FILE = ".lock"
VERSION_KEY = "state_version"
STATE_VERSION = 1
"""of the files in which a run leaves what it has done; those of before there was a version have none"""
FINGERPRINT = "_fingerprint"
"""how an entry of an identity is called that tells the contents of an input, which may change under its name"""
_THREADS = "threads"
_OF_BYTES = (None, errno.ENOENT, errno.EINVAL)  # what readers say of damaged bytes, such as an offset below 0
_NOT_COMPARED = ("neon", VERSION_KEY, _THREADS)  # said in a record; neon's results do not change with its version


@contextlib.contextmanager
def run_folder(
    folder: str | os.PathLike[str], identity: Mapping[str, Any], *, fresh: bool = False, threads: int | None = None
) -> Iterator[Path]:
    """Hold `folder` for a run described by `identity` (JSON): created, continued if equal, emptied if `fresh`.

    The hold ends with the block, or with the process however it dies. Every program that works in a run folder has
    the flag `--fresh`. The number of `threads` of torch, on which roundings depend, is kept in the record; with
    another one a run goes on and a warning says so. A new folder in which nothing was done is gone again if the block
    ends in a RequestError.

    Raises:
        RequestError: the folder is another run's or no run's, is in use, or cannot be written.
    """
    folder = Path(folder)
    record = folder / RUN_FILE
    if folder.exists() and not folder.is_dir():
        raise RequestError(f"{folder}: a file, but a run needs a folder; name another one")
    ours, is_new = {folder / LOCK_FILE, partial_path(record)}, not folder.exists()
    if folder.is_dir() and not record.exists() and not ours.issuperset(folder.iterdir()):
        raise RequestError(f"{folder}: holds files but no {RUN_FILE}, so no run of ours; name another folder")
    check_writable(record, overwrite=True)
    with open(folder / LOCK_FILE, "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise RequestError(
                f"{folder}: another process works on this run; wait for it, or name another folder"
            ) from error
        if fresh:
            _empty(folder)
        if record.exists():
            before = read_record(folder)
            other = difference(before, identity)
            if other is not None:
                raise RequestError(
                    f"{folder}: holds a run with other settings ({other}); add --fresh to replace it, or name another "
                    "folder"
                )
            _warn_of_threads(folder, before.get(_THREADS), threads)
        else:
            facts = {VERSION_KEY: STATE_VERSION} if threads is None else {VERSION_KEY: STATE_VERSION, _THREADS: threads}
            write_json(record, {**facts, **identity})
        try:
            yield folder
        except RequestError:
            if is_new and {*ours, record}.issuperset(folder.iterdir()):  # refused before anything was done
                shutil.rmtree(folder)
            raise
        except Stopped as stop:
            stop.kept, stop.without = stop.kept or f"what lies in {folder}", "--fresh" if fresh else ""
            raise


@contextlib.contextmanager
def held_by_main(
    folder: str | os.PathLike[str], identity: Mapping[str, Any], processes: "Processes", *, fresh: bool = False
) -> Iterator[None]:
    """`run_folder`, entered by the main process of several; what it raises is raised in all of them."""
    with contextlib.ExitStack() as stack:
        processes.on_main(
            lambda: stack.enter_context(run_folder(folder, identity, fresh=fresh, threads=processes.threads))
        )
        yield


def _warn_of_threads(folder: Path, before: object, now: int | None) -> None:
    if before != now and None not in (before, now):
        warn(
            f"{folder}: began with {before} threads and goes on with {now}; the last digits may differ from those of "
            f"a run that was never stopped (OMP_NUM_THREADS={before} keeps them)"
        )


def read_record(folder: Path) -> dict[str, Any]:
    """What the run in `folder` is determined by, as it was recorded.

    Raises:
        RequestError: the record is damaged, or of a later version of neon.
    """
    file = folder / RUN_FILE
    with reading_state(file, "add --fresh to start this run anew, or name another folder"):
        record = as_json(json.loads(file.read_bytes()))
        if not isinstance(record, dict):
            raise ValueError(f"{type(record).__name__} instead of a table")
    check_version(file, record.get(VERSION_KEY))
    return record


def difference(found: Mapping[str, Any], identity: Mapping[str, Any]) -> str | None:
    """In what a run that was recorded as `found` is not that of `identity`, in words; None: it is.

    neon's version does not count. Contents of inputs are compared where they were recorded; earlier runs did not.
    """
    before, now = _flat(found), _flat(json.loads(json.dumps(as_json(identity))))
    different = [
        key
        for key in {**now, **before}
        if key not in _NOT_COMPARED
        and before.get(key) != now.get(key)
        and (key in before or not key.endswith(FINGERPRINT))
    ]
    if not different:
        return None
    key = different[0]
    if key.endswith(FINGERPRINT):
        text = f"the contents of {key.removesuffix(FINGERPRINT)} have changed: {before[key]}, now {now.get(key)}"
    else:
        text = f"{key} is {before.get(key)!r}, now {now.get(key)!r}"
    return text + (f", and {len(different) - 1} more" if len(different) > 1 else "")


def _flat(record: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The entries of nested tables by dotted names."""
    entries: dict[str, Any] = {}
    for key, value in record.items():
        entries |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return entries


def check_version(file: Path, version: object) -> None:
    """Raise a RequestError if `file` says a version of state that is not known here; None: it says none."""
    if version is None:
        return
    if not isinstance(version, int) or not 0 < version <= STATE_VERSION:
        raise RequestError(
            f"{file}: written by another version of neon ({VERSION_KEY} {version}, this one knows 1 to "
            f"{STATE_VERSION}); go on with that one, or name another folder"
        )


@contextlib.contextmanager
def reading_state(file: Path, advice: str) -> Iterator[None]:
    """Whatever goes wrong inside, where a `file` that a run left is read, is a RequestError: the file is damaged.

    `advice` says what to do, and what is lost by it.
    """
    try:
        yield
    except WorkError:
        raise
    except Exception as error:  # what readers raise of damaged bytes is of any kind
        if isinstance(error, OSError) and error.errno not in _OF_BYTES:  # the disk is at fault
            raise
        reason = f"{type(error).__name__}: {error}"
        if isinstance(error, (ValueError, RuntimeError)):
            reason = str(error)
        elif isinstance(error, FileNotFoundError):
            reason = "it is not there"
        raise RequestError(f"{file}: damaged ({one_line(reason)[:200]}); {advice}") from error


def _empty(folder: Path) -> None:
    # The record goes last: an interrupted removal still leaves a run that --fresh may remove.
    for path in sorted(folder.iterdir(), key=lambda path: path.name == RUN_FILE):
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != LOCK_FILE:
            path.unlink()
