"""Tiny pipelines of random weights, written by diffusers' own classes; whoever calls these has diffusers."""

from pathlib import Path
from typing import Any

import torch

SIDE, LATENT, CLASSES = 8, 4, 3
"""of pixels and of latents; images of a pipeline over latents have twice the side"""


def pixels(folder: Path, scheduler: Any = None, classes: int | None = None, name: str = "DDIMPipeline") -> Path:
    """A UNet2DModel of 14k weights over 8 x 8 pixels, grey."""
    import diffusers

    torch.manual_seed(0)
    unet = diffusers.UNet2DModel(
        sample_size=SIDE, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4, attention_head_dim=8, num_class_embeds=classes,
    )  # fmt: skip
    pipe = getattr(diffusers, name)(unet, scheduler or diffusers.DDIMScheduler())
    pipe.save_pretrained(folder)
    return folder


def dit(folder: Path, scheduler: Any = None, *, learned: bool = True) -> Path:
    """A DiTTransformer2DModel over the latents of an AutoencoderKL, of 3 classes."""
    import diffusers

    torch.manual_seed(0)
    transformer = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=LATENT, out_channels=2 * LATENT if learned else None,
        num_layers=1, sample_size=4, num_embeds_ada_norm=CLASSES, norm_num_groups=4,
    )  # fmt: skip
    pipe = diffusers.DiTPipeline(transformer, autoencoder(), scheduler or diffusers.DDIMScheduler())
    pipe.save_pretrained(folder)
    return folder


def autoencoder() -> Any:
    """Images of twice the side of their latents, 3 channels to 4."""
    import diffusers

    return diffusers.AutoencoderKL(
        block_out_channels=(8, 8), latent_channels=LATENT, norm_num_groups=4, sample_size=SIDE,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip
