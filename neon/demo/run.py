"""The demo: every step of Neon, on a small EDM of Fashion-MNIST, through the code that large models use.

sample S -> self-train -> search w on selection seeds -> score on report seeds -> report. Each step leaves
its result in the run folder and is skipped if it is there, so a killed run goes on where it was.
"""

import contextlib
import platform
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from neon import __version__
from neon.checkpoint import load_state
from neon.data.images import ImageDataset
from neon.demo.assets import BASE, FEATURES, REAL_IMAGES, TEST_STATISTICS, TRAIN_STATISTICS, real_images
from neon.evaluate import Reference, ScoreLog, Scores, evaluate
from neon.merge import LiveMerge, merge_files
from neon.metrics import FrechetReference, Manifold, Statistics
from neon.metrics.features import features_of, load_features, score_name
from neon.model import GenerativeModel, load_model
from neon.noise import Purpose, image_seeds
from neon.recipe import Recipe
from neon.report.page import write_report
from neon.report.record import Evaluated, Report, Row, save, summary, text_table
from neon.runtime.distributed import Processes
from neon.runtime.files import sha256_file, write_json
from neon.runtime.run_folder import run_folder
from neon.sampling import sample_block, write_samples
from neon.selftrain import train
from neon.tune.search import Search, search

HIGHEST_W = 1.5
"""end of the search: beyond, small models fall apart"""
LOG_FILE, SCORES_FILE, NEON_FILE = "evaluations.jsonl", "scores.json", "neon.safetensors"


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
    num_images: int = 2000
    """images behind each score"""
    num_blocks: int = 3
    """disjoint blocks of report seeds; the spread is over these"""
    batch_size: int = 100
    nearest_k: int = 5
    picture_w: tuple[float, ...] = (-1.0, -0.5, 1.5)
    """also evaluated, so that the curve shows both sides"""

    def __post_init__(self) -> None:
        image_seeds(Purpose.SYNTHETIC, self.seed, 0)  # refuses a seed out of range

    def identity(self) -> dict[str, Any]:
        """The plan and the hashes of all it starts from, as JSON."""
        assets = {path.name: sha256_file(path) for path in (FEATURES, TRAIN_STATISTICS, TEST_STATISTICS, REAL_IMAGES)}
        return {"neon": __version__, **asdict(self), "base": sha256_file(self.base), "assets": assets}


def run_demo(plan: DemoPlan, out: Path, processes: Processes, *, fresh: bool = False) -> None:
    """Run the demo, or what is left of it, into the folder `out`.

    Raises:
        RequestError: the folder holds something else, or another process works in it.
    """
    demo = _Demo(plan, out, processes)
    with contextlib.ExitStack() as stack:
        processes.on_main(lambda: stack.enter_context(run_folder(out, plan.identity(), fresh=fresh)))
        demo.run()


