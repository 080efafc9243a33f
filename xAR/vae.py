"""The autoencoder of xAR (KL-16): images as latents of a sixteenth of the side, and back.

Attribute names are those of the published weights. Shapes: B batch, C channels, H W pixels, h = H / 16, w = W / 16
with the published five levels. Latents are everywhere those that the transformer sees, of about unit variance.
"""

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.distributions import Normal

from neon.nn.autoencoder import Decoder, Encoder, MapAttention

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
        attention = partial(MapAttention, fused=False)
        self.encoder = Encoder(ch, channels, RES_BLOCKS, 2 * embed_dim, attention)
        self.decoder = Decoder(channels, RES_BLOCKS, embed_dim, attention, attends_at_coarsest=False)
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
