"""One self-contained HTML page of a report, and its plots as PNG beside it.

The page fetches nothing and forbids itself to: styles, pictures and one small script are inside the file.
Without the script it shows all but the slider.
"""

import base64
import html
import json
import os
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from neon.report.grids import as_png, sheet
from neon.report.plots import COLOURS, plots, png, samples_png, svg
from neon.report.record import (
    REAL_NAME,
    Evaluated,
    Report,
    choice_text,
    grid_name,
    load,
    main_grids,
    number,
    summary,
    table,
)
from neon.runtime.files import as_json, atomic_write

PAGE_FILE, CURVE_FILE, SAMPLES_FILE = "report.html", "curve.png", "samples.png"
FINE = 600
"""pixels; a narrower picture is enlarged, and then its pixels are shown as squares"""


def write_report(folder: str | os.PathLike[str], report: Report) -> Path:
    """Write the page `report.html`, and `curve.png`, `samples.png`, `heatmap.png` and `budget.png` where they apply.

    Returns the path of the page.
    """
    folder = Path(folder)
    drawn = {plot.name: plot for plot in plots(report)}
    curve = [drawn.pop(name) for name in ("distance", "shares") if name in drawn]
    pictures = {f"{name}.png": png([plot], report) for name, plot in drawn.items()}
    if curve:
        pictures[CURVE_FILE] = png(curve, report)
    if grids := main_grids(report):
        pictures[SAMPLES_FILE] = samples_png(grids)
    for name, content in {**pictures, PAGE_FILE: page(report).encode()}.items():
        with atomic_write(folder / name) as file:
            file.write(content)
    return folder / PAGE_FILE


def report_again(folder: str | os.PathLike[str]) -> Path:
    """Write the page and plots of the report saved in `folder` once more; returns the path of the page.

    Raises:
        RequestError: the folder holds no report, or one that is not readable.
    """
    return write_report(folder, load(folder))


def page(report: Report) -> str:
    """The page as text; the same report gives the same text."""
    title = html.escape(report.title)
    result, *more = (html.escape(sentence) for sentence in summary(report))
    notes = "".join(f"<li>{html.escape(note)}</li>" for note in report.notes)
    provenance = html.escape(json.dumps(as_json(report.provenance), indent=2))
    figures = "".join(
        f"<figure>{_labelled(svg(plot, report), plot.title)}<figcaption>{html.escape(plot.title)}</figcaption></figure>"
        for plot in plots(report)
    )
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<title>{title}</title>
<style>{_LIGHT}{_STYLE}</style>
</head>
<body>
<h1>{title}</h1>
<p class="headline">{result}</p>
{"".join(f"<p>{sentence}</p>" for sentence in more)}
<h2>Scores</h2>
{_scores(report)}
<h2>The choice</h2>
<p>w = 0 is the base, w = -1 the self-trained model, w &gt; 0 Neon:
θ<sub>neon</sub> = (1 + w) θ<sub>base</sub> - w θ<sub>self-trained</sub>.
Chosen on selection seeds: {html.escape(choice_text(report))}.</p>
<div class="grid">{figures}</div>
{_evaluations(report)}
{_samples(report)}
<h2>How it was measured</h2>
<ul>{notes}</ul>
<details><summary>Provenance</summary><pre>{provenance}</pre></details>
</body>
</html>
"""


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
    blocks = len(report.base.blocks)
    explained = f"± is the standard deviation over {blocks} blocks of seeds; " if blocks > 1 else ""
    return (
        _table(table(report), [row is report.neon for row in report.rows])
        + f"<p class=small>{html.escape(report.metric)}: distance to real images, lower is better; {explained}"
        "change is against the base.</p>"
    )


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
        return "chosen" if chosen else "" if one.searched else "for the picture"

    every = report.evaluated
    columns = [
        ["w", *(f"{one.w:g}" for one in every)],
        ["guidance", *("" if one.guidance is None else f"{one.guidance:g}" for one in every)],
        ["snapshot", *(one.snapshot or "" for one in every)],
        [report.metric, *("" if one.scores is None else number(one.scores.distance) for one in every)],
        ["precision", *("" if one.scores is None else share(one.scores.precision) for one in every)],
        ["recall", *("" if one.scores is None else share(one.scores.recall) for one in every)],
        ["note", *(note(one) for one in every)],
    ]
    lines = list(zip(*(column for column in columns if any(column[1:])), strict=True))
    marked = [line[-1] == "chosen" for line in lines[1:]]
    return f"<details><summary>All {len(every)} evaluations, in order</summary>{_table(lines, marked)}</details>"


def _samples(report: Report) -> str:
    """The grids: the main ones always, those of other w through the slider."""
    if not report.grids:
        return ""
    named = [name for name, _ in main_grids(report)]
    figures = "".join(
        _grid(grid_name(report, w), images, data=f" data-w={w:g}", hidden=grid_name(report, w) not in named)
        for w, images in report.grids.items()
    )
    if report.real is not None:
        figures += _grid(REAL_NAME, report.real)
    ws = list(report.grids)
    start = ws.index(report.w) if report.w in ws else ws.index(0.0)
    slider = f"""<div class="viewer" id="viewer" hidden>
