"""AutoencoderKL of diffusers: images as latents and back, in float32, opened without running anything of its folder."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from neon.checkpoint import open_checkpoint
from neon.checkpoint.naming import unwrapped
from neon.checkpoint.weight_sets import PIPELINE_FILE
from neon.data.images import from_uint8
from neon.errors import RequestError
from neon.model import building, check_outline, load_weights
from neon.nn.autoencoder import decoded_at_once
from neon.runtime.small_json import read_table
from neon_diffusers.library import library

if TYPE_CHECKING:
    from diffusers.models import AutoencoderKL

COMPONENT = "vae"
CLASS = "AutoencoderKL"


class Codec(nn.Module):
    """Images uint8 [B, 3, H, W] <-> latents float32 [B, C, h, w], scaled as the configuration says."""

    def __init__(self, vae: "AutoencoderKL") -> None:
        super().__init__()
        self.vae = vae
        self.scale = float(vae.config["scaling_factor"])
        self.shift = float(vae.config.get("shift_factor") or 0.0)
        self.latent_channels = int(vae.config["latent_channels"])
        self.downsampling = downsampling(vae.config)

    def moments(self, images: Tensor) -> Tensor:
        """Mean and deviation of the posterior of uint8 `images`, unscaled: float32 [B, 2C, h, w]."""
        posterior = self.vae.encode(from_uint8(images)).latent_dist
        return torch.cat([posterior.mean, posterior.std], dim=1)

    def latents(self, moments: Tensor, draw: Tensor) -> Tensor:
        """Latents of images with these moments [B, 2C, h, w], by a unit normal `draw` [B, C, h, w]."""
        mean, std = moments.chunk(2, dim=1)
        return (mean + draw * std - self.shift) * self.scale

    def decode(self, latents: Tensor) -> Tensor:
        """Latents -> images, float32 [B, 3, H, W], mostly within [-1, 1]."""
        raw = latents / self.scale + self.shift
        part = decoded_at_once(raw.shape[-1] * self.downsampling, raw.device)
        return torch.cat([self.vae.decode(some).sample for some in raw.split(part)])


def downsampling(config: Any) -> int:
    """The side of an image over that of its latent."""
    return int(2 ** (len(config["block_out_channels"]) - 1))


def vae_weights(place: Path) -> Path:
    """The weights, file or index, of the autoencoder at `place`: a pipeline, its own folder, or a file in that.

    Raises:
        RequestError: there is none.
    """
    folder = place / COMPONENT if (place / PIPELINE_FILE).is_file() else place.parent if place.is_file() else place
    if not (folder / "config.json").is_file():
        raise RequestError(
            f"{folder}: no config.json of an autoencoder there; name the pipeline, or the folder {COMPONENT} of one, "
            "with --vae"
        )
    with open_checkpoint(place if place.is_file() else folder) as weights:
        return weights.path


def load_codec(weights: Path, device: torch.device | str) -> Codec:
    """The autoencoder of a file of weights beside its config.json, frozen, on `device`.

    Raises:
        RequestError: diffusers is not installed, or the folder does not hold a whole AutoencoderKL.
    """
    source = weights.parent / "config.json"
    config = read_table(source)
    if (kind := config.get("_class_name", CLASS)) != CLASS:
        raise RequestError(f"{source}: an autoencoder of class {kind}; expected {CLASS}")
    config = {name: value for name, value in config.items() if not name.startswith("_")}
    maker = library("diffusers.models").AutoencoderKL
    if config.get("latents_mean") or config.get("latents_std"):
        raise RequestError(
            f"{source}: its latents are scaled channel by channel (latents_mean, latents_std), which is not served; "
            "expected a scaling_factor alone"
        )
    with open_checkpoint(weights) as held, building(f"{source}: not the config of an {CLASS}", "download it again"):
        file = unwrapped(held)
        check_outline(
            lambda: maker.from_config(config), {name: spec.shape for name, spec in file.specs.items()}, weights
        )
        vae = maker.from_config(config)
        load_weights(vae, {name: file.tensor(name) for name in file.names()}, weights)
        return Codec(vae).to(device).eval().requires_grad_(False)
