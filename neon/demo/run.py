"""The demo: `neon improve` of a small EDM of Fashion-MNIST, with everything it needs embedded."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from neon.demo.assets import (
    BASE,
    FEATURES,
    REAL_IMAGES,
    SECOND_FEATURES,
    SECOND_TEST_STATISTICS,
    TEST_STATISTICS,
    TRAIN_STATISTICS,
    real_images,
)
from neon.demo.fashion import CLASS_NAMES
from neon.evaluate import RealFeatures, Reference
from neon.improve.plan import ImprovePlan
from neon.improve.run import Base, improve
from neon.metrics import FrechetReference, Manifold, Statistics
from neon.metrics.features import features_of
from neon.metrics.small import load_features
from neon.model import GenerativeModel, load_model
from neon.runtime.distributed import Processes
from neon.runtime.files import hashes
from neon.tune.inputs import Inputs
from neon.tune.outcome import Outcome, Presentation
from neon.tune.pictures import RealPictures

NUM_STEPS = 5
"""Euler steps of the sampler: few, so that it seeks modes"""
NEAREST_K = 5
PLAN = ImprovePlan(
    num_synthetic=1000,
    training_images=6400,
    batch=128,
    batch_gpu=32,
    lr=1e-4,
    # No averaging and no ramp: over so few images those would leave the weights where they are.
    lr_rampup=0,
    ema=0,
    snapshots=1,
    # Beyond, small models fall apart.
    w=(0.0, 1.5),
    select_images=1000,
    batch_size=100,
    limit=5,
    sampler_scores=8,
)
"""how the demo improves its model, in about three minutes of two cores"""


def run_demo(
    plan: ImprovePlan,
    out: Path,
    processes: Processes,
    *,
    base: Path = BASE,
    fresh: bool = False,
) -> Outcome:
    """Run the demo, or what is left of it, into the folder `out`.

    Raises:
        RequestError: the folder holds something else, or another process works in it.
        WorkError: the disk is full.
    """

    def load(for_training: bool) -> GenerativeModel:
        return load_model(base, device=processes.device, for_training=for_training)

    inputs = _inputs(load(False), processes)
    recipe = {**plan.facts(), "base": str(base), "settings": asdict(inputs.settings)}
    return improve(
        plan,
        Base(path=base, load=load),
        inputs,
        out,
        processes,
        recipe=recipe,
        presentation=_presentation(inputs),
        fresh=fresh,
    )


def _inputs(model: GenerativeModel, processes: Processes) -> Inputs:
    """The embedded real images, compared by the embedded features."""
    first, second = (load_features(file, processes.device) for file in (FEATURES, SECOND_FEATURES))
    real = real_images()
    compared = RealFeatures(manifold=Manifold(features_of(first, real.to(processes.device)), k=NEAREST_K))
    selection, reporting = (
        Reference(extractor=first, frechet=FrechetReference(Statistics.load(path)), real=compared)
        for path in (TRAIN_STATISTICS, TEST_STATISTICS)
    )
    opinion = Reference(extractor=second, frechet=FrechetReference(Statistics.load(SECOND_TEST_STATISTICS)))
    assets = FEATURES, TRAIN_STATISTICS, TEST_STATISTICS, SECOND_FEATURES, SECOND_TEST_STATISTICS, REAL_IMAGES
    files = {path.name: path for path in assets}
    facts: dict[str, Any] = {"assets": processes.on_main(lambda: hashes(files)), "nearest_k": NEAREST_K}
    return Inputs(
        model=model,
        settings=replace(model.default_settings, solver="euler", num_steps=NUM_STEPS),
        selection=selection,
        reporting=(reporting, opinion),
        facts=facts,
        pictures=RealPictures(read=lambda places: [real[i] for i in places], count=len(real), shape=model.image_shape),
    )


def _presentation(inputs: Inputs) -> Presentation:
    """Title and notes of the page: what the base is, and what its scores are made against."""
    side = inputs.model.image_shape[-1]
    first, second = (reference.extractor for reference in inputs.reporting)
    return Presentation(
        title="Neon on Fashion-MNIST",
        picture_w=(-1.0,),  # so that the curve shows both sides
        grid_size=50,
        class_names=CLASS_NAMES,
        again="neon demo",
        real=inputs.pictures,
        notes=(
            f"Base: a class-conditional EDM U-Net of Fashion-MNIST at {side} x {side} pixels, sampled by {NUM_STEPS} "
            "Euler steps without guidance; few steps make it seek modes, the bias that Neon undoes.",
            "Selection is scored against statistics of the training images, the report against those of the 10,000 "
            f"test images; precision and recall by manifolds of {NEAREST_K} nearest neighbours, against 2,000 test "
            "images.",
            f"{first.score_name}: Fréchet distance on {first.dim} features of a small classifier, by which w is "
            f"chosen; {second.score_name}: on {second.dim} features of a network that has learned to tell quarter "
            "turns of the images, and no classes. Neither is comparable with FID on Inception features.",
        ),
    )
