"""The run behind `neon improve`: each stage leaves its result in the folder and is skipped if it is there.

synthetic set S -> self-training -> choice of w on selection seeds, with the sampler of S and, with a set of its own,
with the base's best one -> report on other seeds (neon.tune.outcome) -> improved weights and model card.
"""

import platform
import shlex
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from neon import __version__
from neon.data.prompts import sharing
from neon.errors import note
from neon.improve.estimate import duration_text, seconds_of, stages
from neon.improve.plan import ImprovePlan
from neon.model import GenerativeModel
from neon.noise import Purpose, image_seeds
from neon.report.card import Card, write_card
from neon.report.words import scores_of
from neon.runtime.distributed import Processes
from neon.runtime.files import sha256_file, write_json
from neon.runtime.hub import short_name
from neon.runtime.run_folder import RUN_FILE, held_by_main
from neon.runtime.trackers import Tracker, TrackerName
from neon.selftrain import Snapshot, usual_micro_batch
from neon.tune.inputs import Inputs
from neon.tune.outcome import SCORES_FILE, Outcome, Presentation, choose
from neon.tune.retrain import SelfTraining
from neon.tune.run import Tuner
from neon.tune.scorer import Scorer

LEAST_MOVE, AIM, MOST_RAISED = 5e-3, 1e-2, 1000.0
"""|self-trained - base| / |base| below which a self-training is done again, what it then aims at, and by how much it
raises the learning rate at most. The demo's moves by 2e-2, and w = 0.9 is best; half of that wants twice the w"""

AGAIN = ("--out", "runs/again")
"""where a run is repeated, in the command that its page shows"""


@dataclass(frozen=True, kw_only=True)
class Base:
    """The model to improve."""

    path: Path
    load: Callable[[bool], GenerativeModel]
    """whole, to sample from or (True) to train"""
    key: str | None = None
    """nesting of the state dict in the file"""


def improve(
    plan: ImprovePlan,
    base: Base,
    inputs: Inputs,
    out: Path,
    processes: Processes,
    *,
    recipe: dict[str, Any],
    presentation: Presentation,
    fresh: bool = False,
    log: TrackerName | None = None,
) -> Outcome:
    """Improve `base` for the sampler of `inputs`, or do what is left of it, in the folder `out`.

    Args:
        recipe: what the run is asked for, as JSON by the names of flags: kept in `run.json`, where a run can be
            repeated from.
        log: a tracker that all curves go to as well.

    Raises:
        RequestError: the folder holds something else, or another process works in it.
        WorkError: the disk is full, the weights did not move, or the base cannot be scored.
    """
    begun, model, settings = time.monotonic(), inputs.model, inputs.settings
    self_training = training_of(plan, base, model, log)
    identity = processes.on_main(lambda: identity_of(base, model, settings, recipe, inputs.facts))
    with held_by_main(out, identity, processes, fresh=fresh), Tracker(log, out, identity, processes) as tracker:
        say_what_is_left(plan, model, settings, inputs, out, processes)
        self_training, snapshots = self_trained(plan, self_training, settings, out, processes)
        search = plan.tune_plan(base.path, base.key, snapshots, plan.guidances(model, settings))
        scorer = Scorer(search, model, inputs.selection, inputs.reporting, out, processes, tracker)
        given = Tuner(search, scorer, settings)
        provenance = processes.on_main(lambda: {**identity, **_provenance(plan, given)})
        shown = replace(
            presentation,
            notes=(*presentation.notes, *notes_of(plan, self_training, model)),
            again=presentation.again or shlex.join(["neon", "improve", "--recipe", str(out / RUN_FILE), *AGAIN]),
        )
        outcome = choose(given, shown, provenance, self_training)
        scorer.put_base()  # whoever handed it in finds it as it was
        seconds = {**self_training.seconds, "evaluation": outcome.seconds, "all": time.monotonic() - begun}
        processes.on_main(lambda: _write_card(plan, base, outcome))
        processes.on_main(lambda: _write_scores(outcome, out, seconds))
    return outcome


