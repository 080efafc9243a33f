"""Does anything cheap tell the best w? Gradients and few images against the w of the lowest distance.

    neon demo && python benchmarks/align.py edm      # the demo's run and other samplers of its base
    python benchmarks/align.py VAR xAR imm           # what `small_<architecture>.py study` left in runs/, and others

A case is a sampler of a small base, its synthetic set S and the self-training on S; cases that no study has made are
made here. Of each the w of the lowest distance is known from the study, or from 1,000 images at each of a few w here.
Predictions of it, none of which sees those images:

    cosine       between the gradients of the loss on test images and on S; w > 0 where it is below 0
    moments      `neon align`: moments of 300 images at each of w = -0.5, 0 and 0.5, interpolated
    features     features of 300 images of base and self-trained network, extrapolated image by image
    means        the same, and only the means of features are compared
    parabola     through the distances of 300 images at each of w = -0.5, 0 and 0.5

`moments` was chosen on EDM and VAR, and then tried on xAR and IMM. Rows go to results/align.json as they are measured;
a case that is in it is not measured again unless asked for, and a case whose run is not there is left out.
"""

import json
import shlex
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import tyro
from machine import machine
from small_study import ASSETS, DATA, FEATURES, ROOT, last_snapshot, program
from torch import Tensor
from tune import STUDIES

from neon.checkpoint import load_state, open_checkpoint
from neon.data.encoded import ExampleSet, is_example_set
from neon.data.images import ImageDataset, TrainingImages
from neon.demo.assets import BASE, TEST_STATISTICS, TRAIN_STATISTICS
from neon.demo.assets import FEATURES as DEMO_FEATURES
from neon.demo.fashion import DEBIAN_FOLDER, load_fashion
from neon.evaluate import Reference, evaluate
from neon.merge import LiveMerge
from neon.metrics import FrechetReference, Statistics
from neon.metrics.small import load_features
from neon.model import GenerativeModel, load_model
from neon.noise import Purpose, image_seeds
from neon.runtime.distributed import Processes
from neon.runtime.files import write_json
from neon.sampling import write_samples
from neon.tune.align import features_at
from neon.tune.gradients import gradient_alignment
from neon.tune.predict import interpolation, jackknife, lowest_point, predict
from VAR.model import TOKENS

Architecture = Literal["edm", "VAR", "xAR", "imm"]
RESULTS = Path(__file__).parent / "results"
RUN = ROOT / "runs" / "align-study"
PROCESSES = Processes()
WS = (-1.0, -0.5, -0.25, 0.0, 0.25, 0.5, 1.0)
NEAR = (-0.25, -0.1, 0.0, 0.1, 0.2)
NODES = (-1.0, -0.5, 0.0, 0.5)
FEW, BATCH = 300, 100
SCORED = 1000
"""images at each w that is scored here"""
EVEN = np.arange(-1.0, 2.01, 0.125).tolist()


@dataclass(frozen=True, kw_only=True)
class Case:
    """A sampler of a small base."""

    settings: dict[str, Any]
    """of the sampler, as far as they are not the defaults"""
    run: str | None = None
    """folder below runs/ with S and the self-training; None: made here, with this sampler"""
    scored: str | None = None
    """study in results/small_<architecture>.json with the distances of `run`; None: scored here"""
    ws: tuple[float, ...] = WS
    """at which it is scored here"""


