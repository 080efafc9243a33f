"""The U-Nets of EDM: SongUNet (DDPM++ and NCSN++) and DhariwalUNet (ADM).

Names of classes, constructor keywords and parameters are those of the published checkpoints.
Shapes: B batch, R resolution, L label width, E embedding width. The embedding path stays float32.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from neon.nn.unet import (
    Conv2d,
    GroupNorm,
    Linear,
    PositionalEmbedding,
    UNetBlock,
    add_decoder_blocks,
    add_encoder_blocks,
    drop_labels,
    join_skip,
    silu,
)
from neon.nn.unet import SongUNet as SongUNet


class DhariwalUNet(nn.Module):
    """ADM of Dhariwal & Nichol 2021 (arXiv 2105.05233), as EDM builds it; forward as in SongUNet."""

    def __init__(
        self,
        img_resolution: int,
        in_channels: int,
        out_channels: int,
        label_dim: int = 0,
        augment_dim: int = 0,
        model_channels: int = 192,
        channel_mult: Sequence[int] = (1, 2, 3, 4),
        channel_mult_emb: int = 4,
        num_blocks: int = 3,
        attn_resolutions: Sequence[int] = (32, 16, 8),
        dropout: float = 0.10,
        label_dropout: float = 0,
    ) -> None:
        super().__init__()
        self.label_dropout = label_dropout
        emb_channels = model_channels * channel_mult_emb
        gain = math.sqrt(1 / 3)
        init: dict[str, Any] = {"init_mode": "kaiming_uniform", "init_weight": gain, "init_bias": gain}
        init_zero: dict[str, Any] = {"init_mode": "kaiming_uniform", "init_weight": 0, "init_bias": 0}
        block: dict[str, Any] = {"emb_channels": emb_channels, "dropout": dropout, "init": init, "init_zero": init_zero}

        self.map_noise = PositionalEmbedding(model_channels)
        self.map_augment = Linear(augment_dim, model_channels, bias=False, **init_zero) if augment_dim else None
        self.map_layer0 = Linear(model_channels, emb_channels, **init)
        self.map_layer1 = Linear(emb_channels, emb_channels, **init)
        self.map_label = (
            Linear(label_dim, emb_channels, bias=False, init_mode="kaiming_normal", init_weight=math.sqrt(label_dim))
            if label_dim
            else None
        )

        self.enc = nn.ModuleDict()
        channels = in_channels
        skips: list[int] = []  # channels of the connections from encoder to decoder
        for level, mult in enumerate(channel_mult):
            res = f"{img_resolution >> level}x{img_resolution >> level}"
            out = model_channels * mult
            if level == 0:
                self.enc[f"{res}_conv"] = Conv2d(channels, out, kernel=3, **init)
                channels = out
            else:
                self.enc[f"{res}_down"] = UNetBlock(channels, channels, down=True, **block)
            skips.append(channels)
            attention = [img_resolution >> level in attn_resolutions] * num_blocks
            channels = add_encoder_blocks(self.enc, res, channels, out, skips, attention, block)

        self.dec = nn.ModuleDict()
        deepest = len(channel_mult) - 1
        for level in range(deepest, -1, -1):
            res = f"{img_resolution >> level}x{img_resolution >> level}"
            attention = [img_resolution >> level in attn_resolutions] * (num_blocks + 1)
            out = model_channels * channel_mult[level]
            channels = add_decoder_blocks(self.dec, res, channels, out, skips, attention, level == deepest, block)
        self.out_norm = GroupNorm(channels)
        self.out_conv = Conv2d(channels, out_channels, kernel=3, **init_zero)

    def forward(
        self, x: Tensor, noise_labels: Tensor, class_labels: Tensor | None, augment_labels: Tensor | None = None
    ) -> Tensor:
        emb = self.map_noise(noise_labels)
        if self.map_augment is not None and augment_labels is not None:
            emb = emb + self.map_augment(augment_labels)
        emb = self.map_layer1(F.silu(self.map_layer0(emb)))
        if self.map_label is not None and class_labels is not None:
            emb = emb + self.map_label(drop_labels(class_labels, self.label_dropout if self.training else 0))
        emb = F.silu(emb)

        skips: list[Tensor] = []
        for entry in self.enc.values():
            x = entry(x, emb) if isinstance(entry, UNetBlock) else entry(x)
            skips.append(x)
        for entry in self.dec.values():
            x = entry(join_skip(x, skips, entry), emb)
        return self.out_conv(silu(self.out_norm(x)))
