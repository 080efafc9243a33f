"""Images of the same noise at several w, real images beside them, and how both are kept in the folder of a run."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from neon.data.pictures import load_picture
from neon.report.grids import as_png, columns_of, image_grid, images_of
from neon.runtime.files import atomic_write
from neon.runtime.run_folder import reading_state

FOLDER = "samples"
REAL = ("real", "neighbours")
"""fields of `Samples` that hold real images"""
ADVICE = "run again what wrote it"


@dataclass(frozen=True, kw_only=True)
class Samples:
    """What a page shows of the images themselves."""

    grids: Mapping[float, Tensor] = field(default_factory=dict)
    """w -> uint8 [N, C, H, W] in order of w; image i of each is of the same noise and class"""
    captions: tuple[str, ...] = ()
    """the class or prompt of each of the N images, those of a class together; empty: there are no classes"""
    real: Tensor | None = None
    """real images to compare with, uint8 [M, C, H, W]"""
    nearest: Mapping[float, Sequence[Sequence[int]]] = field(default_factory=dict)
    """w -> for each of its N images the nearest real ones, the nearest first, as places in `neighbours`"""
    neighbours: Tensor | None = None
    """uint8 [K, C, H, W]"""

    def __post_init__(self) -> None:
        shapes = {tuple(images.shape) for images in self.grids.values()}
        counts = {shape[0] for shape in shapes} | ({len(self.captions)} if self.captions and self.grids else set())
        counts |= {len(of_w) for of_w in self.nearest.values()}
        known = 0 if self.neighbours is None else len(self.neighbours)
        if len(shapes) > 1 or len(counts) > 1:
            raise ValueError(f"grids of {shapes} with {len(self.captions)} captions; expected as many of one shape")
        if any(not 0 <= place < known for of_w in self.nearest.values() for places in of_w for place in places):
            raise ValueError(f"nearest real images beyond the {known} that there are")

    @property
    def of_a_class(self) -> int | None:
        """How many images each class has, if all have as many, and some; else None."""
        lengths = {len(list(group)) for _, group in itertools.groupby(self.captions)}
        return lengths.pop() if len(lengths) == 1 and lengths != {1} else None

    @property
    def columns(self) -> int:
        """Of a picture of these images: a row for each class, or two, where there are some."""
        count = len(next(iter(self.grids.values())))
        each = self.of_a_class
        return columns_of(count) if each is None else each if 2 * each > columns_of(count) else 2 * each


def save_samples(samples: Samples, folder: Path) -> dict[str, Any]:
    """Write a picture of each grid and of the real images into the run `folder`; returns the rest, as JSON."""
    real = {name: getattr(samples, name) for name in REAL}
    pictures = {_of_grid(w): images for w, images in samples.grids.items()}
    for name, images in (pictures | real).items():
        if images is not None:
            with atomic_write(_file(folder, name)) as file:
                file.write(as_png(image_grid(images)))
    return {
        "grids": [{"w": w, "shape": tuple(images.shape)} for w, images in samples.grids.items()],
        "captions": samples.captions,
        **{name: None if images is None else tuple(images.shape) for name, images in real.items()},
        "nearest": [{"w": w, "of": of_w} for w, of_w in samples.nearest.items()],
    }


def load_samples(record: Mapping[str, Any], folder: Path, source: Path) -> Samples:
    """What `save_samples` wrote into `folder`, and returned as `record`, which was read from the file `source`.

    Raises:
        RequestError: a picture is missing or damaged, or the record is of something else.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    with reading_state(source, ADVICE):
        ws = [float(grid["w"]) for grid in record["grids"]]
        given = {_of_grid(w): grid["shape"] for w, grid in zip(ws, record["grids"], strict=True)}
        # Runs of before had neither captions nor nearest images.
        given |= {name: record[name] for name in REAL if record.get(name) is not None}
        for name, shape in given.items():
            shapes[name] = tuple(map(int, shape))
            if len(shapes[name]) != 4 or min(shapes[name]) < 1:
                raise ValueError(f"{name} of shape {shape}")
        captions = tuple(map(str, record.get("captions", ())))
        nearest = {float(one["w"]): [[int(i) for i in of] for of in one["of"]] for one in record.get("nearest", ())}
    pictures = {name: _read(_file(folder, name), shape) for name, shape in shapes.items()}
    with reading_state(source, ADVICE):
        return Samples(
            grids={w: pictures[_of_grid(w)] for w in ws},
            captions=captions,
            nearest=nearest,
            **{name: pictures.get(name) for name in REAL},
        )


def _of_grid(w: float) -> str:
    return f"w{w:g}"


def _read(path: Path, shape: Sequence[int]) -> Tensor:
    with reading_state(path, ADVICE):
        return images_of(load_picture(path.read_bytes()), shape)


def _file(folder: Path, name: str) -> Path:
    return folder / FOLDER / f"{name}.png"
