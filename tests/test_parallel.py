"""Engines of training: several processes end as one does, however they share the work, and go on from each other."""

import json
import os
import pickle
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from neon.checkpoint import open_checkpoint
from neon.errors import RequestError, WorkError
from neon.lora.settings import LoRA
from neon.model import GenerativeModel
from neon.noise import ImageNoise
from neon.recipe import Recipe
from neon.runtime.distributed import Processes, processes
from neon.runtime.parallel import Parallel
from neon.selftrain import TrainingRun, shards, train
from neon.selftrain.memory import Kept, enough_memory, fitting
from neon.trained import checkpoint_gradients, repeated_parts
from tests.programs import Killed, dies_after, log, losses
from tests.tiny import tiny_colour_images, tiny_edm, tiny_images, tiny_imm, tiny_var, tiny_xar
from tests.workers import Workers
from VAR.recipe import VARRecipe
from xAR.recipe import XARRecipe

TOLERANCE = 2e-6
# Three micro-batches: of two processes one computes twice as much, of four one nothing. An eps of the size of gradients
# makes weights depend on these, and not on the sign of their rounding. Gradients of VAR are shortened.
EDM_RECIPE = Recipe(batch_size=12, lr=1e-3, eps=1.0, ema_halflife_kimg=0.02, scale_losses=True)
VAR_RECIPE = VARRecipe(batch_size=12, lr=1e-3, eps=1e-2, total_images=0, max_norm=0.05)
XAR_RECIPE = XARRecipe(batch_size=12, lr=1e-3, eps=1e-2, max_norm=0.05)


@dataclass(frozen=True)
class Case:
    """A training."""

    model: Any
    recipe: Recipe
    settings: Mapping[str, Any] = field(default_factory=dict)

    def train(self, folder: Path, group: Processes, parallel: Parallel | None = None) -> None:
        model: GenerativeModel = self.model()
        images = tiny_images() if model.image_shape[0] == 1 else tiny_colour_images()
        train(
            model, images, folder, snapshot_steps=[], recipe=self.recipe, seed=0, processes=group, micro_batch=4,
            keep_raw=True, parallel=parallel, **{"num_steps": 2, **self.settings},
        )  # fmt: skip


CASES = {
    "edm": Case(lambda: tiny_edm(dropout=0.1, augment_dim=2), EDM_RECIPE),
    "var": Case(tiny_var, VAR_RECIPE),
    "xar": Case(tiny_xar, XAR_RECIPE, {"gradient_checkpointing": True}),
    "lora": Case(tiny_edm, EDM_RECIPE, {"lora": LoRA(rank=2, alpha=2.0, targets=("all",))}),
}
RUNS: Mapping[int, tuple[tuple[str, Parallel], ...]] = {
    1: (("edm", "ddp"), ("edm", "fsdp"), ("var", "fsdp"), ("lora", "fsdp")),
    2: (("edm", "ddp"), ("edm", "fsdp"), ("var", "ddp"), ("var", "fsdp"), ("xar", "fsdp"), ("lora", "ddp")),
    4: (("edm", "ddp"), ("edm", "fsdp"), ("var", "fsdp")),
}


def train_all(world_size: int) -> None:
    with processes("cpu") as group:
        for name, parallel in RUNS[world_size]:
            CASES[name].train(Path(f"{name}-{parallel}"), group, parallel)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("alone")
    for name, case in CASES.items():
        case.train(folder / name, Processes())
    return folder


@pytest.mark.parametrize("world_size", RUNS)
def test_several_processes_end_with_the_weights_of_one(
    alone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: Workers, world_size: int
) -> None:
    if world_size == 1:
        monkeypatch.chdir(tmp_path)
        train_all(world_size)
    else:
        workers.run("tests.test_parallel:train_all", world_size, folder=tmp_path, world_size=world_size)
    for name, parallel in RUNS[world_size]:
        expect_same(alone / name, tmp_path / f"{name}-{parallel}")


