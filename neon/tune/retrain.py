"""A self-training of one's own for another sampler: w belongs to the sampler that the synthetic set was drawn with."""

import contextlib
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from neon.data.shards import open_images
from neon.errors import WorkError
from neon.lora.settings import RECORD, LoRA, check_peft, recorded_lora
from neon.merge.pair import open_self_trained
from neon.model import GenerativeModel
from neon.noise import Purpose, image_seeds
from neon.recipe import Recipe
from neon.runtime.distributed import Processes
from neon.runtime.parallel import Parallel
from neon.runtime.trackers import TrackerName
from neon.sampling import write_samples
from neon.selftrain import EXAMPLES, encoded_once, train, usual_micro_batch
from neon.tune.plan import TunePlan


@dataclass(frozen=True, kw_only=True)
class SelfTraining:
    """How a synthetic set is drawn from the base, and the base trained on it."""

    load: Callable[[bool], GenerativeModel]
    """the base, whole, to sample from or (True) to train"""
    num_synthetic: int
    """images of the set"""
    num_steps: int
    snapshot_steps: tuple[int, ...] = ()
    """steps after which snapshots are written, beside the last"""
    recipe: Recipe
    micro_batch: int
    batch_size: int
    """images per forward pass while sampling"""
    seed: int
    lora: LoRA | None = None
    """factors that are trained in the place of the weights"""
    gradient_checkpointing: bool = False
    compile_network: bool = False
    parallel: Parallel | None = None
    workers: int | None = None
    name: str = "self-training"
    """of the folder that is trained in"""
    may_stay: bool = False
    """whether weights that hardly moved are no failure"""
    log: TrackerName | None = None
    """a tracker that the curves of the training go to as well"""
    seconds: dict[str, float] = field(default_factory=dict)
    """that sampling and training have taken in this process"""

    @contextlib.contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Add the seconds of the block to those of a stage."""
        begun = time.monotonic()
        yield
        self.seconds[stage] = self.seconds.get(stage, 0.0) + time.monotonic() - begun

    def __call__(self, settings: Any, folder: Path, processes: Processes, suffix: str = "") -> tuple[Path, ...]:
        """The snapshots; set and training lie in `folder`, which the caller holds, and a killed run goes on there.

        `suffix` is of the names of both.

        Raises:
            WorkError: the weights did not move, or as `train`.
        """
        if self.lora is not None:
            check_peft()
        synthetic = folder / f"synthetic{suffix}"
        seeds = image_seeds(Purpose.SYNTHETIC, self.seed, self.num_synthetic)
        with self.timed("sampling"):
            model = self.load(False)
            labels = model.labels_for(Purpose.SYNTHETIC, len(seeds), self.seed)
            write_samples(
                model, seeds, settings, synthetic, batch_size=self.batch_size, processes=processes, label=labels
            )  # fmt: skip
        with self.timed("self_training"):
            model = self.load(True)
            examples = folder / f"{EXAMPLES}{suffix}"
            dataset = encoded_once(model, open_images(synthetic), examples, processes, self.batch_size)
            snapshots = train(
                model,
                dataset,
                folder / f"{self.name}{suffix}",
                num_steps=self.num_steps,
                snapshot_steps=self.snapshot_steps,
                recipe=replace(self.recipe, scale_losses=model.precision.name == "fp16"),
                seed=self.seed,
                processes=processes,
                micro_batch=self.micro_batch,
                title="self-training",
                lora=self.lora,
                gradient_checkpointing=self.gradient_checkpointing,
                compile_network=self.compile_network,
                parallel=self.parallel,
                workers=self.workers,
                log=self.log,
            )
        last = snapshots[-1]
        if not self.may_stay and (unmoved := processes.on_main(last.unmoved)):
            raise WorkError(
                f"{unmoved}; train on more (--training_images), or use the weights that are given, without a "
                "self-training of its own"
            )
        return tuple(snapshot.path for snapshot in snapshots)


def self_training_of(
    plan: TunePlan, model: GenerativeModel, load: Callable[[bool], GenerativeModel], largest_micro_batch: int = 64
) -> SelfTraining | None:
    """A self-training like that of the plan's last snapshot, as far as its file says; flags of the plan win.

    None: neither tells how many images it was trained on.
    """
    with open_self_trained(plan.self_trained[-1], plan.key, plan.self_trained_key) as checkpoint:
        metadata = checkpoint.metadata
    record = _record(metadata.get("training"))
    seen = metadata.get("images_seen", "")
    images_seen = plan.training_images or (int(seen) if seen.isdecimal() else 0)
    if not images_seen:
        return None
    recipe = _recipe(model.recipe.scaled_to(images_seen), record.get("recipe"))
    known = record.get("images")
    return SelfTraining(
        load=load,
        num_synthetic=plan.synthetic_images or (known if isinstance(known, int) and known > 0 else images_seen),
        num_steps=-(-images_seen // recipe.batch_size),
        recipe=recipe,
        micro_batch=usual_micro_batch(recipe.batch_size, model.batch_multiple, largest_micro_batch),
        batch_size=plan.batch_size,
        seed=plan.seed,
        lora=recorded_lora(record.get(RECORD)),
        parallel=plan.parallel,
        workers=plan.workers,
    )


def _record(text: str | None) -> dict[str, Any]:
    """What a snapshot says of its training; empty if nothing that can be read."""
    try:
        record = json.loads(text or "{}")
    except (ValueError, RecursionError):
        return {}
    return record if isinstance(record, dict) else {}


def _recipe(usual: Recipe, facts: Any) -> Recipe:
    """`usual` with what the record of a training says in its place, where it is of the same kind."""
    if not isinstance(facts, dict):
        return usual
    known = {field.name: getattr(usual, field.name) for field in fields(usual)}
    given: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in facts.items()
        if name in known and name != "budget_images"
    }
    try:
        return replace(usual, **given)
    except (TypeError, ValueError):  # of another kind of network
        return usual
