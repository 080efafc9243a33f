"""The run behind `neon tune`: weights stay resident, each point is merged in place and scored, nothing is scored twice.

Points are compared on the same selection images, so that their difference is that of the weights; what was chosen is
then scored on report images, which share no seed with the selection, in several blocks that tell the noise.
"""

import contextlib
import math
import sys
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from neon import __version__
from neon.checkpoint import load_state
from neon.errors import DegenerateError, RequestError
from neon.evaluate import Reference, ScoreLog, Scores, evaluate
from neon.merge import LiveMerge, check_same_network
from neon.metrics import Statistics
from neon.metrics.features import FeatureExtractor, score_name
from neon.model import GenerativeModel
from neon.noise import Purpose, image_seeds
from neon.report.page import write_report
from neon.report.record import Evaluated, Report, Row, paired_gain, save, summary, text_table
from neon.runtime.distributed import Processes
from neon.runtime.files import sha256_file, write_json
from neon.runtime.run_folder import run_folder
from neon.sampling import sample_block
from neon.tune.search import EvaluationFailed, Point, Search, grid, search

LOG_FILE, STATE_FILE, RESULT_FILE = "evaluations.jsonl", "evaluation.safetensors", "tune.json"
STATISTICS = "statistics"
"""folder with the statistics of each point of a search"""
PICTURED = 36
"""images in each grid of the page"""

METRICS: dict[str, Callable[[Scores], float | None]] = {
    "distance": lambda scores: scores.distance,
    "is": lambda scores: None if scores.is_mean is None else -scores.is_mean,
    "precision": lambda scores: None if scores.precision is None else -scores.precision,
    "recall": lambda scores: None if scores.recall is None else -scores.recall,
}
"""what a search minimises: the distance, or one of these with its sign turned"""


