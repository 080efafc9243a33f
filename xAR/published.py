"""The networks that xAR published: how they are built, sampled and recognised, and how Neon makes them better."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from neon.errors import RequestError
from neon.published import Evaluation, Published, row_sampled_as
from xAR.settings import SIZES, XARSettings

COMMON = {"classes": 1000, "latent_channels": 16, "grid": 16, "cells_per_side": 2}
"""keywords of XAR that all published transformers share"""


def _network(name: str) -> dict[str, int]:
    return {**COMMON, **SIZES[name]}


_EVALUATED = {
    name: Evaluation(
        checkpoint=f"Neon_{released}_imagenet256.pth",
        statistics="adm_in256_stats.npz",
        program="xAR.calculate_fid:ScoreXAR",
        flags=f"--model {name} --model_ckpt {{checkpoint}} --fid_stats {{statistics}} --num_images {{count}} "
        f"--img_size 256 --cfg {cfg} --flow_steps {num_steps}",
        calls=(2 * COMMON["cells_per_side"] ** 2 - 1) * num_steps,
    )
    for name, released, cfg, num_steps in (("xar_base", "xARB", 3.8, 40), ("xar_large", "xARL", 2.7, 50))
}

PUBLISHED: dict[str, Published[XARSettings]] = {
    name: Published(
        name=name,
        network=_network(name),
        settings=XARSettings(num_steps=num_steps, guidance=guidance),
        fid_base=fid_base,
        fid_neon=fid_neon,
        neon=_EVALUATED.get(name),
    )
    for name, num_steps, guidance, fid_base, fid_neon in (
        ("xar_base", 40, 2.7, 1.72, 1.31),
        ("xar_large", 50, 2.3, 1.28, 1.02),
        ("xar_huge", 50, 2.2, None, None),
    )
}
"""Scores are of Neon's paper. Its merges are sampled with more guidance than the base: xar_base with 3.8, at w = 1.4
after self-training on 4,250,000 images; xar_large with 2.7, at w = 1.6 after 3,750,000."""


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
