"""The networks that xAR published: how they are built, sampled and recognised, and how Neon makes them better."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from neon.errors import RequestError
from xAR.recipe import XARRecipe
from xAR.sampler import XARSettings
from xAR.transformer import SIZES

COMMON = {"classes": 1000, "latent_channels": 16, "grid": 16, "cells_per_side": 2}
"""keywords of XAR that all published transformers share"""


@dataclass(frozen=True, kw_only=True)
class Neon:
    """What Neon's authors did with a transformer."""

    recipe: XARRecipe
    """of the self-training; images are the base's, sampled with its own settings"""
    settings: XARSettings
    """for the result, whose guidance is larger than the base's"""
    w: float
    """the paper's best weight, after `budget` images"""
    budget: int
    fid: float
    """50,000 images"""


@dataclass(frozen=True, kw_only=True)
class Published:
    """One published transformer."""

    name: str
    transformer: dict[str, int]
    """keywords of XAR"""
    settings: XARSettings
    """for the base"""
    fid: float | None = None
    """of the base, 50,000 images, Neon's paper; None: not in it"""
    neon: Neon | None = None


def _published(name: str, settings: XARSettings, fid: float | None = None, neon: Neon | None = None) -> Published:
    return Published(name=name, transformer={**COMMON, **SIZES[name]}, settings=settings, fid=fid, neon=neon)


PUBLISHED: dict[str, Published] = {
    row.name: row
    for row in (
        _published(
            "xar_base",
            XARSettings(num_steps=40, guidance=2.7),
            fid=1.72,
            neon=Neon(
                recipe=XARRecipe(warmup_epochs=250),
                settings=XARSettings(num_steps=40, guidance=3.8),
                w=1.4,
                budget=4_250_000,
                fid=1.31,
            ),
        ),
        _published(
            "xar_large",
            XARSettings(num_steps=50, guidance=2.3),
            fid=1.28,
            neon=Neon(
                # The published script; the paper tells of a warm-up over 7 million images, as with xAR-B.
                recipe=XARRecipe(warmup_epochs=10_000),
                settings=XARSettings(num_steps=50, guidance=2.7),
                w=1.6,
                budget=3_750_000,
                fid=1.02,
            ),
        ),
        _published("xar_huge", XARSettings(num_steps=50, guidance=2.2)),
    )
}


def published_settings(transformer: Mapping[str, Any]) -> XARSettings | None:
    """How the published network with the keywords `transformer` should be sampled; None: nothing that is known.

    Only keywords that the published table holds are compared: dropping changes no sample.
    """
    for row in PUBLISHED.values():
        if all(transformer.get(name) == value for name, value in row.transformer.items()):
            return row.settings
    return None


def recognise(shapes: Mapping[str, Sequence[int]], mask: Tensor | None = None) -> dict[str, Any]:
    """The keywords of XAR that a state dict of these `shapes` was built with, as JSON.

    `mask`, the values of its entry of that name, tells the size of a cell; without it there are 2 x 2, as
    published. What is dropped in training is not in a state dict.

    Raises:
        RequestError: tensors are missing.
    """
    rope = "encoder_blocks.0.attn.rope.freqs_cos"
    for name in ("class_emb.weight", "z_proj.weight", "decoder_blocks.0.attn.qkv.weight", rope):
        if name not in shapes:
            raise RequestError(f"the weights hold no {name}; expected those of a transformer of xAR")
    rows, width = shapes["class_emb.weight"]
    positions, head_channels = shapes[rope]
    cells = 4 if mask is None else positions // int((mask[0, 0, 0] == 0).sum())
    return {
        "classes": rows - 1,
        "width": width,
        "encoder_depth": _count(shapes, "encoder_blocks."),
        "decoder_depth": _count(shapes, "decoder_blocks."),
        "heads": width // head_channels,
        "latent_channels": shapes["z_proj.weight"][1],
        "grid": math.isqrt(positions),
        "cells_per_side": math.isqrt(cells),
    }


def evaluation_labels(num_images: int, num_classes: int) -> Tensor:
    """Classes of a published evaluation, int64 [num_images]: each equally often, ascending; of a remainder class 0."""
    labels = torch.arange(num_classes).repeat_interleave(num_images // num_classes)
    return torch.cat([labels, labels.new_zeros(num_images - len(labels))])


def _count(shapes: Mapping[str, Sequence[int]], prefix: str) -> int:
    """How many numbers follow `prefix` in names."""
    return len({name.removeprefix(prefix).split(".")[0] for name in shapes if name.startswith(prefix)})