ALL = {"top_k": 0, "top_p": 0.0}
CASES: dict[Architecture, dict[str, Case]] = {
    "edm": {
        "demo: 5 Euler steps": Case(settings={"solver": "euler", "num_steps": 5}, run="demo"),
        "18 Heun steps": Case(settings={}),
        "5 Euler steps, S of 18 Heun steps": Case(
            settings={"solver": "euler", "num_steps": 5}, run="align-study/edm/18-Heun-steps"
        ),
        "10 Heun steps, too much fresh noise": Case(settings={"num_steps": 10, "S_churn": 8.0, "S_noise": 1.15}),
    },
    "VAR": {
        "guidance 1.5, S of tokens": Case(
            settings={"guidance": 1.5, **ALL},
            run="small_var/study-cfg1.5-k0-p0-t1-tokens-2000-100-0.0001",
            scored="cfg1.5-k0-p0-t1-tokens-2000-100-0.0001",
        ),
        "guidance 1.5, S of pixels": Case(
            settings={"guidance": 1.5, **ALL},
            run="small_var/study-cfg1.5-k0-p0-t1-pixels-2000-100-0.0001",
            scored="cfg1.5-k0-p0-t1-pixels-2000-100-0.0001",
        ),
        "temperature 0.8": Case(
            settings={"guidance": 0.0, "temperature": 0.8, **ALL},
            run="small_var/study-cfg0-k0-p0-t0.8-tokens-2000-100-0.0001",
            scored="cfg0-k0-p0-t0.8-tokens-2000-100-0.0001",
        ),
        "plain": Case(
            settings={"guidance": 0.0, **ALL},
            run="small_var/study-cfg0-k0-p0-t1-tokens-2000-100-0.0001",
            scored="cfg0-k0-p0-t1-tokens-2000-100-0.0001",
        ),
        "temperature 1.3": Case(settings={"guidance": 0.0, "temperature": 1.3, **ALL}),
        "plain, S of guidance 1.5": Case(
            settings={"guidance": 0.0, **ALL}, run="small_var/study-cfg1.5-k0-p0-t1-tokens-2000-100-0.0001"
        ),
    },
    "xAR": {
        "8 steps": Case(
            settings={"guidance": 1.0, "num_steps": 8},
            run="small_xar/study-cfg1-sde8-2000-100-0.0001",
            scored="cfg1-sde8-2000-100-0.0001",
        ),
        "5 steps, guidance 2": Case(
            settings={"guidance": 2.0, "num_steps": 5}, run="small_xar/study-cfg2-sde5-2000-100-0.0001", ws=NEAR
        ),
    },
    "imm": {
        f"{steps} steps, guidance {guidance:g}": Case(
            settings={"guidance": guidance, "num_steps": steps},
            run=f"small_imm/study-cfg{guidance:g}-2000-100-0.0001",
            scored=f"cfg{guidance:g}-2000-100-0.0001-{steps}steps",
        )
        for guidance, steps in ((1.0, 1), (1.0, 8), (1.5, 1), (1.5, 4))
    }
    | {
        "1 step, guidance 1, S of guidance 1.5": Case(
            settings={"guidance": 1.0, "num_steps": 1}, run="small_imm/study-cfg1.5-2000-100-0.0001"
        ),
    },
}


