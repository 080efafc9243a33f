"""Images to look at: of the same noise at several w, those of a class together, and the real ones nearest to them."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from neon.data.prompts import prompts_for
from neon.errors import DegenerateError
from neon.evaluate import Reference
from neon.metrics.features import features_of
from neon.model import GenerativeModel
from neon.noise import Purpose, image_seeds
from neon.report.grids import resized
from neon.report.samples import Samples
from neon.runtime.blocks import blocks
from neon.runtime.distributed import Processes
from neon.sampling import sample_block

SHOWN = 40
"""images at each w"""
NEAREST = 4
"""real images under a sample"""
FIRST = 50
"""real images beside the samples"""
MOST_STEPS = 12
"""of a slider over w, beside the w that were scored"""


@dataclass(frozen=True)
class RealPictures:
    """Real images to look at, read when they are asked for."""

    read: Callable[[Sequence[int]], Sequence[Tensor]]
    """uint8 [C, H, W] each, of any size, by their places"""
    count: int
    shape: tuple[int, int, int]
    """(C, H, W) that they are shown in"""

    def __call__(self, places: Sequence[int]) -> Tensor:
        """uint8 [N, C, H, W]; those of another size resized."""
        return torch.stack([self._fitted(image) for image in self.read(places)])

    def first(self) -> Tensor:
        """Some of them."""
        return self(range(min(FIRST, self.count)))

    def _fitted(self, image: Tensor) -> Tensor:
        channels, *size = self.shape
        if image.shape[0] != channels:
            image = image.expand(channels, -1, -1) if image.shape[0] == 1 else image.float().mean(0, keepdim=True)
        return resized(image[None], size)[0]


LOOKED_AT = (-1.0, -0.5, 0.0, 0.5, 1.0, 1.5, 2.0)
"""w where nothing is scored"""


def slider_ws(lowest: float, highest: float) -> list[float]:
    """w to look at between two, -1 and 0 among them: at most `MOST_STEPS` even steps, of 0.25, 0.5, 1 and so on."""
    lowest, highest = min(lowest, -1.0), max(highest, 0.0)
    step = 0.25
    while highest - lowest > MOST_STEPS * step:
        step *= 2
    places = range(math.ceil(lowest / step), math.floor(highest / step) + 1)
    return sorted({-1.0, *(place * step for place in places)})


def samples_at(
    ws: Iterable[float],
    put: Callable[[float], GenerativeModel],
    model: GenerativeModel,
    settings: Any,
    seed: int,
    most: int,
    batch_size: int,
    processes: Processes,
    class_names: Sequence[str] = (),
) -> Samples:
    """At most `most` images of the report's noise at each w, which `put` puts in place; in every process.

    As many of each class, those of a class together; of more classes than images, one of each of some. w whose weights
    have no images are left out. `batch_size` images are sampled at a time.
    """
    asked = _asked(model)
    each = max(most // len(asked), 1) if asked else 1
    some = [asked[i * len(asked) // most] for i in range(most)] if len(asked) > most else asked
    labels = torch.tensor(some).repeat_interleave(each) if asked else None
    count = most if labels is None else len(labels)
    seeds, cut = image_seeds(Purpose.REPORT, seed, count), blocks(count, batch_size)
    grids = {}
    for w in sorted(ws):
        try:
            merged = put(w)
            parts = [sample_block(merged, block, seeds, settings, processes, labels)[0].cpu() for block in cut]
        except DegenerateError:
            continue
        grids[w] = torch.cat(parts)
    names = class_names or model.prompts or [f"class {label}" for label in asked]
    captions = () if labels is None else tuple(names[label] for label in labels.tolist())
    return Samples(grids=grids, captions=captions)


def _asked(model: GenerativeModel) -> list[int]:
    """The labels that images of the report are asked for by: classes, or prompts; none where there are no classes."""
    if model.prompts is None:
        return list(range(model.num_classes))
    return list(prompts_for(Purpose.REPORT, len(model.asked_prompts())))


def with_nearest(samples: Samples, ws: Iterable[float], real: RealPictures, reference: Reference) -> Samples:
    """The samples with the real images nearest to those at each of `ws`, by the features of `reference`.

    As they are where the reference holds no features of single images. Called by the main process only.
    """
    manifold = None if reference.real is None else reference.real.manifold
    if manifold is None:
        return samples
    found: Mapping[float, Tensor] = {
        w: manifold.nearest(features_of(reference.extractor, samples.grids[w].to(manifold.device)), NEAREST).cpu()
        for w in dict.fromkeys(ws)
        if w in samples.grids
    }
    if not found:
        return samples
    places, of_each = torch.cat(list(found.values())).unique(return_inverse=True)
    nearest = dict(zip(found, of_each.split([len(one) for one in found.values()]), strict=True))
    return replace(
        samples,
        nearest={w: one.tolist() for w, one in nearest.items()},
        neighbours=real(places.tolist()),
    )
