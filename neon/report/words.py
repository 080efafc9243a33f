"""What the scores of a run say: its table, its result in sentences, the content of `scores.json`, and `scores.csv`."""

import os
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from neon.report.record import CONFIDENCE, Gain, Report, Row, Training, paired_gain
from neon.runtime.files import csv_text, write_csv

REAL_NAME = "real images"
SCORES_TABLE = "scores.csv"
OF_ROWS = ("key", "name", "w", "network_calls")
OF_BLOCKS = ("num_images", "distance", "is_mean", "precision", "recall", "density", "coverage", "clip_score")
"""columns of `scores.csv`: of a row of the report, and of each of its blocks by the names of `Scores`"""
OF_TABLE = ("is_mean", "precision", "recall", "clip_score")
"""means of blocks in the table of the page, beside distances"""


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
    gain = gain_over_fair(report, row)
    return "" if gain is None else gain_text(gain)


def gain_over_fair(report: Report, row: Row) -> Gain | None:
    """The paired gain of a row over the fair baseline; None for the baseline itself."""
    return None if row is report.fair else paired_gain(report.fair, row)


def gain_text(gain: Gain) -> str:
    """A gain as the difference that it is to the distance, and its interval: `-29.30 [-33.10, -25.50]`."""
    text, interval = _signed(gain.difference), gain.difference_interval
    return text if interval is None else f"{text} [{', '.join(map(_signed, interval))}]"


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


def grid_name(w: float, chosen: float | None = None) -> str:
    """What the images sampled at `w` are called, if `chosen` is the merge weight that was chosen."""
    if w == 0:
        return "base (w = 0)"
    if w == -1:
        return "self-trained (w = -1)"
    return f"{'Neon' if w > 0 else 'chosen'} (w = {w:g})" if w == chosen else f"w = {w:g}"


def main_grids(report: Report) -> list[tuple[str, Tensor]]:
    """The grids to look at first, each under its name: base, self-trained, the choice and real images."""
    samples = report.samples
    wanted = [w for w in dict.fromkeys((0.0, -1.0, report.w)) if w in samples.grids]
    grids = [(grid_name(w, report.w), samples.grids[w]) for w in wanted]
    return grids if samples.real is None else [*grids, (REAL_NAME, samples.real)]


def scores_at(report: Report) -> dict[float, str]:
    """The distance on selection images at each w that was scored as the samples of the page are drawn."""
    return {
        one.w: f"{report.metric} {distance_text(one.scores.distance)} on selection images"
        for one in report.evaluated
        if one.scores is not None and one.sampler is None and one.guidance == report.guidance
        # Where the base was chosen, of several snapshots it is not told whose merges are shown.
        if one.w == 0 or one.snapshot == report.snapshot
    }


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
    sentences = (headline(report), *map(partial(in_other_space, report), report.beside), credit(report), bias)
    return [sentence for sentence in sentences if sentence is not None]


def in_other_space(report: Report, metric: str) -> str | None:
    """What another feature space, which had no part in the choice, says of the best; None where that is the base."""
    if report.best is report.fair:
        return None
    fair, best = report.fair.in_space(metric), report.best.in_space(metric)
    gain = paired_gain(fair, best)
    lowest, highest = gain.interval or (gain.mean, gain.mean)
    agrees = "agrees" if lowest > 0 else "does not agree" if highest <= 0 else "leaves it open"
    return (
        f"{metric}, which had no part in the choice, {agrees}: {distance_text(best.distance)} against "
        f"{distance_text(fair.distance)} for {_called(report, report.fair)}, {gain_text(gain)}."
    )


