"""Training: what it learns, what it writes, and that a killed run ends like one that was not."""

import dataclasses
import errno
from pathlib import Path
from typing import IO

import pytest
import torch

from neon import selftrain
from neon.checkpoint import load_state, open_checkpoint
from neon.errors import RequestError, WorkError
from neon.model import load_model
from neon.recipe import Recipe
from neon.runtime.distributed import Processes
from neon.selftrain import STATE_FILE, train
from tests.programs import Killed, dies_after, log, losses
from tests.tiny import tiny_edm, tiny_images

RECIPE = Recipe(batch_size=8, lr=1e-3)


def run(folder: Path, *, num_steps: int = 6, recipe: Recipe = RECIPE, snapshots=(3,), **changes):
    model = changes.pop("model", None) or tiny_edm(dropout=0.1)
    keywords = {"seed": 1, "micro_batch": 4, "state_every_seconds": 0.0, "dataset": tiny_images(), **changes}
    return train(
        model, folder=folder, num_steps=num_steps, snapshot_steps=snapshots, recipe=recipe, processes=Processes(),
        **keywords,
    )  # fmt: skip


def weights(path: Path) -> torch.Tensor:
    return torch.cat([tensor.flatten() for tensor in load_state(path).values()])


def test_training_lowers_the_loss_and_logs_every_step(tmp_path: Path) -> None:
    run(tmp_path, num_steps=60, state_every_seconds=60.0)
    found = losses(tmp_path)
    assert len(found) == 60
    assert sum(found[-10:]) < 0.8 * sum(found[:10])


def test_a_snapshot_is_a_model_and_says_what_it_is(tmp_path: Path) -> None:
    first, last = run(tmp_path)
    assert (first.images_seen, last.images_seen) == (24, 48)
    model = load_model(last.path)
    assert model.architecture == "edm" and not model.training
    with open_checkpoint(last.path) as checkpoint:
        assert checkpoint.metadata["images_seen"] == "48" and checkpoint.metadata["weights"] == "raw"


@pytest.mark.parametrize(("averages", "state_every_seconds"), [(False, 0.0), (True, 0.0), (False, 60.0)])
def test_a_killed_run_continues_to_the_same_bits(tmp_path: Path, averages: bool, state_every_seconds: float) -> None:
    recipe = dataclasses.replace(RECIPE, ema_halflife_kimg=0.02 if averages else None, lr_rampup_kimg=0.03)
    whole = run(tmp_path / "whole", recipe=recipe)
    with dies_after(4, selftrain.TrainingRun, "one_step"), pytest.raises(Killed):
        run(tmp_path / "killed", recipe=recipe, state_every_seconds=state_every_seconds)
    continued = run(tmp_path / "killed", recipe=recipe)
    for a, b in zip(whole, continued, strict=True):
        assert torch.equal(weights(a.path), weights(b.path))
    steps = [entry["step"] for entry in log(tmp_path / "killed")]
    assert steps == [1, 2, 3, 4, 5, 6], "every step is told once"


def test_a_finished_run_is_not_trained_again(tmp_path: Path) -> None:
    first = run(tmp_path)
    written = [snapshot.path.stat().st_mtime_ns for snapshot in first]
    assert [snapshot.path.stat().st_mtime_ns for snapshot in run(tmp_path)] == written


def test_micro_batches_change_rounding_only(tmp_path: Path) -> None:
    model = lambda: tiny_edm()  # noqa: E731 - no dropout: its draws belong to a micro-batch
    one = run(tmp_path / "one", micro_batch=8, num_steps=1, model=model())[-1]
    two = run(tmp_path / "two", micro_batch=2, num_steps=1, model=model())[-1]
    torch.testing.assert_close(weights(one.path), weights(two.path), rtol=0, atol=2.1e-3)
    assert (weights(one.path) - weights(two.path)).abs().mean() < 1e-5


def test_scaled_losses_are_scaled_back(tmp_path: Path) -> None:
    plain = weights(run(tmp_path / "plain")[-1].path)
    scaled = weights(run(tmp_path / "scaled", recipe=dataclasses.replace(RECIPE, scale_losses=True))[-1].path)
    torch.testing.assert_close(scaled, plain, rtol=0, atol=1e-6)  # the scale is a power of two