class Run:
    """A case with all its files."""

    def __init__(self, architecture: Architecture, name: str, case: Case) -> None:
        self.architecture, self.case = architecture, case
        is_demo = architecture == "edm"
        self.base = BASE if is_demo else ASSETS / f"small_{architecture.lower()}_base.safetensors"
        self.model = open_as_trained(self.base)
        self.settings = replace(self.model.default_settings, **case.settings)
        slug = "-".join(name.replace(",", "").replace(":", "").split())
        self.folder = ROOT / "runs" / case.run if case.run else RUN / architecture / slug
        if case.run is None:
            self.make()
        self.extractor = load_features(DEMO_FEATURES if is_demo else FEATURES)
        self.train = Statistics.load(TRAIN_STATISTICS if is_demo else DATA / "train.npz")
        self.test = Statistics.load(TEST_STATISTICS if is_demo else DATA / "test.npz")
        self.real = load_fashion(DEBIAN_FOLDER, "test") if is_demo else ImageDataset(DATA / "test.zip")
        self.synthetic = opened(
            next(path for path in map(self.folder.joinpath, ("S.zip", "S", "synthetic")) if path.exists())
        )
        trained = self.folder / ("self-training" if case.run == "demo" else "self")
        self.self_trained = load_state(last_snapshot(trained))
        base = {key: tensor.clone() for key, tensor in self.model.network.state_dict().items()}
        self.live = LiveMerge(self.model.network, base, self.self_trained)

    def make(self) -> None:
        """Sample S and self-train, unless that was done."""
        seeds = image_seeds(Purpose.SYNTHETIC, 0, 1000 if self.architecture == "edm" else 2000)
        write_samples(self.model, seeds, self.settings, self.folder / "S", batch_size=BATCH, processes=PROCESSES)
        study = STUDIES[self.architecture]
        start = "--transfer" if self.architecture == "edm" else study.flag
        data = f"--data {self.folder}/S --outdir {self.folder}/self"
        program(self.architecture, "finetune", f"{start} {self.base} {data} {study.vae} {study.train} --device cpu")

    def distances(self) -> dict[float, float]:
        """The distance of many images at each w."""
        if self.case.run == "demo":
            runs = json.loads((RESULTS / "demo_edm.json").read_text())["runs"]
            row = next(row for row in runs if (row["base_name"], row["seed"]) == (BASE.name, 0))
            return {float(w): distance for w, distance in sorted(row["selection"].items(), key=lambda x: float(x[0]))}
        if self.case.scored is not None:
            studies = json.loads((RESULTS / f"small_{self.architecture}.json").read_text())["studies"]
            return {float(w): row["distance"] for w, row in studies[self.case.scored]["w"].items()}
        return {w: self.distance(w) for w in self.case.ws}

    def distance(self, w: float) -> float:
        """The distance of report images at one w."""
        self.live.set(w)
        seeds = image_seeds(Purpose.REPORT, 0, SCORED)
        reference = Reference(extractor=self.extractor, frechet=FrechetReference(self.test))
        return evaluate(
            self.model,
            seeds,
            self.settings,
            [reference],
            batch_size=BATCH,
            processes=PROCESSES,
            title=f"w = {w:g}",
        ).distance

    def by_gradients(self, num_images: int) -> dict[str, Any]:
        """What gradients say."""
        self.live.set(0.0)
        started = time.monotonic()
        report = gradient_alignment(self.model, self.real, self.synthetic, num_images=num_images, processes=PROCESSES)
        images = report.num_real + report.num_synthetic
        return {**asdict(report.alignment), "images": images, "seconds": time.monotonic() - started}

    def by_images(self) -> dict[str, Any]:
        """What few images say; seconds are for sampling them, the rest takes less than one."""
        started = time.monotonic()
        features = features_at(
            self.model, self.live, NODES, self.settings, self.extractor, FEW, batch_size=BATCH, processes=PROCESSES
        )
        seconds = (time.monotonic() - started) / len(NODES)
        reference, three = self.train, features[1:]
        frechet = FrechetReference(reference)

        def distance(x: Tensor) -> Tensor:
            return torch.tensor(frechet.distance(Statistics.from_features(x)), dtype=torch.float64)

        def extrapolated(rows: Tensor) -> Tensor:
            pair = features[[0, 2]][:, rows].double()
            curve = torch.stack([distance(torch.tensordot(interpolation((-1.0, 0.0), w), pair, 1)) for w in EVEN])
            return lowest_point(EVEN, curve)[0][None]

        def of_means(rows: Tensor) -> Tensor:
            pair = features[[0, 2]][:, rows].double()
            gap = pair[1] - torch.from_numpy(reference.mu)  # of the base from real images
            step = pair[1] - pair[0]
            # Products of the means of two halves, so that noise does not add to them.
            halves = [(gap[i::2].mean(0), step[i::2].mean(0)) for i in (0, 1)]
            (gap_a, step_a), (gap_b, step_b) = halves
            return (-(gap_a @ step_b + gap_b @ step_a) / (2 * step_a @ step_b))[None]

        def of_distances(rows: Tensor) -> Tensor:
            below, at, above = (distance(x[rows].double()) for x in three)
            return (0.5 * (below - above) / (2 * (above - 2 * at + below)))[None]

        found = predict(three, reference)
        moments = {**{key: value for key, value in asdict(found).items() if key != "curve"}, "sign": found.sign}
        return {
            "moments": {**moments, "images": 3 * FEW, "seconds": 3 * seconds},
            "features": {**one(extrapolated), "images": 2 * FEW, "seconds": 2 * seconds},
            "means": {**one(of_means), "images": 2 * FEW, "seconds": 2 * seconds},
            "parabola": {**one(of_distances), "images": 3 * FEW, "seconds": 3 * seconds},
        }


