"""The images of a page: grids of the same noise at every w, which its script turns into a viewer.

The pictures are in the page as WebP, of which all together take at most `PICTURES` bytes. Without the script the main
grids are shown side by side; with it a slider moves over w, and one image is enlarged beside the nearest real ones.
"""

import base64
import html
import json
from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor

from neon.report.grids import GAP, as_webp, columns_of, image_grid, resized
from neon.report.samples import Samples
from neon.report.template import filled
from neon.report.words import REAL_NAME, grid_name

PICTURES = 2_400_000
"""bytes of all pictures of a page: as text 3.2 MB, so that with the rest it stays below 4 MB"""
LARGEST = 256
"""pixels of a side of an image on a page; larger ones are made smaller"""
FINE = 100
"""pixels of a side; images of fewer are shown with their pixels as squares"""


def viewer(
    samples: Samples,
    *,
    chosen: float | None = None,
    shown: Collection[str] | None = None,
    scores: Mapping[float, str] | None = None,
) -> str:
    """The images as HTML, where the slider starts at `chosen`, else at the base.

    Args:
        shown: names of the grids that are shown without the slider, too; None: all are.
        scores: what to say beside the slider at some w.
    """
    grids = {w: _small(images) for w, images in samples.grids.items()}
    if not grids:
        return ""
    ws, names = list(grids), [grid_name(w, chosen) for w in grids]
    count, _, height, width = grids[ws[0]].shape
    most = PICTURES // (len(grids) + sum(images is not None for images in (samples.real, samples.neighbours)))
    figures = [
        _figure(images, samples.columns, name, most, w=w, hidden=shown is not None and name not in shown)
        for (w, images), name in zip(grids.items(), names, strict=True)
    ]
    if samples.real is not None:
        real = _small(samples.real)
        figures.append(_figure(real, columns_of(len(real)), REAL_NAME, most))
    base = ws.index(0.0) if 0.0 in ws else 0
    start = ws.index(chosen) if chosen in ws else base
    data: dict[str, Any] = {
        "names": names,
        "scores": [(scores or {}).get(w, "") for w in ws],
        "size": (count, height, width),
        "gap": GAP,
        "columns": samples.columns,
        "fine": max(height, width) >= FINE,
        "base": base,
        "other": start if start != base else ws.index(1.0) if 1.0 in ws else len(ws) - 1,
        "nearest": {ws.index(w): of_w for w, of_w in samples.nearest.items() if w in ws},
    }
    neighbours = ""
    if samples.neighbours is not None:
        near = _small(samples.neighbours)
        data["neighbours"] = {"size": (len(near), *near.shape[-2:]), "columns": columns_of(len(near))}
        neighbours = _image(near, columns_of(len(near)), "", most, " id=neighbours hidden")
    return filled(
        "samples.html",
        last=str(len(ws) - 1),
        start=str(start),
        lowest=f"{ws[0]:g}",
        highest=f"{ws[-1]:g}",
        title=html.escape(names[start]),
        score=' <span id="score"></span>' if scores else "",
        grids="".join(figures),
        neighbours=neighbours,
        data=_as_script(data),
        **_cells(samples, height, width),
    ).rstrip()


def _pixels(height: int, width: int) -> str:
    """The class of a picture that is shown with its pixels as squares."""
    return "" if max(height, width) >= FINE else " class=pixels"


def _cells(samples: Samples, height: int, width: int) -> dict[str, str]:
    """A button for each image, under the name of its class where all have as many, and some."""
    count = len(next(iter(samples.grids.values())))
    captions, each = samples.captions or ("",) * count, samples.of_a_class
    cells = []
    for i, caption in enumerate(captions):
        name = html.escape(caption)
        if each is not None and i % each == 0:
            cells.append(f'<span title="{name}">{name}</span>')
        which = f"{name}, image {i + 1}" if name else f"image {i + 1}"
        cells.append(
            f'<button type=button title="{which}" aria-label="{which}: enlarge">'
            f"<canvas{_pixels(height, width)} width={width} height={height}></canvas></button>"
        )
    return {"cells": "".join(cells), "layout": "cells" if each is None else "cells classes", "each": str(each or 0)}


def _small(images: Tensor) -> Tensor:
    """uint8 [N, C, H, W], no larger than a page shows them."""
    largest = max(images.shape[-2:])
    if largest <= LARGEST:
        return images
    return resized(images, [max(round(side * LARGEST / largest), 1) for side in images.shape[-2:]])


def _figure(images: Tensor, columns: int, name: str, most: int, *, w: float | None = None, hidden: bool = False) -> str:
    label = html.escape(name)
    return (
        f"<figure{'' if w is None else f' data-w={w:g}'}{' hidden' if hidden else ''}>"
        f"{_image(images, columns, f'samples: {label}', most)}<figcaption>{label}</figcaption></figure>\n"
    )


def _image(images: Tensor, columns: int, label: str, most: int, more: str = "") -> str:
    picture = image_grid(images, columns)
    encoded = base64.b64encode(as_webp(picture, most)).decode()
    return (
        f'<img{_pixels(*images.shape[-2:])}{more} width={picture.width} height={picture.height} alt="{label}" '
        f'src="data:image/webp;base64,{encoded}">'
    )


def _as_script(data: dict[str, Any]) -> str:
    """JSON that no text in it can end the element of."""
    return json.dumps(data).replace("<", "\\u003c")
