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
class Report:
    """What a page shows."""

    title: str
    metric: str
    """name of the distance: `fid`, or `fd_<features>`"""
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
    grids: dict[float, Tensor] = field(default_factory=dict)
    """w -> uint8 [N, C, H, W], the same N seeds and classes for each w"""
    real: Tensor | None = None
    """real images to compare with, uint8 [M, C, H, W]"""
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


def distance_text(value: float) -> str:
    """A distance as text: two decimals, or three digits where those would say little."""
    return f"{value:.2f}" if abs(value) >= 1 or value == 0 else f"{value:.3g}"


def score_text(row: Row) -> str:
    """The distance and, over several blocks, its spread."""
    spread = f"{row.spread:.2f}" if row.distance >= 1 else f"{row.spread:.2g}"
    return distance_text(row.distance) + (f" ± {spread}" if len(row.blocks) > 1 else "")


def change_text(report: Report, row: Row) -> str:
    """The change of the distance against the base as it was asked for; nothing for the base itself."""
    return "" if row is report.base else f"{row.distance / report.base.distance - 1:+.0%}"


def difference_text(report: Report, row: Row) -> str:
    """The paired difference to the fair baseline and its interval; nothing for the baseline itself."""
    return "" if row is report.fair else gain_text(paired_gain(report.fair, row))


def gain_text(gain: Gain) -> str:
    """A gain as the difference that it is to the distance, and its interval: `-29.30 [-33.10, -25.50]`."""
    text = _signed(-gain.mean)
    return text if gain.interval is None else f"{text} [{_signed(-gain.interval[1])}, {_signed(-gain.interval[0])}]"


def _signed(value: float) -> str:
    return ("+" if value > 0 else "") + distance_text(value)


def choice_text(report: Report) -> str:
    """What was chosen: `w = 1 (guidance 2.7, snapshot 12.8 kimg)`."""
    more = [f"guidance {report.guidance:g}"] if report.guidance is not None else []
    more += [f"snapshot {report.snapshot}"] if report.snapshot is not None else []
    return f"w = {report.w:g}" + (f" ({', '.join(more)})" if more else "")


def choices_text(report: Report) -> str:
    """What was chosen with each sampler."""
    tuned = [row for row in report.rows if row.key == "neon_best_sampler"]
    if report.base_best_sampler is None:
        return choice_text(report)
    best = f"w = {tuned[0].w:g}" if tuned else "w = 0"
    return f"{choice_text(report)} with the sampler that was asked for, {best} with the base's best one"


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
    """The result in one sentence: the best against the fair baseline, with the gain held against its noise."""
    fair, best = report.fair, report.best
    if best is fair:
        return (
            f"No gain: no merge did better than {_called(report, fair)}, whose distance to real images is "
            f"{score_text(fair)}; keep it."
        )
    gain, now, before = paired_gain(fair, best), distance_text(best.distance), distance_text(fair.distance)
    what = _choice_of(report)
    if gain.mean <= 0:
        return (
            f"No gain: with {what} the distance to real images is {now} against {before} for {_called(report, fair)}; "
            f"keep {_kept(report)}."
        )
    change = f"{best.distance / fair.distance - 1:+.0%}"
    w = report.w if best is report.neon else best.w or 0
    way = "Neon" if w > 0 else "A step towards the self-trained model"
    of = "" if fair is report.base else f" ({_called(report, fair)})"
    result = f"{way} with {what} lowers the distance to real images from {before}{of} to {now} ({change})"
    if gain.interval is None:
        return f"{result} on one block of seeds, which does not tell how much of that is noise; score more blocks."
    low, high = (distance_text(end) for end in gain.interval)
    blocks = min(len(fair.blocks), len(best.blocks))
    certainty = f"between {low} and {high} with {CONFIDENCE:.0%} confidence ({blocks} paired blocks of seeds)"
    if not gain.certain:
        return (
            f"No gain beyond the noise: with {what} the distance to real images is {now} against {before} for "
            f"{_called(report, fair)}, a gain {certainty}; keep {_kept(report)}."
        )
    return f"{result}, a gain of {distance_text(gain.mean)}, {certainty}."


def _called(report: Report, row: Row) -> str:
    """The base in a sentence."""
    return "the base" if row is report.base else "the base with its best sampler of as many calls"


def _kept(report: Report) -> str:
    """What to use where Neon gains nothing."""
    return "the base" if report.fair is report.base else "the base with that sampler"


def _choice_of(report: Report) -> str:
    """The best row in a sentence."""
    if report.best is report.neon:
        return choice_text(report)
    return f"w = {report.best.w:g} on the base's best sampler"


def credit(report: Report) -> str | None:
    """What of the gain over the base as it was asked for is the sampler's; None where no better sampler was found."""
    if report.fair is report.base:
        return None
    sampler = paired_gain(report.base, report.fair).mean
    text = (
        f"The base as it was asked for is at {distance_text(report.base.distance)}: choosing its sampler alone takes "
        f"{distance_text(sampler)} off"
    )
    if _gains(report):
        text += f", Neon {distance_text(paired_gain(report.base, report.best).mean - sampler)} more"
    return f"{text}, at as many network calls."


def _gains(report: Report) -> bool:
    """Whether Neon is better than the fair baseline, as far as the blocks tell."""
    gain = paired_gain(report.fair, report.best)
    return report.best is not report.fair and gain.mean > 0 and (gain.certain or gain.interval is None)


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
    """The result, what of it is the sampler's, and where it is known the bias undone: a sentence each."""
    bias = bias_undone(report.fair, report.best) if _gains(report) else None
    sentences = (headline(report), credit(report), bias)
    return [sentence for sentence in sentences if sentence is not None]


