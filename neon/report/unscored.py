"""The page of a run without real images: samples at several w from the same noise, and that nothing was scored."""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from neon.report.frame import PAGE_FILE, SAMPLES_FILE, WEIGHTS, framed
from neon.report.plots import samples_png
from neon.report.samples import Samples
from neon.report.viewer import viewer
from neon.report.words import grid_name
from neon.runtime.files import atomic_write


@dataclass(frozen=True, kw_only=True)
class Unscored:
    """What a page shows where there was nothing to score against."""

    title: str
    samples: Samples
    """w = 0 among them"""
    notes: tuple[str, ...] = ()
    """how the samples came about, a sentence each"""
    provenance: dict[str, Any] = field(default_factory=dict)
    """what it takes to make them again, as JSON"""

    def __post_init__(self) -> None:
        if 0 not in self.samples.grids:
            raise ValueError(f"samples at w of {list(self.samples.grids)}; expected the base's, too")


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
    main = f"<p>{WEIGHTS}</p>\n{viewer(unscored.samples)}\n"
    how = "How these samples were made"
    return framed(unscored.title, unscored_conclusions(), main, how, unscored.notes, unscored.provenance)


def write_unscored(folder: str | os.PathLike[str], unscored: Unscored) -> Path:
    """Write the page `report.html`, and `samples.png` with the grids side by side. Returns the path of the page."""
    folder = Path(folder)
    samples = unscored.samples
    strip = samples_png([(grid_name(w), images) for w, images in samples.grids.items()], samples.columns)
    for name, content in {SAMPLES_FILE: strip, PAGE_FILE: unscored_page(unscored).encode()}.items():
        with atomic_write(folder / name) as file:
            file.write(content)
    return folder / PAGE_FILE
