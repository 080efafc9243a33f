"""The fingerprint of an image set changes with its images and labels, and with nothing else."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from neon.data.fingerprint import fingerprint
from neon.errors import RequestError


def make_set(folder: Path) -> Path:
    (folder / "a").mkdir(parents=True)
    (folder / "a" / "0.png").write_bytes(b"pixels")
    (folder / "dataset.json").write_text('{"labels": [["a/0.png", 1]]}')
    return folder


def replace(file: Path) -> None:
    """Other content of the same size, a moment later."""
    file.write_bytes(b"PIXELS")
    os.utime(file, ns=(1, 1))


def relabel(folder: Path) -> None:
    """Another label at the same time and of the same size."""
    file = folder / "dataset.json"
    stat = file.stat()
    file.write_text('{"labels": [["a/0.png", 2]]}')
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))


@pytest.mark.parametrize(
    ("change", "changes"),
    [
        (lambda f: replace(f / "a" / "0.png"), True),
        (lambda f: (f / "a" / "0.png").rename(f / "a" / "1.png"), True),
        (lambda f: (f / "b.png").write_bytes(b""), True),
        (relabel, True),
        (lambda f: (f / ".lock").touch(), False),
        (lambda f: (f / "a" / "circle").symlink_to(f), False),
    ],
)
def test_a_folder_is_known_by_what_it_lists(tmp_path: Path, change: Callable[[Path], None], changes: bool) -> None:
    folder = make_set(tmp_path / "set")
    before = fingerprint(folder)
    assert before == fingerprint(folder) and before.startswith("2 files of ")
    change(folder)
    assert (fingerprint(folder) != before) is changes


def test_a_file_is_known_by_its_bytes(tmp_path: Path) -> None:
    file = tmp_path / "set.zip"
    file.write_bytes(b"one")
    before = fingerprint(file)
    os.utime(file, ns=(1, 1))
    assert fingerprint(file) == before and before.startswith("3 bytes, sha256 ")
    file.write_bytes(b"two")
    assert fingerprint(file) != before


def test_nothing_has_no_fingerprint(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="nowhere"):
        fingerprint(tmp_path / "nowhere")
