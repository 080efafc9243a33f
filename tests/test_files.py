"""Files are written whole or not at all, by one process or by two at once, and killed ones leave nothing for good."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from neon.runtime import files
from neon.runtime.files import atomic_write, check_writable
from neon.runtime.run_folder import run_folder
from tests.programs import ROOT


def killed_while_writing(path: Path) -> None:
    """Leave what a process leaves that is killed in the middle of writing `path`."""
    script = (
        "import os, sys\nfrom neon.runtime.files import atomic_write\nwith atomic_write(sys.argv[1]) as file:\n"
        "    file.write(b'half' * 1000)\n    file.flush()\n    os.kill(os.getpid(), 9)\n"
    )
    run = subprocess.run([sys.executable, "-c", script, str(path)], env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert run.returncode == -signal.SIGKILL
    assert [path.name for path in path.parent.iterdir()] == [f".{path.name}.partial"]


def test_what_a_killed_process_left_goes_with_the_next_write(tmp_path: Path) -> None:
    path = tmp_path / "out.bin"
    killed_while_writing(path)
    with atomic_write(path) as file:
        file.write(b"new")
    assert list(tmp_path.iterdir()) == [path] and path.read_bytes() == b"new"


def test_it_goes_also_where_a_program_only_begins(tmp_path: Path) -> None:
    killed_while_writing(tmp_path / "out.bin")
    check_writable(tmp_path / "out.bin", overwrite=False)
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_was_killed_over_its_record_begins_again(tmp_path: Path) -> None:
    killed_while_writing(tmp_path / "run.json")
    with run_folder(tmp_path, {"seed": 0}):
        assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "run.json"]


def test_two_writers_at_once_disturb_each_other_not(tmp_path: Path) -> None:
    path = tmp_path / "out.bin"
    with atomic_write(path) as first:
        first.write(b"first")
        check_writable(path, overwrite=False)
        with atomic_write(path) as second:
            second.write(b"second, longer")
        assert path.read_bytes() == b"second, longer"
        with pytest.raises(ValueError, match="no"), atomic_write(path):
            raise ValueError("no")
    assert path.read_bytes() == b"first" and list(tmp_path.iterdir()) == [path]


def test_nothing_is_left_where_files_cannot_be_locked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(files.fcntl, "flock", refuse)
    check_writable(tmp_path / "a", overwrite=False)
    with atomic_write(tmp_path / "a") as file:
        file.write(b"a")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_link_in_the_place_of_a_partial_is_not_followed(tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.write_text("precious")
    (tmp_path / ".a.partial").symlink_to(other)
    with atomic_write(tmp_path / "a") as file:
        file.write(b"a")
    assert other.read_text() == "precious" and (tmp_path / "a").read_bytes() == b"a"