class _Demo:
    """The steps, and the pieces that they share."""

    def __init__(self, plan: DemoPlan, out: Path, processes: Processes) -> None:
        self.plan, self.out, self.processes = plan, out, processes
        self.model: GenerativeModel = load_model(plan.base, device=processes.device)
        self.base_state = {name: tensor.clone() for name, tensor in self.model.network.state_dict().items()}
        self.sampler = replace(self.model.default_settings, solver="euler", num_steps=plan.num_steps)
        self.extractor = load_features(FEATURES, processes.device)
        self.metric = score_name(self.extractor)
        manifold = Manifold(features_of(self.extractor, real_images().to(processes.device)), k=plan.nearest_k)
        self.selection = Reference(frechet=FrechetReference(Statistics.load(TRAIN_STATISTICS)), manifold=manifold)
        self.reporting = Reference(frechet=FrechetReference(Statistics.load(TEST_STATISTICS)), manifold=manifold)

    def run(self) -> None:
        """Every step that is not done yet."""
        started = time.monotonic()
        if self.processes.is_main:
            print(f"Neon on Fashion-MNIST: {self.processes.world_size} processes, into {self.out}", file=sys.stderr)
        self.log = ScoreLog(self.out / LOG_FILE, self.processes)
        self.sample()
        self.self_train()
        found, curve = self.choose_w()
        rows = self.report_rows(found.best.point.w)
        self.processes.on_main(lambda: self.finish(found, curve, rows, time.monotonic() - started))

    def sample(self) -> None:
        """The synthetic set S, sampled exactly as the evaluation samples."""
        seeds = image_seeds(Purpose.SYNTHETIC, self.plan.seed, self.plan.num_synthetic)
        folder = self.out / "synthetic"
        write_samples(
            self.model, seeds, self.sampler, folder, batch_size=self.plan.batch_size, processes=self.processes
        )

    def self_train(self) -> None:
        """The brief fine-tune on S: theta_s, and the live network that merges are written into."""
        plan = self.plan
        snapshots = train(
            load_model(plan.base, device=self.processes.device),
            ImageDataset(self.out / "synthetic"),
            self.out / "self-training",
            num_steps=plan.training_steps,
            snapshot_steps=[plan.training_steps // 2],
            recipe=plan.recipe,
            seed=plan.seed,
            processes=self.processes,
            micro_batch=plan.micro_batch,
            title="self-training",
        )
        self.self_trained = snapshots[-1].path
        self.live = LiveMerge(self.model.network, self.base_state, load_state(self.self_trained))

    def score(self, w: float, purpose: Purpose, block: int = 0, num_steps: int | None = None) -> Scores:
        """Scores at weight `w` on one block of seeds, from the log if they are there."""
        plan, steps = self.plan, num_steps or self.plan.num_steps
        title = f"{purpose.name.lower()} block {block}, w {w:g}, {steps} steps"

        def compute() -> Scores:
            self.live.set(w)
            return evaluate(
                self.model,
                image_seeds(purpose, plan.seed, plan.num_images, start=block * plan.num_images),
                replace(self.sampler, num_steps=steps),
                self.extractor,
                self.selection if purpose is Purpose.SELECTION else self.reporting,
                batch_size=plan.batch_size,
                processes=self.processes,
                title=title,
            )

        return self.log.get_or(title, compute)

    def choose_w(self) -> tuple[Search, dict[float, Scores]]:
        """The best w on selection seeds against training statistics; and the curve, with points for the picture."""
        found = search(lambda point: self.score(point.w, Purpose.SELECTION).distance, w=(0.0, HIGHEST_W), limit=5)
        searched = [evaluation.point.w for evaluation in found.evaluations]
        return found, {w: self.score(w, Purpose.SELECTION) for w in [*searched, *self.plan.picture_w]}

    def report_rows(self, w: float) -> dict[str, Row]:
        """Base, base at twice the steps, self-trained and Neon, on report seeds against test statistics."""
        steps = self.plan.num_steps
        plans = {
            "base": ("base", 0.0, steps),
            "base_twice_the_steps": ("base, twice the steps", 0.0, 2 * steps),
            "self_trained": ("self-trained (w = -1)", -1.0, steps),
            "neon": (f"Neon (w = {w:g})", w, steps),
        }
        return {
            key: Row(
                name=name,
                calls=calls,
                blocks=tuple(self.score(weight, Purpose.REPORT, i, calls) for i in range(self.plan.num_blocks)),
            )
            for key, (name, weight, calls) in plans.items()
        }

    def finish(self, found: Search, curve: dict[float, Scores], rows: dict[str, Row], seconds: float) -> None:
        """Write the merged checkpoint, report, page and scores (main process only)."""
        report = self.report(found, curve, rows)
        merge_files(self.plan.base, self.self_trained, [report.w], self.out / NEON_FILE, overwrite=True)
        save(report, self.out)
        page = write_report(self.out, report)
        write_json(self.out / SCORES_FILE, self.result(report, rows, seconds))
        print("\n".join(["", text_table(report), "", *summary(report), ""]))
        print(f"{seconds:.0f} s. Report: {page}", flush=True)

    def result(self, report: Report, rows: dict[str, Row], seconds: float) -> dict[str, Any]:
        """The content of `scores.json`: means over report blocks, and what they were made of."""
        details = {
            key: {
                "network_calls": row.calls,
                "spread": row.spread,
                "precision": row.mean("precision"),
                "recall": row.mean("recall"),
                "blocks": [block.distance for block in row.blocks],
            }
            for key, row in rows.items()
        }
        return {
            "metric": self.metric,
            **{key: row.distance for key, row in rows.items()},
            "spread": max(row.spread for row in rows.values()),
            "blocks": self.plan.num_blocks,
            "w": report.w,
            "num_images": self.plan.num_images,
            "seconds": round(seconds, 1),
            "summary": summary(report),
            "rows": details,
            "selection": {f"{one.w:g}": one.scores.distance for one in report.evaluated if one.scores},
            "provenance": report.provenance,
        }

    def report(self, found: Search, curve: dict[float, Scores], rows: dict[str, Row]) -> Report:
        """What the page shows."""
        w, searched = found.best.point.w, {evaluation.point.w for evaluation in found.evaluations}
        return Report(
            title="Neon on Fashion-MNIST",
            metric=self.metric,
            rows=tuple(rows.values()),
            base=rows["base"],
            neon=rows["neon"] if w else rows["base"],
            w=w,
            evaluated=tuple(Evaluated(w=at, scores=scores, searched=at in searched) for at, scores in curve.items()),
            fit=found.curve(),
            grids={at: self.grid(at) for at in sorted({*curve, -1.0})},
            real=real_images()[:50],
            notes=self.notes(len(searched)),
            provenance=self.provenance(w),
        )

    def grid(self, w: float) -> Tensor:
        """The first 50 images of the report at weight `w`, uint8 [50, C, H, W]."""
        self.live.set(w)
        seeds = image_seeds(Purpose.REPORT, self.plan.seed, 50)
        return sample_block(self.model, range(50), seeds, self.sampler, self.processes)[0]

    def notes(self, num_searched: int) -> tuple[str, ...]:
        """How the figures came about."""
        plan = self.plan
        height, width = self.model.image_shape[1:]
        return (
            f"Base: a class-conditional EDM U-Net of Fashion-MNIST at {height} x {width} pixels. Sampler: Euler, "
            f"{plan.num_steps} steps, no guidance; few steps make it seek modes, the bias that Neon undoes.",
            f"Synthetic set: {plan.num_synthetic} images of that same sampler. Self-training: {plan.training_steps} "
            f"steps of {plan.recipe.batch_size} images at learning rate {plan.recipe.lr:g}.",
            f"w was chosen on selection seeds against statistics of the training images ({num_searched} evaluations "
            f"of {plan.num_images} images).",
            f"Scores: {plan.num_blocks} blocks of {plan.num_images} images from report seeds, which the search never "
            "saw, against statistics of the 10,000 test images; ± is the standard deviation over blocks.",
            f"Precision and recall: manifolds of {plan.nearest_k} nearest neighbours, against 2,000 test images.",
            f"{self.metric}: Fréchet distance on {self.extractor.dim} features of a small classifier; not comparable "
            "with FID on Inception features.",
        )

    def provenance(self, w: float) -> dict[str, Any]:
        """What it takes to make the figures again."""
        plan = self.plan

        def span(purpose: Purpose, count: int) -> str:
            seeds = image_seeds(purpose, plan.seed, count)
            return f"{seeds[0]}-{seeds[-1]}"

        return {
            **plan.identity(),
            "self_trained": sha256_file(self.self_trained),
            "formula": "(1 + w) base - w self_trained",
            "w": w,
            "synthetic_seeds": span(Purpose.SYNTHETIC, plan.num_synthetic),
            "selection_seeds": span(Purpose.SELECTION, plan.num_images),
            "report_seeds": span(Purpose.REPORT, plan.num_blocks * plan.num_images),
            "sampler": asdict(self.sampler),
            "torch": torch.__version__,
            "python": platform.python_version(),
            "machine": platform.machine(),
            "processes": self.processes.world_size,
            "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        }
