"""What is below a folder, by name: links are followed, and what systems leave behind is passed over."""

import os
from collections.abc import Iterator
from pathlib import Path

from neon.errors import RequestError, reason

LEFT_BEHIND = frozenset({"__MACOSX", "Thumbs.db", "desktop.ini"})
"""what Windows and macOS put beside images; the rest of it is hidden (.DS_Store, ._a.png)"""


def is_ours(name: str) -> bool:
    """Whether no part of `name` (with slashes) is hidden, or one that a system left behind."""
    return not any(part.startswith(".") or part in LEFT_BEHIND for part in name.rstrip("/").split("/"))


def plain(name: str) -> str:
    """The name of a file with slashes, also if a zip or a list was written on Windows, and no dot in front."""
    return name.replace("\\", "/").removeprefix("./")


def entries_below(folder: str | os.PathLike[str]) -> Iterator[tuple[str, os.DirEntry[str]]]:
    """(name relative to `folder`; its entry) of every file and folder below it, in no order.

    Names have slashes; those of folders end with one. Links are followed, but no folder is entered from inside itself;
    a dead link counts as a file (which cannot be read), so that a set does not shrink in silence.

    Raises:
        RequestError: `folder`, or one below it, cannot be listed.
    """
    waiting: list[tuple[str, str, frozenset[tuple[int, int]]]] = [(os.fspath(folder), "", frozenset())]
    while waiting:
        path, prefix, above = waiting.pop()
        try:
            stat = Path(path).stat()
            here = (stat.st_dev, stat.st_ino)
            if here in above:
                continue
            with os.scandir(path) as entries:
                for entry in entries:
                    if not is_ours(entry.name):
                        continue
                    name = prefix + entry.name
                    if entry.is_dir():
                        yield f"{name}/", entry
                        waiting.append((entry.path, f"{name}/", above | {here}))
                    elif entry.is_file() or not Path(entry.path).exists():
                        yield name, entry
        except OSError as error:
            raise RequestError(f"{path}: the folder cannot be listed ({reason(error)})") from error