def score_table(report: Report) -> list[list[str]]:
    """The rows as text, the header first; a column that no row has figures for is left out."""
    columns = [
        ["", *(row.name for row in report.rows)],
        ["calls", *("" if row.calls is None else str(row.calls) for row in report.rows)],
        [report.metric, *(score_text(row) + _few_blocks(report, row) for row in report.rows)],
        ["change", *(change_text(report, row) for row in report.rows)],
        [f"against {report.fair.name}", *(difference_text(report, row) for row in report.rows)],
        *([metric, *(score_text(row.in_space(metric)) for row in report.rows)] for metric in report.beside),
    ]
    for title, name in (("inception score", "is_mean"), ("precision", "precision"), ("recall", "recall")):
        means = [row.mean(name) for row in report.rows]
        columns.append([title, *("" if mean is None else f"{mean:.2f}" for mean in means)])
    fits = [_clip_score(report, row) for row in report.rows]
    columns.append(["CLIP score", *("" if fit is None else f"{fit:.2f}" for fit in fits)])
    return [list(line) for line in zip(*(column for column in columns if any(column[1:])), strict=True)]


def _clip_score(report: Report, row: Row) -> float | None:
    """How well images fit their prompts, in whichever space that was scored."""
    means = (one.mean("clip_score") for one in (row, *map(row.in_space, report.beside)))
    return next((mean for mean in means if mean is not None), None)


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
        **({"beside": {metric: _distances_in(report, metric) for metric in report.beside}} if report.beside else {}),
        **{row.key: row.distance for row in report.rows},
        "neon": report.neon.distance,
        "spread": max(row.spread for row in report.rows),
        "blocks": len(report.base.blocks),
        "w": report.w,
        "fair": report.fair.key,
        "best": report.best.key,
        "summary": conclusions(report),
        "selection": {f"{one.w:g}": one.scores.distance for one in report.evaluated if one.scores and not one.sampler},
        "rows": {row.key: _row_json(report, row) for row in report.rows},
        "provenance": report.provenance,
    }


def _distances_in(report: Report, metric: str) -> dict[str, float]:
    """Means over report blocks in another feature space, by the keys of rows."""
    return {row.key: row.in_space(metric).distance for row in report.rows}


def _row_json(report: Report, row: Row) -> dict[str, Any]:
    gain = gain_over_fair(report, row)
    return {
        "name": row.name,
        "network_calls": row.calls,
        "w": row.w,
        "distance": row.distance,
        "spread": row.spread,
        "difference": gain and gain.difference,
        "interval": gain and gain.difference_interval,
        "precision": row.mean("precision"),
        "recall": row.mean("recall"),
        **({} if (fit := _clip_score(report, row)) is None else {"clip_score": fit}),
        "blocks": [block.distance for block in row.blocks],
        "settings": row.settings,
    }


def training_text(training: Training) -> str:
    """How far a self-training moved the weights, in a sentence."""
    where = [
        f"{share:.2%} of their norm" + ("" if seen is None else f" in {seen:,.0f} images")
        for seen, share in training.moved
    ]
    return f"The self-training for {training.name} moved the weights by {', '.join(where)}."


def table_csv(report: Report) -> str:
    """The table as CSV, figures in full: means over report blocks, and differences to the fair baseline."""
    distances = (report.metric, *report.beside)
    columns = (*OF_ROWS[1:], report.metric, "spread", "difference", "low", "high", *report.beside, *OF_TABLE)
    lines = []
    for row in report.rows:
        gain = gain_over_fair(report, row)
        low, high = (gain and gain.difference_interval) or (None, None)
        spaces = (row, *map(row.in_space, report.beside))
        lines.append(
            {**vars(row), "network_calls": row.calls, "spread": row.spread, "low": low, "high": high}
            | {"difference": gain and gain.difference}
            | {metric: in_space.distance for metric, in_space in zip(distances, spaces, strict=True)}
            | {name: row.mean(name) for name in OF_TABLE}
        )
    return csv_text(columns, lines)


def write_scores_csv(folder: str | os.PathLike[str], report: Report) -> Path:
    """Write `scores.csv`, a line for each row, block of report seeds and feature space; returns its path.

    Figures in full, nothing where there is none; blocks are counted from 0, and those of one number share their seeds.
    """
    lines = (
        {**asdict(scores), "block": number, "metric": metric, **vars(row), "network_calls": row.calls}
        for row in report.rows
        for number, block in enumerate(row.blocks)
        for metric, scores in {report.metric: block, **block.beside}.items()
    )
    path = Path(folder) / SCORES_TABLE
    write_csv(path, [*OF_ROWS, "block", "metric", *OF_BLOCKS, "settings"], lines)
    return path