def expect_same(one: Path, many: Path) -> None:
    names = sorted(path.name for path in one.glob("*.safetensors"))
    assert names and names == sorted(path.name for path in many.glob("*.safetensors"))
    for name in names:
        with open_checkpoint(one / name) as first, open_checkpoint(many / name) as second:
            for key in first.names():
                torch.testing.assert_close(second.tensor(key), first.tensor(key), rtol=0, atol=TOLERANCE)
            if "moved" in first.metadata:
                assert float(second.metadata["moved"]) == pytest.approx(float(first.metadata["moved"]), rel=1e-4)
    assert losses(many) == pytest.approx(losses(one), rel=1e-5)


# The state of a run


def killed(folder: Path, parallel: Parallel | None, group: Processes) -> None:
    with dies_after(2, TrainingRun, "one_step"), pytest.raises(Killed):
        LONGER.train(folder, group, parallel)


LONGER = Case(tiny_edm, EDM_RECIPE, settings={"num_steps": 3, "state_every_seconds": 0.0})


def begin() -> None:
    with processes("cpu") as group:
        killed(Path("fsdp"), "fsdp", group)
        killed(Path("ddp"), "ddp", group)


def go_on() -> None:
    with processes("cpu") as group:
        LONGER.train(Path("fsdp"), group)  # as the folder says
        LONGER.train(Path("ddp"), group, "ddp")


def test_a_run_goes_on_with_another_number_of_processes(tmp_path: Path, workers: Workers) -> None:
    LONGER.train(tmp_path / "alone", Processes())
    workers.run("tests.test_parallel:begin", folder=tmp_path, world_size=2)
    (tmp_path / "fsdp/training-state/step-9").mkdir()  # of a save that was killed
    workers.run("tests.test_parallel:go_on", folder=tmp_path, world_size=3)
    for parallel in ("fsdp", "ddp"):
        expect_same(tmp_path / "alone", tmp_path / parallel)
    assert sorted(path.name for path in (tmp_path / "fsdp/training-state").iterdir()) == ["state.json", "step-3"]


def test_a_save_that_is_killed_leaves_the_state_before(tmp_path: Path) -> None:
    with dies_after(1, shards, "write_shards"), pytest.raises(Killed):
        LONGER.train(tmp_path, Processes(), "fsdp")
    facts = json.loads((tmp_path / "training-state/state.json").read_text())
    assert (facts["step"], facts["folder"]) == (1, "step-1")
    LONGER.train(tmp_path, Processes(), "fsdp")
    assert [row["step"] for row in log(tmp_path)] == [1, 2, 3]


@pytest.mark.parametrize(("before", "now"), [("fsdp", "ordered"), ("ordered", "fsdp")])
def test_state_of_an_engine_that_keeps_it_otherwise_is_refused(tmp_path: Path, before: Parallel, now: Parallel) -> None:
    killed(tmp_path, before, Processes())
    with pytest.raises(RequestError, match=rf"training-state.*--parallel {before}.*this one has {now}; go on"):
        LONGER.train(tmp_path, Processes(), now)