<label for="w">Merge weight: <strong id="title"></strong></label>
<input type="range" id="w" min="0" max="{len(ws) - 1}" step="1" value="{start}">
<div class="ends" aria-hidden="true"><span>w = {ws[0]:g}</span><span>w = {ws[-1]:g}</span></div>
<img id="shown" alt="" width="1" height="1">
</div>"""
    return (
        "<h2>Samples from the same noise</h2>\n"
        + (f"{slider}\n" if len(ws) > 1 else "")
        + f'<div class="grid" id="grids">{figures}</div>\n'
        + (f"<script>{_SCRIPT}</script>" if len(ws) > 1 else "")
    )


def _grid(name: str, images: Tensor, data: str = "", hidden: bool = False) -> str:
    picture = sheet(images)
    encoded = base64.b64encode(as_png(picture)).decode()
    label = html.escape(name)
    return (
        f"<figure{data}{' hidden' if hidden else ''}><img{' class=pixels' if picture.width < FINE else ''} "
        f'width={picture.width} height={picture.height} alt="samples: {label}" src="data:image/png;base64,{encoded}">'
        f"<figcaption>{label}</figcaption></figure>\n"
    )


_LIGHT = f":root{{{';'.join(f'--{name}:{colour}' for name, colour in COLOURS.items())}}}"
_STYLE = """
:root{color-scheme:light;--line:#d8dce0;--soft:#f4f6f8}
@media screen and (prefers-color-scheme:dark){:root{color-scheme:dark;
  --ink:#e8eaed;--paper:#16181b;--grey:#9aa3ad;--base:#84b4ff;--neon:#ff7aa8;--line:#3a3f45;--soft:#202327}}
*{box-sizing:border-box}
body{font:16px/1.5 system-ui,sans-serif;color:var(--ink);background:var(--paper);
  max-width:60rem;margin:2rem auto;padding:0 1rem;overflow-wrap:break-word}
h1{font-size:1.5rem}h2{font-size:1.1rem;margin-top:2rem}
.headline{font-size:1.15rem;border-left:4px solid var(--neon);padding-left:.8rem}
.small,figcaption{font-size:.85rem}figcaption{text-align:center}
.scroll{overflow-x:auto}table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
th,td{padding:.35rem .6rem;border-bottom:1px solid var(--line);text-align:right;white-space:nowrap}
th:first-child{text-align:left;white-space:normal}tbody th{min-width:9rem}
thead th{font-weight:600;font-size:.85rem}tbody th{font-weight:400}
details tbody th{min-width:0}details th:last-child,details td:last-child{text-align:left}
details td:last-child{white-space:normal;min-width:10rem}
.chosen th,.chosen td{font-weight:700;color:var(--neon)}
.grid{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(20rem,100%),1fr));gap:1rem}
figure{margin:0;min-width:0}
svg{display:block;width:100%;height:auto}svg text{font-family:inherit!important}
img{display:block;width:100%;height:auto;border-radius:4px}.pixels{image-rendering:pixelated}
[hidden]{display:none!important}
.viewer{max-width:40rem;margin:0 auto 1.5rem}
.viewer label,.viewer input{display:block}
.viewer input{width:100%;margin:.4rem 0 0;height:1.6rem;accent-color:var(--neon)}
.ends{display:flex;justify-content:space-between;font-size:.85rem;margin-bottom:.4rem}
:focus-visible{outline:2px solid var(--base);outline-offset:2px}
summary{cursor:pointer;padding:.3rem 0}
pre{background:var(--soft);padding:.8rem;overflow-x:auto;font-size:.8rem;border-radius:4px}
@media print{body{max-width:none;margin:0}.viewer{display:none}figure,tr{break-inside:avoid}h2{break-after:avoid}
  details::details-content{content-visibility:visible;block-size:auto}
  pre{white-space:pre-wrap}.scroll{overflow:visible}}
"""
_SCRIPT = """{
  const grids = document.querySelectorAll("#grids figure[data-w]"), slider = document.getElementById("w");
  const shown = document.getElementById("shown"), title = document.getElementById("title");
  const show = () => {
    const picture = grids[slider.value].querySelector("img"), name = picture.nextElementSibling.textContent;
    for (const key of ["src", "alt", "className", "width", "height"]) shown[key] = picture[key];
    title.textContent = name;
    slider.setAttribute("aria-valuetext", name);
  };
  slider.addEventListener("input", show);
  show();
  document.getElementById("viewer").hidden = false;
}"""
