"""What a command prints when it ends badly: one line, whatever foreign text stands in it."""

from collections.abc import Callable

import pytest
import torch

from neon.cli.command_line import exit_code
from neon.errors import LONGEST_LINE, WorkError, one_line


@pytest.mark.parametrize(
    "text, line",
    [
        ("a.pth: no such file", "a.pth: no such file"),
        ("two\n  lines\tand more ", "two lines and more"),
        ("a\x1b[2Jname\x00", "a\\x1b[2Jname\\x00"),
        ("half a pair \ud800", "half a pair \\ud800"),
        ("right to left \u202e", "right to left \\u202e"),
        ("Bäume, 木", "Bäume, 木"),
        (ValueError(), "ValueError"),
        ("", ""),
    ],
)
def test_any_text_becomes_a_line_that_can_be_shown(text: object, line: str) -> None:
    assert one_line(text) == line


def test_a_long_line_keeps_its_beginning_and_its_end() -> None:
    line = one_line("base.pth: " + "x" * 5000 + "; choose another file")
    assert len(line) <= LONGEST_LINE
    assert line.startswith("base.pth: x")
    assert line.endswith("; choose another file")


@pytest.mark.parametrize(("rank", "shared", "said"), [("0", True, True), ("1", True, False), ("1", False, True)])
def test_what_every_process_finds_wrong_is_said_by_the_first(
    rank: str, shared: bool, said: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", rank)
    error = WorkError("the disk is full")
    error.shared = shared

    def fail() -> None:
        raise error

    assert exit_code("neon", fail) == 1
    assert capsys.readouterr().err == ("neon: the disk is full\n" if said else "")


@pytest.mark.parametrize("ask", [lambda: torch.empty(1 << 50), lambda: bytearray(1 << 60)], ids=["torch", "python"])
def test_a_machine_without_enough_memory_is_told_in_one_line(
    ask: Callable[[], object], capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_code("neon sample", lambda: ask() and None) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("neon sample: out of memory") and line.endswith("ask for smaller batches")


def test_another_fault_of_torch_is_not_called_one_of_memory() -> None:
    with pytest.raises(RuntimeError, match="size of tensor"):
        exit_code("neon", lambda: (torch.ones(2) + torch.ones(3)) and None)
