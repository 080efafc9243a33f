"""Is the demo's gain the direction's, and is it more than this metric? Controls on a finished run of `neon demo`.

    neon demo && python benchmarks/controls.py

At the w that the run chose: a random direction of the same length in every tensor, and the direction of the same
fine-tune on real training images instead of synthetic ones. Each is scored on the run's report seeds under the demo's
features and under a second feature network, trained here with another seed and twice the width. Needs Fashion-MNIST:
the Debian package dataset-fashion-mnist, or --data FOLDER.
"""

import json
import shlex
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import tyro
from machine import machine
from torch import Tensor

from neon.checkpoint import load_state
from neon.demo.assets import BASE, FEATURES
from neon.demo.fashion import DEBIAN_FOLDER, load_fashion
from neon.demo.run import NUM_STEPS, PLAN
from neon.evaluate import RealFeatures, Reference, evaluate
from neon.improve.plan import ImprovePlan
from neon.merge import LiveMerge
from neon.metrics import FrechetReference, Manifold, Statistics
from neon.metrics.features import features_of
from neon.metrics.small import SmallFeatures, classes_of, fit_classifier, load_features
from neon.model import load_model
from neon.noise import Purpose, image_seeds
from neon.runtime.distributed import Processes
from neon.runtime.files import write_json
from neon.selftrain import train

State = dict[str, Tensor]


def second_features(data: Path, seed: int) -> SmallFeatures:
    """A classifier like the demo's, of another seed and twice the features."""
    torch.manual_seed(seed)
    training = load_fashion(data, "train")
    extractor = SmallFeatures("second128", training.image_shape, 128, 10)
    fit_classifier(extractor, classes_of(training), torch.arange(len(training)), passes=2)
    return extractor


def random_direction(base: State, self_trained: State, seed: int) -> State:
    """The base moved as far as the self-trained weights, tensor by tensor, in a random direction."""
    generator = torch.Generator().manual_seed(seed)
    moved = {}
    for name, tensor in base.items():
        step = torch.randn(tensor.shape, generator=generator)
        moved[name] = tensor + step * ((self_trained[name] - tensor).norm() / step.norm())
    return moved


def real_direction(plan: ImprovePlan, data: Path, folder: Path) -> State:
    """The base after the demo's fine-tune on as many steps of real training images."""
    model = load_model(BASE)
    recipe = plan.recipe(model)
    snapshots = train(
        model,
        load_fashion(data, "train"),
        folder,
        num_steps=plan.budget // recipe.batch_size,
        snapshot_steps=[],
        recipe=recipe,
        seed=plan.seed,
        processes=Processes(),
        micro_batch=plan.batch_gpu,
        title="on real images",
    )
    return load_state(snapshots[-1].path)


def main(
    run: Path = Path("runs/demo"),
    data: Path = DEBIAN_FOLDER,
    seed: int = 1,
    json_file: Path = Path(__file__).parent / "results" / "controls_edm.json",
) -> None:
    """Score the base, Neon and both controls under two feature networks.

    Args:
        run: A finished run of `neon demo` with the embedded base and seed 0.
        data: Folder with the four Fashion-MNIST files.
        seed: Of the random direction and the second feature network.
        json_file: Where the figures go.
    """
    torch.set_num_threads(1)
    plan = PLAN
    w = json.loads((run / "scores.json").read_text())["w"]
    base = load_state(BASE)
    self_trained = load_state(sorted((run / "self-training").glob("*.safetensors"))[-1])
    with tempfile.TemporaryDirectory() as folder:
        real = real_direction(plan, data, Path(folder))
    model = load_model(BASE)
    sampler = replace(model.default_settings, solver="euler", num_steps=NUM_STEPS)
    test = load_fashion(data, "test").images
    extractors = [load_features(FEATURES), second_features(data, seed)]
    ends: dict[str, tuple[State, float]] = {
        "base": (self_trained, 0.0),
        "Neon": (self_trained, w),
        "random direction": (random_direction(base, self_trained, seed), w),
        "away from real images": (real, w),
        "towards real images (w = -1)": (real, -1.0),
    }
    record: dict[str, Any] = {
        "command": shlex.join(["python", "benchmarks/controls.py", *sys.argv[1:]]),
        "machine": machine(),
        "w": w,
        "num_images": plan.select_images,
        "scores": {},
    }
    for extractor in extractors:
        features = features_of(extractor, test)
        reference = Reference(
            extractor=extractor,
            frechet=FrechetReference(Statistics.from_features(features)),
            real=RealFeatures(manifold=Manifold(features[:2000], k=5)),
        )
        print(f"\n{extractor.score_name:<30}{'distance':>10}{'precision':>11}{'recall':>9}")
        for name, (end, weight) in ends.items():
            LiveMerge(model.network, base, end).set(weight)
            scores = evaluate(
                model,
                image_seeds(Purpose.REPORT, plan.seed, plan.select_images),
                sampler,
                [reference],
                batch_size=plan.batch_size,
                processes=Processes(),
                title=name,
            )
            record["scores"].setdefault(extractor.score_name, {})[name] = {
                "distance": scores.distance,
                "precision": scores.precision,
                "recall": scores.recall,
            }
            print(f"{name:<30}{scores.distance:>10.2f}{scores.precision:>11.2f}{scores.recall:>9.2f}")
    write_json(json_file, record)
    print(f"written to {json_file}")


if __name__ == "__main__":
    tyro.cli(main)
