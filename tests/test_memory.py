"""The state of a training is written beside it, from a copy if there is memory for one, and its errors are told."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from neon.checkpoint import torch_format
from neon.errors import WorkError
from neon.runtime import memory
from neon.runtime.distributed import Processes
from neon.runtime.memory import available_memory, copy_in_memory
from neon.selftrain import STATE_FILE, run, train
from tests.tiny import tiny_edm, tiny_images


def test_a_copy_is_one_of_values_and_shares_what_was_shared() -> None:
    weights = torch.arange(4.0)
    content = {"a": weights, "b": weights.detach(), "rest": [{"step": 3, "c": weights[:2]}], "text": "x"}
    copy = copy_in_memory(content)
    weights.zero_()
    assert isinstance(copy, dict)
    assert copy["a"].tolist() == [0, 1, 2, 3]
    assert copy["a"] is copy["b"]
    assert copy["rest"][0]["c"].tolist() == [0, 1]
    assert (copy["rest"][0]["step"], copy["text"]) == (3, "x")


def test_without_memory_for_a_copy_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available_memory", lambda: 31)
    assert copy_in_memory({"a": torch.zeros(4)}) is None
    assert copy_in_memory({"a": torch.zeros(3)}) is not None


def test_memory_is_that_of_the_machine_or_of_the_control_group(tmp_path: Path) -> None:
    system, membership = tmp_path / "meminfo", tmp_path / "cgroup"
    system.write_text("MemTotal:  100 kB\nMemAvailable:   50 kB\n")
    membership.write_text("0::/job/step\n")
    assert available_memory(system, tmp_path, membership) == 50 * 1024
    (tmp_path / "job").mkdir()
    (tmp_path / "job" / "memory.max").write_text("30000\n")
    (tmp_path / "job" / "memory.current").write_text("10000\n")
    assert available_memory(system, tmp_path, membership) == 20_000
    assert available_memory(tmp_path / "nothing", tmp_path, membership) == 0


def trained(folder: Path) -> None:
    model = tiny_edm()
    train(
        model, tiny_images(8), folder, num_steps=3, snapshot_steps=[], recipe=replace(model.recipe, batch_size=4),
        seed=0, processes=Processes(), state_every_seconds=0.0,
    )  # fmt: skip


def test_the_state_in_the_background_is_that_of_its_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained(tmp_path / "beside")
    monkeypatch.setattr(run, "copy_in_memory", lambda content: None)
    trained(tmp_path / "here")
    beside, here = (torch.load(tmp_path / name / STATE_FILE, weights_only=True) for name in ("beside", "here"))
    assert beside["step"] == here["step"] == 3
    torch.testing.assert_close(beside["network"], here["network"], rtol=0, atol=0)
    torch.testing.assert_close(beside["optimizer"], here["optimizer"], rtol=0, atol=0)


def test_a_full_disk_is_the_error_that_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch_format.torch, "save", full)
    with pytest.raises(WorkError, match=r"training-state\.pt: .*No space left"):
        trained(tmp_path / "run")
