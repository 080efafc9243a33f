"""The networks that xAR published: how they are built, sampled and recognised, and how Neon makes them better."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from neon.errors import RequestError
from neon.published import Published, row_sampled_as
from xAR.recipe import XARRecipe
from xAR.settings import SIZES, XARSettings

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


@dataclass(frozen=True, kw_only=True)
class PublishedXAR(Published[XARSettings]):
    """One published transformer; scores are of Neon's paper."""

    neon: Neon | None = None


def _network(name: str) -> dict[str, int]:
    return {**COMMON, **SIZES[name]}


PUBLISHED: dict[str, PublishedXAR] = {
    row.name: row
    for row in (
        PublishedXAR(
            name="xar_base",
            network=_network("xar_base"),
            settings=XARSettings(num_steps=40, guidance=2.7),
            fid_base=1.72,
            fid_neon=1.31,
            neon=Neon(
                recipe=XARRecipe(warmup_epochs=250),
                settings=XARSettings(num_steps=40, guidance=3.8),
                w=1.4,
                budget=4_250_000,
            ),
        ),
        PublishedXAR(
            name="xar_large",
            network=_network("xar_large"),
            settings=XARSettings(num_steps=50, guidance=2.3),
            fid_base=1.28,
            fid_neon=1.02,
            neon=Neon(
                # The published script; the paper tells of a warm-up over 7 million images, as with xAR-B.
                recipe=XARRecipe(warmup_epochs=10_000),
                settings=XARSettings(num_steps=50, guidance=2.7),
                w=1.6,
                budget=3_750_000,
            ),
        ),
        PublishedXAR(name="xar_huge", network=_network("xar_huge"), settings=XARSettings(num_steps=50, guidance=2.2)),
    )
}


def published_settings(transformer: Mapping[str, Any]) -> XARSettings | None:
    """How the published network with the keywords `transformer` should be sampled; None: nothing that is known.

    Only keywords that the published table holds are compared: dropping changes no sample.
    """
    row = row_sampled_as(PUBLISHED, transformer, lambda found: [found.get(name) for name in _network("xar_base")])
    return None if row is None else row.settings


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


def _count(shapes: Mapping[str, Sequence[int]], prefix: str) -> int:
    """How many numbers follow `prefix` in names."""
    return len({name.removeprefix(prefix).split(".")[0] for name in shapes if name.startswith(prefix)})