def test_the_average_lags_the_weights(tmp_path: Path) -> None:
    base = torch.cat([tensor.flatten() for tensor in tiny_edm(dropout=0.1).network.state_dict().values()])
    raw = weights(run(tmp_path / "raw")[-1].path)
    slow = dataclasses.replace(RECIPE, ema_halflife_kimg=1.0)
    averaged = weights(run(tmp_path / "averaged", recipe=slow)[-1].path)
    assert 0 < (averaged - base).norm() < 0.1 * (raw - base).norm()


def test_settings_of_an_unfinished_run_are_not_mixed(tmp_path: Path) -> None:
    with dies_after(0, selftrain.TrainingRun, "write_snapshot"), pytest.raises(Killed):
        run(tmp_path)
    with pytest.raises(RequestError, match="other settings"):
        run(tmp_path, seed=2)


def test_snapshots_of_another_run_are_not_taken_for_ours(tmp_path: Path) -> None:
    run(tmp_path)
    with pytest.raises(RequestError, match=r"snapshot-.*other settings.*another folder"):
        run(tmp_path, recipe=dataclasses.replace(RECIPE, lr=1e-4))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"micro_batch": 3}, "micro-batch"),
        ({"model": tiny_edm(img_resolution=16)}, "the model makes"),
        ({"model": tiny_edm(img_channels=3)}, "the model makes"),
    ],
)
def test_what_does_not_fit_is_refused_before_any_step(tmp_path: Path, changes: dict, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        run(tmp_path / "run", **changes)
    assert not (tmp_path / "run").exists()


def test_a_conditional_model_needs_labels(tmp_path: Path) -> None:
    dataset = tiny_images()
    dataset.labels = None
    with pytest.raises(RequestError, match="no labels"):
        run(tmp_path, dataset=dataset)


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path) -> None:
    model = tiny_edm()
    next(model.parameters()).data.fill_(torch.nan)
    with pytest.raises(WorkError, match="the loss is nan"):
        run(tmp_path, model=model)


def test_the_learning_rate_ramps_by_images_seen_before_the_step() -> None:
    recipe = Recipe(lr=2.0, lr_rampup_kimg=10)
    assert [recipe.lr_at(n) for n in (0, 5000, 10_000, 50_000)] == [0, 1, 2, 2]


def test_the_average_follows_the_published_half_life_and_its_ramp() -> None:
    recipe = Recipe(batch_size=500, ema_halflife_kimg=1.0)
    assert recipe.average_decay(0) == pytest.approx(0.5**0.5)
    ramped = dataclasses.replace(recipe, ema_rampup_ratio=0.05)
    assert ramped.average_decay(0) == 0
    assert ramped.average_decay(10_000) == pytest.approx(0.5)
    assert ramped.average_decay(10**9) == pytest.approx(0.5**0.5)


def test_broken_gradients_are_repaired() -> None:
    parameter = torch.nn.Parameter(torch.zeros(3))
    parameter.grad = torch.tensor([torch.nan, torch.inf, -torch.inf])
    Recipe().repair_gradients([parameter])
    assert parameter.grad.tolist() == [0, 1e5, -1e5]


def test_a_full_disk_while_saving_the_state_is_told_and_keeps_the_old_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(content: object, file: IO[bytes], **settings: object) -> None:
        file.write(b"half a state")
        try:
            raise OSError(errno.ENOSPC, "No space left on device")
        except OSError:
            raise RuntimeError("unexpected pos 64 vs 0")  # noqa: B904 - as torch's writer hides the cause

    run(tmp_path, num_steps=2, snapshots=())
    before = (tmp_path / STATE_FILE).read_bytes()
    for snapshot in tmp_path.glob("*.safetensors"):
        snapshot.unlink()
    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(WorkError, match=r"training-state.pt: the disk is full"):
        run(tmp_path, num_steps=3, snapshots=())
    assert (tmp_path / STATE_FILE).read_bytes() == before
    assert not list(tmp_path.glob("*.partial")) and not list(tmp_path.glob(".*.partial"))
