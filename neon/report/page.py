"""One self-contained HTML page of a report, and its plots as PNG beside it."""

import base64
import html
import os
from collections.abc import Sequence
from pathlib import Path

from neon.report.frame import PAGE_FILE, SAMPLES_FILE, WEIGHTS, framed
from neon.report.frontier import (
    Frontier,
    frontier_conclusion,
    frontier_explained,
    frontier_table,
    load_frontier,
    save_frontier,
)
from neon.report.plots import Drawn, Plot, frontier_plots, plots, png, samples_png, svg, training_plots
from neon.report.record import Evaluated, Report, load
from neon.report.template import filled
from neon.report.viewer import viewer
from neon.report.words import (
    choices_text,
    conclusions,
    distance_text,
    explained,
    main_grids,
    score_table,
    scores_at,
    table_csv,
    training_text,
)
from neon.runtime.files import atomic_write

CURVE_FILE, FRONTIER_FIGURE = "curve.png", "frontier.png"
SAVE = (
    '<span class="buttons scripted"><button type="button">Save as SVG</button>'
    '<button type="button">Save as PNG</button></span>'
)
"""of a plot"""


def write_report(folder: str | os.PathLike[str], report: Report) -> Path:
    """Write the page `report.html`, and its plots and main samples as PNG: `curve.png`, `samples.png` and so on.

    Distance against calls is on the page if `frontier.json` lies there. Returns the path of the page.
    """
    folder = Path(folder)
    frontier = load_frontier(folder)
    drawn = {plot.name: plot for plot in plots(report)}
    curve = [drawn.pop(name) for name in ("distance", "shares") if name in drawn]
    pictures = {f"{name}.png": png([plot], report) for name, plot in drawn.items()}
    if curve:
        pictures[CURVE_FILE] = png(curve, report)
    if grids := main_grids(report):
        pictures[SAMPLES_FILE] = samples_png(grids, report.samples.columns if report.samples.captions else None)
    for name, content in {**pictures, PAGE_FILE: page(report, frontier).encode()}.items():
        with atomic_write(folder / name) as file:
            file.write(content)
    return folder / PAGE_FILE


def report_again(folder: str | os.PathLike[str]) -> Path:
    """Write the page and plots of the report saved in `folder` once more; returns the path of the page.

    Raises:
        RequestError: the folder holds no report, or one that is not readable.
    """
    return write_report(folder, load(folder))


def write_frontier(folder: str | os.PathLike[str], frontier: Frontier) -> None:
    """Write `frontier.json`, `frontier.csv` and `frontier.png`."""
    save_frontier(frontier, folder)
    with atomic_write(Path(folder) / FRONTIER_FIGURE) as file:
        file.write(png(frontier_plots(frontier), frontier))


def page(report: Report, frontier: Frontier | None = None) -> str:
    """The page as text; the same report gives the same text."""
    main = filled(
        "scores.html",
        samples=viewer(
            report.samples, chosen=report.w, shown=[name for name, _ in main_grids(report)], scores=scores_at(report)
        ),
        scores=_scores(report),
        weights=WEIGHTS,
        choice=html.escape(choices_text(report)),
        plots=_figures(plots(report), report),
        evaluations=_evaluations(report),
        frontier=_frontier(frontier),
        training=_training(report),
        commands=_commands(report),
    )
    return framed(report.title, conclusions(report), main, "How it was measured", report.notes, report.provenance)


def _figures(wanted: Sequence[Plot[Drawn]], drawn: Drawn) -> str:
    return "".join(
        f'<figure class="plot" data-name="{plot.name}">{_labelled(svg(plot, drawn), plot.title)}'
        f"<figcaption>{html.escape(plot.title)}{SAVE}</figcaption></figure>"
        for plot in wanted
    )


def _labelled(drawing: str, title: str) -> str:
    return drawing.replace("<svg", f'<svg role="img" aria-label="{html.escape(title)}"', 1)


