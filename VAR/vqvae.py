"""The tokenizer of VAR: images as multi-scale tokens, and back.

Attribute names are those of the published weights. Shapes: B batch, C channels, H W pixels; p_1 .. p_K the sides
of the scales, L = sum of p_k^2 tokens. Every normalisation is over 32 groups with epsilon 1e-6.
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from VAR.quantizer import MultiScaleQuantizer

USAGE_BUFFER = "quantize.ema_vocab_hit_SV"


class VQVAE(nn.Module):
    """Images float32 [B, 3, H, H] in [-1, 1] <-> tokens int64 [B, L], with H = p_K 2^(levels - 1) = `image_side`.

    Convolutional encoder and decoder of one level per entry of `channel_mult` (channels in units of
    `base_channels`, a multiple of 32), halving the side from level to level, with attention at the last.
    """

    def __init__(
        self,
        vocab: int = 4096,
        code_channels: int = 32,
        base_channels: int = 160,
        channel_mult: Sequence[int] = (1, 1, 2, 2, 4),
        res_blocks: int = 2,
        patch_nums: Sequence[int] = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16),
        phi_count: int = 4,
        phi_ratio: float = 0.5,
        cosine_lookup: bool = False,
        quant_conv_kernel: int = 3,
    ) -> None:
        super().__init__()
        channels = [base_channels * mult for mult in channel_mult]
        self.image_side = patch_nums[-1] * 2 ** (len(channels) - 1)
        self.encoder = Encoder(base_channels, channels, res_blocks, code_channels)
        self.decoder = Decoder(channels, res_blocks, code_channels)
        self.quantize = MultiScaleQuantizer(vocab, code_channels, patch_nums, phi_count, phi_ratio, cosine_lookup)
        padding = quant_conv_kernel // 2
        self.quant_conv = nn.Conv2d(code_channels, code_channels, quant_conv_kernel, padding=padding)
        self.post_quant_conv = nn.Conv2d(code_channels, code_channels, quant_conv_kernel, padding=padding)

    def features(self, images: Tensor) -> Tensor:
        """What the quantiser sees of `images`: [B, c, p_K, p_K].

        Raises:
            ValueError: the images are of another size.
        """
        if images.shape[-2:] != (self.image_side, self.image_side):
            raise ValueError(
                f"images are {images.shape[-2]} x {images.shape[-1]}; expected {self.image_side} x {self.image_side}"
            )
        return self.quant_conv(self.encoder(images))

    @torch.no_grad()
    def tokens(self, images: Tensor) -> Tensor:
        """Tokens [B, L], all scales coarse to fine; in float32 even under autocast, for codes lie close."""
        with _float32(images.device):
            return self.quantize.encode(self.features(images))

    def decode(self, feature_map: Tensor) -> Tensor:
        """Feature maps [B, c, p_K, p_K] -> images in [-1, 1], of the autocast dtype if there is one."""
        return self.decoder(self.post_quant_conv(feature_map)).clamp(-1, 1)

    def decode_tokens(self, tokens: Tensor) -> Tensor:
        """Tokens [B, L] -> images in [-1, 1]."""
        return self.decode(self.quantize.feature_maps(tokens)[-1])

    def training_forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(reconstructions, not clamped; loss of the quantiser, scalar), for training a tokenizer."""
        quantised, loss = self.quantize.training_forward(self.features(images))
        return self.decoder(self.post_quant_conv(quantised)), loss


def fit_usage_buffer(state: Mapping[str, Tensor], vqvae: VQVAE) -> dict[str, Tensor]:
    """`state`, with the tokenizer's own usage counts if those of the file are for another number of scales.

    One published file serves 256 and 512 pixels. The counts are statistics of training that nothing reads.
    """
    own = vqvae.state_dict()[USAGE_BUFFER]
    found = state.get(USAGE_BUFFER)
    if found is None or len(found) == len(own):
        return dict(state)
    return {**state, USAGE_BUFFER: own}


