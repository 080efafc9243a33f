"""Record of a run: the scores and every evaluation that led to the choice. What they say is in `neon.report.words`.

A report is kept in its run folder as `report.json` and pictures, and can be shown again from there
(`neon.report.page`) without computing anything.
"""

import json
import os
import statistics
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from scipy.special import stdtrit

from neon.errors import RequestError
from neon.evaluate import Scores, scores_from, scores_json
from neon.report.samples import ADVICE, Samples, load_samples, save_samples
from neon.runtime.files import from_json, write_json
from neon.runtime.run_folder import reading_state

RECORD_FILE = "report.json"
CONFIDENCE = 0.95


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table: a way to sample, scored on several disjoint blocks of report seeds."""

    name: str
    key: str = ""
    """its name in `scores.json`"""
    calls: int | None = None
    """network calls per image; None: not counted"""
    blocks: tuple[Scores, ...]
    """of the first blocks of report seeds: of all of them, or of fewer where an image takes many calls"""
    w: float | None = None
    """merge weight, or scale of two networks that sample together"""
    settings: dict[str, Any] | None = None
    """of the sampler, as JSON"""

    @property
    def distance(self) -> float:
        """Mean over blocks."""
        return statistics.fmean(block.distance for block in self.blocks)

    @property
    def spread(self) -> float:
        """Standard deviation over blocks."""
        return statistics.stdev(block.distance for block in self.blocks) if len(self.blocks) > 1 else 0.0

    def in_space(self, metric: str) -> "Row":
        """The row with its scores in another feature space, in place of the first."""
        return replace(self, blocks=tuple(block.beside[metric] for block in self.blocks))

    def mean(self, name: str) -> float | None:
        """Mean over blocks of the score called `name`; None: not scored."""
        values = [getattr(block, name) for block in self.blocks]
        return None if None in values else statistics.fmean(values)


@dataclass(frozen=True, kw_only=True)
class Evaluated:
    """One evaluation on selection seeds."""

    w: float
    guidance: float | None = None
    """None: the sampler has none, or it was not searched"""
    snapshot: str | None = None
    """a label of the self-trained weights, such as "12.8 kimg"; None: there is one only"""
    kimg: float | None = None
    """the budget of that snapshot"""
    sampler: str | None = None
    """in what the sampler differs from the one that was asked for; None: in nothing"""
    scores: Scores | None = None
    """None: it failed"""
    failure: str | None = None
    """why it failed"""
    searched: bool = True
    """False: evaluated for the picture only"""


@dataclass(frozen=True, kw_only=True)
class TriedSampler:
    """One evaluation of the base in the search for its best sampler, on selection seeds."""

    settings: str
    """in what they differ from those that were asked for, in words"""
    value: float | None = None
    """None: it failed"""


@dataclass(frozen=True, kw_only=True)
class Training:
    """A self-training, as far as its folder tells."""

    name: str
    """for which sampler, in words"""
    images: tuple[float, ...] = ()
    """seen"""
    losses: tuple[float, ...] = ()
    """mean loss of the steps since the place before, of as many places"""
    moved: tuple[tuple[float | None, float], ...] = ()
    """of each snapshot: images seen (None: not told), and |weights - base| / |base|"""


@dataclass(frozen=True, kw_only=True)
class Report:
    """What a page shows."""

    title: str
    metric: str
    """name of the distance: `fid`, or `fd_<features>`"""
    beside: tuple[str, ...] = ()
    """names of the distances in other feature spaces, in which rows are scored, too"""
    rows: tuple[Row, ...]
    """all lines of the table, the others here among them"""
    base: Row
    """with the sampler that was asked for"""
    neon: Row
    """with that sampler; the same object as `base` where no merge was better"""
    base_best_sampler: Row | None = None
    """the base with its best sampler of as many calls; None: none is better, or it was not searched"""
    choice: Row | None = None
    """what did best on selection images, if that is not `neon`"""
    w: float
    """the choice with the sampler that was asked for"""
    guidance: float | None = None
    snapshot: str | None = None
    evaluated: tuple[Evaluated, ...] = ()
    """in order of evaluation"""
    fit: tuple[tuple[float, float], ...] = ()
    """(w, fitted distance) at the chosen guidance and snapshot"""
    samplers: tuple[TriedSampler, ...] = ()
    """the search for the base's best sampler, in order"""
    training: tuple[Training, ...] = ()
    """the self-trainings behind it: for the sampler that was asked for, and for the base's best one"""
    samples: Samples = field(default_factory=Samples)
    commands: tuple[tuple[str, str], ...] = ()
    """what to type to do it again, merge the weights or sample: what that does, and the line"""
    notes: tuple[str, ...] = ()
    """how the figures came about, a sentence each"""
    provenance: dict[str, Any] = field(default_factory=dict)
    """what it takes to make the figures again, as JSON"""

    @property
    def fair(self) -> Row:
        """The base that gains are held against: with its best sampler of as many calls."""
        return self.base_best_sampler or self.base

    @property
    def best(self) -> Row:
        """What did best on selection images: Neon with one of the samplers, or `fair`."""
        return self.choice or self.neon


