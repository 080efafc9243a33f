"""What the pages of all runs have in common: the frame with its style, and the grids of samples under a slider.

A page fetches nothing and forbids itself to: styles, pictures and one small script are inside the file
(`page.html`, and `samples.html` where there are grids to choose from). Without the script it shows all but the slider.
"""

import base64
import html
import json
from collections.abc import Collection, Mapping, Sequence
from importlib.resources import files
from string import Template
from typing import Any

from torch import Tensor

from neon.report.grids import as_png, image_grid
from neon.report.plots import COLOURS
from neon.report.words import REAL_NAME, grid_name
from neon.runtime.files import as_json

PAGE_FILE, SAMPLES_FILE = "report.html", "samples.png"
FINE = 600
"""pixels; a narrower picture is enlarged, and then its pixels are shown as squares"""
WEIGHTS = """w = 0 is the base, w = -1 the self-trained model, w &gt; 0 Neon:
θ<sub>neon</sub> = (1 + w) θ<sub>base</sub> - w θ<sub>self-trained</sub>."""
"""what w is, as HTML"""


def framed(
    title: str,
    sentences: Sequence[str],
    main: str,
    how: str,
    notes: Sequence[str],
    provenance: Mapping[str, Any],
) -> str:
    """A page as text: `main`, which is HTML, between what it says first and how that came about; the rest is text.

    The first of `sentences` is the headline; `how` is the heading of the notes.
    """
    result, *more = map(html.escape, sentences)
    return filled(
        "page.html",
        title=html.escape(title),
        colours=";".join(f"--{name}:{colour}" for name, colour in COLOURS.items()),
        result=result,
        more="".join(f"<p>{sentence}</p>" for sentence in more),
        main=main,
        how=html.escape(how),
        notes="".join(f"<li>{html.escape(note)}</li>" for note in notes),
        provenance=html.escape(json.dumps(as_json(provenance), indent=2)),
    )


def filled(name: str, **fields: str) -> str:
    """The template `name` beside this module."""
    return Template(files(__package__).joinpath(name).read_text(encoding="utf-8")).substitute(fields)


def samples(
    grids: Mapping[float, Tensor],
    *,
    chosen: float | None = None,
    shown: Collection[str] | None = None,
    real: Tensor | None = None,
) -> str:
    """Grids of images as HTML: w -> uint8 [N, C, H, W] of the same noise, where the slider starts at `chosen`.

    Grids whose name is not among `shown` (None: all are) appear through the slider only; `real` stands beside them.
    """
    if not grids:
        return ""
    names = {w: grid_name(w, chosen) for w in grids}
    figures = "".join(
        _grid(names[w], images, data=f" data-w={w:g}", hidden=shown is not None and names[w] not in shown)
        for w, images in grids.items()
    )
    if real is not None:
        figures += _grid(REAL_NAME, real)
    ws = list(grids)
    if len(ws) == 1:
        return f'<h2>Samples from the same noise</h2>\n<div class="grid" id="grids">{figures}</div>\n'
    start = ws.index(chosen) if chosen in ws else ws.index(0.0)
    ends = {"lowest": f"{ws[0]:g}", "highest": f"{ws[-1]:g}", "last": str(len(ws) - 1)}
    return filled("samples.html", start=str(start), grids=figures, **ends).rstrip()


def _grid(name: str, images: Tensor, data: str = "", hidden: bool = False) -> str:
    picture = image_grid(images)
    encoded = base64.b64encode(as_png(picture)).decode()
    label = html.escape(name)
    return (
        f"<figure{data}{' hidden' if hidden else ''}><img{' class=pixels' if picture.width < FINE else ''} "
        f'width={picture.width} height={picture.height} alt="samples: {label}" src="data:image/png;base64,{encoded}">'
        f"<figcaption>{label}</figcaption></figure>\n"
    )