@dataclass(frozen=True, kw_only=True)
class TunePlan:
    """What is searched, and what the choice is reported on."""

    base: Path
    self_trained: tuple[Path, ...]
    """snapshots of one self-training, in order of budget"""
    w: tuple[float, float] = (-0.5, 2.0)
    """range of merge weights; 0, the base, is always in it"""
    guidance: tuple[float, float] | None = None
    """range of guidance; None: that of the settings"""
    grid: tuple[tuple[float, ...], tuple[float, ...]] | None = None
    """all of these w (with, if there are any, all of these guidances) for every snapshot, instead of a search"""
    metric: str = "distance"
    num_images: int = 2000
    """behind each point of the search"""
    report_images: int = 2000
    """in each block of the report"""
    blocks: int = 3
    """of report images"""
    batch_size: int = 100
    seed: int = 0
    tolerance: float = 0.01
    """relative gain below which the search ends"""
    limit: int = 16
    """evaluations of the search at most"""

    def __post_init__(self) -> None:
        for name, span in (("w", self.w), ("guidance", self.guidance)):
            if span is not None and not (math.isfinite(span[0]) and math.isfinite(span[1]) and span[0] < span[1]):
                raise RequestError(f"--{name} {span[0]:g} {span[1]:g}: expected a range, the lower end first")
        if self.metric not in METRICS:
            raise RequestError(f"--metric {self.metric}: unknown; expected one of {', '.join(METRICS)}")
        for name in ("num_images", "report_images", "blocks", "batch_size", "limit"):
            if getattr(self, name) < 1:
                raise RequestError(f"--{name} {getattr(self, name)}: expected at least 1")
        if self.blocks < 3:
            raise RequestError(f"--blocks {self.blocks}: expected at least 3, from which the noise can be told")
        if not self.self_trained:
            raise RequestError("--self_trained: expected one or several snapshots")


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a tuning run found."""

    point: Point
    """the choice: w = 0, the base, where Neon does not help beyond the noise"""
    search: Search
    report: Report


class Tuner:
    """Scores points of a plan, each once, into the folder of the run."""

    def __init__(
        self,
        plan: TunePlan,
        model: GenerativeModel,
        settings: Any,
        extractor: FeatureExtractor,
        selection: Reference,
        reporting: Reference,
        folder: Path,
        processes: Processes,
    ) -> None:
        self.plan, self.model, self.settings, self.extractor = plan, model, settings, extractor
        self.selection, self.reporting, self.folder, self.processes = selection, reporting, folder, processes
        self.base = {name: tensor.clone() for name, tensor in model.network.state_dict().items()}
        self.states = [load_state(path) for path in plan.self_trained]
        self._live: tuple[int, LiveMerge] | None = None
        self.log = ScoreLog(folder / LOG_FILE, processes)

    def lengths(self) -> list[float]:
        """How far each snapshot is from the base: the Euclidean norm of the update of all weights.

        Raises:
            RequestError: a snapshot is the base.
        """
        names = [name for name, _ in self.model.network.named_parameters()]
        found = []
        for path, state in zip(self.plan.self_trained, self.states, strict=True):
            steps = (state[name].double() - self.base[name].cpu().double() for name in names)
            found.append(math.sqrt(sum(float(step.square().nan_to_num(0, 0, 0).sum()) for step in steps)))
            if not found[-1]:
                raise RequestError(f"{path}: holds the weights of the base; expected weights after self-training")
        return found

    def set(self, point: Point) -> Any:
        """Put the weights of `point` into the network; the sampler's settings for it."""
        if self._live is None or self._live[0] != point.snapshot:
            # The network is written by whole states: it may hold any merge before.
            self._live = (point.snapshot, LiveMerge(self.model.network, self.base, self.states[point.snapshot]))
        self._live[1].set(point.w)
        return self.settings if point.guidance is None else replace(self.settings, guidance=point.guidance)

    def scores(self, point: Point, purpose: Purpose, block: int = 0, *, again: bool = False) -> Scores:
        """Scores of `point` on one block of images, from the log if they are there; a DegenerateError likewise.

        With `again` scores in the log are computed once more, for what is kept beside them.
        """
        count = self.plan.num_images if purpose is Purpose.SELECTION else self.plan.report_images
        name = f"{purpose.name.lower()} {block}: {self.text(point)}"

        def compute() -> Scores:
            settings = self.set(point)
            return evaluate(
                self.model,
                image_seeds(purpose, self.plan.seed, count, start=block * count),
                settings,
                self.extractor,
                self.selection if purpose is Purpose.SELECTION else self.reporting,
                batch_size=self.plan.batch_size,
                processes=self.processes,
                title=name,
                state=self.folder / STATE_FILE,
                identity=name,
                statistics=self.statistics_file(point) if purpose is Purpose.SELECTION and self.by_moments else None,
            )

        if again and isinstance(self.log.entries.get(name), Scores):
            del self.log.entries[name]
        return self.log.get_or(name, compute)

    def text(self, point: Point) -> str:
        """The point in words, which is its name in the log."""
        parts = [f"w {point.w:.6g}"]
        if point.guidance is not None:
            parts.append(f"guidance {point.guidance:.6g}")
        if point.w != 0 and len(self.states) > 1:
            parts.append(self.plan.self_trained[point.snapshot].stem)
        return ", ".join(parts)

    @property
    def by_moments(self) -> bool:
        """Whether the search sees the features' statistics: a grid needs none, and other metrics do not follow them."""
        return self.plan.grid is None and self.plan.metric == "distance"

    def statistics_file(self, point: Point) -> Path:
        """Where the statistics of a point on selection images are kept."""
        return self.folder / STATISTICS / f"{self.text(point).replace(', ', '_').replace(' ', '-')}.npz"

    def statistics(self, point: Point) -> Statistics:
        """Statistics of `point` on selection images, from the folder if they are there."""
        file = self.statistics_file(point)
        try:
            self.scores(point, Purpose.SELECTION, again=not self.processes.on_main(file.exists))
        except DegenerateError as error:
            raise EvaluationFailed(str(error)) from error
        return self.processes.on_main(lambda: Statistics.load(file))

    def value(self, point: Point) -> float:
        """What the search minimises."""
        try:
            found = METRICS[self.plan.metric](self.scores(point, Purpose.SELECTION))
        except DegenerateError as error:
            raise EvaluationFailed(str(error)) from error
        if found is None:
            raise RequestError(f"--metric {self.plan.metric}: is not scored here; add --real_images, or use distance")
        return found

    def search(self) -> Search:
        """The search, or the grid, of the plan."""
        plan = self.plan
        if plan.grid is not None:
            ws, guidances = plan.grid
            return grid(self.value, ws, guidances or (None,), self.lengths())
        return search(
            self.statistics if self.by_moments else self.value,
            w=plan.w,
            guidance=plan.guidance,
            snapshots=self.lengths(),
            reference=self.selection.frechet if self.by_moments else None,
            tolerance=plan.tolerance,
            limit=plan.limit,
        )

    def row(self, name: str, point: Point) -> Row:
        """One line of the report."""
        blocks = tuple(self.scores(point, Purpose.REPORT, block) for block in range(self.plan.blocks))
        return Row(name=name, blocks=blocks)

    def grids(self, point: Point, ws: Collection[float]) -> dict[float, Tensor]:
        """The first images of the report at several w, from the same noise: uint8 [N, C, H, W] each."""
        found = {}
        seeds = image_seeds(Purpose.REPORT, self.plan.seed, PICTURED)
        for w in sorted(ws):
            try:
                settings = self.set(point._replace(w=w))
                found[w] = sample_block(self.model, range(PICTURED), seeds, settings, self.processes)[0].cpu()
            except DegenerateError:
                continue  # such weights have no images to show
        return found