@dataclass(frozen=True, kw_only=True)
class Gain:
    """By how much a row's distance is below another's, block by block on the same seeds."""

    mean: float
    interval: tuple[float, float] | None
    """of 95% confidence (Student's t over the paired differences); None: one block has no spread"""

    @property
    def difference(self) -> float:
        """To the other row's distance: below 0 for a gain."""
        return -self.mean

    @property
    def difference_interval(self) -> tuple[float, float] | None:
        """`interval` of the difference."""
        return None if self.interval is None else (-self.interval[1], -self.interval[0])

    @property
    def certain(self) -> bool:
        """Whether the whole interval is on the good side."""
        return self.interval is not None and self.interval[0] > 0


def paired_gain(base: Row, neon: Row) -> Gain:
    """The gain of `neon` over `base` on the blocks that both have: of the same seeds, so that most noise cancels."""
    gains = [before.distance - after.distance for before, after in zip(base.blocks, neon.blocks, strict=False)]
    mean, count = statistics.fmean(gains), len(gains)
    if count == 1:
        return Gain(mean=mean, interval=None)
    half = float(stdtrit(count - 1, (1 + CONFIDENCE) / 2)) * statistics.stdev(gains) / count**0.5
    return Gain(mean=mean, interval=(mean - half, mean + half))


def save(report: Report, folder: str | os.PathLike[str]) -> None:
    """Keep the report in its run folder: `report.json`, and a picture of each grid in `samples/`."""
    folder = Path(folder)
    samples = save_samples(report.samples, folder)
    named = (report.base, report.neon, report.base_best_sampler, report.choice)
    base, neon, base_best_sampler, choice = (
        next((i for i, row in enumerate(report.rows) if row is one), None) for one in named
    )
    record = {
        "title": report.title,
        "metric": report.metric,
        **({"beside": report.beside} if report.beside else {}),
        "rows": [{**asdict(row), "blocks": [scores_json(block) for block in row.blocks]} for row in report.rows],
        "base": base,
        "neon": neon,
        "base_best_sampler": base_best_sampler,
        "choice": choice,
        "w": report.w,
        "guidance": report.guidance,
        "snapshot": report.snapshot,
        "evaluated": [
            {**asdict(one), "scores": None if one.scores is None else scores_json(one.scores)}
            for one in report.evaluated
        ],
        "fit": report.fit,
        "samplers": [asdict(one) for one in report.samplers],
        "training": [asdict(one) for one in report.training],
        **samples,
        "commands": report.commands,
        "notes": report.notes,
        "provenance": report.provenance,
    }
    write_json(folder / RECORD_FILE, record)


def load(folder: str | os.PathLike[str]) -> Report:
    """The report that was saved in `folder`.

    Raises:
        RequestError: there is none, or a file of it is missing or not readable.
    """
    folder = Path(folder)
    path = folder / RECORD_FILE
    try:
        text = path.read_bytes()
    except OSError as error:
        raise RequestError(
            f"{folder}: no report to show ({RECORD_FILE}: {error.strerror}); name the folder of a finished run"
        ) from error
    with reading_state(path, ADVICE):
        record = json.loads(text)
        report = _parsed(record)
    return replace(report, samples=load_samples(record, folder, path))


def _parsed(record: Any) -> Report:
    """The report that `save` wrote as `record`, without its pictures; or any exception."""
    rows = tuple(
        from_json(Row, {**row, "blocks": tuple(scores_from(one) for one in row["blocks"])}) for row in record["rows"]
    )
    base, neon = rows[record["base"]], rows[record["neon"]]
    # Runs of before had no more of them.
    places = {name: record.get(name) for name in ("base_best_sampler", "choice")}
    others = {name: None if place is None else rows[place] for name, place in places.items()}
    compared = [base, neon, *(row for row in others.values() if row is not None)]
    if len({len(row.blocks) for row in compared}) != 1 or not all(row.blocks for row in rows):
        raise ValueError("rows without blocks of scores, or not of as many")
    evaluated = tuple(
        from_json(Evaluated, {**one, "scores": one["scores"] and scores_from(one["scores"])})
        for one in record["evaluated"]
    )
    beside = tuple(map(str, record.get("beside", ())))
    if any(set(beside) - block.beside.keys() for row in rows for block in row.blocks):
        raise ValueError(f"rows without scores in {' and '.join(beside)}")
    known = {name: record[name] for name in ("title", "metric", "w", "guidance", "snapshot", "provenance")}
    return from_json(
        Report,
        {
            **known,
            "beside": beside,
            "rows": rows,
            "base": base,
            "neon": neon,
            **others,
            "evaluated": evaluated,
            "samplers": tuple(from_json(TriedSampler, one) for one in record.get("samplers", ())),
            "training": tuple(map(_training, record.get("training", ()))),
            "commands": tuple((str(what), str(line)) for what, line in record.get("commands", ())),
            "notes": tuple(map(str, record["notes"])),
            "fit": tuple((float(w), float(value)) for w, value in record["fit"]),
        },
    )


def _training(record: Any) -> Training:
    moved = tuple((None if seen is None else float(seen), float(share)) for seen, share in record["moved"])
    curve = {name: tuple(map(float, record[name])) for name in ("images", "losses")}
    if len({len(values) for values in curve.values()}) != 1:
        raise ValueError("a curve of a training with more images than losses")
    return from_json(Training, {**record, **curve, "moved": moved})
