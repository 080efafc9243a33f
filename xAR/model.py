"""xAR as a GenerativeModel: latents of a frozen autoencoder, drawn cell by cell."""

import os
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from itertools import count, takewhile
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from neon.checkpoint import Checkpoint, load_state
from neon.data.images import from_uint8
from neon.errors import RequestError
from neon.model import GenerativeModel, building, check_outline, load_weights
from neon.nn.autoencoder import as_bytes
from neon.noise import Noise
from neon.precision import FP16, FP32, Precision
from neon.runtime.compiling import compile_parts
from neon.runtime.published_files import usual_file
from neon.tunable import Choice, Range
from xAR.loss import flow_loss
from xAR.published import published_settings, recognise
from xAR.recipe import XARRecipe
from xAR.sampler import generate_latents
from xAR.settings import XARSettings
from xAR.transformer import XAR
from xAR.vae import AutoencoderKL, center_crop

VAE_FLAG = "--vae_path (neon's commands: --vae)"
VAE_FILE = "kl16.ckpt"
MOMENTS = "xAR moments"
"""what sets of encoded images hold: [2, 2c, G, G] an image, as it is and mirrored"""


class XARModel(GenerativeModel):
    """A transformer over cells of latents; `use_autoencoder` gives it the autoencoder, which is never trained.

    config: {"transformer": keywords of XAR, "pixel_patch": p}. With `pixel_patch` there is no autoencoder: the
    latents are squares of p x p pixels, for small images.
    """

    architecture = "xAR"
    network: XAR
    second: tuple[XAR, float] | None
    combines = True
    protocol = {  # noqa: RUF012 - a constant
        "uint8_rule": "truncate(255 clip((x + 1) / 2, 0, 1))",
        "label_rule": "every class equally often, shuffled by the seed",
    }

    sampling_precision = replace(FP16, reason="float16 autocast, as published")
    training_precision = replace(FP16, reason="float16 autocast, as published")

    def __init__(
        self,
        config: dict[str, Any],
        *,
        precision: Precision = FP32,
        mirrors: bool = True,
        dropout: tuple[float, float] | None = None,
    ) -> None:
        """`mirrors`: whether half of the training images are mirrored, as published.

        `dropout`: of attention and of what follows it, while training; None: as the config says.
        """
        super().__init__()
        self.config = config
        self.precision = precision
        self.network = XAR(**config["transformer"])
        if dropout is not None:
            self.network.set_dropout(*dropout)
        self.pixel_patch: int | None = config.get("pixel_patch")
        self.vae: AutoencoderKL | None = None
        self.num_classes = self.network.classes
        side = self.network.grid * (self.pixel_patch or 16)  # of the published autoencoder, until there is one
        self.image_shape = (3, side, side)
        self.default_settings = published_settings(config["transformer"]) or XARSettings()
        self.tunable = {"guidance": Range(1.0, 8.0), "stochastic": Choice((True, False))}
        self.lora_targets = ("attn.qkv", "attn.proj")
        self.recipe = XARRecipe()
        self.mirrors = mirrors

    @classmethod
    def config_of(cls, checkpoint: Checkpoint) -> dict[str, Any] | None:
        if not {"z_proj_ln.weight", "mask"} <= checkpoint.specs.keys():
            return None
        shapes = {name: spec.shape for name, spec in checkpoint.specs.items()}
        return {"transformer": recognise(shapes, checkpoint.tensor("mask"))}

    def autoencoder_file(self, named: Path | None) -> Path | None:
        return super().autoencoder_file(named) if self.pixel_patch else vae_file(named)

    def use_autoencoder(self, path: Path) -> None:
        """Load the autoencoder of checkpoint `path`, frozen, onto the device of the transformer; all names must fit."""
        vae = load_vae(path)
        if vae.embed_dim != self.network.latent_channels:
            raise RequestError(
                f"{path}: an autoencoder with {vae.embed_dim} channels, but the transformer makes "
                f"{self.network.latent_channels}; expected the autoencoder it was trained with"
            )
        self.set_vae(vae)

    def set_vae(self, vae: AutoencoderKL) -> None:
        """Use `vae`, frozen."""
        side = 2 ** (len(vae.encoder.down) - 1) * self.network.grid
        self.image_shape = (3, side, side)
        self.vae = vae.to(self._network_device).eval().requires_grad_(False)

    def _autoencoder(self) -> AutoencoderKL:
        if self.vae is None:
            raise RequestError(f"xAR needs its autoencoder; name it with {VAE_FLAG}")
        return self.vae

    def parts_of(self, network: XAR) -> Sequence[nn.Module]:
        """The blocks, compiled for each place of a cell, and for the first without guidance."""
        return tuple(network.blocks())

    def compile_parts(self) -> None:
        super().compile_parts()
        if self.vae is not None:
            compile_parts([self.vae.decoder])

    def calls(self, settings: XARSettings) -> int:
        """Of each cell, one for each step; that a cell is remembered for the next ones is not counted.

        The first cell is not guided.
        """
        cells = self.network.num_cells
        return self._evaluated * settings.num_steps * (2 * cells - 1 if settings.guidance > 1 else cells)

    def converged(self, settings: XARSettings) -> XARSettings:
        return replace(settings, num_steps=100)

    @torch.no_grad()
    def sample(self, noise: Noise, labels: Tensor | None, settings: XARSettings) -> Tensor:
        """Draws per image and cell: the noise that it starts from, then that of each step but the last."""
        with self._autocast():
            latents = generate_latents(self.network, self._on_device(labels), noise, settings, self.second)
            if self.pixel_patch:
                images = F.pixel_shuffle(latents, self.pixel_patch)
            else:
                images = self._autoencoder().decode(latents)
        return as_bytes(images)

    def prepare(self, images: Tensor, noise: Noise) -> Tensor:
        """Images of another size are resized and cropped in the middle, then some are mirrored.

        Draws per image: a coin, by which it is mirrored (if any are).
        """
        side = self.image_shape[-1]
        if images.shape[2:] != (side, side):
            images = torch.stack([center_crop(image, side) for image in images])
        if self.mirrors:
            images = torch.where(noise.integers(2, 1, 1, 1) == 1, images.flip(3), images)
        return images

    @torch.no_grad()
    def encode(self, images: Tensor, noise: Noise) -> Tensor:
        """uint8 [B, 3, H, W] -> moments [B, 2c, G, G] of the autoencoder (of patches of pixels: values [B, c, G, G]).

        Draws nothing.
        """
        inputs = from_uint8(images)
        if self.pixel_patch:
            return F.pixel_unshuffle(inputs, self.pixel_patch)
        return self._autoencoder().moments(inputs)

    def training_loss(self, examples: Tensor, labels: Tensor | None, noise: Noise) -> Tensor:
        """Per image, the error of the velocity: float32 [B].

        `examples` are what `encode` gives, or [B, 2, 2c, G, G] of a set of moments. Draws per image: for such a set
        the coin of `encode`; the noise of the autoencoder's posterior (if there is one); then those of `flow_loss`.
        """
        if examples.ndim == 5:
            plain, mirrored = examples.unbind(1)
            examples = torch.where(noise.integers(2, 1, 1, 1) == 1, mirrored, plain) if self.mirrors else plain
        latents = examples
        if not self.pixel_patch:
            vae = self._autoencoder()
            channels, side = self.network.latent_channels, self.network.grid
            latents = vae.posterior_sample(examples, noise.normal(channels, side, side))
        with self._autocast():
            return flow_loss(self.network, latents, self._on_device(labels), noise)

    def _on_device(self, labels: Tensor | None) -> Tensor:
        assert labels is not None, "xAR is class-conditional"
        return labels.to(self._network_device, non_blocking=True)

    def _autocast(self) -> AbstractContextManager[object]:
        return self.precision.autocast_on(self._network_device)


