"""`neon diff`: norms against float64, what low precision loses, and what is in one side only."""

import json
from pathlib import Path

import pytest
import torch

from neon.checkpoint import save_safetensors
from neon.cli.app import main
from neon.merge.diff import diff
from tests.tiny import pair


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """a and b: two weights that differ, one that does not, a counter, a buffer, and a name of each side's own."""
    monkeypatch.chdir(tmp_path)
    (small, small_moved), (large, large_moved) = pair(torch.float32, step=1e-3), pair(torch.float32, (1500, 1000))
    a = {"small.weight": small, "large.weight": large, "same.weight": small, "steps": torch.tensor(3)}
    b = {**a, "small.weight": small_moved, "large.weight": large_moved, "steps": torch.tensor(4)}
    save_safetensors("a.safetensors", {**a, "bn.running_var": torch.ones(4), "old": -small, "cut": small}, {})
    torch.save({**b, "bn.running_var": torch.zeros(4), "new": -small, "cut": small[:3]}, "b.pth")
    return tmp_path


def test_every_tensor_is_compared_as_in_float64(here: Path) -> None:
    found = diff("a.safetensors", "b.pth")
    assert [one.name for one in found.tensors] == ["large.weight", "small.weight"]
    for one, (a, b) in zip(
        found.tensors, (pair(torch.float32, (1500, 1000)), pair(torch.float32, step=1e-3)), strict=True
    ):
        change = b.double() - a.double()
        assert one.change == pytest.approx(float(change.norm()), rel=1e-5)
        assert one.relative == pytest.approx(float(change.norm() / a.double().norm()), rel=1e-5)
        assert one.largest_change == pytest.approx(float(change.abs().max()), rel=1e-5)
        assert one.largest_weight == float(a.abs().max())
    assert (found.equal, found.other, found.shapes) == (1, ("steps", "bn.running_var"), ("cut [100] / [3]",))
    assert (found.only_a, found.only_b) == (("old",), ("new",))
    squares = sum(one.change**2 for one in found.tensors)
    assert found.change == pytest.approx(squares**0.5)


def test_what_low_precision_loses_is_what_rounding_the_weights_does(here: Path) -> None:
    small = diff("a.safetensors", "b.pth").tensors[1]
    a, b = pair(torch.float32, step=1e-3)
    for one in small.kept:
        kept = a.to(getattr(torch, one.dtype)).double()
        step = a.double() - b.double()
        realised = (kept + step).to(getattr(torch, one.dtype)).double() - kept
        assert one.share_lost == pytest.approx(float((realised == 0).double().mean()))
        assert one.relative_error == pytest.approx(float((realised - step).norm() / step.norm()), rel=1e-3)
    assert small.kept[0].share_lost > 0.3 > small.kept[1].share_lost


def test_weights_beyond_float16_are_said_to_overflow(here: Path) -> None:
    save_safetensors("big.safetensors", {"w": torch.tensor([7e4, 1.0])}, {})
    save_safetensors("bigger.safetensors", {"w": torch.tensor([7e4, 1.5])}, {})
    found = diff("big.safetensors", "bigger.safetensors")
    assert [one.overflows for one in found.kept] == [False, True]


def test_the_command_shows_the_largest_and_writes_all(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["diff", "a.safetensors", "b.pth", "--top", "1", "--json", "diff.json"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("|b - a| / |a| = 0.1: 2 tensors differ, 1 are equal\nat w = 1 in bfloat16 ")
    assert "large.weight" in shown and "small.weight" not in shown and shown.endswith("and 1 more\n")
    assert "only in a.safetensors (1): old" in shown and "only in b.pth (1): new" in shown
    assert [one["name"] for one in json.loads(Path("diff.json").read_text())["tensors"]] == [
        "large.weight",
        "small.weight",
    ]


@pytest.mark.parametrize("words", [["nothing.pth"], ["b.pth", "--top", "0"], ["b.pth", "--component", "unet"]])
def test_what_cannot_be_compared_is_refused(here: Path, words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["diff", "a.safetensors", *words, "--json", "diff.json"]) == 2
    assert words[-1] in capsys.readouterr().err
    assert not Path("diff.json").exists()