class Hostile:
    """Makes a file when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("hostile",)


def run_when_read(metadata: Any) -> Any:
    return Hostile()


def pickle_elsewhere(metadata: Any) -> Any:
    from torch.distributed.checkpoint.metadata import BytesStorageMetadata

    name = next(iter(metadata.state_dict_metadata))
    metadata.state_dict_metadata[name] = BytesStorageMetadata()
    return metadata


def file_elsewhere(metadata: Any) -> Any:
    for index, place in metadata.storage_data.items():
        metadata.storage_data[index] = replace(place, relative_path="../../other")
    return metadata


@pytest.mark.parametrize("change", [run_when_read, pickle_elsewhere, file_elsewhere, lambda _: {"a": 1}])
def test_a_hostile_run_folder_runs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Any) -> None:
    monkeypatch.chdir(tmp_path)
    killed(Path("run"), "fsdp", Processes())
    (file,) = Path("run/training-state").glob("step-*/.metadata")
    file.write_bytes(pickle.dumps(change(pickle.loads(file.read_bytes()))))
    with pytest.raises(RequestError, match=r"run/training-state/state.json: damaged .*delete"):
        LONGER.train(Path("run"), Processes(), "fsdp")
    assert not Path("hostile").exists()


@pytest.mark.parametrize("text", ['{"identity": "{}"}', "[]", "", '{"step": 1, "identity": 3}'])
def test_damaged_facts_of_a_state_are_told(tmp_path: Path, text: str) -> None:
    (tmp_path / "training-state").mkdir()
    (tmp_path / "training-state/state.json").write_text(text)
    with pytest.raises(RequestError, match=r"training-state/state.json: (damaged|a run with other settings)"):
        LONGER.train(tmp_path, Processes(), "fsdp")


# Memory

SMALL, LARGE = 20_000_000_000, 70_000_000_000
KEPT = Kept(weights=10_000_000_000, trained=10_000_000_000, copies=3, largest=500_000_000)  # whole: 50 GB


def test_what_fits_is_chosen(capsys: pytest.CaptureFixture[str]) -> None:
    assert fitting(KEPT, LARGE, 4, None, "ddp") == "ddp" and not capsys.readouterr().err
    assert fitting(KEPT, SMALL, 4, None, "ddp") == "fsdp"
    (line,) = capsys.readouterr().err.splitlines()
    assert "training keeps 50.0 GB and a GPU has room for 20.0 GB: spread over 4 processes (--parallel fsdp)" in line
    assert fitting(KEPT, 52_000_000_000, 4, "ddp", "ddp") == "ddp", "what is asked for is done if it may fit"


@pytest.mark.parametrize(
    ("world_size", "asked", "advice"),
    [
        (4, "ddp", "50.0 GB on each GPU .* room for 20.0 GB; expected --parallel fsdp; or --lora_rank"),
        (2, None, "50.0 GB on each GPU .* expected 3 GPUs or more with --parallel fsdp"),
        (2, "fsdp", "26.0 GB on each GPU .* expected 3 GPUs or more"),
        (1, None, "50.0 GB .* expected 3 GPUs or more"),
    ],
)
def test_too_little_memory_is_refused_with_what_would_do(world_size: int, asked: Any, advice: str) -> None:
    with pytest.raises(RequestError, match=advice):
        fitting(KEPT, SMALL, world_size, asked, "ddp" if world_size > 1 else "ordered")


def test_running_out_of_memory_says_what_takes_less() -> None:
    advice = r"run: the GPU .*--batch_gpu, --gradient_checkpointing.*--parallel fsdp"
    with pytest.raises(WorkError, match=advice), enough_memory(Path("run")):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


@pytest.mark.parametrize(
    ("model", "examples"),
    [
        (lambda: tiny_edm(dropout=0.5), torch.randn(4, 1, 8, 8)),
        (tiny_var, torch.arange(84).view(4, 21) % 16),
        (tiny_xar, torch.randn(4, 8, 4, 4)),
        (lambda: tiny_imm(dropout=0.5), torch.randn(4, 8, 2, 2)),
    ],
    ids=["EDM", "VAR", "xAR", "IMM"],
)
def test_activations_that_are_computed_once_more_move_no_bit(model: Any, examples: torch.Tensor) -> None:
    def gradients(checkpointed: bool) -> tuple[list[torch.Tensor | None], int]:
        one, calls = model(), []
        one.network.train().requires_grad_(True)
        if checkpointed:
            checkpoint_gradients(one)
        inside = next(repeated_parts(one.network)[-1].children())
        inside.register_forward_hook(lambda *_: calls.append(1))
        torch.manual_seed(0)
        one.training_loss(examples, torch.tensor([0, 1, 2, 0]), ImageNoise(range(4))).mean().backward()
        return [parameter.grad for parameter in one.network.parameters()], len(calls)

    (plain, once), (again, twice) = gradients(False), gradients(True)
    assert twice == once + 1
    for first, second in zip(plain, again, strict=True):
        assert (first is None) == (second is None) and (first is None or torch.equal(first, second))
