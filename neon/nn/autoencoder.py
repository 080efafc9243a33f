"""The convolutional encoder and decoder that tokenizers and autoencoders of latents have in common.

Those of VQGAN (Esser et al. 2020, arXiv 2012.09841); attribute names are those of the weights published since. Shapes:
B batch, C channels, H W pixels, h w the map at the coarsest level. Normalisations are over 32 groups.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FEWEST_DECODED = 8
PIXELS_DECODED = 32 * 256**2
AttentionOf = Callable[[int], nn.Module]
"""attention for maps of so many channels, added to its input; weights are published in several forms"""


class Encoder(nn.Module):
    """Images [B, 3, H, W] -> [B, outputs, h, w]; `channels` per level, finest first, with attention at the last."""

    def __init__(
        self, first: int, channels: Sequence[int], res_blocks: int, outputs: int, attention: AttentionOf
    ) -> None:
        super().__init__()
        self.conv_in = conv3(3, first)
        self.down = nn.ModuleList()
        for level, (before, here) in enumerate(pairwise([first, *channels])):
            coarsest = level == len(channels) - 1
            self.down.append(Level(before, here, res_blocks, attention if coarsest else None))
            if not coarsest:
                self.down[-1].downsample = Downsample(here)
        self.mid = Middle(channels[-1], attention)
        self.norm_out = group_norm(channels[-1])
        self.conv_out = conv3(channels[-1], outputs)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level in self.down:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


class Decoder(nn.Module):
    """[B, inputs, h, w] -> images [B, 3, H, W]; one residual block more per level than in the encoder."""

    def __init__(
        self,
        channels: Sequence[int],
        res_blocks: int,
        inputs: int,
        attention: AttentionOf,
        *,
        attends_at_coarsest: bool,
    ) -> None:
        super().__init__()
        self.conv_in = conv3(inputs, channels[-1])
        self.mid = Middle(channels[-1], attention)
        self.up = nn.ModuleList()  # finest first, as in the encoder
        for level, (here, before) in enumerate(pairwise([*channels, channels[-1]])):
            attends = attends_at_coarsest and level == len(channels) - 1
            self.up.append(Level(before, here, res_blocks + 1, attention if attends else None))
            if level > 0:
                self.up[-1].upsample = Upsample(here)
        self.norm_out = group_norm(channels[0])
        self.conv_out = conv3(channels[0], 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mid(self.conv_in(x))
        for level in reversed(self.up):
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class Level(nn.Module):
    """Residual blocks at one resolution, each followed by attention or not, then a change of resolution or none."""

    downsample: nn.Module | None
    upsample: nn.Module | None

    def __init__(self, before: int, here: int, num_blocks: int, attention: AttentionOf | None) -> None:
        super().__init__()
        self.block = nn.ModuleList(ResidualBlock(here if i else before, here) for i in range(num_blocks))
        self.attn = nn.ModuleList(attention(here) if attention else nn.Identity() for _ in range(num_blocks))
        self.downsample = None
        self.upsample = None

    def forward(self, x: Tensor) -> Tensor:
        for block, attention in zip(self.block, self.attn, strict=True):
            x = attention(block(x))
        resample = self.downsample or self.upsample
        return x if resample is None else resample(x)


class Middle(nn.Module):
    """The blocks at the coarsest resolution, [B, C, h, w] -> the same shape."""

    def __init__(self, channels: int, attention: AttentionOf) -> None:
        super().__init__()
        self.block_1 = ResidualBlock(channels, channels)
        self.attn_1 = attention(channels)
        self.block_2 = ResidualBlock(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class MapAttention(nn.Module):
    """One head over all positions of a map [B, C, h, w], added to it.

    Weights are published in two forms: `fused`, one convolution for queries, keys and values, or one for each.
    """

    def __init__(self, channels: int, *, fused: bool) -> None:
        super().__init__()
        self.norm = group_norm(channels)
        self.fused = fused
        if fused:
            self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        else:
            self.q, self.k, self.v = (nn.Conv2d(channels, channels, 1) for _ in range(3))
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        maps = self.qkv(normed).chunk(3, dim=1) if self.fused else (self.q(normed), self.k(normed), self.v(normed))
        q, k, v = (each.flatten(2).transpose(1, 2)[:, None] for each in maps)  # [B, 1, h w, C]
        mixed = F.scaled_dot_product_attention(q, k, v)
        return x + self.proj_out(mixed[:, 0].transpose(1, 2).reshape(x.shape))


class ResidualBlock(nn.Module):
    """Two normalised 3x3 convolutions beside the input, which a 1x1 convolution widens where channels change."""

    def __init__(self, before: int, here: int) -> None:
        super().__init__()
        self.norm1 = group_norm(before)
        self.conv1 = conv3(before, here)
        self.norm2 = group_norm(here)
        self.conv2 = conv3(here, here)
        self.nin_shortcut = nn.Identity() if before == here else nn.Conv2d(before, here, 1)

    def forward(self, x: Tensor) -> Tensor:
        branch = self.conv1(F.silu(self.norm1(x)))
        return self.nin_shortcut(x) + self.conv2(F.silu(self.norm2(branch)))


class Downsample(nn.Module):
    """Half the resolution by a strided convolution; the padding is at the bottom and right only."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Twice the resolution: pixels repeated, then a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = conv3(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


def conv3(before: int, after: int) -> nn.Conv2d:
    """A 3x3 convolution that keeps the size."""
    return nn.Conv2d(before, after, 3, padding=1)


def group_norm(channels: int) -> nn.GroupNorm:
    """The normalisation of the autoencoder."""
    return nn.GroupNorm(32, channels, eps=1e-6)


def decoded_at_once(side: int, device: torch.device) -> int:
    """How many images of `side` pixels the decoder of diffusers takes in a pass.

    Its maps at full size are what fills a GPU: as many there as have the pixels of 32 images of 256 together, but not
    fewer than 8. On a CPU 8, for others would move images by rounding.
    """
    return FEWEST_DECODED if device.type == "cpu" else max(FEWEST_DECODED, PIXELS_DECODED // side**2)


def as_bytes(decoded: Tensor, rounded: bool = False) -> Tensor:
    """Images in [-1, 1] -> uint8, computed in their own dtype as published.

    Neon's programs cut fractions off; xAR's own evaluation rounds to the nearest, half a level brighter on average.
    """
    levels = ((decoded + 1) / 2 * 255).clamp(0, 255)
    return (levels.round() if rounded else levels).to(torch.uint8)