def tune(
    plan: TunePlan,
    model: GenerativeModel,
    settings: Any,
    extractor: FeatureExtractor,
    selection: Reference,
    reporting: Reference,
    folder: Path,
    processes: Processes,
    facts: dict[str, Any],
    *,
    fresh: bool = False,
) -> Outcome:
    """Search, report and write the page into `folder`, or what is left of it of a run that was killed.

    `model` is the base, loaded; `facts` say what else the scores depend on, as JSON.

    Raises:
        RequestError: the folder is another run's, or files do not fit each other.
        WorkError: the disk is full.
    """
    for path in plan.self_trained:
        check_same_network(plan.base, path)
    identity = processes.on_main(lambda: _identity(plan, model, settings, facts))
    with contextlib.ExitStack() as stack:
        processes.on_main(lambda: stack.enter_context(run_folder(folder, identity, fresh=fresh)))
        tuner = Tuner(plan, model, settings, extractor, selection, reporting, folder, processes)
        found = tuner.search()
        outcome = _reported(tuner, found, identity)
        processes.on_main(lambda: _write(tuner, outcome))
    return outcome


def _identity(plan: TunePlan, model: GenerativeModel, settings: Any, facts: dict[str, Any]) -> dict[str, Any]:
    return {
        "neon": __version__,
        "torch": torch.__version__,
        "architecture": model.architecture,
        **asdict(plan),
        "base": str(plan.base),
        "self_trained": [str(path) for path in plan.self_trained],
        "base_sha256": sha256_file(plan.base),
        "self_trained_sha256": [sha256_file(path) for path in plan.self_trained],
        "settings": asdict(settings),
        **model.protocol,
        **facts,
    }


def _reported(tuner: Tuner, found: Search, identity: dict[str, Any]) -> Outcome:
    """Score base, self-trained and Neon on report images; the base wins where the gain is within the noise."""
    plan, best, base = tuner.plan, found.best.point, found.base.point
    rows = [tuner.row("base", base)]
    if best.w != 0 and best.guidance != base.guidance:
        rows.append(tuner.row(f"base, guidance {best.guidance:g}", Point(0.0, best.guidance)))
    trained = best if best.w != 0 else Point(0.0, base.guidance, len(tuner.states) - 1)
    try:
        rows.append(tuner.row("self-trained (w = -1)", trained._replace(w=-1.0)))
    except DegenerateError as error:
        print(f"self-trained weights cannot be scored: {error}", file=sys.stderr)
    neon = rows[0]
    if best.w != 0:
        neon = tuner.row(f"Neon (w = {best.w:g})", best)
        rows.append(neon)
    helps = neon is not rows[0] and paired_gain(rows[0], neon).certain
    sampled = {evaluation.point.w for evaluation in found.evaluations if evaluation.value is not None}
    grids = tuner.grids(trained, sampled | {0.0, -1.0})
    report = Report(
        title=f"Neon: choice of w for {plan.base.name}",
        metric=score_name(tuner.extractor),
        rows=tuple(rows),
        base=rows[0],
        neon=neon,
        w=best.w,
        guidance=best.guidance,
        snapshot=_label(plan, best),
        evaluated=tuple(_evaluated(tuner, e.point) for e in found.evaluations),
        fit=found.curve(trained.guidance, trained.snapshot) if plan.metric == "distance" else (),
        grids=grids,
        notes=_notes(tuner, found),
        provenance={**identity, "command": " ".join(sys.argv)},
    )
    return Outcome(point=best if helps else base, search=found, report=report)


