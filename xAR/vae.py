"""The autoencoder of xAR (KL-16): images as latents of a sixteenth of the side, and back.

Attribute names are those of the published weights. Shapes: B batch, C channels, H W pixels, h = H / 16, w = W / 16
with the published five levels. Latents are everywhere those that the transformer sees, of about unit variance.
"""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.distributions import Normal

LATENT_SCALE = 0.2325
"""what samples of the posterior are multiplied by, and latents divided by before they are decoded"""
RES_BLOCKS = 2
"""per level of the encoder; the decoder has one more"""


class AutoencoderKL(nn.Module):
    """Images float32 [B, 3, H, W] in [-1, 1] <-> latents float32 [B, embed_dim, h, w].

    Convolutional encoder and decoder of one level per entry of `ch_mult` (channels in units of `ch`, a multiple of
    32), halving the side from level to level. Sides must divide by 2^(levels - 1).
    """

    DOWNSAMPLING = 16
    """side of an image over that of its latent, with the published levels"""

    def __init__(self, embed_dim: int = 16, ch_mult: Sequence[int] = (1, 1, 2, 2, 4), ch: int = 128) -> None:
        super().__init__()
        channels = [ch * mult for mult in ch_mult]
        self.embed_dim = embed_dim
        self.encoder = Encoder(ch, channels, 2 * embed_dim)
        self.decoder = Decoder(channels, embed_dim)
        self.quant_conv = nn.Conv2d(2 * embed_dim, 2 * embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(embed_dim, embed_dim, 1)

    def moments(self, images: Tensor) -> Tensor:
        """Mean and log-variance of the posterior of `images`, [B, 2 embed_dim, h, w]."""
        return self.quant_conv(self.encoder(images))

    @staticmethod
    def posterior_sample(moments: Tensor, noise_draw: Tensor) -> Tensor:
        """Latents of images with these `moments`, by a unit normal draw [B, embed_dim, h, w]."""
        found = posterior(moments)
        return LATENT_SCALE * (found.mean + found.stddev * noise_draw)

    def decode(self, latents: Tensor) -> Tensor:
        """Latents -> images, mostly within [-1, 1], of the autocast dtype if there is one."""
        return self.decoder(self.post_quant_conv(latents / LATENT_SCALE))


def posterior(moments: Tensor) -> Normal:
    """The distribution of what was encoded, before it is scaled; its log-variance is limited to [-30, 20]."""
    mean, log_variance = moments.chunk(2, dim=1)
    return Normal(mean, (0.5 * log_variance.clamp(-30, 20)).exp(), validate_args=False)


def as_input(images: Tensor) -> Tensor:
    """uint8 -> float32 in [-1, 1]."""
    return (images.to(torch.float32) / 255 - 0.5) / 0.5


def as_bytes(decoded: Tensor, rounded: bool = False) -> Tensor:
    """Images in [-1, 1] -> uint8, computed in their own dtype as published.

    Neon's programs cut fractions off; xAR's own evaluation rounds to the nearest, half a level brighter on average.
    """
    levels = ((decoded + 1) / 2 * 255).clamp(0, 255)
    return (levels.round() if rounded else levels).to(torch.uint8)


def center_crop(image: Tensor, size: int) -> Tensor:
    """uint8 [3, H, W] -> the middle [3, size, size], its shorter side resized as ADM did: images of `size` stay.

    Halved by averaging while it is at least twice too large, then resized by Pillow's bicubic filter.
    """
    picture = Image.fromarray(image.permute(1, 2, 0).numpy())
    while min(picture.size) >= 2 * size:
        picture = picture.resize((picture.width // 2, picture.height // 2), Image.Resampling.BOX)
    shorter = min(picture.size)
    wanted = (round(picture.width * size / shorter), round(picture.height * size / shorter))
    picture = picture.resize(wanted, Image.Resampling.BICUBIC)
    left, top = (picture.width - size) // 2, (picture.height - size) // 2
    pixels = np.asarray(picture)[top : top + size, left : left + size]
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1)


class Encoder(nn.Module):
    """Images [B, 3, H, W] -> [B, outputs, h, w]; `channels` per level, finest first, with attention at the last."""

    def __init__(self, ch: int, channels: Sequence[int], outputs: int) -> None:
        super().__init__()
        self.conv_in = conv3(3, ch)
        self.down = nn.ModuleList()
        for level, (before, here) in enumerate(pairwise([ch, *channels])):
            coarsest = level == len(channels) - 1
            self.down.append(Level(before, here, RES_BLOCKS, attention=coarsest))
            if not coarsest:
                self.down[-1].downsample = Downsample(here)
        self.mid = Middle(channels[-1])
        self.norm_out = group_norm(channels[-1])
        self.conv_out = conv3(channels[-1], outputs)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level in self.down:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


class Decoder(nn.Module):
    """[B, inputs, h, w] -> images [B, 3, H, W]; the mirrored levels, without attention."""

    def __init__(self, channels: Sequence[int], inputs: int) -> None:
        super().__init__()
        self.conv_in = conv3(inputs, channels[-1])
        self.mid = Middle(channels[-1])
        self.up = nn.ModuleList()  # finest first, as in the encoder
        for level, (here, before) in enumerate(pairwise([*channels, channels[-1]])):
            self.up.append(Level(before, here, RES_BLOCKS + 1))
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

    def __init__(self, before: int, here: int, num_blocks: int, *, attention: bool = False) -> None:
        super().__init__()
        self.block = nn.ModuleList(ResidualBlock(here if i else before, here) for i in range(num_blocks))
        self.attn = nn.ModuleList(Attention(here) if attention else nn.Identity() for _ in range(num_blocks))
        self.downsample: nn.Module | None = None
        self.upsample: nn.Module | None = None

    def forward(self, x: Tensor) -> Tensor:
        for block, attention in zip(self.block, self.attn, strict=True):
            x = attention(block(x))
        resample = self.downsample or self.upsample
        return x if resample is None else resample(x)


class Middle(nn.Module):
    """The blocks at the coarsest resolution, [B, C, h, w] -> the same shape."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.block_1 = ResidualBlock(channels, channels)
        self.attn_1 = Attention(channels)
        self.block_2 = ResidualBlock(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


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


class Attention(nn.Module):
    """One head over all positions of a map [B, C, h, w], added to it."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = group_norm(channels)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        q, k, v = (conv(normed).flatten(2).transpose(1, 2)[:, None] for conv in (self.q, self.k, self.v))
        mixed = F.scaled_dot_product_attention(q, k, v)  # [B, 1, h w, C]
        return x + self.proj_out(mixed[:, 0].transpose(1, 2).reshape(x.shape))


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
