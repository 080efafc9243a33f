"""Does anything cheap tell the best w? Gradients and few images against the w of the lowest distance.

    neon demo && python benchmarks/align.py edm      # the demo's run and other samplers of its base
    python benchmarks/align.py VAR xAR imm           # what `small_<architecture>.py study` left in runs/, and others

A case is a sampler of a small base, its synthetic set S and the self-training on S; cases that no study has made are
made here. Of each the w of the lowest distance is known from the study, or from 1,000 images at each of a few w here.
Predictions of it, none of which sees those images:

    cosine       between the gradients of the loss on test images and on S; w > 0 where it is below 0
    moments      `neon align`: 250 images at each of w = -0.5, 0, 0.5 and one more, interpolated
    wide         the same by 2,048 features, of a wider network of the same kind that is trained here
    features     features of 250 images of base and self-trained network, extrapolated image by image
    means        the same, and only the means of features are compared
    parabola     through the distances of 250 images at each of w = -0.5, 0 and 0.5

For `wide` the w of the lowest distance is another: it is told by 500 images at each of seven w, less their bias as
`neon align` takes it off. Rows go to results/align.json as they are measured; a part of a case that is in it is not
measured again unless asked for, and a case whose run is not there is left out. Distances and gradients in the file are
of before classes were shuffled (image i was of class i mod 10).
"""

import json
import math
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
import tyro
from machine import machine
from small_study import ASSETS, DATA, FEATURES, ROOT, colour_images, last_snapshot, program
from torch import Tensor
from tune import STUDIES

from neon.checkpoint import load_state, open_checkpoint
from neon.data.encoded import ExampleSet, is_example_set
from neon.data.images import ArrayDataset, ImageDataset, TrainingImages
from neon.demo.assets import BASE, TEST_STATISTICS, TRAIN_STATISTICS
from neon.demo.assets import FEATURES as DEMO_FEATURES
from neon.demo.fashion import DEBIAN_FOLDER, load_fashion
from neon.evaluate import Reference, evaluate, sampled_images
from neon.merge import LiveMerge
from neon.metrics import DirectionTarget, FrechetReference, Statistics
from neon.metrics.features import FeatureExtractor, Images, features_of
from neon.metrics.small import SmallFeatures, classes_of, fit_classifier, load_features
from neon.model import GenerativeModel, load_model
from neon.noise import Purpose, image_seeds
from neon.runtime.distributed import Processes
from neon.runtime.files import write_json
from neon.sampling import write_samples
from neon.tune.align import features_at, predict_from_few
from neon.tune.gradients import gradient_alignment
from neon.tune.predict import NODES, interpolation, jackknife, lowest_point
from VAR.model import TOKENS

Architecture = Literal["edm", "VAR", "xAR", "imm"]
Part = Literal["distances", "wide_distances", "by_gradients", "by_images"]
RESULTS = Path(__file__).parent / "results"
RUN = ROOT / "runs" / "align-study"
PROCESSES = Processes()
WS = (-1.0, -0.5, -0.25, 0.0, 0.25, 0.5, 1.0)
NEAR = (-0.25, -0.1, 0.0, 0.1, 0.2)
FEW, BATCH = 250, 100
SCORED, WIDE_SCORED = 1000, 500
"""images at each w that is scored here"""
WIDE, WIDE_WS = 2048, (-1.0, -0.5, 0.0, 0.5, 1.0, 1.5, 2.0)
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


class Joined(FeatureExtractor):
    """Features of several networks, side by side: images are sampled once."""

    name = "joined"

    def __init__(self, extractors: Sequence[FeatureExtractor]) -> None:
        self.extractors, self.dims = extractors, [extractor.dim for extractor in extractors]
        self.dim = sum(self.dims)

    def __call__(self, images: Images) -> Tensor:
        return torch.cat([extractor(images) for extractor in self.extractors], 1)


