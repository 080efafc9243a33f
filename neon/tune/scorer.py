"""Scores of one live model under many weights and settings, each computed once, into the folder of a run."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from neon.errors import DegenerateError, RequestError, warn
from neon.evaluate import LOG_FILE, STATE_FILE, Reference, ScoreLog, Scores, evaluate
from neon.merge.live import Live, copied_weights
from neon.metrics import Statistics
from neon.model import GenerativeModel
from neon.noise import Purpose, image_seeds
from neon.report.record import Row
from neon.report.words import OF_BLOCKS
from neon.runtime.distributed import Processes
from neon.runtime.files import write_csv
from neon.runtime.run_folder import reading_state
from neon.runtime.trackers import Tracker
from neon.tune.cautions import balance_cautions, reference_cautions
from neon.tune.plan import Metric, TunePlan
from neon.tune.search import EvaluationFailed
from neon.tune.snapshots import as_file_name

METRICS: dict[Metric, tuple[str, int]] = {
    "distance": ("distance", 1),
    "is": ("is_mean", -1),
    "precision": ("precision", -1),
    "recall": ("recall", -1),
}
"""what a search minimises: a field of `Scores`, and the sign that it is minimised with"""
STATISTICS = "statistics"
"""folder with the statistics of each point of a search"""
EVALUATIONS_TABLE = "evaluations.csv"
OF_CANDIDATES, OF_SCORES = ("w", "guidance"), OF_BLOCKS[1:]
"""columns that a tracker gets, too"""
COLUMNS = ("name", "purpose", "block", *OF_CANDIDATES, "snapshot", "sampler", *OF_BLOCKS, "seconds", "failure")
"""of `evaluations.csv`: a line for each evaluation of a run, in order"""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """Weights and settings that are scored."""

    name: str
    """in words that tell them from all others of the run"""
    put: Callable[[], GenerativeModel]
    """puts the weights in place and says which model samples"""
    settings: Any
    w: float
    """merge weight, or scale of two networks that sample together"""
    snapshot: str | None = None
    """what the self-trained weights are called; None: there is one only, or none is used"""
    sampler: str = ""
    """in what the settings differ from those that were asked for, in words; empty: in nothing"""

    @property
    def columns(self) -> dict[str, Any]:
        """What a table tells of these."""
        guidance = getattr(self.settings, "guidance", None)
        return {"w": self.w, "guidance": guidance, "snapshot": self.snapshot, "sampler": self.sampler or None}


class Scorer:
    """Samples, scores and records; what is recorded, a failure too, is not computed again.

    `model` comes with the weights of the base. Evaluations go to `tracker`, if there is one, by their number.
    """

    def __init__(
        self,
        plan: TunePlan,
        model: GenerativeModel,
        selection: Reference,
        reporting: Sequence[Reference],
        folder: Path,
        processes: Processes,
        tracker: Tracker | None = None,
    ) -> None:
        self.plan, self.model, self.folder, self.processes = plan, model, folder, processes
        self.selection, self.reporting = selection, tuple(reporting)
        self.log = ScoreLog(folder / LOG_FILE, processes)
        self._tracker = tracker
        self._live: Live | None = None
        self._table: dict[str, dict[str, Any]] = {}
        """lines of `evaluations.csv`, by the name of the evaluation"""

    def put(self, live: Live, w: float) -> None:
        """Put a merge into the live network, which may hold any other."""
        if self._live is not live:
            self.put_base()
        self._live = live
        live.set(w)

    def put_base(self) -> None:
        """Put the weights of the base back into the live network."""
        if self._live is not None:
            self._live.set(0.0)

    @cached_property
    def base(self) -> dict[str, Tensor]:
        """A copy of the weights of the base."""
        self.put_base()
        return copied_weights(self.model.network)

    @cached_property
    def norm(self) -> float:
        """Of the base's weights."""
        self.put_base()
        return math.sqrt(sum(float(p.detach().double().square().sum()) for p in self.model.network.parameters()))

    @property
    def seconds(self) -> float:
        """Of all evaluations, those before a kill included."""
        return sum(entry.seconds or 0.0 for entry in self.log.entries.values() if isinstance(entry, Scores))

    def scores(
        self,
        candidate: Candidate,
        purpose: Purpose,
        block: int = 0,
        *,
        num_images: int | None = None,
        keep: bool = False,
        again: bool = False,
    ) -> Scores:
        """Scores on one block of images; a DegenerateError if there are none.

        Args:
            num_images: other than the plan says.
            keep: keep the mean and covariance of the features, too.
            again: compute once more what is recorded.
        """
        count = num_images or self._planned(purpose)
        name = self._of_count(candidate.name, purpose, count)
        entry = f"{purpose.name.lower()} {block}: {name}"

        def compute() -> Scores:
            return evaluate(
                candidate.put(),
                image_seeds(purpose, self.plan.seed, count, start=block * count),
                candidate.settings,
                [self.selection] if purpose is Purpose.SELECTION else self.reporting,
                batch_size=self.plan.batch_size,
                processes=self.processes,
                label=self.model.labels_for(purpose, count, self.plan.seed),
                title=entry,
                state=self.folder / STATE_FILE,
                identity=entry,
                statistics=self._file(name) if keep else None,
            )

        if again and isinstance(self.log.entries.get(entry), Scores):
            del self.log.entries[entry]
        try:
            return self.log.get_or(entry, compute)
        finally:
            if entry in self.log.entries and entry not in self._table:
                self._tell({"name": entry, "purpose": purpose.name.lower(), "block": block, **candidate.columns})

    def _tell(self, what: dict[str, Any]) -> None:
        """Tell the table and the tracker of an evaluation that is in the log."""
        scores = self.log.entries[what["name"]]
        line = what | ({"failure": scores} if isinstance(scores, str) else asdict(scores))
        self._table[what["name"]] = line
        self.processes.on_main(lambda: write_csv(self.folder / EVALUATIONS_TABLE, COLUMNS, self._table.values()))
        if self._tracker is not None:
            values = {f"{what['purpose']}/{name}": line.get(name) for name in (*OF_CANDIDATES, *OF_SCORES)}
            self._tracker.log(values, len(self._table))

    def track_result(self, rows: Iterable[Row]) -> None:
        """Tell the tracker of the report that a run ends with, after all of its evaluations."""
        if self._tracker is not None:
            values = {f"scores/{row.key}/{name}": row.mean(name) for row in rows for name in OF_SCORES}
            self._tracker.log(values, len(self._table) + 1)

    def cautions(self, gain: float) -> list[str]:
        """Why a choice that gained so much may be off for other images, as sentences; also said as warnings."""
        references = self.selection.frechet.statistics, self.reporting[0].frechet.statistics
        found = [*reference_cautions(*references, gain), *balance_cautions(self.model, self.plan.report_images)]
        if self.processes.is_main:
            for caution in found:
                warn(caution)
        return [f"{caution[0].upper()}{caution[1:]}." for caution in found]

    def statistics(self, candidate: Candidate, *, num_images: int | None = None) -> Statistics:
        """Statistics of the features of selection images, from the folder if they are there.

        Raises:
            EvaluationFailed: there are none.
        """
        file = self._file(self._of_count(candidate.name, Purpose.SELECTION, num_images))
        again = not self.processes.on_main(file.exists)
        try:
            self.scores(candidate, Purpose.SELECTION, num_images=num_images, keep=True, again=again)
        except DegenerateError as error:
            raise EvaluationFailed(str(error)) from error
        return self.processes.on_main(lambda: self._load(file))

    def value(self, candidate: Candidate, *, num_images: int | None = None) -> float:
        """What a search minimises, of selection images.

        Raises:
            EvaluationFailed: there are no scores.
            RequestError: the plan's metric is none of them.
        """
        try:
            scores = self.scores(candidate, Purpose.SELECTION, num_images=num_images)
        except DegenerateError as error:
            raise EvaluationFailed(str(error)) from error
        field_name, sign = METRICS[self.plan.metric]
        if (score := getattr(scores, field_name)) is None:
            raise RequestError(f"--metric {self.plan.metric}: is not scored here; add --real_images, or use distance")
        return float(sign * score)

    def _planned(self, purpose: Purpose) -> int:
        return self.plan.num_images if purpose is Purpose.SELECTION else self.plan.report_images

    def _of_count(self, name: str, purpose: Purpose, num_images: int | None) -> str:
        """The name of an evaluation of another number of images than planned."""
        return name if num_images in (None, self._planned(purpose)) else f"{name}, {num_images} images"

    def _file(self, name: str) -> Path:
        return self.folder / STATISTICS / f"{as_file_name(name)}.npz"

    def _load(self, file: Path) -> Statistics:
        dim = self.selection.extractor.dim
        with reading_state(file, "delete it, and its point is sampled again"):
            statistics = Statistics.load(file)
            if statistics.dim != dim:
                raise ValueError(f"statistics of {statistics.dim} features, not of {dim}")
        return statistics


def settings_text(given: Any, settings: Any) -> str:
    """In what `settings` differ from `given`, in words: `sigma_max 10, rho 12`; empty if in nothing."""
    return ", ".join(f"{name} {number_text(value)}" for name, value in _changed(given, settings).items())


def set_text(default: Any, settings: Any) -> str:
    """What turns `default` into `settings`, as pairs of the flag `--set` of commands."""
    return " ".join(f"{name}={_set_value(value)}" for name, value in _changed(default, settings).items())


def _changed(before: Any, after: Any) -> dict[str, Any]:
    """The fields of settings that differ from others, by name."""
    old = asdict(before)
    return {name: value for name, value in asdict(after).items() if value != old.get(name)}


def _set_value(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def number_text(value: Any) -> str:
    """A number in six digits, or in as many as it takes; other values as they print."""
    if not isinstance(value, float):
        return str(value)
    text = f"{value:.6g}"
    return text if float(text) == value else repr(value)
