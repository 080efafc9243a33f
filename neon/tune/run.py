"""The run behind `neon tune`: weights stay resident, each point is merged in place and scored, nothing is scored twice.

Points are compared on the same selection images, so that their difference is that of the weights; what was chosen is
then scored on report images, which share no seed with the selection, in several blocks, whose spread is the noise.
"""

import math
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from neon import __version__
from neon.errors import DegenerateError, RequestError
from neon.evaluate import LOG_FILE, STATE_FILE, Reference, ScoreLog, Scores, evaluate
from neon.merge import LiveMerge, load_self_trained
from neon.metrics import Statistics
from neon.metrics.features import FeatureExtractor, score_name
from neon.model import GenerativeModel
from neon.noise import Purpose, image_seeds
from neon.report.page import PAGE_FILE, write_report
from neon.report.record import Evaluated, Report, Row, paired_gain, result_text, save
from neon.runtime.distributed import Processes
from neon.runtime.files import sha256_file, write_json
from neon.runtime.run_folder import reading_state
from neon.sampling import sample_block
from neon.tune.plan import Metric, TunePlan
from neon.tune.search import EvaluationFailed, Point, Search, grid, search
from neon.tune.snapshots import as_file_name, budgets, snapshot_names

RESULT_FILE = "tune.json"
STATISTICS = "statistics"
"""folder with the statistics of each point of a search"""

METRICS: dict[Metric, tuple[str, int]] = {
    "distance": ("distance", 1),
    "is": ("is_mean", -1),
    "precision": ("precision", -1),
    "recall": ("recall", -1),
}
"""what a search minimises: a field of `Scores`, and the sign that it is minimised with"""


