"""The plots of a report: distance, precision and recall against w, w x guidance, and the budget.

Each is drawn once, to PNG for documents or to SVG for the page, whose colours follow the page's style.
"""

import html
import io
import math
import re
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeVar

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from neon.evaluate import Scores
from neon.report.frontier import Frontier
from neon.report.grids import image_grid
from neon.report.record import Evaluated, Report, Row
from neon.report.words import distance_text, score_text

COLOURS = {"ink": "#1c1e21", "paper": "#fffffe", "grey": "#68707a", "base": "#2f5fa8", "neon": "#c2255c"}
"""in a light page and in PNG; the page's style sets another value for each name in the dark"""
INK, PAPER, GREY, BASE, NEON = COLOURS.values()
SIZE = (5.0, 4.2)
"""inches of one plot: text of 10 points stays readable on a phone 390 pixels wide"""
STYLE: dict[Any, Any] = {
    "font.size": 10,
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "savefig.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "svg.fonttype": "none",
    "text.parse_math": False,
}
LOG_RATIO = 20
"""distances further apart than this are drawn on a logarithmic scale: beyond its minimum the curve has steep walls"""
FEW = 24
"""points of the heat map that are all labelled; of more, only the lowest at each guidance is"""
LONG = 30
"""letters of a label that takes a line of the legend for itself"""
Drawn = TypeVar("Drawn")


class Mark(NamedTuple):
    """A place of a plot, and what is there in words."""

    x: float
    y: float
    text: str


@dataclass(frozen=True)
class Plot(Generic[Drawn]):
    """One plot of a report, or of something else."""

    name: str
    title: str
    draw: Callable[[Axes, Drawn], Sequence[Mark]]
    """returns the values that are shown where the pointer is"""


class Scored(NamedTuple):
    """An evaluation that did not fail."""

    of: Evaluated
    scores: Scores


def plots(report: Report) -> tuple[Plot[Report], ...]:
    """The plots for which the report has figures."""
    drawn = [Plot("distance", f"{report.metric} against w", draw_distance)] if report.evaluated else []
    points = _points(report)
    if len({row.calls for row in report.rows} - {None}) > 1:
        drawn.append(Plot("calls", f"{report.metric} against network calls", draw_calls))
    if any(point.scores.precision is not None for point in points):
        drawn.append(Plot("shares", "Precision and recall against w", draw_shares))
    given = [one for one in report.evaluated if one.sampler is None]
    if len({one.w for one in given}) > 1 and len({one.guidance for one in given}) > 1:
        drawn.append(Plot("heatmap", f"{report.metric} over w and guidance", draw_heatmap))
    if len(_best_of_snapshots(points)) > 1:
        drawn.append(Plot("budget", f"Best {report.metric} against the budget of self-training", draw_budget))
    return tuple(drawn)


def training_plots(report: Report) -> tuple[Plot[Report], ...]:
    """The loss of self-training, where it is known: on the page only."""
    known = any(one.images for one in report.training)
    return (Plot("training", "Loss of self-training", draw_training),) if known else ()


def frontier_plots(frontier: Frontier) -> tuple[Plot[Frontier], ...]:
    """Distance against network calls, and precision and recall where they are scored."""
    drawn = [Plot("frontier", f"{frontier.metric} against network calls, base and Neon", draw_frontier)]
    if any(row.mean("precision") is not None for point in frontier.points for row in (point.base, point.neon)):
        drawn.append(Plot("frontier_shares", "Precision and recall against network calls", draw_frontier_shares))
    return tuple(drawn)


def png(wanted: Sequence[Plot[Drawn]], drawn: Drawn) -> bytes:
    """PNG: the plots side by side on white."""
    with matplotlib.rc_context({**STYLE, "savefig.facecolor": "white"}):
        figure = Figure(figsize=(SIZE[0] * len(wanted), SIZE[1]), dpi=120, layout="constrained")
        for axes, plot in zip(figure.subplots(1, len(wanted), squeeze=False)[0], wanted, strict=True):
            plot.draw(axes, drawn)
        return _saved(figure, "png", {"Software": None})


