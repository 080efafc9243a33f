"""The U-Nets of EDM: SongUNet (DDPM++ and NCSN++) and DhariwalUNet (ADM).

Names of classes, constructor keywords and parameters are those of the published checkpoints.
Shapes: B batch, R resolution, L label width, E embedding width. The embedding path stays float32.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edm.layers import Conv2d, FourierEmbedding, GroupNorm, Linear, PositionalEmbedding, UNetBlock


class SongUNet(nn.Module):
    """DDPM++ and NCSN++ of Song et al. 2020 (arXiv 2011.13456), as EDM builds them.

    forward: x [B, in_channels, R, R], noise_labels [B] or [1] float32, class_labels [B, label_dim] or None,
    augment_labels [B, augment_dim] or None -> [B, out_channels, R, R].
    """

    def __init__(
        self,
        img_resolution: int,
        in_channels: int,
        out_channels: int,
        label_dim: int = 0,
        augment_dim: int = 0,
        model_channels: int = 128,
        channel_mult: Sequence[int] = (1, 2, 2, 2),
        channel_mult_emb: int = 4,
        num_blocks: int = 4,
        attn_resolutions: Sequence[int] = (16,),
        dropout: float = 0.10,
        label_dropout: float = 0,
        embedding_type: str = "positional",
        channel_mult_noise: int = 1,
        encoder_type: str = "standard",
        decoder_type: str = "standard",
        resample_filter: Sequence[float] = (1, 1),
    ) -> None:
        for keyword, value, known in (
            ("embedding_type", embedding_type, ("positional", "fourier")),
            ("encoder_type", encoder_type, ("standard", "skip", "residual")),
            ("decoder_type", decoder_type, ("standard", "skip")),
        ):
            if value not in known:
                raise ValueError(f"{keyword} {value!r} is unknown; expected one of {', '.join(known)}")
        super().__init__()
        self.label_dropout = label_dropout
        emb_channels = model_channels * channel_mult_emb
        noise_channels = model_channels * channel_mult_noise
        init: dict[str, Any] = {"init_mode": "xavier_uniform"}
        init_zero: dict[str, Any] = {"init_mode": "xavier_uniform", "init_weight": 1e-5}
        init_attn: dict[str, Any] = {"init_mode": "xavier_uniform", "init_weight": math.sqrt(0.2)}
        block: dict[str, Any] = {
            "emb_channels": emb_channels, "num_heads": 1, "dropout": dropout, "skip_scale": math.sqrt(0.5),
            "eps": 1e-6, "resample_filter": resample_filter, "resample_proj": True, "adaptive_scale": False,
            "init": init, "init_zero": init_zero, "init_attn": init_attn,
        }  # fmt: skip

        self.map_noise: nn.Module = (
            PositionalEmbedding(noise_channels, endpoint=True)
            if embedding_type == "positional"
            else FourierEmbedding(noise_channels)
        )
        self.map_label = Linear(label_dim, noise_channels, **init) if label_dim else None
        self.map_augment = Linear(augment_dim, noise_channels, bias=False, **init) if augment_dim else None
        self.map_layer0 = Linear(noise_channels, emb_channels, **init)
        self.map_layer1 = Linear(emb_channels, emb_channels, **init)

        self.enc = nn.ModuleDict()
        channels = aux_channels = in_channels
        skips: list[int] = []  # channels of the connections from encoder to decoder
        for level, mult in enumerate(channel_mult):
            res = f"{img_resolution >> level}x{img_resolution >> level}"
            if level == 0:
                self.enc[f"{res}_conv"] = Conv2d(channels, model_channels, kernel=3, **init)
                channels = model_channels
            else:
                self.enc[f"{res}_down"] = UNetBlock(channels, channels, down=True, **block)
                aux: dict[str, Any] = {"down": True, "resample_filter": resample_filter}
                if encoder_type == "skip":
                    self.enc[f"{res}_aux_down"] = Conv2d(aux_channels, aux_channels, kernel=0, **aux)
                    self.enc[f"{res}_aux_skip"] = Conv2d(aux_channels, channels, kernel=1, **init)
                if encoder_type == "residual":
                    residual = Conv2d(aux_channels, channels, kernel=3, fused_resample=True, **aux, **init)
                    self.enc[f"{res}_aux_residual"] = residual
                    aux_channels = channels
            skips.append(channels)
            attention = [img_resolution >> level in attn_resolutions] * num_blocks
            channels = add_encoder_blocks(self.enc, res, channels, model_channels * mult, skips, attention, block)

        self.dec = nn.ModuleDict()
        deepest = len(channel_mult) - 1
        for level in range(deepest, -1, -1):
            res = f"{img_resolution >> level}x{img_resolution >> level}"
            attention = [False] * num_blocks + [img_resolution >> level in attn_resolutions]
            out = model_channels * channel_mult[level]
            channels = add_decoder_blocks(self.dec, res, channels, out, skips, attention, level == deepest, block)
            if decoder_type == "skip" and level < deepest:
                up: dict[str, Any] = {"up": True, "resample_filter": resample_filter}
                self.dec[f"{res}_aux_up"] = Conv2d(out_channels, out_channels, kernel=0, **up)
            if decoder_type == "skip" or level == 0:
                self.dec[f"{res}_aux_norm"] = GroupNorm(channels, eps=1e-6)
                self.dec[f"{res}_aux_conv"] = Conv2d(channels, out_channels, kernel=3, **init_zero)

    def embed(self, noise_labels: Tensor, class_labels: Tensor | None, augment_labels: Tensor | None) -> Tensor:
        """The conditioning vector [B, E]; the halves of the noise embedding are swapped to [sin, cos]."""
        emb = self.map_noise(noise_labels)
        emb = torch.cat(emb.chunk(2, dim=1)[::-1], dim=1)
        if self.map_label is not None and class_labels is not None:
            labels = drop_labels(class_labels, self.label_dropout if self.training else 0)
            emb = emb + self.map_label(labels * math.sqrt(self.map_label.in_features))
        if self.map_augment is not None and augment_labels is not None:
            emb = emb + self.map_augment(augment_labels)
        return F.silu(self.map_layer1(F.silu(self.map_layer0(emb))))

    def forward(
        self, x: Tensor, noise_labels: Tensor, class_labels: Tensor | None, augment_labels: Tensor | None = None
    ) -> Tensor:
        emb = self.embed(noise_labels, class_labels, augment_labels)
        skips: list[Tensor] = []
        aux = x
        for name, entry in self.enc.items():
            if "aux_down" in name:
                aux = entry(aux)
            elif "aux_skip" in name:
                x = skips[-1] = x + entry(aux)
            elif "aux_residual" in name:
                x = skips[-1] = aux = (x + entry(aux)) / math.sqrt(2)
            else:
                x = entry(x, emb) if isinstance(entry, UNetBlock) else entry(x)
                skips.append(x)

        out: Tensor | None = None
        normed = x
        for name, entry in self.dec.items():
            if "aux_up" in name:
                out = entry(out)
            elif "aux_norm" in name:
                normed = entry(x)
            elif "aux_conv" in name:
                here = entry(F.silu(normed))
                out = here if out is None else here + out
            else:
                x = entry(join_skip(x, skips, entry), emb)
        assert out is not None
        return out


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
        return self.out_conv(F.silu(self.out_norm(x)))


def add_encoder_blocks(
    enc: nn.ModuleDict,
    res: str,
    channels: int,
    out: int,
    skips: list[int],
    attention: Sequence[bool],
    block: dict[str, Any],
) -> int:
    """Append the blocks of one resolution on the way down, one per entry of `attention`; returns their channels."""
    for i, attend in enumerate(attention):
        enc[f"{res}_block{i}"] = UNetBlock(channels, out, attention=attend, **block)
        channels = out
        skips.append(channels)
    return channels


def add_decoder_blocks(
    dec: nn.ModuleDict,
    res: str,
    channels: int,
    out: int,
    skips: list[int],
    attention: Sequence[bool],
    deepest: bool,
    block: dict[str, Any],
) -> int:
    """Append the blocks of one resolution on the way up, each taking a connection from `skips`; their channels."""
    if deepest:
        dec[f"{res}_in0"] = UNetBlock(channels, channels, attention=True, **block)
        dec[f"{res}_in1"] = UNetBlock(channels, channels, **block)
    else:
        dec[f"{res}_up"] = UNetBlock(channels, channels, up=True, **block)
    for i, attend in enumerate(attention):
        dec[f"{res}_block{i}"] = UNetBlock(channels + skips.pop(), out, attention=attend, **block)
        channels = out
    return channels


def drop_labels(labels: Tensor, probability: float) -> Tensor:
    """Zero each row of `labels` [B, L] with `probability`: what trains the unconditional branch for guidance."""
    if probability <= 0:
        return labels
    return labels * (torch.rand(labels.shape[0], 1, device=labels.device) >= probability).to(labels.dtype)


def join_skip(x: Tensor, skips: list[Tensor], entry: nn.Module) -> Tensor:
    """x, with the last skip connection beside it if `entry` expects more channels than x has."""
    return x if x.shape[1] == entry.in_channels else torch.cat([x, skips.pop()], dim=1)