@dataclass(frozen=True, kw_only=True)
class Presentation:
    """What a report shows beside the points searched and the choice."""

    title: str | None = None
    """None: it names the base"""
    base_rows: Mapping[str, Any] = field(default_factory=dict)
    """name of a further row of the base -> the sampler's settings for it"""
    picture_w: tuple[float, ...] = ()
    """merge weights that are evaluated for the curves, and never chosen"""
    grid_size: int = 36
    """images in each grid of samples"""
    real: Tensor | None = None
    """real images to compare with, uint8 [M, C, H, W]"""
    calls: Callable[[Any], int] | None = None
    """settings -> network calls per image; None: not counted"""
    notes: tuple[str, ...] = ()
    """how base and self-trained weights came about, a sentence each"""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Result of a run: the recommended point, the search that led to it, and the report on other images."""

    point: Point
    """w = 0, the base, where Neon does not help beyond the noise"""
    search: Search
    report: Report
    page: Path
    seconds: float
    """of all evaluations, those before a kill included"""

    @property
    def text(self) -> str:
        """Table, result and the place of the page, for a terminal."""
        last = f"{len(self.search.evaluations)} evaluations, {self.seconds:.0f} s. Report: {self.page}"
        return f"\n{result_text(self.report)}\n\n{last}"


class Tuner:
    """Scores points of a plan, each once, into the folder of the run.

    The search sees the moments of the features; with `by_values`, and for other metrics than the distance, only values.
    """

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
        presentation: Presentation = Presentation(),
        *,
        by_values: bool = False,
    ) -> None:
        self.presentation = presentation
        # A grid needs no statistics, and other metrics do not follow from them.
        self.by_moments = not by_values and plan.grid is None and plan.metric == "distance"
        self.plan, self.model, self.settings, self.extractor = plan, model, settings, extractor
        self.selection, self.reporting, self.folder, self.processes = selection, reporting, folder, processes
        self.base = {name: tensor.clone() for name, tensor in model.network.state_dict().items()}
        self.states = [
            load_self_trained(model.network, plan.base, path, plan.key, plan.self_trained_key)
            for path in plan.self_trained
        ]
        self.names = snapshot_names(plan.self_trained)
        self.budgets = budgets(plan.self_trained, plan.key, plan.self_trained_key)
        self._live: tuple[int, LiveMerge] | None = None
        self.log = ScoreLog(folder / LOG_FILE, processes)

    def lengths(self) -> list[float]:
        """How far each snapshot is from the base: the Euclidean norm of the update of all weights.

        Raises:
            RequestError: a snapshot is the base.
        """
        names = [name for name, _ in self.model.network.named_parameters()]
        lengths = []
        for path, state in zip(self.plan.self_trained, self.states, strict=True):
            steps = (state[name].double() - self.base[name].cpu().double() for name in names)
            lengths.append(math.sqrt(sum(float(step.square().nan_to_num(0, 0, 0).sum()) for step in steps)))
            if not lengths[-1]:
                raise RequestError(f"{path}: holds the weights of the base; expected weights after self-training")
        return lengths

    def set(self, point: Point) -> Any:
        """Put the weights of `point` into the network; the sampler's settings for it."""
        if self._live is None or self._live[0] != point.snapshot:
            # The network is written by whole states: it may hold any merge before.
            self._live = (point.snapshot, LiveMerge(self.model.network, self.base, self.states[point.snapshot]))
        self._live[1].set(point.w)
        return self.settings if point.guidance is None else replace(self.settings, guidance=point.guidance)

    def scores(
        self, point: Point, purpose: Purpose, block: int = 0, *, row: str | None = None, again: bool = False
    ) -> Scores:
        """Scores of `point` on one block of images, from the log if they are there; a DegenerateError likewise.

        `row` is one of the presentation's, sampled with its own settings. With `again` scores in the log are computed
        once more, for what is kept beside them.
        """
        count = self.plan.num_images if purpose is Purpose.SELECTION else self.plan.report_images
        name = f"{purpose.name.lower()} {block}: {self.text(point) if row is None else row}"

        def compute() -> Scores:
            settings = self.set(point)
            return evaluate(
                self.model,
                image_seeds(purpose, self.plan.seed, count, start=block * count),
                settings if row is None else self.presentation.base_rows[row],
                self.extractor,
                self.selection if purpose is Purpose.SELECTION else self.reporting,
                batch_size=self.plan.batch_size,
                processes=self.processes,
                label=self.model.set_labels(count, self.plan.seed),
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
        parts = [f"w {_number(point.w)}"]
        if point.guidance is not None:
            parts.append(f"guidance {_number(point.guidance)}")
        if point.w != 0 and len(self.states) > 1:
            parts.append(self.names[point.snapshot])
        return ", ".join(parts)

    def label(self, point: Point) -> str | None:
        """What the snapshot of a point is called on the page: its budget, or its name; None if there is no choice."""
        if point.w == 0 or len(self.states) == 1:
            return None
        budget = self.budgets[point.snapshot]
        return self.names[point.snapshot] if budget is None else f"{budget:g} kimg"

    def statistics_file(self, point: Point) -> Path:
        """Where the statistics of a point on selection images are kept."""
        return self.folder / STATISTICS / f"{as_file_name(self.text(point))}.npz"

    def statistics(self, point: Point) -> Statistics:
        """Statistics of `point` on selection images, from the folder if they are there."""
        file = self.statistics_file(point)
        try:
            self.scores(point, Purpose.SELECTION, again=not self.processes.on_main(file.exists))
        except DegenerateError as error:
            raise EvaluationFailed(str(error)) from error
        return self.processes.on_main(lambda: self._load(file))

    def _load(self, file: Path) -> Statistics:
        dim = self.extractor.dim
        with reading_state(file, "delete it, and its point is sampled again"):
            statistics = Statistics.load(file)
            if statistics.dim != dim:
                raise ValueError(f"statistics of {statistics.dim} features, not of {dim}")
        return statistics

    def value(self, point: Point) -> float:
        """What the search minimises."""
        try:
            scores = self.scores(point, Purpose.SELECTION)
        except DegenerateError as error:
            raise EvaluationFailed(str(error)) from error
        field_name, sign = METRICS[self.plan.metric]
        if (score := getattr(scores, field_name)) is None:
            raise RequestError(f"--metric {self.plan.metric}: is not scored here; add --real_images, or use distance")
        return sign * score

    def search(self) -> Search:
        """The search, or the grid, of the plan."""
        plan = self.plan
        if plan.grid is not None:
            return grid(self.value, plan.grid, plan.guidances or (None,), self.lengths())
        return search(
            self.statistics if self.by_moments else self.value,
            w=plan.w,
            guidance=plan.guidance,
            snapshots=self.lengths(),
            reference=self.selection.frechet if self.by_moments else None,
            tolerance=plan.tolerance,
            limit=plan.limit,
        )

    def row(self, name: str, point: Point, *, of_base: bool = False) -> Row:
        """One line of the report; `of_base`: one of the presentation's further rows."""
        blocks = tuple(
            self.scores(point, Purpose.REPORT, block, row=name if of_base else None)
            for block in range(self.plan.blocks)
        )
        calls, settings = self.presentation.calls, self.presentation.base_rows[name] if of_base else self.settings
        return Row(name=name, blocks=blocks, calls=calls and calls(settings))

    def evaluated(self, point: Point, *, searched: bool = True) -> Evaluated:
        """A point on selection images, as the report shows it."""
        scores, failure = None, None
        try:
            scores = self.scores(point, Purpose.SELECTION)
        except DegenerateError as error:
            failure = str(error)
        return Evaluated(
            w=point.w,
            guidance=point.guidance,
            snapshot=self.label(point),
            kimg=self.budgets[point.snapshot] if point.w != 0 else None,
            scores=scores,
            failure=failure,
            searched=searched,
        )

    def _images(self, seeds: Sequence[int], settings: Any) -> Tensor:
        """Images of some seeds, uint8 [N, C, H, W] on the CPU."""
        count = len(seeds)
        labels = self.model.set_labels(count, self.plan.seed)
        return sample_block(self.model, range(count), seeds, settings, self.processes, labels)[0].cpu()

    def grids(self, point: Point, ws: Collection[float]) -> dict[float, Tensor]:
        """The first images of the report at several w, from the same noise: uint8 [N, C, H, W] each."""
        grids = {}
        count = self.presentation.grid_size
        seeds = image_seeds(Purpose.REPORT, self.plan.seed, count)
        for w in sorted(ws):
            try:
                settings = self.set(point._replace(w=w))
                grids[w] = self._images(seeds, settings)
            except DegenerateError:
                continue  # such weights have no images to show
        return grids


def choose(tuner: Tuner, provenance: dict[str, Any]) -> Outcome:
    """Search, report the choice on other images, and write both into the folder of the run, which the caller holds.

    `provenance` says what the scores depend on, as JSON.
    """
    result = tuner.search()
    report, helps = _report(tuner, result, provenance)
    scored = [entry for entry in tuner.log.entries.values() if isinstance(entry, Scores)]
    outcome = Outcome(
        point=result.best.point if helps else result.base.point,
        search=result,
        report=report,
        page=tuner.folder / PAGE_FILE,
        seconds=sum(entry.seconds or 0.0 for entry in scored),
    )
    tuner.processes.on_main(lambda: _write(tuner, outcome))
    return outcome


def identity_of(plan: TunePlan, model: GenerativeModel, settings: Any, facts: dict[str, Any]) -> dict[str, Any]:
    """What a run is determined by, as JSON; `facts` say what beside plan, model and settings the scores depend on."""
    # Runs that began before classes were dealt to the images of a set, as the protocol says, are not continued.
    dealt = {} if model.set_labels(1, 0) is None else {"labels": "dealt to the set"}
    return {
        "neon": __version__,
        "torch": torch.__version__,
        "architecture": model.architecture,
        **asdict(plan),
        # One entry for both, as in records of earlier runs.
        "grid": None if plan.grid is None else (plan.grid, plan.guidances),
        "guidance_grid": None,
        "base": str(plan.base),
        "self_trained": [str(path) for path in plan.self_trained],
        "base_sha256": sha256_file(plan.base),
        "self_trained_sha256": [sha256_file(path) for path in plan.self_trained],
        "settings": asdict(settings),
        **model.protocol,
        **dealt,
        **facts,
    }


def _report(tuner: Tuner, result: Search, provenance: dict[str, Any]) -> tuple[Report, bool]:
    """Base, self-trained and Neon scored on report images, and whether Neon's gain is beyond the noise."""
    plan, shown, best, base = tuner.plan, tuner.presentation, result.best.point, result.base.point
    rows, notes = [tuner.row("base", base)], [*shown.notes, *_notes(tuner, result)]
    if best.w != 0 and best.guidance != base.guidance:
        rows.append(tuner.row(f"base, guidance {best.guidance:g}", Point(0.0, best.guidance)))
    rows += [tuner.row(name, Point(0.0, base.guidance), of_base=True) for name in shown.base_rows]
    trained = best if best.w != 0 else Point(0.0, base.guidance, len(tuner.states) - 1)
    try:
        rows.append(tuner.row("self-trained (w = -1)", trained._replace(w=-1.0)))
    except DegenerateError as error:
        notes.append(f"The self-trained weights could not be scored: {error}.")
    neon = rows[0]
    if best.w != 0:
        neon = tuner.row(f"Neon (w = {best.w:g})", best)
        rows.append(neon)
    evaluated = [tuner.evaluated(evaluation.point) for evaluation in result.evaluations]
    pictured = set(shown.picture_w) - {point.w for point in evaluated}
    evaluated += [tuner.evaluated(trained._replace(w=w), searched=False) for w in shown.picture_w if w in pictured]
    report = Report(
        title=shown.title or f"Neon: choice of w for {plan.base.name}",
        metric=score_name(tuner.extractor),
        rows=tuple(rows),
        base=rows[0],
        neon=neon,
        w=best.w,
        guidance=best.guidance,
        snapshot=tuner.label(best),
        evaluated=tuple(evaluated),
        fit=result.curve(trained.guidance, trained.snapshot) if plan.metric == "distance" else (),
        grids=tuner.grids(trained, {point.w for point in evaluated if point.scores is not None} | {0.0, -1.0}),
        real=shown.real,
        notes=tuple(notes),
        provenance={**provenance, "command": " ".join(sys.argv)},
    )
    return report, neon is not rows[0] and paired_gain(rows[0], neon).certain


def _number(value: float) -> str:
    """A number in six digits, or in as many as it takes."""
    text = f"{value:.6g}"
    return text if float(text) == value else repr(value)


def _notes(tuner: Tuner, result: Search) -> list[str]:
    plan = tuner.plan
    return [
        f"{len(result.evaluations)} points were scored on the same {plan.num_images:,} selection images each; "
        f"the search ended because {result.reason}.",
        f"The table is of {plan.blocks} blocks of {plan.report_images:,} report images each, which share no seed with "
        "the selection; the spread is the standard deviation over blocks.",
        f"Sampler: {', '.join(f'{name} {value}' for name, value in asdict(tuner.settings).items())}.",
        *(
            ["The base is scored at its own best guidance, so that no gain of guidance is counted as Neon's."]
            if plan.guidances
            else []
        ),
    ]


def _write(tuner: Tuner, outcome: Outcome) -> None:
    report, result, chosen = outcome.report, outcome.search, outcome.point
    save(report, tuner.folder)
    write_report(tuner.folder, report)
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
            "evaluations": len(result.evaluations),
            "images": len(result.evaluations) * tuner.plan.num_images
            + sum(len(row.blocks) for row in report.rows) * tuner.plan.report_images,
            "seconds": round(outcome.seconds, 1),
            "reason": result.reason,
            "best_on_selection": {**result.best.point._asdict(), "value": result.best.value},
            "base_on_selection": {**result.base.point._asdict(), "value": result.base.value},
        },
    )