def svg(plot: Plot[Drawn], drawn: Drawn) -> str:
    """An `svg` element for a page: text as text, colours as `var(--name)`, no name shared with other plots.

    Each value that the plot tells is a circle of the class `mark` with a title.
    """
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": plot.name}):
        figure = Figure(figsize=SIZE, layout="constrained", dpi=72)
        axes = figure.subplots()
        marks = plot.draw(axes, drawn)
        text = _saved(figure, "svg", dict.fromkeys(("Date", "Creator", "Format", "Type"))).decode()
        places = axes.transData.transform([mark[:2] for mark in marks]) if marks else ()
    circles = "".join(
        f'<circle class="mark" cx="{x:.1f}" cy="{72 * SIZE[1] - y:.1f}" r="7" fill="none" pointer-events="all">'
        f"<title>{html.escape(mark.text)}</title></circle>\n"
        for mark, (x, y) in zip(marks, places, strict=True)
    )
    text = text.replace("</svg>", f"{circles}</svg>")
    text = re.sub(r' xmlns(:xlink)?="[^"]*"', "", text[text.index("<svg") :])
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{plot.name}-", text)
    for name, colour in COLOURS.items():
        text = text.replace(colour, f"var(--{name})")
    return text


def samples_png(grids: Sequence[tuple[str, Tensor]], columns: int | None = None) -> bytes:
    """PNG: grids of images uint8 [N, C, H, W] side by side, each under its title."""
    pictures = [image_grid(images, columns) for _, images in grids]
    aspect = max(picture.height / picture.width for picture in pictures)
    figure = Figure(figsize=(2.6 * len(grids), 2.6 * aspect + 0.3), dpi=120, layout="constrained")
    for axes, (title, _), picture in zip(
        figure.subplots(1, len(grids), squeeze=False)[0], grids, pictures, strict=True
    ):
        axes.imshow(np.asarray(picture), cmap="gray", interpolation="nearest")
        axes.set_title(title, fontsize=9)
        axes.axis("off")
    return _saved(figure, "png", {"Software": None})


def draw_distance(axes: Axes, report: Report) -> list[Mark]:
    """Distance against w: the fit, every evaluation, and the reported scores with their spread."""
    here, elsewhere = _at_focus(report)
    if report.fit:
        axes.plot(*zip(*report.fit, strict=True), color=NEON, lw=1.5, ls="--", label="fitted", zorder=1)
    else:
        ordered = sorted(here, key=lambda point: point.of.w)
        axes.plot([p.of.w for p in ordered], [p.scores.distance for p in ordered], color=GREY, lw=1, zorder=1)
    searched = [point for point in here if point.of.searched]
    extra = [point for point in here if not point.of.searched]
    for points, marker, fill, edge, label in (
        (elsewhere, "s", "none", GREY, "other settings"),
        (searched, "o", INK, INK, "searched"),
        (extra, "o", PAPER, INK, "for the picture"),
    ):
        if points:
            axes.scatter(
                [p.of.w for p in points], [p.scores.distance for p in points],
                marker=marker, facecolors=fill, edgecolors=edge, s=28, label=label, zorder=2,
            )  # fmt: skip
    tuned = sorted(_points(report, tuned=True), key=lambda point: point.of.w)
    if tuned:
        axes.plot(
            [p.of.w for p in tuned], [p.scores.distance for p in tuned], "^-", color=BASE, lw=1, ms=5,
            label="base's best sampler", zorder=2,
        )  # fmt: skip
    failed = [one.w for one in report.evaluated if one.scores is None]
    if failed:
        # At the top, since there is no value; unlike scatter, plot widens the axis to hold them.
        places = [0.97] * len(failed)
        axes.plot(failed, places, "x", transform=axes.get_xaxis_transform(), color=NEON, ms=7, label="failed")
    reported = _reported(report)
    for row, w, colour, marker, name in reported:
        axes.errorbar(
            [w], [row.distance], yerr=[row.spread], fmt=marker, color=colour, ms=6, capsize=4,
            label=f"{name}, reported", zorder=3,
        )  # fmt: skip
    values = [p.scores.distance for p in [*_points(report), *tuned]] + [row.distance for row, *_ in reported]
    if max(values) > LOG_RATIO * min(values) > 0:
        axes.set_yscale("log")
    else:
        axes.set_ylim(0, 1.1 * max(values))
    axes.axvline(0, color=GREY, lw=0.6, ls=":")
    axes.set(xlabel="merge weight w", ylabel=f"{report.metric} (lower is better)")
    _legend(axes)
    return [
        *(
            Mark(p.of.w, p.scores.distance, f"{_point_text(p)}, on selection images")
            for p in [*_points(report), *tuned]
        ),
        *(Mark(w, row.distance, f"{name}, reported: {score_text(row)}") for row, w, _, _, name in reported),
    ]