def one(find: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    """A single figure with its error."""
    value, error = jackknife(find, FEW)
    return {"w": {"value": float(value[0]), "error": float(error[0])}}


def opened(path: Path) -> TrainingImages:
    return ExampleSet(path, TOKENS) if is_example_set(path) else ImageDataset(path)


AS_TRAINED: dict[str, dict[str, Any]] = {"VAR": {"enlargement": 1.0}, "xAR": {"mirrors": False}}
"""how the studies train: images neither enlarged nor mirrored"""


def open_as_trained(path: Path) -> GenerativeModel:
    """The model of a study with its tokenizer, seeing images as it was trained on them."""
    with open_checkpoint(path) as checkpoint:
        name = checkpoint.metadata["architecture"]
    model = load_model(path, **AS_TRAINED.get(name, {}))
    if name == "VAR":
        model.use_autoencoder(ASSETS / "small_var_tokenizer.safetensors")
    return model


def best_of(distances: dict[float, float]) -> dict[str, float]:
    """The w of the lowest distance, by the parabola through three points, and the gain over w = 0."""
    ws = sorted(distances)
    middle = ws.index(min(ws, key=lambda w: distances[w]))
    found = ws[middle]
    if 0 < middle < len(ws) - 1:
        near = ws[middle - 1 : middle + 2]
        a, b, _ = np.polyfit(near, [distances[w] for w in near], 2)
        found = float(-b / (2 * a))
    return {"w": found, "gain": distances[0.0] - distances[ws[middle]], "base": distances[0.0]}


def text(estimate: dict[str, Any] | None) -> str:
    return "-" if estimate is None else f"{estimate['value']:.2g} +- {estimate['error']:.1g}"


def table(rows: dict[str, Any]) -> str:
    """All rows, for a terminal."""
    columns = (
        "best w",
        "gain",
        "cosine",
        "slope",
        "moments",
        "features",
        "means",
        "parabola",
    )
    lines = [f"{'':<44}" + "".join(f"{column:>18}" for column in columns)]
    for name, row in rows.items():
        by_images, best = row["by_images"], row["best"]
        cells = [
            f"{best['w']:.2f}",
            f"{best['gain']:.1f} of {best['base']:.0f}",
            text(row["by_gradients"]["cosine"]),
            text(by_images["moments"]["slope"]),
            *(text(by_images[key]["w"]) for key in columns[-4:]),
        ]
        lines.append(f"{name:<44}" + "".join(f"{cell:>18}" for cell in cells))
    return "\n".join(lines)


def main(
    architectures: tyro.conf.Positional[tuple[Architecture, ...]] = ("edm", "VAR", "xAR", "imm"),
    /,
    *,
    num_images: int = 2000,
    fresh: bool = False,
    json_file: Path = RESULTS / "align.json",
) -> None:
    """Measure every case of some architectures.

    Args:
        architectures: Which.
        num_images: Images behind gradients, of each set, as far as there are as many.
        fresh: Measure again what is in the file.
        json_file: Where the figures go.
    """
    torch.set_num_threads(1)
    rows: dict[str, Any] = json.loads(json_file.read_text())["rows"] if json_file.exists() else {}
    command = shlex.join(["python", "benchmarks/align.py", *sys.argv[1:]])
    for architecture in architectures:
        for name, case in CASES[architecture].items():
            folder, row = ROOT / "runs" / (case.run or ""), f"{architecture}, {name}"
            if row in rows and not fresh:
                continue
            if not folder.exists():
                print(f"{folder}: not there; left out", file=sys.stderr)
                continue
            run = Run(architecture, name, case)
            by_images, by_gradients, distances = run.by_images(), run.by_gradients(num_images), run.distances()
            rows[row] = {
                "command": command,
                "settings": case.settings,
                "distances": distances,
                "best": best_of(distances),
                "by_gradients": by_gradients,
                "by_images": by_images,
            }
            write_json(json_file, {"rows": rows, "machine": machine()})
    print(table(rows))
    print(f"written to {json_file}")


if __name__ == "__main__":
    tyro.cli(main)
