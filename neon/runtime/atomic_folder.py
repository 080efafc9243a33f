"""Writing a folder so that a reader, or a killed run, sees all of it or nothing."""

import contextlib
import fcntl
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from neon.errors import RequestError
from neon.runtime.files import partial_path, write_failure


@contextlib.contextmanager
def atomic_folder(
    path: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    may_be_replaced: Callable[[Path], bool] = lambda folder: True,
) -> Iterator[Path]:
    """A temporary folder beside `path`, which becomes `path` when the block ends well.

    On any exception it is removed and `path` is left as it was; what a killed process left goes with the next one
    that writes `path`. The parent folder is created if needed. A folder that is replaced is moved aside first, and
    removed when the new one has its name.

    Args:
        may_be_replaced: whether an existing folder is of the kind that is written, so that a name given by mistake
            costs nobody a folder of something else.

    Raises:
        RequestError: `path` exists and `overwrite` is false, or it may not be replaced, or written.
        WorkError: the disk is full or fails while writing.
    """
    path = Path(path)
    _check_replaceable(path, overwrite, may_be_replaced)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial, lock = _partial_folder(path)
    except OSError as error:
        raise write_failure(error, path) from error
    try:
        yield partial
        _check_replaceable(path, overwrite, may_be_replaced)  # it may have come into being meanwhile
        _take_place(partial, path)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, OSError):
            raise write_failure(error, path) from error
        raise
    finally:
        os.close(lock)


def _check_replaceable(path: Path, overwrite: bool, may_be_replaced: Callable[[Path], bool]) -> None:
    if not (path.exists() or path.is_symlink()):
        return
    if not path.is_dir() or path.is_symlink():
        raise RequestError(f"{path}: a folder is to be written, and this is a file or a link; choose another name")
    if not overwrite:
        raise RequestError(f"{path}: this folder exists; choose another name or pass --overwrite to replace it")
    if any(path.iterdir()) and not may_be_replaced(path):
        raise RequestError(
            f"{path}: will not be replaced, what lies in it is no model; choose another name or remove it yourself"
        )


def _partial_folder(path: Path) -> tuple[Path, int]:
    """An empty temporary folder and the hold on it, which ends with the process."""
    partial = partial_path(path)
    for _ in range(2):  # once more without what a killed process left
        with contextlib.suppress(FileExistsError):
            partial.mkdir()
            lock = _locked(partial)
            if lock is not None:
                return partial, lock
        lock = _locked(partial)
        if lock is None:  # a living process writes it
            break
        shutil.rmtree(partial)
        os.close(lock)
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    partial.mkdir()
    return partial, os.open(partial, os.O_RDONLY)


def _locked(folder: Path) -> int | None:
    """A descriptor that holds a folder; None: another process does."""
    lock = os.open(folder, os.O_RDONLY | os.O_NOFOLLOW | os.O_DIRECTORY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        return None
    except OSError:  # no locks on this file system, so no process holds one
        pass
    return lock


def _take_place(partial: Path, path: Path) -> None:
    if not path.exists():
        os.replace(partial, path)
        return
    old = path.with_name(f".{path.name}.{secrets.token_hex(4)}.replaced")
    os.replace(path, old)
    try:
        os.replace(partial, path)
    except OSError:
        os.replace(old, path)
        raise
    shutil.rmtree(old, ignore_errors=True)