def _reported(report: Report) -> list[tuple[Row, float, str, str, str]]:
    """The rows at a w of the sampler that was asked for: row, w, colour, marker and name."""
    rows = [(report.base, 0.0, BASE, "s", "base")]
    rows += [(row, -1.0, GREY, "v", "self-trained") for row in report.rows if row.key == "self_trained"]
    if report.neon is not report.base:
        rows.append((report.neon, report.w, NEON, "D", "choice"))
    return rows


def _point_text(point: Scored) -> str:
    """Where an evaluation was made, and what it gave."""
    of = point.of
    parts = [f"w = {of.w:g}"]
    parts += [] if of.guidance is None else [f"guidance {of.guidance:g}"]
    parts += [part for part in (of.snapshot, of.sampler) if part is not None]
    return f"{', '.join(parts)}: {distance_text(point.scores.distance)}"


FAMILIES = (
    (("base", "base_twice_the_calls", "base_converged"), "base, sampler as asked for", BASE, "s-"),
    (("base_best_sampler",), "base, best sampler", BASE, "^"),
    (("neon",), "Neon, sampler as asked for", NEON, "D"),
    (("neon_best_sampler",), "Neon, best sampler", NEON, "^"),
    (("sims",), "SIMS", GREY, "o"),
)
"""rows of a report by key, how they are called in the plot of calls, and how they are drawn"""


def draw_calls(axes: Axes, report: Report) -> list[Mark]:
    """Distance of the reported rows, with their spread, against what an image costs."""
    rows = {row.key: row for row in report.rows if row.calls is not None}
    for keys, label, colour, form in FAMILIES:
        shown = sorted((rows[key] for key in keys if key in rows), key=_calls_of)
        if shown:
            axes.errorbar(
                [_calls_of(row) for row in shown], [row.distance for row in shown], yerr=[row.spread for row in shown],
                fmt=form, color=colour, ms=6, capsize=4, label=label,
            )  # fmt: skip
    axes.set_ylim(bottom=0)
    axes.set(ylabel=f"{report.metric} (lower is better)")
    _against_calls(axes, [_calls_of(row) for row in rows.values()])
    _legend(axes)
    drawn = {key for keys, *_ in FAMILIES for key in keys}
    return [_calls_mark(row.name, row) for key, row in rows.items() if key in drawn]


def _calls_of(row: Row) -> int:
    return row.calls or 0


def _calls_mark(name: str, row: Row, calls: int | None = None) -> Mark:
    calls = _calls_of(row) if calls is None else calls
    return Mark(calls, row.distance, f"{name}, {calls} calls: {score_text(row)}")


def draw_frontier(axes: Axes, frontier: Frontier) -> list[Mark]:
    """Distance of base and Neon, with their spread, against what an image costs."""
    calls = [point.calls for point in frontier.points]
    values = []
    for name, form, colour in (("base", "s-", BASE), ("Neon", "D-", NEON)):
        rows = [point.base if name == "base" else point.neon for point in frontier.points]
        distances = [row.distance for row in rows]
        axes.errorbar(
            calls, distances, yerr=[row.spread for row in rows], fmt=form, color=colour, ms=6, capsize=4, label=name
        )  # fmt: skip
        values += distances
    if max(values) > LOG_RATIO * min(values) > 0:
        axes.set_yscale("log")
    else:
        axes.set_ylim(bottom=0)
    axes.set(ylabel=f"{frontier.metric} (lower is better)")
    _against_calls(axes, calls)
    _legend(axes)
    return [
        _calls_mark(name, row, point.calls)
        for point in frontier.points
        for name, row in (("base", point.base), (f"Neon (w = {point.w:g})", point.neon))
    ]


def draw_frontier_shares(axes: Axes, frontier: Frontier) -> list[Mark]:
    """Precision and recall of base and Neon against what an image costs."""
    calls = [point.calls for point in frontier.points]
    marks = []
    for name, marker, colour in (("base", "s", BASE), ("Neon", "D", NEON)):
        rows = [point.base if name == "base" else point.neon for point in frontier.points]
        for share, line in (("precision", "-"), ("recall", "--")):
            means = [(n, row.mean(share)) for n, row in zip(calls, rows, strict=True)]
            known = [(n, mean) for n, mean in means if mean is not None]
            if known:
                axes.plot(*zip(*known, strict=True), f"{marker}{line}", color=colour, ms=5, label=f"{share}, {name}")
                marks += [Mark(n, value, f"{share}, {name}, {n} calls: {value:.2f}") for n, value in known]
    axes.set(ylabel="share (higher is better)", ylim=(0, 1.02))
    _against_calls(axes, calls)
    _legend(axes)
    return marks


