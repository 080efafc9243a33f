"""Record of a run: the scores, every evaluation that led to the choice, and what they say in words.

A report is kept in its run folder as `report.json` and pictures, and can be shown again from there
(`neon.report.page`) without computing anything.
"""

import json
import os
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from scipy.special import stdtrit
from torch import Tensor

from neon.data.pictures import load_picture
from neon.errors import RequestError
from neon.evaluate import Scores, scores_from
from neon.report.grids import as_png, image_grid, images_of
from neon.runtime.files import atomic_write, from_json, write_json
from neon.runtime.run_folder import reading_state

RECORD_FILE, SAMPLES_FOLDER = "report.json", "samples"
REAL_NAME = "real images"
CONFIDENCE = 0.95


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table: a way to sample, scored on several disjoint blocks of report seeds."""

    name: str
    calls: int | None = None
    """network calls per image; None: not counted"""
    blocks: tuple[Scores, ...]

    @property
    def distance(self) -> float:
        """Mean over blocks."""
        return statistics.fmean(block.distance for block in self.blocks)

    @property
    def spread(self) -> float:
        """Standard deviation over blocks."""
        return statistics.stdev(block.distance for block in self.blocks) if len(self.blocks) > 1 else 0.0

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
    scores: Scores | None = None
    """None: it failed"""
    failure: str | None = None
    """why it failed"""
    searched: bool = True
    """False: evaluated for the picture only"""


@dataclass(frozen=True, kw_only=True)
class Report:
    """What a page shows."""

    title: str
    metric: str
    """name of the distance: `fid`, or `fd_<features>`"""
    rows: tuple[Row, ...]
    """all lines of the table, the next two among them"""
    base: Row
    neon: Row
    """the same object as `base` where no merge was better"""
    w: float
    """the choice"""
    guidance: float | None = None
    snapshot: str | None = None
    evaluated: tuple[Evaluated, ...] = ()
    """in order of evaluation"""
    fit: tuple[tuple[float, float], ...] = ()
    """(w, fitted distance) at the chosen guidance and snapshot"""
    grids: dict[float, Tensor] = field(default_factory=dict)
    """w -> uint8 [N, C, H, W], the same N seeds and classes for each w"""
    real: Tensor | None = None
    """real images to compare with, uint8 [M, C, H, W]"""
    notes: tuple[str, ...] = ()
    """how the figures came about, a sentence each"""
    provenance: dict[str, Any] = field(default_factory=dict)
    """what it takes to make the figures again, as JSON"""


@dataclass(frozen=True, kw_only=True)
class Gain:
    """By how much a row's distance is below the base's, block by block on the same seeds."""

    mean: float
    interval: tuple[float, float] | None
    """of 95% confidence (Student's t over the paired differences); None: one block has no spread"""

    @property
    def certain(self) -> bool:
        """Whether the whole interval is on the good side."""
        return self.interval is not None and self.interval[0] > 0


def paired_gain(base: Row, neon: Row) -> Gain:
    """The gain of `neon` over `base`, whose blocks are of the same seeds, so that most of the noise cancels."""
    gains = [before.distance - after.distance for before, after in zip(base.blocks, neon.blocks, strict=True)]
    mean, count = statistics.fmean(gains), len(gains)
    if count == 1:
        return Gain(mean=mean, interval=None)
    half = float(stdtrit(count - 1, (1 + CONFIDENCE) / 2)) * statistics.stdev(gains) / count**0.5
    return Gain(mean=mean, interval=(mean - half, mean + half))


def distance_text(value: float) -> str:
    """A distance as text: two decimals, or three digits where those would say little."""
    return f"{value:.2f}" if abs(value) >= 1 or value == 0 else f"{value:.3g}"


def score_text(row: Row) -> str:
    """The distance and, over several blocks, its spread."""
    spread = f"{row.spread:.2f}" if row.distance >= 1 else f"{row.spread:.2g}"
    return distance_text(row.distance) + (f" ± {spread}" if len(row.blocks) > 1 else "")


def change_text(report: Report, row: Row) -> str:
    """The change of the distance against the base; nothing for the base itself."""
    return "" if row is report.base else f"{row.distance / report.base.distance - 1:+.0%}"


def choice_text(report: Report) -> str:
    """What was chosen: `w = 1 (guidance 2.7, snapshot 12.8 kimg)`."""
    more = [f"guidance {report.guidance:g}"] if report.guidance is not None else []
    more += [f"snapshot {report.snapshot}"] if report.snapshot is not None else []
    return f"w = {report.w:g}" + (f" ({', '.join(more)})" if more else "")


def grid_name(report: Report, w: float) -> str:
    """What the images sampled at `w` are called."""
    if w == 0:
        return "base (w = 0)"
    if w == -1:
        return "self-trained (w = -1)"
    return f"{'Neon' if w > 0 else 'chosen'} (w = {w:g})" if w == report.w else f"w = {w:g}"


def main_grids(report: Report) -> list[tuple[str, Tensor]]:
    """The grids to look at first, each under its name: base, self-trained, the choice and real images."""
    wanted = [w for w in dict.fromkeys((0.0, -1.0, report.w)) if w in report.grids]
    grids = [(grid_name(report, w), report.grids[w]) for w in wanted]
    return grids if report.real is None else [*grids, (REAL_NAME, report.real)]


def headline(report: Report) -> str:
    """The result in one sentence, with the gain held against its noise."""
    base, neon = report.base, report.neon
    if neon is base:
        return (
            f"No gain: no merge did better than the base, whose distance to real images is {score_text(base)}; keep it."
        )
    gain, change = paired_gain(base, neon), change_text(report, neon)
    if gain.mean <= 0:
        return (
            f"No gain: with {choice_text(report)} the distance to real images is {distance_text(neon.distance)} "
            f"against {distance_text(base.distance)} for the base; keep the base."
        )
    way = "Neon" if report.w > 0 else "A step towards the self-trained model"
    result = (
        f"{way} with {choice_text(report)} lowers the distance to real images from {distance_text(base.distance)} to "
        f"{distance_text(neon.distance)} ({change})"
    )
    if gain.interval is None:
        return f"{result} on one block of seeds, which does not tell how much of that is noise; score more blocks."
    low, high = (distance_text(end) for end in gain.interval)
    certainty = f"between {low} and {high} with {CONFIDENCE:.0%} confidence ({len(base.blocks)} paired blocks of seeds)"
    if not gain.certain:
        return (
            f"No gain beyond the noise: with {choice_text(report)} the distance to real images is "
            f"{distance_text(neon.distance)} against {distance_text(base.distance)} for the base, a gain {certainty}; "
            "keep the base."
        )
    return f"{result}, a gain of {distance_text(gain.mean)}, {certainty}."


def bias_undone(base: Row, neon: Row) -> str | None:
    """Which bias of the sampler Neon undid, read from precision and recall; None where those are not scored."""
    before, after = (base.mean("precision"), base.mean("recall")), (neon.mean("precision"), neon.mean("recall"))
    if neon is base or before[0] is None or before[1] is None or after[0] is None or after[1] is None:
        return None
    figures = f"precision {before[0]:.2f} → {after[0]:.2f}, recall {before[1]:.2f} → {after[1]:.2f}"
    if after[1] > before[1] and after[0] <= before[0]:
        return f"The base's sampler was too concentrated on typical images; Neon gave the variety back ({figures})."
    if after[0] > before[0] and after[1] <= before[1]:
        return f"The base's sampler was too noisy; Neon made its images more faithful ({figures})."
    if after[0] > before[0] and after[1] > before[1]:
        return f"Neon made the base's images both more faithful and more varied ({figures})."
    return f"Neither fidelity nor variety improved ({figures})."


def conclusions(report: Report) -> list[str]:
    """The result and, where it is known, the bias undone: a sentence each."""
    bias = bias_undone(report.base, report.neon)
    return [headline(report)] if bias is None else [headline(report), bias]


def score_table(report: Report) -> list[list[str]]:
    """The rows as text, the header first; a column that no row has figures for is left out."""
    columns = [
        ["", *(row.name for row in report.rows)],
        ["calls", *("" if row.calls is None else str(row.calls) for row in report.rows)],
        [report.metric, *map(score_text, report.rows)],
        ["change", *(change_text(report, row) for row in report.rows)],
    ]
    for title, name in (("inception score", "is_mean"), ("precision", "precision"), ("recall", "recall")):
        means = [row.mean(name) for row in report.rows]
        columns.append([title, *("" if mean is None else f"{mean:.2f}" for mean in means)])
    return [list(line) for line in zip(*(column for column in columns if any(column[1:])), strict=True)]


def text_table(lines: Sequence[Sequence[str]]) -> str:
    """Rows of equally many cells as plain text: the first column flush left, the others right."""
    first, *widths = (max(map(len, column)) for column in zip(*lines, strict=True))
    return "\n".join(
        f"{name:<{first}}" + "".join(f"  {cell:>{width}}" for cell, width in zip(cells, widths, strict=True))
        for name, *cells in lines
    )


def result_text(report: Report) -> str:
    """The table and what it says, for a terminal."""
    return "\n".join([text_table(score_table(report)), "", *conclusions(report)])


def save(report: Report, folder: str | os.PathLike[str]) -> None:
    """Keep the report in its run folder: `report.json`, and a picture of each grid in `samples/`."""
    folder = Path(folder)
    pictures = {_grid_file(folder, w): images for w, images in report.grids.items()}
    if report.real is not None:
        pictures[_real_file(folder)] = report.real
    for path, images in pictures.items():
        with atomic_write(path) as file:
            file.write(as_png(image_grid(images)))
    places = [next(i for i, row in enumerate(report.rows) if row is one) for one in (report.base, report.neon)]
    record = {
        "title": report.title,
        "metric": report.metric,
        "rows": [asdict(row) for row in report.rows],
        "base": places[0],
        "neon": places[1],
        "w": report.w,
        "guidance": report.guidance,
        "snapshot": report.snapshot,
        "evaluated": [asdict(one) for one in report.evaluated],
        "fit": report.fit,
        "grids": [{"w": w, "shape": tuple(images.shape)} for w, images in report.grids.items()],
        "real": None if report.real is None else tuple(report.real.shape),
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
    with reading_state(path, "run again what wrote it"):
        report, grids, real = _parsed(json.loads(text))
    pictures = {w: _read_images(_grid_file(folder, w), shape) for w, shape in grids.items()}
    return replace(report, grids=pictures, real=None if real is None else _read_images(_real_file(folder), real))


def _parsed(record: Any) -> tuple[Report, dict[float, list[int]], list[int] | None]:
    """The report that `save` wrote as `record`, without its pictures, and the shapes of these; or any exception."""
    rows = tuple(
        from_json(Row, {**row, "blocks": tuple(scores_from(one) for one in row["blocks"])}) for row in record["rows"]
    )
    base, neon = rows[record["base"]], rows[record["neon"]]
    if len(base.blocks) != len(neon.blocks) or not all(row.blocks for row in rows):
        raise ValueError("rows without blocks of scores, or not of as many")
    evaluated = tuple(
        from_json(Evaluated, {**one, "scores": one["scores"] and scores_from(one["scores"])})
        for one in record["evaluated"]
    )
    known = {name: record[name] for name in ("title", "metric", "w", "guidance", "snapshot", "provenance")}
    report = from_json(
        Report,
        {
            **known,
            "rows": rows,
            "base": base,
            "neon": neon,
            "evaluated": evaluated,
            "notes": tuple(map(str, record["notes"])),
            "fit": tuple((float(w), float(value)) for w, value in record["fit"]),
        },
    )
    return report, {float(grid["w"]): grid["shape"] for grid in record["grids"]}, record["real"]


def _grid_file(folder: Path, w: float) -> Path:
    return folder / SAMPLES_FOLDER / f"w{w:g}.png"


def _real_file(folder: Path) -> Path:
    return folder / SAMPLES_FOLDER / "real.png"


def _read_images(path: Path, shape: Sequence[int]) -> Tensor:
    with reading_state(path, "run again what wrote it"):
        return images_of(load_picture(path.read_bytes()), shape)
