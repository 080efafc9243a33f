"""The networks that VAR published: how they are built, sampled and recognised, and how well Neon makes them."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from neon.errors import RequestError
from neon.published import Evaluation, Published, row_sampled_as
from VAR.quantizer import scale_slices
from VAR.settings import VARSettings

PATCH_NUMS: dict[int, list[int]] = {
    256: [1, 2, 3, 4, 5, 6, 8, 10, 13, 16],
    512: [1, 2, 3, 4, 6, 9, 13, 18, 24, 32],
}
"""Sides of the scales by side of the image."""
HEAD_CHANNELS = 64
"""of every published transformer"""
TOKENIZER_FILE = "vae_ch160v4096z32.pth"
TOKENIZER: dict[str, Any] = {
    "vocab": 4096, "code_channels": 32, "base_channels": 160, "channel_mult": [1, 1, 2, 2, 4], "res_blocks": 2,
    "phi_count": 4, "quant_conv_kernel": 3,
}  # fmt: skip
"""Keywords of VQVAE; one file serves both resolutions, so `patch_nums` comes from the transformer."""


def _transformer(depth: int, image_side: int, shared_adaln: bool) -> dict[str, Any]:
    return {
        "classes": 1000, "depth": depth, "width": HEAD_CHANNELS * depth, "heads": depth, "mlp_ratio": 4.0,
        "shared_adaln": shared_adaln, "l2_norm_attention": True, "patch_nums": list(PATCH_NUMS[image_side]),
        "vocab": TOKENIZER["vocab"], "code_channels": TOKENIZER["code_channels"],
    }  # fmt: skip


_NEON_256 = VARSettings(guidance=2.9, top_k=900, top_p=0.95)
_NEON_512 = VARSettings(guidance=4.0, top_k=900, top_p=0.95)
_VAR = VARSettings(guidance=1.5, top_k=900, top_p=0.96)

_EVALUATED = {
    depth: Evaluation(
        checkpoint=f"Neon_VARd{depth}_imagenet{side}.pth",
        statistics=statistics,
        program="VAR.calculate_fid:ScoreVAR",
        flags=f"--var_ckpt {{checkpoint}} --fid_stats {{statistics}} --num_images {{count}} --img_size {side} "
        f"--cfg {cfg}",
        calls=2 * len(PATCH_NUMS[side]),
    )
    for depth, side, statistics, cfg in ((16, 256, "adm_in256_stats.npz", 2.8), (36, 512, "adm_in512_stats.npz", 3.2))
}

PUBLISHED: dict[str, Published[VARSettings]] = {
    f"var_d{depth}": Published(
        name=f"var_d{depth}",
        network=_transformer(depth, side, shared_adaln),
        settings=settings,
        fid_base=fid_base,
        fid_neon=fid_neon,
        neon=_EVALUATED.get(depth),
    )
    for depth, side, shared_adaln, settings, fid_base, fid_neon in (
        (16, 256, False, _NEON_256, 3.30, 2.01),
        (20, 256, False, _VAR, None, None),
        (24, 256, False, _VAR, None, None),
        (30, 256, False, _VAR, None, None),
        (36, 512, True, _NEON_512, 2.63, 1.70),
    )
}
"""Settings are the defaults of Neon's evaluation; of networks that Neon did not use, VAR's own. Scores are of Neon's
README; its authors note to have scored with a guidance of 2.8 (var_d16) and 3.2 (var_d36), as `neon` says."""


def published_settings(transformer: Mapping[str, Any]) -> VARSettings | None:
    """How the published network with the keywords `transformer` should be sampled; None: nothing that is known.

    Only keywords that the published table holds are compared: neither dropping nor epsilon changes sampling.
    """
    row = row_sampled_as(PUBLISHED, transformer, _sampled_by)
    return None if row is None else row.settings


def _sampled_by(transformer: Mapping[str, Any]) -> list[Any]:
    values = (transformer.get(name) for name in _transformer(16, 256, False))
    return [list(value) if isinstance(value, tuple) else value for value in values]


def recognise(shapes: Mapping[str, Sequence[int]], levels: Tensor | None = None) -> dict[str, Any]:
    """The keywords of VAR that a state dict of these `shapes` was built with, as JSON.

    `levels`, the values of its `lvl_1L`, give the sides of the scales; without them the published lists are known
    by their length. Label drop and drop path are not in a state dict.

    Raises:
        RequestError: tensors are missing, or nobody published a network of that many positions.
    """
    of = _Shapes(shapes, "a transformer of VAR")
    rows, width = of("class_emb.weight")
    vocab, _ = of("head.weight")
    _, code_channels = of("word_embed.weight")
    hidden, _ = of("blocks.0.ffn.fc1.weight")
    _, length = of("lvl_1L")
    l2_norm = "blocks.0.attn.scale_mul_1H11" in shapes
    return {
        "classes": rows - 1,
        "depth": of.count("blocks.{}.ffn.fc1.weight"),
        "width": width,
        "heads": of("blocks.0.attn.scale_mul_1H11")[1] if l2_norm else width // HEAD_CHANNELS,
        "mlp_ratio": hidden / width,
        "shared_adaln": "shared_ada_lin.1.weight" in shapes,
        "l2_norm_attention": l2_norm,
        "patch_nums": _sides(length, levels),
        "vocab": vocab,
        "code_channels": code_channels,
    }


def recognise_tokenizer(shapes: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    """The keywords of VQVAE that a state dict of these `shapes` was built with, as JSON, less `patch_nums`.

    The ratio of its residual convolutions and the kind of lookup are not in a state dict either.

    Raises:
        RequestError: tensors are missing.
    """
    of = _Shapes(shapes, "a tokenizer of VAR")
    vocab, code_channels = of("quantize.embedding.weight")
    base_channels = of("encoder.conv_in.weight")[0]
    levels = of.count("encoder.down.{}.block.0.conv2.weight")
    if "quantize.quant_resi.qresi.weight" in shapes:
        phi_count = 1
    elif "quantize.quant_resi.0.weight" in shapes:
        phi_count = 0
    else:
        phi_count = of.count("quantize.quant_resi.qresi_ls.{}.weight")
    return {
        "vocab": vocab,
        "code_channels": code_channels,
        "base_channels": base_channels,
        "channel_mult": [of(f"encoder.down.{i}.block.0.conv2.weight")[0] // base_channels for i in range(levels)],
        "res_blocks": of.count("encoder.down.0.block.{}.conv2.weight"),
        "phi_count": phi_count,
        "quant_conv_kernel": of("quant_conv.weight")[3],
    }


class _Shapes:
    """Shapes of a state dict by name; a RequestError names what it would need to be `what`."""

    def __init__(self, shapes: Mapping[str, Sequence[int]], what: str) -> None:
        self._shapes, self._what = shapes, what

    def __call__(self, name: str) -> Sequence[int]:
        if name not in self._shapes:
            raise RequestError(f"the weights hold no {name}; expected those of {self._what}")
        return self._shapes[name]

    def count(self, pattern: str) -> int:
        """How many names 0, 1, 2, ... in place of the braces there are, at least one."""
        self(pattern.format(0))
        number = 1
        while pattern.format(number) in self._shapes:
            number += 1
        return number


def _sides(length: int, levels: Tensor | None) -> list[int]:
    if levels is not None:
        return [math.isqrt(count) for count in torch.bincount(levels.flatten().long()).tolist()]
    lengths = {scale_slices(sides)[-1].stop: sides for sides in PATCH_NUMS.values()}
    if length not in lengths:
        raise RequestError(
            f"lvl_1L has {length} positions; expected {' or '.join(map(str, lengths))}, as published networks have"
        )
    return list(lengths[length])
