"""The demo: every step of Neon, on a small EDM of Fashion-MNIST, through the code that large models use.

sample S -> self-train -> choose w on selection seeds, with the sampler of S and, with an S of its own, with the base's
best one -> report on other seeds (neon.tune.outcome). Each step leaves its result in the run folder and is skipped if
it is there, so a killed run goes on where it was.
"""

import platform
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from neon import __version__
from neon.demo.assets import BASE, FEATURES, REAL_IMAGES, TEST_STATISTICS, TRAIN_STATISTICS, real_images
from neon.evaluate import Reference
from neon.merge import merge_files
from neon.metrics import FrechetReference, Manifold, Statistics
from neon.metrics.features import features_of, load_features, score_name
from neon.model import GenerativeModel, load_model
from neon.noise import Purpose, image_seeds
from neon.recipe import Recipe
from neon.report.words import scores_of
from neon.runtime.distributed import Processes
from neon.runtime.files import hashes, sha256_file, write_json
from neon.runtime.run_folder import held_by_main
from neon.tune.outcome import SCORES_FILE, Outcome, Presentation, choose
from neon.tune.plan import TunePlan
from neon.tune.retrain import SelfTraining
from neon.tune.run import Tuner
from neon.tune.scorer import Scorer

HIGHEST_W = 1.5
"""end of the search: beyond, small models fall apart"""
NEON_FILE, BEST_SAMPLER_FILE = "neon.safetensors", "neon-best-sampler.safetensors"


@dataclass(frozen=True, kw_only=True)
class DemoPlan:
    """What a demo run is determined by: two runs of one plan give the same scores on one machine."""

    seed: int = 0
    base: Path = BASE
    """the model to improve"""
    num_synthetic: int = 1000
    """size of the synthetic set S"""
    num_steps: int = 5
    """Euler steps of the sampler: few, so that it seeks modes"""
    training_steps: int = 50
    recipe: Recipe = Recipe(batch_size=128, lr=1e-4)  # noqa: RUF009 - frozen
    """no averaging and no ramp: over so few images those would leave the weights where they are"""
    micro_batch: int = 32
    num_images: int = 1000
    """images behind each score"""
    num_blocks: int = 3
    """disjoint blocks of report seeds; the spread is over these"""
    batch_size: int = 100
    nearest_k: int = 5
    sampler_scores: int = 8
    """of the search for the base's best sampler"""
    picture_w: tuple[float, ...] = (-1.0,)
    """also evaluated, so that the curve shows both sides"""

    def __post_init__(self) -> None:
        image_seeds(Purpose.SYNTHETIC, self.seed, 0)  # refuses a seed out of range

    def identity(self) -> dict[str, Any]:
        """The plan and the hashes of all it starts from, as JSON."""
        assets = hashes({path.name: path for path in (FEATURES, TRAIN_STATISTICS, TEST_STATISTICS, REAL_IMAGES)})
        facts = {**asdict(self), "recipe": self.recipe.facts()}
        return {"neon": __version__, **facts, "base": sha256_file(self.base), "assets": assets}