def score_table(report: Report) -> list[list[str]]:
    """The rows as text, the header first; a column that no row has figures for is left out."""
    columns = [
        ["", *(row.name for row in report.rows)],
        ["calls", *("" if row.calls is None else str(row.calls) for row in report.rows)],
        [report.metric, *(score_text(row) + _few_blocks(report, row) for row in report.rows)],
        ["change", *(change_text(report, row) for row in report.rows)],
        [f"against {report.fair.name}", *(difference_text(report, row) for row in report.rows)],
    ]
    for title, name in (("inception score", "is_mean"), ("precision", "precision"), ("recall", "recall")):
        means = [row.mean(name) for row in report.rows]
        columns.append([title, *("" if mean is None else f"{mean:.2f}" for mean in means)])
    return [list(line) for line in zip(*(column for column in columns if any(column[1:])), strict=True)]


def _few_blocks(report: Report, row: Row) -> str:
    """The mark of a row that is scored on fewer blocks than the base."""
    return "" if len(row.blocks) == len(report.base.blocks) else f" ({len(row.blocks)} block)"


def text_table(lines: Sequence[Sequence[str]]) -> str:
    """Rows of equally many cells as plain text: the first column flush left, the others right."""
    first, *widths = (max(map(len, column)) for column in zip(*lines, strict=True))
    return "\n".join(
        f"{name:<{first}}" + "".join(f"  {cell:>{width}}" for cell, width in zip(cells, widths, strict=True))
        for name, *cells in lines
    )


def result_text(report: Report) -> str:
    """The table and what it says, for a terminal."""
    return "\n".join([text_table(score_table(report)), "", explained(report), "", *conclusions(report)])


def explained(report: Report) -> str:
    """What the columns of the table are, and what their noise covers."""
    blocks = len(report.base.blocks)
    sentences = [f"{report.metric}: distance to real images, lower is better; change is against {report.base.name}."]
    if blocks > 1:
        sentences.append(noise_explained(blocks))
    if any(row.key.startswith("sims") for row in report.rows):
        sentences.append("SIMS: base and self-trained network sample together, (1 + w) base - w self-trained.")
    if any(len(row.blocks) < blocks for row in report.rows):
        sentences.append("Rows of more than twice the calls are of one block.")
    return " ".join(sentences)


def noise_explained(blocks: int) -> str:
    """What the spread over several blocks, and the interval of a difference, cover."""
    return (
        f"± is the standard deviation over {blocks} blocks of seeds; in brackets the {CONFIDENCE:.0%} interval of the "
        "difference on the same seeds. Both cover the sampling noise of these weights, not another synthetic set or "
        "self-training."
    )


def scores_of(report: Report) -> dict[str, Any]:
    """The content of `scores.json` that every run has: means over report blocks, by the keys of rows."""
    return {
        "metric": report.metric,
        **{row.key: row.distance for row in report.rows},
        "neon": report.neon.distance,
        "spread": max(row.spread for row in report.rows),
        "blocks": len(report.base.blocks),
        "w": report.w,
        "fair": report.fair.key,
        "best": report.best.key,
        "summary": conclusions(report),
        "rows": {row.key: _row_json(report, row) for row in report.rows},
        "provenance": report.provenance,
    }


def _row_json(report: Report, row: Row) -> dict[str, Any]:
    gain = None if row is report.fair else paired_gain(report.fair, row)
    return {
        "name": row.name,
        "network_calls": row.calls,
        "w": row.w,
        "distance": row.distance,
        "spread": row.spread,
        "difference": gain and -gain.mean,
        "interval": gain and gain.interval and [-gain.interval[1], -gain.interval[0]],
        "precision": row.mean("precision"),
        "recall": row.mean("recall"),
        "blocks": [block.distance for block in row.blocks],
        "settings": row.settings,
    }


def save(report: Report, folder: str | os.PathLike[str]) -> None:
    """Keep the report in its run folder: `report.json`, and a picture of each grid in `samples/`."""
    folder = Path(folder)
    pictures = {_grid_file(folder, w): images for w, images in report.grids.items()}
    if report.real is not None:
        pictures[_real_file(folder)] = report.real
    for path, images in pictures.items():
        with atomic_write(path) as file:
            file.write(as_png(image_grid(images)))
    named = (report.base, report.neon, report.base_best_sampler, report.choice)
    base, neon, base_best_sampler, choice = (
        next((i for i, row in enumerate(report.rows) if row is one), None) for one in named
    )
    record = {
        "title": report.title,
        "metric": report.metric,
        "rows": [asdict(row) for row in report.rows],
        "base": base,
        "neon": neon,
        "base_best_sampler": base_best_sampler,
        "choice": choice,
        "w": report.w,
        "guidance": report.guidance,
        "snapshot": report.snapshot,
        "evaluated": [asdict(one) for one in report.evaluated],
        "fit": report.fit,
        "samplers": [asdict(one) for one in report.samplers],
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
    known = {name: record[name] for name in ("title", "metric", "w", "guidance", "snapshot", "provenance")}
    report = from_json(
        Report,
        {
            **known,
            "rows": rows,
            "base": base,
            "neon": neon,
            **others,
            "evaluated": evaluated,
            "samplers": tuple(from_json(TriedSampler, one) for one in record.get("samplers", ())),
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
