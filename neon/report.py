"""One self-contained HTML page and PNG plots of a run: scores, the curve over w, samples from the same noise."""

import base64
import html
import io
import json
import os
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from neon.evaluate import Scores
from neon.files import atomic_write

BASE_COLOUR, NEON_COLOUR, GREY = "#3b6fb6", "#d6336c", "#868e96"


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table: a way to sample, scored on several disjoint blocks of seeds."""

    name: str
    calls: int
    """network calls per image"""
    blocks: tuple[Scores, ...]

    @property
    def distance(self) -> float:
        """Mean over blocks."""
        return statistics.fmean(block.distance for block in self.blocks)

    @property
    def spread(self) -> float:
        """Standard deviation over blocks."""
        return statistics.stdev(block.distance for block in self.blocks) if len(self.blocks) > 1 else 0.0

    def mean(self, name: str) -> float:
        """Mean over blocks of the score called `name`."""
        return statistics.fmean(getattr(block, name) for block in self.blocks)


@dataclass(frozen=True, kw_only=True)
class Report:
    """What a report shows."""

    title: str
    metric: str
    rows: tuple[Row, ...]
    """all lines of the table, the next two among them"""
    base: Row
    neon: Row
    w: float
    curve: dict[float, Scores]
    """w -> scores on selection seeds"""
    searched: tuple[float, ...]
    """the w that the search evaluated; the others were added for the picture"""
    grids: tuple[tuple[str, Tensor], ...]
    """title, uint8 [N, C, H, W]: the same N seeds and classes in each, except for real images"""
    notes: tuple[str, ...]
    """how the figures came about, a sentence each"""
    provenance: dict[str, Any]


def headline(report: Report) -> str:
    """The result in one sentence."""
    base, neon = report.base, report.neon
    change = neon.distance / base.distance - 1
    gain = base.distance - neon.distance
    noise = max(base.spread, neon.spread)
    certainty = f"{gain / noise:.0f} times the spread over blocks" if noise > 0 else "with no spread over blocks"
    if gain <= 2 * noise:
        return (
            f"No gain: at w = {report.w:g} the distance to real images is {neon.distance:.2f} against "
            f"{base.distance:.2f} for the base, within the spread over blocks ({noise:.2f}); keep the base."
        )
    return (
        f"Neon with w = {report.w:g} lowers the distance to real images from {base.distance:.2f} to "
        f"{neon.distance:.2f} ({change:+.0%}), {certainty}."
    )


def bias_undone(base: Row, neon: Row) -> str:
    """Which bias of the sampler Neon undid, read from precision and recall before and after."""
    precision, recall = (base.mean("precision"), neon.mean("precision")), (base.mean("recall"), neon.mean("recall"))
    figures = f"precision {precision[0]:.2f} → {precision[1]:.2f}, recall {recall[0]:.2f} → {recall[1]:.2f}"
    if recall[1] > recall[0] and precision[1] <= precision[0]:
        return f"The base's sampler was too concentrated on typical images; Neon gave the variety back ({figures})."
    if precision[1] > precision[0] and recall[1] <= recall[0]:
        return f"The base's sampler was too noisy; Neon made its images more faithful ({figures})."
    if precision[1] > precision[0] and recall[1] > recall[0]:
        return f"Neon made the base's images both more faithful and more varied ({figures})."
    return f"Neither fidelity nor variety improved ({figures})."


def text_table(report: Report) -> str:
    """The rows as plain text."""
    lines = [f"{'':<26}{'calls':>6}{report.metric:>18}{'change':>9}{'precision':>11}{'recall':>8}"]
    for row in report.rows:
        change = "" if row is report.base else f"{row.distance / report.base.distance - 1:+.0%}"
        score = f"{row.distance:.2f} ± {row.spread:.2f}"
        lines.append(
            f"{row.name:<26}{row.calls:>6}{score:>18}{change:>9}{row.mean('precision'):>11.2f}{row.mean('recall'):>8.2f}"
        )
    return "\n".join(lines)


def curve_plot(report: Report) -> bytes:
    """PNG: distance, precision and recall against w, with the reported scores beside the selection points."""
    figure = Figure(figsize=(9, 3.6), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    ws = sorted(report.curve)
    left.plot(ws, [report.curve[w].distance for w in ws], color=GREY, lw=1.2, zorder=1)
    extra = [w for w in ws if w not in report.searched]
    searched = [w for w in ws if w in report.searched]
    left.scatter(
        searched, [report.curve[w].distance for w in searched], color="black", s=28, label="searched", zorder=2
    )
    left.scatter(
        extra, [report.curve[w].distance for w in extra],
        facecolors="white", edgecolors=GREY, s=28, label="for the picture", zorder=2,
    )  # fmt: skip
    for row, w, colour in ((report.base, 0.0, BASE_COLOUR), (report.neon, report.w, NEON_COLOUR)):
        left.errorbar(
            [w], [row.distance], yerr=[row.spread], fmt="D", color=colour, ms=6, capsize=3,
            label=f"{row.name}, reported", zorder=3,
        )  # fmt: skip
    left.axvline(0, color=GREY, lw=0.6, ls=":")
    left.set(xlabel="merge weight w", ylabel=f"{report.metric} (lower is better)", ylim=(0, None))
    left.legend(fontsize=7, frameon=False)
    right.plot(ws, [report.curve[w].precision for w in ws], "o-", color=BASE_COLOUR, ms=4, label="precision")
    right.plot(ws, [report.curve[w].recall for w in ws], "o-", color=NEON_COLOUR, ms=4, label="recall")
    right.axvline(0, color=GREY, lw=0.6, ls=":")
    right.axvline(report.w, color=NEON_COLOUR, lw=0.8, ls="--")
    right.set(xlabel="merge weight w", ylim=(0, 1))
    right.legend(fontsize=7, frameon=False)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def image_grid(images: Tensor, columns: int, scale: int = 3) -> Image.Image:
    """uint8 [N, C, H, W] as one picture of `columns` columns, each pixel `scale` x `scale`, 1 pixel apart."""
    count, channels, height, width = images.shape
    rows = -(-count // columns)
    sheet = np.full((rows * (height + 1) - 1, columns * (width + 1) - 1, channels), 255, np.uint8)
    for i, image in enumerate(images.permute(0, 2, 3, 1).cpu().numpy()):
        top, left = (i // columns) * (height + 1), (i % columns) * (width + 1)
        sheet[top : top + height, left : left + width] = image
    picture = Image.fromarray(sheet[..., 0] if channels == 1 else sheet)
    return picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)


def samples_plot(grids: Sequence[tuple[str, Tensor]], columns: int = 10) -> bytes:
    """PNG: the grids side by side, each under its title."""
    sheets = [np.asarray(image_grid(images, columns, scale=1)) for _, images in grids]
    aspect = max(sheet.shape[0] / sheet.shape[1] for sheet in sheets)
    figure = Figure(figsize=(2.6 * len(grids), 2.6 * aspect + 0.3), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    places = np.atleast_1d(figure.subplots(1, len(grids)))
    for axes, (title, _), sheet in zip(places, grids, sheets, strict=True):
        axes.imshow(sheet, cmap="gray", interpolation="nearest")
        axes.set_title(title, fontsize=9)
        axes.axis("off")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def write_report(path: str | os.PathLike[str], report: Report) -> None:
    """Write the page: no script, no network access, everything inside one file."""
    with atomic_write(path) as file:
        file.write(_page(report).encode())


def _picture(data: bytes, description: str) -> str:
    encoded = base64.b64encode(data).decode()
    return f'<img src="data:image/png;base64,{encoded}" alt="{html.escape(description)}">'


def _table(report: Report) -> str:
    names = ("weights and sampler", "network calls per image", report.metric, "change", "precision", "recall")
    head = "".join(f"<th scope=col>{html.escape(name)}" for name in names)
    body = ""
    for row in report.rows:
        change = "" if row is report.base else f"{row.distance / report.base.distance - 1:+.0%}"
        figures = (
            f"{row.calls}", f"{row.distance:.2f} ± {row.spread:.2f}", change,
            f"{row.mean('precision'):.2f}", f"{row.mean('recall'):.2f}",
        )  # fmt: skip
        cells = "".join(f"<td>{figure}" for figure in figures)
        mark = ' class="neon"' if row is report.neon else ""
        body += f"<tr{mark}><th scope=row>{html.escape(row.name)}{cells}</tr>"
    return f"<div class=scroll><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"


def _grids(report: Report) -> str:
    figures = ""
    for title, images in report.grids:
        buffer = io.BytesIO()
        image_grid(images, columns=10).save(buffer, format="png")
        figures += f"<figure>{_picture(buffer.getvalue(), title)}<figcaption>{html.escape(title)}</figcaption></figure>"
    return f"<div class=grids>{figures}</div>"


_STYLE = """
:root{color-scheme:light dark;--ink:#1c1e21;--paper:#fff;--line:#d8dce0;--soft:#f4f6f8;--neon:#d6336c}
@media(prefers-color-scheme:dark){:root{--ink:#e8eaed;--paper:#16181b;--line:#3a3f45;--soft:#202327;--neon:#ff6b9d}}
*{box-sizing:border-box}
body{font:16px/1.5 system-ui,sans-serif;color:var(--ink);background:var(--paper);
  max-width:60rem;margin:2rem auto;padding:0 1rem}
h1{font-size:1.5rem}h2{font-size:1.1rem;margin-top:2rem}
.headline{font-size:1.15rem;border-left:4px solid var(--neon);padding-left:.8rem}
.scroll{overflow-x:auto}table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
th,td{padding:.35rem .6rem;border-bottom:1px solid var(--line);text-align:right}th:first-child{text-align:left}
thead th{font-weight:600;font-size:.85rem}tbody th{font-weight:400}.neon th,.neon td{font-weight:700;color:var(--neon)}
img{max-width:100%;height:auto;background:#fff;border-radius:4px;image-rendering:pixelated}
.plot img{image-rendering:auto}
.grids{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(20rem,100%),1fr));gap:1rem}
figure{margin:0}figcaption{font-size:.9rem;text-align:center}.grids img{width:100%}
pre{background:var(--soft);padding:.8rem;overflow-x:auto;font-size:.8rem;border-radius:4px}
@media print{body{max-width:none;margin:0}h2,figure,table{break-inside:avoid}}
"""


def _page(report: Report) -> str:
    notes = "".join(f"<li>{html.escape(note)}</li>" for note in report.notes)
    provenance = html.escape(json.dumps(report.provenance, indent=2))
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(report.title)}</title>
<style>{_STYLE}</style>
</head>
<body>
<h1>{html.escape(report.title)}</h1>
<p class="headline">{html.escape(headline(report))}</p>
<p>{html.escape(bias_undone(report.base, report.neon))}</p>
<h2>Scores</h2>
{_table(report)}
<h2>The choice of w</h2>
<p>w = 0 is the base, w = -1 the self-trained model, w &gt; 0 Neon:
θ<sub>neon</sub> = (1 + w) θ<sub>base</sub> - w θ<sub>self-trained</sub>.</p>
<div class="plot">{_picture(curve_plot(report), "distance, precision and recall against w")}</div>
<h2>Samples from the same noise</h2>
{_grids(report)}
<h2>How it was measured</h2>
<ul>{notes}</ul>
<details><summary>Provenance</summary><pre>{provenance}</pre></details>
</body>
</html>
"""
