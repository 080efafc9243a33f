"""What kinds over latents have in common: images as an AutoencoderKL sees them."""

from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from neon.errors import RequestError
from neon.noise import Noise
from neon_diffusers.kinds.kind import Kind, height_and_width
from neon_diffusers.pipeline import Pipeline
from neon_diffusers.vae import CLASS, COMPONENT, Codec, downsampling, load_codec, vae_weights


class Latents(Kind):
    """Examples are means and deviations of latents; their size is the denoiser's `sample_size`."""

    example_kind = "moments of diffusers latents"
    frozen: ClassVar = {COMPONENT: (CLASS,)}
    usual_size: ClassVar[int]
    """of latents whose denoiser does not tell"""

    def __init__(self, pipeline: Pipeline) -> None:
        super().__init__(pipeline)
        config, vae = self.denoiser.config, pipeline.components[COMPONENT].config
        side = config.get("sample_size") or self.usual_size
        height, width = height_and_width(side)
        self.shape = (config.get("in_channels", 4), height, width)
        self.codec: Codec | None = None
        self._see(vae.get("out_channels", 3), downsampling(vae))

    def __deepcopy__(self, memo: dict[int, Any]) -> "Latents":
        """Itself: models with networks of their own share what is frozen."""
        return self

    def encode(self, images: Tensor) -> Tensor:
        """Mean and deviation of latents, [B, 2C, h, w]."""
        return self._codec().moments(images)

    def clean(self, examples: Tensor, noise: Noise) -> Tensor:
        """Draws per image: its latents, from the posterior."""
        return self._codec().latents(examples, noise.normal(*self.shape))

    def decode(self, x: Tensor) -> Tensor:
        return self._codec().decode(x)

    def frozen_file(self, named: Path | None) -> Path:
        return vae_weights(self._place(named))

    def load_frozen(self, path: Path, device: torch.device) -> None:
        codec = load_codec(path, device)
        if codec.latent_channels != self.shape[0]:
            raise RequestError(
                f"{path}: an autoencoder of {codec.latent_channels} channels, but the denoiser makes {self.shape[0]}; "
                "expected the one it was trained with"
            )
        self.codec = codec
        self._see(self.image_shape[0], codec.downsampling)

    def _see(self, channels: int, scale: int) -> None:
        """Images are so many times larger than latents."""
        _, height, width = self.shape
        self.image_shape = (channels, scale * height, scale * width)

    def _place(self, named: Path | None) -> Path:
        """The folder of what is frozen: `named`, or the pipeline's."""
        place = named if named is not None else self.pipeline.folder()
        if place is None or not place.exists():
            raise RequestError(
                f"{place or self.pipeline.source}: not there, and with it the autoencoder; name the pipeline, or the "
                f"folder {COMPONENT} of one, with --vae"
            )
        return place

    def _codec(self) -> Codec:
        if self.codec is None:
            raise RequestError("a network of latents needs its autoencoder; name it with --vae")
        return self.codec