class Encoder(nn.Module):
    """Images [B, 3, H, H] -> [B, code_channels, p_K, p_K]; `channels` per level, finest first."""

    def __init__(self, base_channels: int, channels: Sequence[int], res_blocks: int, code_channels: int) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(3, base_channels, 3, padding=1)
        self.down = nn.ModuleList()
        for level, (before, here) in enumerate(pairwise([base_channels, *channels])):
            last = level == len(channels) - 1
            self.down.append(Level(before, here, res_blocks, attention=last))
            if not last:
                self.down[-1].downsample = Downsample(here)
        self.mid = Middle(channels[-1])
        self.norm_out = group_norm(channels[-1])
        self.conv_out = nn.Conv2d(channels[-1], code_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level in self.down:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


class Decoder(nn.Module):
    """[B, code_channels, p_K, p_K] -> images [B, 3, H, H]; one residual block more per level than the encoder."""

    def __init__(self, channels: Sequence[int], res_blocks: int, code_channels: int) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(code_channels, channels[-1], 3, padding=1)
        self.mid = Middle(channels[-1])
        self.up = nn.ModuleList()  # finest first, as in the encoder
        for level, (here, before) in enumerate(pairwise([*channels, channels[-1]])):
            self.up.append(Level(before, here, res_blocks + 1, attention=level == len(channels) - 1))
            if level > 0:
                self.up[-1].upsample = Upsample(here)
        self.norm_out = group_norm(channels[0])
        self.conv_out = nn.Conv2d(channels[0], 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mid(self.conv_in(x))
        for level in reversed(self.up):
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class Level(nn.Module):
    """Residual blocks at one resolution, each followed by attention or not, then a change of resolution or none."""

    downsample: nn.Module | None
    upsample: nn.Module | None

    def __init__(self, before: int, here: int, num_blocks: int, *, attention: bool) -> None:
        super().__init__()
        self.block = nn.ModuleList(ResidualBlock(here if i else before, here) for i in range(num_blocks))
        self.attn = nn.ModuleList(Attention(here) if attention else nn.Identity() for _ in range(num_blocks))
        self.downsample = None
        self.upsample = None

    def forward(self, x: Tensor) -> Tensor:
        for block, attention in zip(self.block, self.attn, strict=True):
            x = attention(block(x))
        resample = self.downsample or self.upsample
        return x if resample is None else resample(x)


class Middle(nn.Module):
    """The blocks at the coarsest resolution, [B, C, p_K, p_K] -> the same shape."""

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
        self.conv1 = nn.Conv2d(before, here, 3, padding=1)
        self.norm2 = group_norm(here)
        self.conv2 = nn.Conv2d(here, here, 3, padding=1)
        self.nin_shortcut = nn.Identity() if before == here else nn.Conv2d(before, here, 1)

    def forward(self, x: Tensor) -> Tensor:
        branch = self.conv1(F.silu(self.norm1(x)))
        return self.nin_shortcut(x) + self.conv2(F.silu(self.norm2(branch)))


class Attention(nn.Module):
    """One head over all positions of a map [B, C, H, W], added to it."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = group_norm(channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).flatten(2).transpose(1, 2).unsqueeze(1).chunk(3, dim=3)  # [B, 1, H W, C]
        mixed = F.scaled_dot_product_attention(q, k, v)
        return x + self.proj_out(mixed.squeeze(1).transpose(1, 2).reshape(x.shape))


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
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


def group_norm(channels: int) -> nn.GroupNorm:
    """The normalisation of the tokenizer."""
    return nn.GroupNorm(32, channels, eps=1e-6)


def _float32(device: torch.device) -> AbstractContextManager[object]:
    """No autocast on `device`."""
    known = torch.amp.is_autocast_available(device.type)
    return torch.autocast(device.type, enabled=False) if known else nullcontext()
