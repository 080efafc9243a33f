"""The page of a run without real images: samples at several w from the same noise, and that nothing was scored."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from neon.report.frame import PAGE_FILE, SAMPLES_FILE, WEIGHTS, framed, samples
from neon.report.plots import samples_png
from neon.report.words import grid_name
from neon.runtime.files import atomic_write


@dataclass(frozen=True, kw_only=True)
class Unscored:
    """What a page shows where there was nothing to score against."""

    title: str
    grids: Mapping[float, Tensor]
    """w -> uint8 [N, C, H, W] in order of w, w = 0 among them; image i of each w is of the same noise and class"""
    notes: tuple[str, ...] = ()
    """how the samples came about, a sentence each"""
    provenance: dict[str, Any] = field(default_factory=dict)
    """what it takes to make them again, as JSON"""

    def __post_init__(self) -> None:
        if 0 not in self.grids or len({images.shape for images in self.grids.values()}) != 1:
            shapes = {w: tuple(images.shape) for w, images in self.grids.items()}
            raise ValueError(f"grids of {shapes}; expected as many images of one shape at each w, and the base's")


def unscored_conclusions() -> list[str]:
    """What is known without a score, and what to do: a sentence each."""
    return [
        "Nothing was scored: there were no real images to compare with, so whether any of these w is better than the "
        "base is not known.",
        "Look at the samples: each image has its noise, and so its place, in common with those at other w. Keep the "
        "base if you see no w that is better; images that only look stranger are no gain.",
        "To have w chosen and its gain measured, give real images or their statistics (--real).",
    ]


def unscored_page(unscored: Unscored) -> str:
    """The page as text; the same samples give the same text."""
    main = f"<p>{WEIGHTS}</p>\n{samples(unscored.grids)}\n"
    how = "How these samples were made"
    return framed(unscored.title, unscored_conclusions(), main, how, unscored.notes, unscored.provenance)


def write_unscored(folder: str | os.PathLike[str], unscored: Unscored) -> Path:
    """Write the page `report.html`, and `samples.png` with the grids side by side. Returns the path of the page."""
    folder = Path(folder)
    strip = samples_png([(grid_name(w), images) for w, images in unscored.grids.items()])
    for name, content in {SAMPLES_FILE: strip, PAGE_FILE: unscored_page(unscored).encode()}.items():
        with atomic_write(folder / name) as file:
            file.write(content)
    return folder / PAGE_FILE