def vae_file(named: Path | None) -> Path:
    """Where the autoencoder lies: `named`, or its usual place; a RequestError if it is not there."""
    fetch = f"hf download xwen99/mar-vae-kl16 --include {VAE_FILE} --local-dir xAR/pretrained"
    return named or usual_file(VAE_FILE, "the autoencoder", fetch, VAE_FLAG)


def load_vae(path: str | os.PathLike[str]) -> AutoencoderKL:
    """The autoencoder of checkpoint `path`, frozen; every tensor must be there.

    Raises:
        RequestError: the file holds no autoencoder, or not all of one.
    """
    state = load_state(path)
    if "z_proj_ln.weight" in state:
        raise RequestError(f"{path}: a transformer, not an autoencoder; name the autoencoder with {VAE_FLAG}")
    if not {"encoder.conv_in.weight", "post_quant_conv.weight"} <= state.keys():
        raise RequestError(f"{path}: no autoencoder of xAR; expected kl16.ckpt")
    with building(f"{path}: its shapes are of no autoencoder of xAR", "expected kl16.ckpt"):
        keywords = vae_keywords(state)
        shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
        check_outline(lambda: AutoencoderKL(**keywords), shapes, path)
        vae = AutoencoderKL(**keywords)
    load_weights(vae, state, path)
    return vae.eval().requires_grad_(False)


def vae_keywords(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """The keywords of AutoencoderKL that the state dict of an autoencoder was built with."""
    base = state["encoder.conv_in.weight"].shape[0]
    levels = count()
    names = takewhile(state.__contains__, (f"encoder.down.{level}.block.0.conv2.weight" for level in levels))
    return {
        "embed_dim": state["post_quant_conv.weight"].shape[0],
        "ch_mult": [state[name].shape[0] // base for name in names],
        "ch": base,
    }
