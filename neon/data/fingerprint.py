"""What tells the images of one set from those of another under the same name, without decoding any."""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path

from neon.data.labels import LABELS_FILE
from neon.data.listing import entries_below
from neon.errors import RequestError, reason
from neon.runtime.files import sha256_file


def fingerprint(path: str | os.PathLike[str]) -> str:
    """Size and SHA-256 of a set, as words: of the bytes of a file (a zip, an `.npz`), or of what a folder lists.

    A folder is listed as the names, sizes and times of its files below (contents are read of `dataset.json` only), so
    a million images take seconds; a copy counts as another set unless it kept their times. Hidden files do not count.

    Raises:
        RequestError: there is nothing at `path`, or it cannot be read.
    """
    path = Path(path)
    try:
        return _of_folder(path) if path.is_dir() else f"{path.stat().st_size} bytes, sha256 {sha256_file(path)}"
    except OSError as error:
        raise RequestError(f"{error.filename or path}: cannot be read ({reason(error)})") from error


def fingerprints(inputs: Mapping[str, Path | None]) -> dict[str, str | None]:
    """The fingerprint of each input, under its name here; None of what is none."""
    return {name: None if path is None else fingerprint(path) for name, path in inputs.items()}


def _of_folder(folder: Path) -> str:
    digest, size, listing = hashlib.sha256(), 0, []
    for name, entry in entries_below(folder):
        if name.endswith("/"):
            continue
        stat = entry.stat()
        size += stat.st_size
        listing.append((name, stat.st_size, sha256_file(entry.path) if name == LABELS_FILE else stat.st_mtime_ns))
    for line in sorted(listing):
        digest.update(json.dumps(line).encode() + b"\n")
    return f"{len(listing)} files of {size} bytes, sha256 {digest.hexdigest()}"