def run_demo(plan: DemoPlan, out: Path, processes: Processes, *, fresh: bool = False) -> Outcome:
    """Run the demo, or what is left of it, into the folder `out`.

    Raises:
        RequestError: the folder holds something else, or another process works in it.
        WorkError: the disk is full.
    """
    started = time.monotonic()

    def load(for_training: bool) -> GenerativeModel:
        return load_model(plan.base, device=processes.device, for_training=for_training)

    model = load(False)
    sampler = replace(model.default_settings, solver="euler", num_steps=plan.num_steps)
    self_training = SelfTraining(
        load=load,
        num_synthetic=plan.num_synthetic,
        num_steps=plan.training_steps,
        snapshot_steps=(plan.training_steps // 2,),
        recipe=plan.recipe,
        micro_batch=plan.micro_batch,
        batch_size=plan.batch_size,
        seed=plan.seed,
    )
    with held_by_main(out, plan.identity(), processes, fresh=fresh):
        self_trained = self_training(sampler, out, processes)
        given = _tuner(plan, model, sampler, self_trained, out, processes)
        provenance = processes.on_main(lambda: _provenance(plan, given))
        outcome = choose(given, _presentation(plan, given), provenance, self_training)
        seconds = time.monotonic() - started

        def finish() -> None:
            merge_files(plan.base, self_trained, [given.best.w], out / NEON_FILE, overwrite=True)
            if (tuned := outcome.tuned) is not None:
                weights = tuned.snapshots[tuned.best.snapshot]
                merge_files(plan.base, weights, [tuned.best.w], out / BEST_SAMPLER_FILE, overwrite=True)
            write_json(out / SCORES_FILE, _scores(plan, outcome, seconds))

        processes.on_main(finish)
    return outcome


def _tuner(
    plan: DemoPlan, model: GenerativeModel, sampler: Any, self_trained: Path, out: Path, processes: Processes
) -> Tuner:
    """What scores merges of the base with the weights in `self_trained`, and chooses among them."""
    extractor = load_features(FEATURES, processes.device)
    manifold = Manifold(features_of(extractor, real_images().to(processes.device)), k=plan.nearest_k)
    selection, reporting = (
        Reference(frechet=FrechetReference(Statistics.load(path)), manifold=manifold)
        for path in (TRAIN_STATISTICS, TEST_STATISTICS)
    )
    tune_plan = TunePlan(
        base=plan.base,
        self_trained=(self_trained,),
        w=(0.0, HIGHEST_W),
        num_images=plan.num_images,
        report_images=plan.num_images,
        blocks=plan.num_blocks,
        batch_size=plan.batch_size,
        seed=plan.seed,
        limit=5,
        sampler_scores=plan.sampler_scores,
    )
    scorer = Scorer(tune_plan, model, extractor, selection, reporting, out, processes)
    return Tuner(tune_plan, scorer, sampler)


def _presentation(plan: DemoPlan, given: Tuner) -> Presentation:
    extractor = given.scorer.extractor
    return Presentation(
        title="Neon on Fashion-MNIST",
        picture_w=plan.picture_w,
        grid_size=50,
        real=real_images()[:50],
        notes=_notes(plan, given.scorer.model.image_shape[-1], score_name(extractor), extractor.dim),
    )


def _scores(plan: DemoPlan, outcome: Outcome, seconds: float) -> dict[str, Any]:
    """The content of `scores.json`: means over report blocks, and what they were made of."""
    given = [one for one in outcome.report.evaluated if one.sampler is None]
    return {
        **scores_of(outcome.report),
        "num_images": plan.num_images,
        "seconds": round(seconds, 1),
        "selection": {f"{one.w:g}": one.scores.distance for one in given if one.scores},
    }


def _notes(plan: DemoPlan, side: int, metric: str, dim: int) -> tuple[str, ...]:
    """How the weights came about, and what the scores are made against."""
    return (
        f"Base: a class-conditional EDM U-Net of Fashion-MNIST at {side} x {side} pixels, sampled by {plan.num_steps} "
        "Euler steps without guidance; few steps make it seek modes, the bias that Neon undoes.",
        f"Synthetic set: {plan.num_synthetic} images of that same sampler. Self-training: {plan.training_steps} "
        f"steps of {plan.recipe.batch_size} images at learning rate {plan.recipe.lr:g}.",
        "Selection is scored against statistics of the training images, the report against those of the 10,000 test "
        f"images; precision and recall by manifolds of {plan.nearest_k} nearest neighbours, against 2,000 test images.",
        f"{metric}: Fréchet distance on {dim} features of a small classifier; not comparable with FID on Inception "
        "features.",
    )


def _provenance(plan: DemoPlan, tuner: Tuner) -> dict[str, Any]:
    """What it takes to make the figures again."""

    def span(purpose: Purpose, count: int) -> str:
        seeds = image_seeds(purpose, plan.seed, count)
        return f"{seeds[0]}-{seeds[-1]}"

    return {
        **plan.identity(),
        "self_trained": sha256_file(tuner.snapshots[-1]),
        "formula": "(1 + w) base - w self_trained",
        "synthetic_seeds": span(Purpose.SYNTHETIC, plan.num_synthetic),
        "selection_seeds": span(Purpose.SELECTION, plan.num_images),
        "report_seeds": span(Purpose.REPORT, plan.num_blocks * plan.num_images),
        "sampler": asdict(tuner.settings),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "processes": tuner.scorer.processes.world_size,
    }