def _table(lines: Sequence[Sequence[str]], marked: Sequence[bool]) -> str:
    """A table that scrolls by itself: the first line its header, the first column the header of each row."""
    head = "".join(f"<th scope=col>{html.escape(cell)}</th>" for cell in lines[0])
    body = "".join(
        f"<tr{' class=chosen' if mark else ''}><th scope=row>{html.escape(name)}</th>"
        + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells)
        + "</tr>\n"
        for (name, *cells), mark in zip(lines[1:], marked, strict=True)
    )
    return f"<div class=scroll tabindex=0><table><thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table></div>"


def _scores(report: Report) -> str:
    encoded = base64.b64encode(table_csv(report).encode()).decode()
    return (
        _table(score_table(report), [row is report.best for row in report.rows])
        + f"<p class=small>{html.escape(explained(report))}</p>\n"
        + f'<p><a class="button" download="table.csv" href="data:text/csv;base64,{encoded}">Table as CSV</a></p>'
    )


def _training(report: Report) -> str:
    """How self-training went, and how far it moved the weights."""
    if not report.training:
        return ""
    sentences = "".join(f"<p>{html.escape(training_text(one))}</p>" for one in report.training)
    return f'<h2>Self-training</h2>\n{sentences}<div class="grid">{_figures(training_plots(report), report)}</div>\n'


def _commands(report: Report) -> str:
    """What to type next, as text to copy."""
    if not report.commands:
        return ""
    each = "".join(
        f'<div class="command">{html.escape(what)}:<pre>{html.escape(line)}</pre>'
        '<button type="button" class="scripted">Copy</button></div>\n'
        for what, line in report.commands
    )
    return f"<h2>Commands</h2>\n{each}"


def _evaluations(report: Report) -> str:
    """Every evaluation as a table, so that no plot is needed to read them."""
    if not report.evaluated:
        return ""

    def share(value: float | None) -> str:
        return "" if value is None else f"{value:.2f}"

    def note(one: Evaluated) -> str:
        if one.scores is None:
            return f"failed: {one.failure or 'no reason recorded'}"
        chosen = (one.w, one.guidance) == (report.w, report.guidance) and one.snapshot in (report.snapshot, None)
        if one.sampler is not None:
            chosen = report.best.key == "neon_best_sampler" and one.w == report.best.w
        return "chosen" if chosen else "" if one.searched else "for the picture"

    every = report.evaluated
    columns = [
        ["w", *(f"{one.w:g}" for one in every)],
        ["guidance", *("" if one.guidance is None else f"{one.guidance:g}" for one in every)],
        ["snapshot", *(one.snapshot or "" for one in every)],
        ["sampler", *(one.sampler or "" for one in every)],
        [report.metric, *("" if one.scores is None else distance_text(one.scores.distance) for one in every)],
        ["precision", *("" if one.scores is None else share(one.scores.precision) for one in every)],
        ["recall", *("" if one.scores is None else share(one.scores.recall) for one in every)],
        ["note", *(note(one) for one in every)],
    ]
    lines = list(zip(*(column for column in columns if any(column[1:])), strict=True))
    marked = [line[-1] == "chosen" for line in lines[1:]]
    return (
        f"<details><summary>All {len(every)} evaluations, in order</summary>{_table(lines, marked)}</details>"
        + _samplers(report)
    )


def _samplers(report: Report) -> str:
    """The search for the base's best sampler as a table."""
    if not report.samplers:
        return ""
    values = [one.value for one in report.samplers]
    lines = [["sampler", report.metric]] + [
        [one.settings, "failed" if one.value is None else distance_text(one.value)] for one in report.samplers
    ]
    lowest = min((value for value in values if value is not None), default=None)
    marked = [value is not None and value == lowest for value in values]
    summary = f"All {len(values)} samplers of the base, in order"
    return f"<details><summary>{summary}</summary>{_table(lines, marked)}</details>"


def _frontier(frontier: Frontier | None) -> str:
    """What base and Neon reach for so many calls; points where Neon gains are marked."""
    if frontier is None:
        return ""
    table = _table(frontier_table(frontier), [point.gains for point in frontier.points])
    return (
        f"\n<h2>Distance against calls</h2>\n<p>{html.escape(frontier_conclusion(frontier))}</p>\n{table}"
        f"<p class=small>{html.escape(frontier_explained(frontier))}</p>\n"
        f'<div class="grid">{_figures(frontier_plots(frontier), frontier)}</div>'
    )
