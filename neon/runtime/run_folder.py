"""A run folder: one process at work in it, one identity, so that a killed run continues and two never mix."""

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from neon.errors import RequestError, warn
from neon.runtime.files import as_json, check_writable, partial_path, write_json
from neon.runtime.signals import Stopped

if TYPE_CHECKING:
    from neon.runtime.distributed import Processes

RUN_FILE = "run.json"
LOCK_FILE = ".lock"
_THREADS = "threads"


@contextlib.contextmanager
def run_folder(
    folder: str | os.PathLike[str], identity: dict[str, Any], *, fresh: bool = False, threads: int | None = None
) -> Iterator[Path]:
    """Hold `folder` for a run described by `identity` (JSON): created, continued if equal, emptied if `fresh`.

    The hold ends with the block, or with the process however it dies. The number of `threads` of torch, on which
    roundings depend, is kept in the record; with another one a run goes on and a warning says so.

    Raises:
        RequestError: the folder is another run's or no run's, is in use, or cannot be written.
    """
    folder = Path(folder)
    record = folder / RUN_FILE
    if folder.exists() and not folder.is_dir():
        raise RequestError(f"{folder}: a file, but a run needs a folder; name another with --out")
    ours = {folder / LOCK_FILE, partial_path(record)}
    if folder.is_dir() and not record.exists() and not ours.issuperset(folder.iterdir()):
        raise RequestError(
            f"{folder}: holds files but no {RUN_FILE}, so no run of ours; name another folder with --out"
        )
    check_writable(record, overwrite=True)
    with open(folder / LOCK_FILE, "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise RequestError(
                f"{folder}: another process works on this run; wait for it, or name another folder with --out"
            ) from error
        if fresh:
            _empty(folder)
        if record.exists():
            _check_identity(record, identity, threads)
        else:
            write_json(record, identity if threads is None else {**identity, _THREADS: threads})
        try:
            yield folder
        except Stopped as stop:
            stop.kept, stop.without = stop.kept or f"what lies in {folder}", "--fresh" if fresh else ""
            raise


@contextlib.contextmanager
def held_by_main(
    folder: str | os.PathLike[str], identity: dict[str, Any], processes: "Processes", *, fresh: bool = False
) -> Iterator[None]:
    """`run_folder`, entered by the main process of several; what it raises is raised in all of them."""
    with contextlib.ExitStack() as stack:
        processes.on_main(
            lambda: stack.enter_context(run_folder(folder, identity, fresh=fresh, threads=processes.threads))
        )
        yield


def _empty(folder: Path) -> None:
    # The record goes last: an interrupted removal still leaves a run that --fresh may remove.
    for path in sorted(folder.iterdir(), key=lambda path: path.name == RUN_FILE):
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != LOCK_FILE:
            path.unlink()


def _check_identity(record: Path, identity: dict[str, Any], threads: int | None) -> None:
    try:
        found = dict(json.loads(record.read_text()))
    except (ValueError, TypeError) as error:
        raise RequestError(
            f"{record}: not readable as the record of a run ({error}); add --fresh to start anew"
        ) from error
    before = found.pop(_THREADS, threads)
    expected = json.loads(json.dumps(as_json(identity)))
    different = [key for key in {**expected, **found} if found.get(key) != expected.get(key)]
    if different:
        key = different[0]
        raise RequestError(
            f"{record.parent}: holds a run with other settings ({key} is {found.get(key)!r}, now {expected.get(key)!r}"
            f"{f', and {len(different) - 1} more' if len(different) > 1 else ''}); "
            "add --fresh to replace it, or name another folder with --out"
        )
    if before != threads and None not in (before, threads):
        warn(
            f"{record.parent}: began with {before} threads and goes on with {threads}; the last digits may differ from "
            f"those of a run that was never stopped (OMP_NUM_THREADS={before} keeps them)"
        )