def _against_calls(axes: Axes, calls: Sequence[int]) -> None:
    """Label the horizontal axis: network calls, on a logarithmic scale, with a mark at each number there is."""
    axes.set_xscale("log")
    axes.set_xticks(sorted(set(calls)))
    axes.get_xaxis().set_major_formatter("{x:.0f}")
    axes.get_xaxis().set_minor_formatter("")
    axes.set(xlabel="network calls an image")


def draw_shares(axes: Axes, report: Report) -> list[Mark]:
    """Precision and recall against w, at the guidance and snapshot of the choice, and reported with their spread."""
    here = sorted(_at_focus(report)[0], key=lambda point: point.of.w)
    marks = []
    for name, form, colour in (("precision", "o-", BASE), ("recall", "s--", NEON)):
        known = [(p.of.w, getattr(p.scores, name)) for p in here if getattr(p.scores, name) is not None]
        if known:
            axes.plot(*zip(*known, strict=True), form, color=colour, ms=5, label=name)
        marks += [Mark(w, value, f"{name}, w = {w:g}: {value:.2f}, on selection images") for w, value in known]
        for row, w, _, _, called in _reported(report):
            values = [getattr(block, name) for block in row.blocks]
            if None not in values:
                mean, spread = statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0
                axes.errorbar(
                    [w], [mean], yerr=[spread], fmt="D", mfc=PAPER, color=colour, ms=6, capsize=4,
                    label=f"{name}, reported", zorder=3,
                )  # fmt: skip
                marks.append(Mark(w, mean, f"{name}, {called}, reported: {mean:.2f} ± {spread:.2f}"))
    axes.axvline(0, color=GREY, lw=0.6, ls=":")
    axes.axvline(report.w, color=INK, lw=0.8, ls="-.", label=f"chosen, w = {report.w:g}")
    axes.set(xlabel="merge weight w", ylabel="share (higher is better)", ylim=(0, 1.02))
    _legend(axes)
    return marks


def draw_heatmap(axes: Axes, report: Report) -> list[Mark]:
    """Distance over w and guidance at the snapshot of the choice: figures at the points, colours between them."""
    _, snapshot = _focus(report)
    shown = [
        (one, one.guidance)
        for one in report.evaluated
        if one.guidance is not None and one.sampler is None and _is_of(one, snapshot)
    ]
    points = [(one.w, level, one.scores.distance) for one, level in shown if one.scores is not None]
    w, guidance, values = ([point[i] for point in points] for i in range(3))
    if _span_an_area(w, guidance):
        axes.tricontourf(w, guidance, np.log(values), levels=12, cmap="viridis_r", alpha=0.85)
    lowest = {level: min(value for _, y, value in points if y == level) for level in guidance}
    for x, y, value in points:
        chosen = (x, y) == (report.w, report.guidance)
        axes.plot(
            x, y, "D" if chosen else "o", color=NEON if chosen else INK, mec=PAPER, ms=9 if chosen else 6,
            label="chosen" if chosen else "evaluated", zorder=3,
        )  # fmt: skip
        if len(points) <= FEW or value == lowest[y]:
            axes.annotate(
                distance_text(value), (x, y), (0, 7), textcoords="offset points", ha="center", fontsize=8,
                zorder=4 if chosen else 2, weight="bold" if chosen else "normal",
                bbox={"boxstyle": "round,pad=0.15", "fc": PAPER, "ec": "none"},
            )  # fmt: skip
    for one, level in shown:
        if one.scores is None:
            axes.plot(one.w, level, "x", color=NEON, ms=7, label="failed")
    axes.use_sticky_edges = False  # the coloured area would cut the labels at its rim
    axes.margins(0.12)
    axes.set(xlabel="merge weight w", ylabel="guidance")
    _legend(axes)
    return [Mark(x, y, f"w = {x:g}, guidance {y:g}: {distance_text(value)}") for x, y, value in points]


