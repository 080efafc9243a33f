"""The autoencoder of IMM, Stable Diffusion's: images as latents of an eighth of the side, and back.

Shapes: B images, H W pixels, h = H / 8, w = W / 8 with the published four levels. Latents are everywhere those that
the network sees; raw ones, which only the autoencoder knows, are standardised per channel to a deviation of 0.5.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from neon.checkpoint import load_state
from neon.checkpoint.naming import renewed
from neon.data.images import from_uint8
from neon.errors import RequestError
from neon.model import building, check_outline, load_weights
from neon.nn.autoencoder import as_bytes, decoded_at_once
from neon.runtime.published_files import usual_file, usual_places

if TYPE_CHECKING:
    from diffusers.models import AutoencoderKL

VAE_FLAG = "--vae_path (neon's commands: --vae)"
LATENT_CHANNELS = 4
DOWNSAMPLING = 8
"""side of an image over that of its latent, with the published levels"""

REPOSITORY = "stabilityai/sd-vae-ft-ema"
FOLDER = "sd-vae-ft-ema"
CONFIG_FILE = "config.json"
WEIGHTS_FILES = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
"""in order of preference"""


@dataclass(frozen=True, kw_only=True)
class LatentScale:
    """The statistics by which raw latents are standardised, one number per channel; by default ImageNet-256's."""

    raw_mean: Sequence[float] = (0.86488, -0.27787343, 0.21616915, 0.3738409)
    raw_std: Sequence[float] = (4.85503674, 5.31922414, 3.93725398, 3.9870003)
    final_std: float = 0.5
    """of the latents that the network sees; their mean is 0"""

    def scale_and_bias(self, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
        """What raw latents are multiplied by, and what is added then: float32 [C, 1, 1] each."""
        # Made on the CPU and sent, so that a GPU is not waited for: `torch.tensor` on a device would.
        mean, std = (torch.tensor(raw, device="cpu").reshape(-1, 1, 1) for raw in (self.raw_mean, self.raw_std))
        scale = self.final_std / std
        return scale.to(device, non_blocking=True), (-mean * scale).to(device, non_blocking=True)

    def latents(self, moments: Tensor, draw: Tensor) -> Tensor:
        """Latents of images with these moments [B, 2C, h, w], by a unit normal `draw` [B, C, h, w]."""
        scale, bias = self.scale_and_bias(moments.device)
        mean, std = moments.chunk(2, dim=1)
        return (mean + draw * std) * scale + bias

    def raw(self, latents: Tensor) -> Tensor:
        """Latents -> raw ones, float32."""
        scale, bias = self.scale_and_bias(latents.device)
        return (latents.to(torch.float32) - bias) / scale


IMAGENET = LatentScale()


class Codec(nn.Module):
    """Images uint8 [B, 3, H, W] <-> latents float32 [B, C, h, w], by an autoencoder of diffusers.

    The autoencoder computes in the dtype of its weights, everything around it in float32.
    """

    def __init__(self, vae: "AutoencoderKL", scale: LatentScale = IMAGENET) -> None:
        super().__init__()
        self.vae = vae
        self.scale = scale
        self.latent_channels = len(scale.raw_mean)
        self.downsampling = 2 ** (len(vae.config["block_out_channels"]) - 1)

    def moments(self, images: Tensor) -> Tensor:
        """Mean and standard deviation of the raw latents of uint8 `images`: float32 [B, 2C, h, w]."""
        posterior = self.vae.encode(from_uint8(images).to(self.vae.dtype)).latent_dist
        return torch.cat([posterior.mean, posterior.std], dim=1).to(torch.float32)

    def decode(self, latents: Tensor) -> Tensor:
        """Latents -> images, uint8 [B, 3, H, W]."""
        return as_bytes(self.decode_float(latents))

    def decode_float(self, latents: Tensor) -> Tensor:
        """Latents -> images, float32 [B, 3, H, W], mostly within [-1, 1]."""
        raw = self.scale.raw(latents).to(self.vae.dtype)
        part = decoded_at_once(raw.shape[-1] * self.downsampling, raw.device)
        images = [self.vae.decode(some).sample for some in raw.split(part)]
        return torch.cat(images).to(torch.float32)


def vae_folder(path: str | os.PathLike[str] | None) -> Path:
    """The folder of an autoencoder: `path`, or where the published one usually lies.

    Raises:
        RequestError: it is in none of those places, or `path` is no folder with a config.
    """
    if path is None:
        *folders, _ = (file.parent for file in usual_places(CONFIG_FILE))
        fetch = f"hf download {REPOSITORY} --local-dir {folders[0]}"
        path = usual_file(FOLDER, "the autoencoder", fetch, VAE_FLAG, [*folders, _cached_folder()])
    if not (Path(path) / CONFIG_FILE).is_file():
        found = "a folder without it" if Path(path).is_dir() else "a file" if Path(path).exists() else "nothing"
        raise RequestError(
            f"{path}: found {found}; expected the folder of an autoencoder, with {CONFIG_FILE} and "
            f"{WEIGHTS_FILES[0]}; name it with {VAE_FLAG}"
        )
    return Path(path)


def _cached_folder() -> Path:
    """Where Hugging Face's cache holds the published autoencoder, if it does; nothing is downloaded."""
    from huggingface_hub import constants, try_to_load_from_cache  # as much as the rest of the program

    config = try_to_load_from_cache(REPOSITORY, CONFIG_FILE)
    if isinstance(config, str):
        return Path(config).parent
    return Path(constants.HF_HUB_CACHE) / f"models--{REPOSITORY.replace('/', '--')}"


def weights_file(path: str | os.PathLike[str] | None) -> Path:
    """The file with the weights of the autoencoder in folder `path` (None: where it usually lies).

    Raises:
        RequestError: there is none.
    """
    folder = vae_folder(path)
    for name in WEIGHTS_FILES:
        if (folder / name).is_file():
            return folder / name
    raise RequestError(f"{folder}: no weights; expected {' or '.join(WEIGHTS_FILES)}; download the folder again")


def load_codec(
    path: str | os.PathLike[str] | None, device: torch.device | str, dtype: torch.dtype | None = None
) -> Codec:
    """The codec of the autoencoder in folder `path` (None: where the published one usually lies), frozen.

    It computes in `dtype`, by default float16 on a GPU, as published, and float32 on a CPU. Nothing in the folder is
    executed.

    Raises:
        RequestError: diffusers is not installed, or the folder does not hold a whole autoencoder with 4 channels.
    """
    file = weights_file(path)
    state = {renewed(name): tensor for name, tensor in load_state(file).items()}
    vae = _built(file.parent / CONFIG_FILE, {name: tuple(tensor.shape) for name, tensor in state.items()}, file)
    load_weights(vae, state, file)
    if dtype is None:
        dtype = torch.float16 if torch.device(device).type == "cuda" else torch.float32
    return Codec(vae).to(device, dtype).eval().requires_grad_(False)


def _built(config_file: Path, shapes: Mapping[str, tuple[int, ...]], weights: Path) -> "AutoencoderKL":
    """The autoencoder that `config_file` describes, its weights not yet set: `shapes` are those in file `weights`."""
    try:
        from diffusers.models import AutoencoderKL  # seconds: only those who decode latents pay for it
    except ImportError as error:
        raise RequestError(
            f"the autoencoder of IMM needs the package diffusers ({error}); install it with "
            "`pip install 'neon-extrapolation[imm]'`"
        ) from error
    with building(f"{config_file}: not the config of an autoencoder", "download it again"):
        config: dict[str, Any] = json.loads(config_file.read_text())
        kind, channels = config.get("_class_name", "AutoencoderKL"), config.get("latent_channels", 4)
        if kind != "AutoencoderKL" or channels != LATENT_CHANNELS:
            raise RequestError(
                f"{config_file}: {kind} with {channels} latent channels; expected AutoencoderKL with "
                f"{LATENT_CHANNELS}, as {REPOSITORY} has"
            )
        check_outline(lambda: AutoencoderKL.from_config(config), shapes, weights)
        with torch.device("meta"):
            vae = AutoencoderKL.from_config(config)
    return vae.to_empty(device="cpu")