def training_of(plan: ImprovePlan, base: Base, model: GenerativeModel, log: TrackerName | None = None) -> SelfTraining:
    """How the plan draws a synthetic set of `base` and trains on it."""
    recipe = plan.recipe(model)
    steps = -(-plan.budget // recipe.batch_size)
    usual = usual_micro_batch(recipe.batch_size, model.batch_multiple, 64)
    return SelfTraining(
        load=base.load,
        num_synthetic=plan.num_synthetic,
        num_steps=steps,
        snapshot_steps=tuple(sorted({-(-steps * part // plan.snapshots) for part in range(1, plan.snapshots)})),
        recipe=recipe,
        micro_batch=plan.batch_gpu or usual,
        batch_size=plan.batch_size,
        seed=plan.seed,
        lora=plan.lora(model),
        gradient_checkpointing=plan.gradient_checkpointing,
        compile_network=plan.compile,
        parallel=plan.parallel,
        workers=plan.workers,
        log=log,
    )


def self_trained(
    plan: ImprovePlan, training: SelfTraining, settings: Any, out: Path, processes: Processes
) -> tuple[SelfTraining, tuple[Path, ...]]:
    """The snapshots of a self-training that moved the weights, and how it was done.

    The published learning rate is made for the published budget: over few images it may leave the weights where they
    are, so that any w is hidden by rounding and noise. Then, unless the rate was asked for, the training is done once
    more at one raised in proportion to what is missing (Adam's steps are proportional to it).

    Raises:
        WorkError: the weights did not move, or as `train`.
    """
    if plan.lr is not None:
        return training, training(settings, out, processes)
    snapshots = replace(training, may_stay=True)(settings, out, processes)
    moved = processes.on_main(Snapshot(images_seen=plan.budget, path=snapshots[-1]).moved) or 0.0
    if moved >= LEAST_MOVE:
        return training, snapshots
    lr = training.recipe.lr * min(AIM / moved if moved else MOST_RAISED, MOST_RAISED)
    note(
        f"at the published learning rate {training.recipe.lr:g} so few images move the weights by {moved:.1e} of their "
        f"norm only; training at {lr:.2g} (--lr sets another)"
    )
    faster = replace(training, name=f"{training.name}-faster", recipe=replace(training.recipe, lr=lr))
    return faster, faster(settings, out, processes)


def identity_of(
    base: Base, model: GenerativeModel, settings: Any, recipe: dict[str, Any], facts: dict[str, Any]
) -> dict[str, Any]:
    """What a run is determined by, as JSON; `facts` say what beside base, sampler and recipe."""
    return {
        "neon": __version__,
        "torch": torch.__version__,
        "architecture": model.architecture,
        "recipe": recipe,
        "base_sha256": sha256_file(base.path),
        "settings": asdict(settings),
        **model.protocol,
        **facts,
    }


def say_what_is_left(
    plan: ImprovePlan, model: GenerativeModel, settings: Any, inputs: Inputs | None, out: Path, processes: Processes
) -> None:
    """How long a run that begins will take."""
    if processes.on_main((out / "synthetic").exists):
        return
    found = stages(plan, model, settings, None if inputs is None else inputs.extractor.dim)
    left = seconds_of(found, inputs, model, settings, plan, processes)
    note(f"about {duration_text(left)} left at most, by the first batch; a killed run goes on where it was")


def notes_of(plan: ImprovePlan, training: SelfTraining, model: GenerativeModel) -> tuple[str, ...]:
    """How the weights came about, as sentences."""
    recipe, lora = training.recipe, training.lora
    prompts = (f"{sharing(len(model.prompts))}.",) if model.prompts else ()
    return (
        f"Synthetic set: {plan.num_synthetic:,} images of the sampler. Self-training: {training.num_steps:,} steps of "
        f"{recipe.batch_size:,} images at learning rate {recipe.lr:g}"
        + (f", rising over {1000 * recipe.rampup_kimg:,.0f} images" if recipe.rampup_kimg else "")
        + (f"; averaged weights of half-life {1000 * recipe.halflife_kimg:,.0f} images" if recipe.halflife_kimg else "")
        + "."
        + ("" if lora is None else f" Trained was a {lora.text}; the weights were left as they are."),
        *prompts,
    )


def _provenance(plan: ImprovePlan, tuner: Tuner) -> dict[str, Any]:
    """What it takes to make the figures again, beside what the run is determined by."""

    def span(purpose: Purpose, count: int) -> str:
        seeds = image_seeds(purpose, plan.seed, count)
        return f"{seeds[0]}-{seeds[-1]}"

    return {
        "self_trained": sha256_file(tuner.snapshots[-1]),
        "formula": "(1 + w) base - w self_trained",
        "synthetic_seeds": span(Purpose.SYNTHETIC, plan.num_synthetic),
        "selection_seeds": span(Purpose.SELECTION, plan.select_images),
        "report_seeds": span(Purpose.REPORT, plan.blocks * plan.images_of_report),
        "python": platform.python_version(),
        "machine": platform.machine(),
        "processes": tuner.scorer.processes.world_size,
    }


def _write_card(plan: ImprovePlan, base: Base, outcome: Outcome) -> None:
    """The model card of the improved weights, if there are any."""
    if not outcome.weights:
        return
    tuner, point = outcome.recommended
    model, settings = tuner.scorer.model, tuner.settings_at(point)
    card = Card(
        architecture=model.architecture,
        weights=tuple(path.name for path in outcome.weights),
        base=short_name(base.path),
        base_sha256=sha256_file(base.path),
        w=point.w,
        settings=asdict(settings),
        synthetic_settings=None if settings == tuner.settings else asdict(tuner.settings),
        synthetic_images=plan.num_synthetic,
        training_images=plan.budget,
        image_shape=model.image_shape,
        num_classes=model.num_classes,
        real=Path(tuner.scorer.reporting[0].frechet.statistics.name).name,  # folders are nobody's business
    )
    write_card(tuner.scorer.folder, outcome.report, card)


def _write_scores(outcome: Outcome, out: Path, seconds: dict[str, float]) -> None:
    content = {
        **scores_of(outcome.report),
        "num_images": outcome.given.plan.report_images,
        "seconds": round(seconds["all"], 1),
        "seconds_of": {name: round(value, 1) for name, value in seconds.items()},
        "weights": [path.name for path in outcome.weights],
    }
    write_json(out / SCORES_FILE, content)