def _label(plan: TunePlan, point: Point) -> str | None:
    """What the snapshot of a point is called on the page: its budget, or else its file; None if there is no choice."""
    if point.w == 0 or len(plan.self_trained) == 1:
        return None
    budget = _kimg(plan.self_trained[point.snapshot])
    return plan.self_trained[point.snapshot].stem if budget is None else f"{budget:g} kimg"


def _evaluated(tuner: Tuner, point: Point) -> Evaluated:
    scores, failure = None, None
    try:
        scores = tuner.scores(point, Purpose.SELECTION)  # from the log
    except DegenerateError as error:
        failure = str(error)
    return Evaluated(
        w=point.w,
        guidance=point.guidance,
        snapshot=_label(tuner.plan, point),
        kimg=_kimg(tuner.plan.self_trained[point.snapshot]) if point.w != 0 else None,
        scores=scores,
        failure=failure,
    )


def _kimg(path: Path) -> float | None:
    """The budget of a snapshot in thousand images, if its name tells."""
    for part in path.stem.split("-"):
        with contextlib.suppress(ValueError):
            return float(part)
    return None


def _notes(tuner: Tuner, found: Search) -> tuple[str, ...]:
    plan = tuner.plan
    return (
        f"{len(found.evaluations)} points were scored on the same {plan.num_images:,} selection images each; "
        f"the search ended because {found.reason}.",
        f"The table is of {plan.blocks} blocks of {plan.report_images:,} report images each, which share no seed with "
        "the selection; the spread is the standard deviation over blocks.",
        f"Sampler: {', '.join(f'{name} {value}' for name, value in asdict(tuner.settings).items())}.",
        "The base is scored at its own best guidance, so that no gain of guidance is counted as Neon's.",
    )


def _write(tuner: Tuner, outcome: Outcome) -> None:
    report, found, chosen = outcome.report, outcome.search, outcome.point
    save(report, tuner.folder)
    page = write_report(tuner.folder, report)
    scored = [entry for entry in tuner.log.entries.values() if isinstance(entry, Scores)]
    seconds = sum(entry.seconds or 0.0 for entry in scored)  # of all evaluations, before a kill too
    gained = None if report.neon is report.base else paired_gain(report.base, report.neon)
    write_json(
        tuner.folder / RESULT_FILE,
        {
            "metric": report.metric,
            "recommended": "base" if chosen.w == 0 else "neon",
            "w": chosen.w,
            "guidance": chosen.guidance,
            "self_trained": None if chosen.w == 0 else str(tuner.plan.self_trained[chosen.snapshot]),
            "base": report.base.distance,
            "neon": report.neon.distance,
            "gain": None if gained is None else gained.mean,
            "gain_interval": None if gained is None else gained.interval,
            "blocks": tuner.plan.blocks,
            "evaluations": len(found.evaluations),
            "images": len(found.evaluations) * tuner.plan.num_images
            + sum(len(row.blocks) for row in report.rows) * tuner.plan.report_images,
            "seconds": round(seconds, 1),
            "reason": found.reason,
            "best_on_selection": {**found.best.point._asdict(), "value": found.best.value},
            "base_on_selection": {**found.base.point._asdict(), "value": found.base.value},
        },
    )
    print("\n".join(["", text_table(report), "", *summary(report), ""]))
    print(f"{len(found.evaluations)} evaluations, {seconds:.0f} s. Report: {page}", flush=True)