def draw_budget(axes: Axes, report: Report) -> list[Mark]:
    """The lowest distance of each snapshot, and that of the base."""
    points = _points(report)
    best = _best_of_snapshots(points)
    places = range(len(best))
    axes.plot(places, [point.scores.distance for point in best], "o-", color=INK, ms=5, label="best of each snapshot")
    for place, point in zip(places, best, strict=True):
        axes.annotate(
            f"{distance_text(point.scores.distance)}\nw {point.of.w:g}", (place, point.scores.distance), (0, 8),
            textcoords="offset points", ha="center", fontsize=8,
        )  # fmt: skip
        if point.of.snapshot == report.snapshot:
            axes.plot([place], [point.scores.distance], "D", color=NEON, ms=8, label="chosen")
    base = min((point.scores.distance for point in points if point.of.w == 0), default=None)
    if base is not None:
        axes.axhline(base, color=BASE, lw=1.2, ls="--", label=f"base, {distance_text(base)}")
    top = max([point.scores.distance for point in best] + [base or 0])
    axes.set(xlabel="self-trained for", ylabel=f"{report.metric} (lower is better)", ylim=(0, 1.2 * top))
    axes.set_xlim(-0.5, len(best) - 0.5)
    names = [point.of.snapshot or "" if point.of.kimg is None else f"{point.of.kimg:g} kimg" for point in best]
    axes.set_xticks(list(places), names)
    _legend(axes)
    return [Mark(place, p.scores.distance, _point_text(p)) for place, p in zip(places, best, strict=True)]


def draw_training(axes: Axes, report: Report) -> list[Mark]:
    """The loss of each self-training against the images it saw, and where it left how far the weights had moved."""
    marks = []
    for one, colour in zip(report.training, (INK, BASE), strict=False):
        if not one.images:
            continue
        axes.plot(one.images, one.losses, color=colour, lw=1, label=f"loss, {one.name}")
        for seen, share in one.moved:
            if seen is not None:
                loss = float(np.interp(seen, one.images, one.losses))
                axes.plot([seen], [loss], "D", color=NEON, ms=6, label="snapshot")
                marks.append(Mark(seen, loss, f"{one.name}, {seen:,.0f} images: weights moved by {share:.2%}"))
        marks += [
            Mark(seen, loss, f"{one.name}, {seen:,.0f} images: loss {loss:.4g}")
            for seen, loss in zip(one.images, one.losses, strict=True)
        ]
    axes.set(xlabel="images of self-training", ylabel="loss on the synthetic set")
    _legend(axes)
    return marks


def _saved(figure: Figure, kind: str, metadata: dict[str, None]) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format=kind, metadata=metadata)
    return buffer.getvalue()


def _legend(axes: Axes) -> None:
    """Below the plot, each label once, in two columns if these are short."""
    handles = {label: handle for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    axes.legend(
        handles.values(),
        handles.keys(),
        loc="upper center",
        bbox_to_anchor=(0.5, -0.16),
        ncols=2 if max(map(len, handles), default=0) < LONG else 1,
        fontsize=9,
        frameon=False,
    )


def _points(report: Report, *, tuned: bool = False) -> list[Scored]:
    """The evaluations that did not fail, with the sampler that was asked for or with the base's best one."""
    return [
        Scored(one, one.scores)
        for one in report.evaluated
        if one.scores is not None and (one.sampler is not None) == tuned
    ]


def _focus(report: Report) -> tuple[float | None, str | None]:
    """Guidance and snapshot at which curves over w are drawn: the choice's, or the best merge's if that is the base."""
    if report.w != 0:
        return report.guidance, report.snapshot
    merges = [point for point in _points(report) if point.of.w != 0]
    best = min(merges, key=lambda point: point.scores.distance, default=None)
    return (report.guidance, report.snapshot) if best is None else (best.of.guidance, best.of.snapshot)


def _is_of(one: Evaluated, snapshot: str | None) -> bool:
    return one.w == 0 or one.snapshot == snapshot  # without self-trained weights in it, w = 0 is of every snapshot


def _at_focus(report: Report) -> tuple[list[Scored], list[Scored]]:
    """The points on the curve over w, and the others."""
    guidance, snapshot = _focus(report)
    points = _points(report)
    here = [point for point in points if point.of.guidance == guidance and _is_of(point.of, snapshot)]
    return here, [point for point in points if point not in here]


def _best_of_snapshots(points: Sequence[Scored]) -> list[Scored]:
    """The best point of each snapshot, by budget."""
    best: dict[str, Scored] = {}
    for point in points:
        label = point.of.snapshot
        if point.of.w != 0 and label is not None:
            best[label] = min(best.get(label, point), point, key=lambda one: one.scores.distance)
    return sorted(best.values(), key=lambda point: math.inf if point.of.kimg is None else point.of.kimg)


def _span_an_area(x: Sequence[float], y: Sequence[float]) -> bool:
    """Whether some three of the points are no line, so that there is something to colour."""
    return len(x) > 2 and int(np.linalg.matrix_rank(np.stack([x, y], 1) - [x[0], y[0]], tol=1e-6)) == 2