def wide_features(name: str, training: ArrayDataset) -> tuple[SmallFeatures, Statistics]:
    """A network of many features, trained unless that was done, and statistics of what it was trained on."""
    path = DATA / f"{name}.safetensors"
    if not path.exists():
        torch.manual_seed(0)
        extractor = SmallFeatures(name, training.image_shape, WIDE, 10)
        fit_classifier(extractor, classes_of(training), torch.arange(len(training)), 2)
        extractor.save(path)
        Statistics.from_features(features_of(extractor, training.images)).save(path.with_suffix(".npz"))
    return load_features(path), Statistics.load(path.with_suffix(".npz"))


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
        training = load_fashion(DEBIAN_FOLDER, "train") if is_demo else colour_images("train", DEBIAN_FOLDER)
        self.wide, self.wide_train = wide_features("wide_grey" if is_demo else "wide_rgb", training)
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

    def wide_distances(self) -> dict[float, float]:
        """The distance by many features of report images at each w, as of many images."""
        features, seeds = [], image_seeds(Purpose.REPORT, 0, WIDE_SCORED)
        ws = NEAR if self.case.ws == NEAR else WIDE_WS
        for w in ws:
            self.live.set(w)
            label = self.model.set_labels(WIDE_SCORED, 0)
            sample = sampled_images(self.model, seeds, self.settings, PROCESSES, label)
            blocks = (range(first, first + BATCH) for first in range(0, WIDE_SCORED, BATCH))
            features.append(torch.cat([self.wide(sample(block)) for block in blocks]))
        target = DirectionTarget(self.wide_train, torch.stack(features).numpy())
        found = target.distances(target.moments(np.arange(WIDE_SCORED)), np.eye(len(ws)))
        return dict(zip(ws, found.tolist(), strict=True))

    def by_gradients(self) -> dict[str, Any]:
        """What gradients say."""
        self.live.set(0.0)
        started = time.monotonic()
        report = gradient_alignment(self.model, self.real, self.synthetic, num_images=2000, processes=PROCESSES)
        images = report.num_real + report.num_synthetic
        return {**asdict(report.alignment), "images": images, "seconds": time.monotonic() - started}

    def by_images(self) -> dict[str, Any]:
        """What few images say; seconds are for sampling them, and for `predict` in processor time."""
        joined, sampled = Joined([self.extractor, self.wide]), dict[float, tuple[Tensor, ...]]()

        def features(ws: Sequence[float], space: int) -> Tensor:
            """Of one of the two spaces; what was sampled before is not sampled again."""
            for w in set(ws) - sampled.keys():
                (found,) = features_at(
                    self.model, self.live, [w], self.settings, joined, FEW, batch_size=BATCH, processes=PROCESSES
                )
                sampled[w] = found.split(joined.dims, 1)
            return torch.stack([sampled[w][space] for w in ws])

        def moments(space: int, reference: Statistics) -> dict[str, Any]:
            before = time.process_time()
            found = predict_from_few(lambda ws: features(ws, space), reference, PROCESSES)
            end = time.process_time()
            plain = {key: value for key, value in asdict(found).items() if key != "curve"}
            ends = min(found.curve), max(found.curve)
            return {**plain, "ends": ends, "sign": found.sign, "images": 4 * FEW, "predict_seconds": end - before}

        started = time.monotonic()
        few = features((-1.0, *NODES), 0)
        seconds = (time.monotonic() - started) / len(few)
        narrow, wide = moments(0, self.train), moments(1, self.wide_train)
        reference, three, features_few = self.train, few[1:], few[[0, 2]]
        frechet = FrechetReference(reference)

        def distance(x: Tensor) -> Tensor:
            return torch.tensor(frechet.distance(Statistics.from_features(x)), dtype=torch.float64)

        def extrapolated(rows: Tensor) -> Tensor:
            pair = features_few[:, rows].double()
            curve = torch.stack([distance(torch.tensordot(interpolation((-1.0, 0.0), w), pair, 1)) for w in EVEN])
            return lowest_point(EVEN, curve)[0][None]

        def of_means(rows: Tensor) -> Tensor:
            pair = features_few[:, rows].double()
            gap = pair[1] - torch.from_numpy(reference.mu)  # of the base from real images
            step = pair[1] - pair[0]
            # Products of the means of two halves, so that noise does not add to them.
            halves = [(gap[i::2].mean(0), step[i::2].mean(0)) for i in (0, 1)]
            (gap_a, step_a), (gap_b, step_b) = halves
            return (-(gap_a @ step_b + gap_b @ step_a) / (2 * step_a @ step_b))[None]

        def of_distances(rows: Tensor) -> Tensor:
            below, at, above = (distance(x[rows].double()) for x in three)
            return (0.5 * (below - above) / (2 * (above - 2 * at + below)))[None]

        return {
            "moments": {**narrow, "seconds": 4 * seconds},
            "wide": {**wide, "seconds": 4 * seconds},
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


def holds(found: dict[str, Any], distances: dict[str, float]) -> bool:
    """Whether an interval holds the w of the lowest distance, or what is beyond the end where it is."""
    (low, high), ends, scored = found["interval"], found["ends"], sorted(map(float, distances))
    best = best_of({float(w): distance for w, distance in distances.items()})["w"]
    reaches_down, reaches_up = low == ends[0] or best == scored[-1], high == ends[1] or best == scored[0]
    return (low <= best or reaches_down) and (best <= high or reaches_up)


def table(rows: dict[str, Any]) -> str:
    """All rows, for a terminal, and how often intervals hold and signs are right."""
    columns = ("best w", "gain", "cosine", "moments", "interval", "best, wide", "wide", "interval", "features", "means")
    lines = [f"{'':<42}" + "".join(f"{column:>16}" for column in (*columns, "parabola"))]
    tallies = []
    for name, row in rows.items():
        if not {"distances", "by_gradients", "by_images"} <= row.keys():
            continue
        by_images, best, wide_distances = row["by_images"], row["best"], row.get("wide_distances")
        wide = best_of({float(w): d for w, d in wide_distances.items()})["w"] if wide_distances else math.nan
        cells = [f"{best['w']:.2f}", f"{best['gain']:.1f} of {best['base']:.0f}", text(row["by_gradients"]["cosine"])]
        for key, lowest, distances in (
            ("moments", best["w"], row["distances"]),
            ("wide", wide, wide_distances),
        ):
            found, held = by_images[key], not distances or holds(by_images[key], distances)
            right = None if found["sign"] == "undecided" else (found["sign"] == "w > 0") == (lowest > 0)
            if distances:
                tallies.append((key, held, right))
            interval = "{:.2f} to {:.2f}".format(*found["interval"])
            cells += [text(found["w"]), interval + ("" if held else " !")]
            if key == "moments":
                cells.append(f"{wide:.2f}")
        cells += [text(by_images[key]["w"]) for key in ("features", "means", "parabola")]
        lines.append(f"{name:<42}" + "".join(f"{cell:>16}" for cell in cells))
    for key in ("moments", "wide"):
        held, right = zip(*[(held, right) for one, held, right in tallies if one == key], strict=True)
        decided = len(right) - right.count(None)
        lines.append(
            f"{key}: {sum(held)} of {len(held)} intervals hold the best w; {right.count(True)} of {decided} signs right"
        )
    return "\n".join(lines)


def main(
    architectures: tyro.conf.Positional[tuple[Architecture, ...]] = ("edm", "VAR", "xAR", "imm"),
    /,
    *,
    parts: tuple[Part, ...] = get_args(Part),
    fresh: bool = False,
    json_file: Path = RESULTS / "align.json",
) -> None:
    """Measure every case of some architectures.

    Args:
        architectures: Which.
        parts: What to measure.
        fresh: Measure again what is in the file.
        json_file: Where the figures go.
    """
    torch.set_num_threads(1)
    rows: dict[str, Any] = json.loads(json_file.read_text())["rows"] if json_file.exists() else {}
    command = shlex.join(["python", "benchmarks/align.py", *sys.argv[1:]])
    for architecture in architectures:
        for name, case in CASES[architecture].items():
            folder, row = ROOT / "runs" / (case.run or ""), rows.get(f"{architecture}, {name}", {})
            missing = [part for part in parts if fresh or part not in row]
            if not missing:
                continue
            if not folder.exists():
                print(f"{folder}: not there; left out", file=sys.stderr)
                continue
            run = Run(architecture, name, case)
            row |= {"command": command, "settings": case.settings}
            row |= {part: getattr(run, part)() for part in missing}
            if "distances" in row:
                row["best"] = best_of({float(w): distance for w, distance in row["distances"].items()})
            rows[f"{architecture}, {name}"] = row
            write_json(json_file, {"rows": rows, "machine": machine()})
    print(table(rows))
    print(f"written to {json_file}")


if __name__ == "__main__":
    tyro.cli(main)
