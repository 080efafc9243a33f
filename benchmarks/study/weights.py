"""Weights beside a base, made as files: by training on S or on real images, or by a random step."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from neon.checkpoint import load_state
from neon.errors import WorkError
from neon.merge import LiveMerge
from neon.model import GenerativeModel, save_model
from neon.runtime.distributed import Processes
from neon.selftrain import train
from neon.tune.retrain import SelfTraining
from study.families import Family
from study.plan import Contrasted, Direction, RandomStep, RealTrained, Sampler, SelfTrained, slug

BUDGETS = (12, 25, 50, 100, 200, 400)
"""steps after which trainings leave snapshots, so that rows of several budgets share one"""

State = dict[str, Tensor]
SettingsOf = Callable[[Sampler], object]
"""the settings of a sampler, searched if need be"""


def made(direction: Direction, family: Family, base: Path, folder: Path, settings_of: SettingsOf) -> Path:
    """The file of the weights of `direction`, in `folder`, where a killed training goes on."""
    if isinstance(direction, SelfTrained):
        return _self_trained(direction, family, base, folder, settings_of)
    if isinstance(direction, RealTrained):
        return _real_trained(direction, family, base, folder)
    if isinstance(direction, Contrasted):
        from study.contrast import contrasted  # it needs what is here

        return contrasted(direction, family, base, folder, settings_of)
    path = folder / f"{slug(direction)}.safetensors"
    if not path.exists():
        like = load_state(_self_trained(direction.like, family, base, folder, settings_of))
        model = family.load(base, False)
        save_model(path, model, _random_step(direction, model, like))
    return path


def images_of(direction: Direction, family: Family) -> tuple[int, int]:
    """(images sampled, images trained on) behind the weights of `direction`."""
    if isinstance(direction, RandomStep):
        return images_of(direction.like, family)
    batch = family.recipe(family.load(family.bases[0], False)).batch_size
    if isinstance(direction, Contrasted):
        return direction.num, 2 * batch * direction.steps
    steps = direction.steps or family.steps
    sampled = (direction.num or family.num_synthetic) if isinstance(direction, SelfTrained) else 0
    return sampled, steps * batch


def merged_file(path: Path, model: GenerativeModel, base: State, other: Path, w: float) -> Path:
    """The merge of `base` away from `other` at w, as a file that takes the place of a base."""
    if not path.exists():
        LiveMerge(model.network, base, load_state(other)).set(w)
        save_model(path, model)
    return path


def self_training_of(direction: SelfTrained | Contrasted, family: Family, base: Path) -> SelfTraining:
    """How S is drawn and trained on."""
    steps = direction.steps or family.steps
    return SelfTraining(
        load=lambda for_training: family.load(base, for_training),
        num_synthetic=direction.num or family.num_synthetic,
        num_steps=steps,
        snapshot_steps=tuple(budget for budget in BUDGETS if budget < steps),
        recipe=family.recipe(family.load(base, True)),
        micro_batch=family.micro_batch,
        batch_size=family.batch_size,
        seed=direction.seed,
        may_stay=True,
    )


def _self_trained(direction: SelfTrained, family: Family, base: Path, folder: Path, settings_of: SettingsOf) -> Path:
    """Trainings that differ in their budgets only share a folder, if these are usual ones."""
    usual = direction.steps == 0 or direction.steps in BUDGETS
    kept = replace(direction, steps=0) if usual else direction
    own = folder / slug(kept)
    training = self_training_of(direction, family, base)
    if (found := _snapshot(own / "self-training", training.num_steps * training.recipe.batch_size)) is not None:
        return found
    if direction.source:
        from study.source import write_foreign_set  # it needs what is here

        write_foreign_set(direction, family, own / "synthetic")
    snapshots = training(settings_of(direction.sampler), own, Processes())
    return _moved(snapshots[-1], base)


def _real_trained(direction: RealTrained, family: Family, base: Path, folder: Path) -> Path:
    model, steps = family.load(base, True), direction.steps or family.steps
    snapshots = train(
        model,
        family.data().real(),
        folder / slug(direction),
        num_steps=steps,
        snapshot_steps=[],
        recipe=family.recipe(model),
        seed=direction.seed,
        processes=Processes(),
        micro_batch=family.micro_batch,
        title="training on real images",
    )
    return _moved(snapshots[-1].path, base)


def _snapshot(folder: Path, images_seen: int) -> Path | None:
    path = folder / f"snapshot-{images_seen / 1000:010.3f}-kimg.safetensors"
    return path if path.exists() else None


def _moved(path: Path, base: Path) -> Path:
    """`path`, if its weights are not those of the base."""
    first, last = load_state(base), load_state(path)
    if all(torch.equal(last[name], tensor) for name, tensor in first.items()):
        raise WorkError(f"{path}: the training left the weights where they were")
    return path


def _random_step(direction: RandomStep, model: GenerativeModel, like: State) -> State:
    """The state of `model`, which is the base, with its weights moved; buffers stay as they are."""
    generator = torch.Generator().manual_seed(direction.seed)
    weights = {name: parameter.detach() for name, parameter in model.network.named_parameters()}
    steps = {name: torch.randn(tensor.shape, generator=generator) for name, tensor in weights.items()}
    lengths = {name: float((like[name] - tensor).norm()) for name, tensor in weights.items()}
    if direction.per_tensor:
        scales = {name: lengths[name] / float(step.norm()) for name, step in steps.items()}
    else:
        total = sum(length**2 for length in lengths.values()) ** 0.5
        noise = sum(float(step.square().sum()) for step in steps.values()) ** 0.5
        scales = dict.fromkeys(steps, total / noise)
    # A merge goes away from these weights: at w > 0 along the negative of the step, which is as random.
    moved = {name: tensor + scales[name] * steps[name] for name, tensor in weights.items()}
    return {**model.network.state_dict(), **moved}
