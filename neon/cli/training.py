"""What every finetune.py of the newer architectures shares: flags, the plan of a run, and the run itself."""

from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from neon.checkpoint import load_state, open_checkpoint
from neon.checkpoint.pickle_format import PickleCheckpoint
from neon.data.images import TrainingImages
from neon.errors import RequestError, warn
from neon.model import GenerativeModel
from neon.recipe import Recipe
from neon.runtime.distributed import Processes
from neon.selftrain import Snapshot, largest_divisor, snapshot_steps, train_in_folder


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How long and in what batches to train; an architecture adds how fast."""

    batch: int
    """images per step, over all processes"""
    total_images: int
    """budget"""
    save_interval: int
    """images between snapshots"""


SomePlan = TypeVar("SomePlan", bound=Plan)


@dataclass(frozen=True, kw_only=True)
class TrainingFlags:
    """Training: on what, for how long and where."""

    data: Path
    """folder or zip of images with dataset.json, or a set encoded before"""
    outdir: Path
    """folder of snapshots, log and state"""
    batch: int | None = None
    """images per step, over all processes"""
    batch_gpu: int | None = None
    """images per forward pass; it moves results by rounding (and dropout)"""
    total_images: int | None = None
    """budget"""
    save_interval: int | None = None
    """images between snapshots"""
    state_every: float = 300.0
    """seconds between saves of the state of the run"""
    seed: int = 0
    """of initial weights, data order and noise"""
    fresh: bool = False
    """start anew, replacing a run that is in the folder"""

    def completed(self, preset: SomePlan, zero: Collection[str] = ()) -> SomePlan:
        """`preset` with what was given in its place; a RequestError for what is not above 0 (`zero`: may be 0)."""
        given = {name: value for name in asdict(preset) if (value := getattr(self, name)) is not None}
        plan = replace(preset, **given)
        for name, value in {**asdict(plan), "state_every": self.state_every}.items():
            if not (value > 0 or (name in zero and value == 0)):
                raise RequestError(f"--{name} {value}: expected a positive number")
        return plan

    def run(
        self,
        model: GenerativeModel,
        dataset: TrainingImages,
        plan: Plan,
        recipe: Recipe,
        identity: dict[str, Any],
        processes: Processes,
        *,
        largest_micro_batch: int,
        title: str,
        **settings: Any,
    ) -> None:
        """Train into `outdir`, or what is left of it; `identity` is what determines the result beside plan and recipe.

        `settings` as in `neon.selftrain.train`.
        """
        steps = snapshot_steps(plan.batch, plan.total_images, plan.save_interval)
        multiple = model.batch_multiple
        fitting = multiple * largest_divisor(max(plan.batch // multiple, 1), max(largest_micro_batch // multiple, 1))
        train_in_folder(
            model,
            dataset,
            self.outdir,
            record={**identity, "plan": asdict(plan), "recipe": asdict(recipe), "seed": self.seed},
            fresh=self.fresh,
            num_steps=steps[-1],
            snapshot_steps=steps,
            recipe=recipe,
            seed=self.seed,
            processes=processes,
            micro_batch=self.batch_gpu or fitting,
            state_every_seconds=self.state_every,
            title=title,
            identity=identity,
            **settings,
        )


def pickle_copies(base: Path | None, key: str | None) -> Callable[[Snapshot], None] | None:
    """What writes a snapshot also as a copy of the published pickle `base`; None if `base` is not one.

    The copies are named by thousand images. Warns if `base` is such a pickle and cannot be copied.
    """
    if base is None:
        return None
    with open_checkpoint(base, key) as checkpoint:
        if not isinstance(checkpoint, PickleCheckpoint):
            return None
        try:
            checkpoint.check_copyable()
        except RequestError as error:
            warn(f"{error}; snapshots will be .safetensors only")
            return None

    def write(snapshot: Snapshot) -> None:
        copy = snapshot.path.with_name(f"network-snapshot-{snapshot.images_seen // 1000:06d}.pkl")
        if not copy.exists():
            with open_checkpoint(base, key) as checkpoint:
                assert isinstance(checkpoint, PickleCheckpoint)
                checkpoint.save_with(copy, load_state(snapshot.path))

    return write
