"""The tokenizer of VAR: images as multi-scale tokens, and back.

Attribute names are those of the published weights. Shapes: B batch, C channels, H W pixels; p_1 .. p_K the sides
of the scales, L = sum of p_k^2 tokens. Every normalisation is over 32 groups with epsilon 1e-6.
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
from torch import Tensor, nn

from neon.nn.autoencoder import Decoder, Encoder, MapAttention
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
        attention = partial(MapAttention, fused=True)
        self.encoder = Encoder(base_channels, channels, res_blocks, code_channels, attention)
        self.decoder = Decoder(channels, res_blocks, code_channels, attention, attends_at_coarsest=True)
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

    def training_forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(reconstructions, not clamped; loss of the quantiser, scalar), for training a tokenizer."""
        quantised, loss = self.quantize.training_forward(self.features(images))
        return self.decoder(self.post_quant_conv(quantised)), loss


def fit_usage_buffer(state: Mapping[str, Tensor], scales: int) -> dict[str, Tensor]:
    """`state`, with usage counts of 0 for `scales` scales if those of the file are for another number of them.

    One published file serves 256 and 512 pixels. The counts are statistics of training that nothing reads.
    """
    found = state.get(USAGE_BUFFER)
    if found is None or found.ndim != 2 or len(found) == scales:
        return dict(state)
    return {**state, USAGE_BUFFER: found.new_zeros(scales, found.shape[1])}


def _float32(device: torch.device) -> AbstractContextManager[object]:
    """No autocast on `device`."""
    known = torch.amp.is_autocast_available(device.type)
    return torch.autocast(device.type, enabled=False) if known else nullcontext()
