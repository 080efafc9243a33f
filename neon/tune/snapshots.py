"""What the snapshots of a self-training are called, and after how many images they were taken."""

import re
from collections.abc import Sequence
from pathlib import Path

from neon.checkpoint import open_checkpoint

_NAMED = re.compile(r"(?:^|-)snapshot-(\d+\.\d+)-kimg$|^network-snapshot-(\d+)$")
"""the stems of files that our and the published loops write: of thousand images, both"""


def snapshot_names(paths: Sequence[Path]) -> list[str]:
    """A name for each of the files, all different (as names of files, too): as much of its path as that takes.

    The stem where that is enough, else the file with some of the folders above it.
    """
    candidates = [[path.stem for path in paths]]
    parts = [path.absolute().parts for path in paths]
    candidates += [["/".join(part[-count:]) for part in parts] for count in range(1, max(map(len, parts)) + 1)]
    numbered = [f"{number}-{path.stem}" for number, path in enumerate(paths, 1)]
    return next((names for names in candidates if len({as_file_name(name) for name in names}) == len(paths)), numbered)


def as_file_name(name: str) -> str:
    """`name` as the beginning of the name of a file."""
    return name.replace(", ", "_").replace(" ", "-").replace("/", "%2F")


def budgets(paths: Sequence[Path], key: str | None = None) -> list[float | None]:
    """Thousand images behind each of the files: as it says itself, or else by its name; None: it is not known.

    None for all of them if two are of the same, which the budget does not tell apart.
    """
    found = [_budget(path, key) for path in paths]
    known = [budget for budget in found if budget is not None]
    return found if len(set(known)) == len(known) else [None] * len(paths)


def _budget(path: Path, key: str | None) -> float | None:
    with open_checkpoint(path, key) as checkpoint:
        images_seen = checkpoint.metadata.get("images_seen", "")
    if images_seen.isdecimal():
        return int(images_seen) / 1000
    named = _NAMED.search(path.stem)
    return None if named is None else float(named[1] or named[2])
