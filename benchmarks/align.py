"""Does the gradient alignment tell which w is best? On the demo and every study of a small model that is on the disk.

    neon demo && python benchmarks/align.py edm      # the demo: two minutes
    python benchmarks/align.py VAR xAR imm           # what `small_<architecture>.py study` left in runs/

For each synthetic set S and self-training the cosine between the gradients on test images and on S, and the w of the
lowest loss, beside the w of the lowest Frechet distance that the study scored. Rows go to results/align.json, those of
other architectures in it stay. A base that is not there is left out.
"""

import json
import shlex
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from machine import machine
from small_study import ASSETS, DATA, ROOT, last_snapshot

from neon.align import Estimate, align, text_table
from neon.checkpoint import load_state
from neon.dataset import ImageDataset, TrainingImages
from neon.demo.assets import BASE
from neon.demo.fashion import DEBIAN_FOLDER, load_fashion
from neon.distributed import Processes
from neon.examples import ExampleSet, is_example_set
from neon.files import write_json
from neon.model import GenerativeModel, load_model
from VAR.model import TOKENS, VARModel
from xAR.model import XARModel

RESULTS = Path(__file__).parent / "results"
Architecture = Literal["edm", "VAR", "xAR", "imm"]


@dataclass(frozen=True, kw_only=True)
class Case:
    """One synthetic set of one base, and what was scored with it."""

    name: str
    model: GenerativeModel
    real: TrainingImages
    synthetic: Path
    self_trained: Path
    distances: dict[str, dict[float, float]] = field(default_factory=dict)
    """study -> w -> Frechet distance"""


def demo_cases() -> Iterator[Case]:
    """The run of `neon demo` with the embedded base and seed 0."""
    run = ROOT / "runs" / "demo"
    scored = json.loads((RESULTS / "demo_edm.json").read_text())["runs"]
    row = next(row for row in scored if (row["base_name"], row["seed"]) == (BASE.name, 0))
    if not run.exists():
        print(f"{run}: not there; run `neon demo`", file=sys.stderr)
        return
    yield Case(
        name="edm demo",
        model=load_model(BASE),
        real=load_fashion(DEBIAN_FOLDER, "test"),
        synthetic=run / "synthetic",
        self_trained=last_snapshot(run / "self-training"),
        distances={"5 steps": {float(w): distance for w, distance in row["selection"].items()}},
    )


def study_cases(architecture: str) -> Iterator[Case]:
    """The studies in results/small_<architecture>.json whose run is on the disk."""
    base, results = ASSETS / f"small_{architecture.lower()}_base.safetensors", RESULTS / f"small_{architecture}.json"
    if not base.exists() or not results.exists():
        print(f"small {architecture}: no base or no study; left out", file=sys.stderr)
        return
    scored: dict[str, dict[str, dict[float, float]]] = {}
    for name, study in json.loads(results.read_text())["studies"].items():
        # One self-training of IMM is scored at several numbers of steps.
        run = name.rpartition("-")[0] if name.endswith("steps") else name
        scored.setdefault(run, {})[name] = {float(w): row["distance"] for w, row in study["w"].items()}
    for run, distances in scored.items():
        folder = ROOT / "runs" / f"small_{architecture.lower()}" / f"study-{run}"
        if not folder.exists():
            print(f"{folder}: not there; left out", file=sys.stderr)
            continue
        yield Case(
            name=f"{architecture} {run}",
            model=as_trained(load_model(base)),
            real=ImageDataset(DATA / "test.zip"),
            synthetic=folder / "S.zip" if (folder / "S.zip").exists() else folder / "S",
            self_trained=last_snapshot(folder / "self"),
            distances=distances,
        )


def as_trained(model: GenerativeModel) -> GenerativeModel:
    """The model with its tokenizer, seeing images as the studies train on them: neither enlarged nor mirrored."""
    if isinstance(model, VARModel):
        model.use_autoencoder(ASSETS / "small_var_tokenizer.safetensors")
        model.enlargement = 1.0
    if isinstance(model, XARModel):
        model.mirrors = False
    return model


def measured(case: Case, seed: int, num_images: int, visits: int) -> dict[str, Any]:
    """The alignment of a case, its best scored w and how long it took."""
    started = time.monotonic()
    is_encoded = is_example_set(case.synthetic)
    synthetic = ExampleSet(case.synthetic, TOKENS) if is_encoded else ImageDataset(case.synthetic)
    report = align(
        case.model,
        case.real,
        synthetic,
        load_state(case.self_trained),
        num_images=num_images,
        visits=visits,
        seed=seed,
        processes=Processes(),
    )
    print(f"\n{case.name}\n{text_table(report)}")
    found = asdict(report)
    found["real"], found["synthetic"] = case.real.path.name, case.synthetic.name
    best = {study: min(points, key=lambda w: points[w]) for study, points in case.distances.items()}
    return {"distance_optimal_w": best, "seconds": time.monotonic() - started, "report": found}


def text(estimate: dict[str, float] | None, width: int) -> str:
    return f"{'-' if estimate is None else str(Estimate(**estimate)):>{width}}"


def main(
    architectures: tyro.conf.Positional[tuple[Architecture, ...]] = ("edm", "VAR", "xAR", "imm"),
    /,
    *,
    seed: int = 0,
    num_images: int = 10_000,
    visits: int = 2,
    json_file: Path = RESULTS / "align.json",
) -> None:
    """Measure every case of some architectures.

    Args:
        architectures: Which.
        seed: Of the images that are looked at and of their noise.
        num_images: Of each set, as far as there are as many.
        visits: How often each is looked at, with fresh noise.
        json_file: Where the figures go.
    """
    torch.set_num_threads(1)
    record: dict[str, Any] = json.loads(json_file.read_text()) if json_file.exists() else {"rows": {}}
    command = shlex.join(["python", "benchmarks/align.py", *sys.argv[1:]])
    for architecture in architectures:
        for case in demo_cases() if architecture == "edm" else study_cases(architecture):
            record["rows"][case.name] = {"command": command, **measured(case, seed, num_images, visits)}
            write_json(json_file, record | {"machine": machine()})
    print(f"\n{'':<44}{'cosine':>20}{'Adam':>20}{'slope':>24}{'lowest loss, w':>20}{'lowest distance, w':>20}")
    for name, row in record["rows"].items():
        report, best = row["report"], row["distance_optimal_w"].values()
        print(
            f"{name:<44}{text(report['plain']['cosine'], 20)}{text(report['adam']['cosine'], 20)}"
            f"{text(report['slope'], 24)}{text(report['loss_optimal_w'], 20)}"
            f"{', '.join(f'{w:g}' for w in best):>20}"
        )
    print(f"written to {json_file}")


if __name__ == "__main__":
    tyro.cli(main)
