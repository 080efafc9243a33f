"""IMM as a GenerativeModel: a few steps over latents of a frozen autoencoder, or over pixels."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from imm.loss import IMMLoss
from imm.precond import IMMPrecond
from imm.published import canonical, published_row, recognise
from imm.recipe import IMMRecipe
from imm.sampler import IMMSettings, generate
from imm.vae import DOWNSAMPLING, IMAGENET, LATENT_CHANNELS, Codec, load_codec, weights_file
from neon.checkpoint import Checkpoint
from neon.data.augment import AugmentPipe
from neon.data.images import from_uint8, to_uint8
from neon.errors import RequestError
from neon.model import GenerativeModel
from neon.noise import Noise
from neon.sampling import one_hot

ASSUMED = {"temb_type": "stride"}
"""of a network whose checkpoint does not tell it: that of ts_a2, from which Neon's published network was made"""


class IMM(GenerativeModel):
    """A preconditioned DiT or U-Net with its samplers and loss; `use_autoencoder` is for those of latents.

    config: {"network": keywords of IMMPrecond, "loss": keywords of IMMLoss (absent: those of the published network
    that it is, else IMMLoss's own)}. A config without temb_type is that of a bare state dict, which does not tell
    it; it is taken as that of the network that Neon published, ts_a2 (see `assumes_time_embedding`).
    """

    architecture = "imm"
    network: IMMPrecond

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.config = config
        keywords = {**ASSUMED, **config["network"]}
        self.network = IMMPrecond(**keywords)
        self.num_classes = self.network.label_dim
        row = published_row(keywords)
        self.default_settings = row.settings if row else IMMSettings(guidance=1.5 if self.num_classes else 1.0)
        self.recipe = IMMRecipe()
        self.use_loss(IMMLoss(**config["loss"]) if "loss" in config else row.loss if row else IMMLoss())
        self.codec: Codec | None = None
        self.augment: AugmentPipe | None = None
        """changes training images and tells the network how; it needs as many augmentation labels"""
        side = self.network.img_resolution
        self.in_latents = self.network.img_channels == LATENT_CHANNELS  # pixels have 1 or 3
        self.image_shape = (self.network.img_channels, side, side)
        if self.in_latents:  # with the published autoencoder, until there is one
            self.image_shape = (3, side * DOWNSAMPLING, side * DOWNSAMPLING)
        self.protocol = {
            "uint8_rule": "truncate(255 clip((x + 1) / 2, 0, 1))" if self.in_latents else "truncate(127.5 x + 128)",
            "label_rule": "every class equally often, shuffled by the seed",
        }

    @property
    def assumes_time_embedding(self) -> bool:
        """Whether the checkpoint did not tell `temb_type`."""
        return "temb_type" not in self.config["network"]

    @classmethod
    def config_of(cls, checkpoint: Checkpoint) -> dict[str, Any] | None:
        constructor = checkpoint.constructor
        if constructor is not None:
            if constructor.class_name != IMMPrecond.__name__:
                return None
            network = canonical(constructor.keywords)
            network.pop("mixed_precision", None)  # of its training: the precision of a run is the user's choice
            return {"network": network}
        keywords = recognise(checkpoint.specs)
        return None if keywords is None else {"network": keywords}

    def autoencoder_file(self, named: Path | None) -> Path | None:
        """The weights of the autoencoder in the folder `named`, or in its usual place."""
        return weights_file(named) if self.in_latents else super().autoencoder_file(named)

    def use_autoencoder(self, path: Path) -> None:
        """Load the autoencoder of which `path` holds the weights, frozen, onto the network's device."""
        self.set_codec(load_codec(path.parent, self._device), path)

    def set_codec(self, codec: Codec, source: str | os.PathLike[str] | None = None) -> None:
        """Use `codec`, frozen; `source` is named in errors."""
        if codec.latent_channels != self.network.img_channels:
            raise RequestError(
                f"{source or 'the autoencoder'}: it has {codec.latent_channels} channels, but the network makes "
                f"{self.network.img_channels}; expected the autoencoder it was trained with"
            )
        self.codec = codec
        side = self.network.img_resolution * codec.downsampling
        self.image_shape = (3, side, side)

    def use_loss(self, loss: IMMLoss) -> None:
        """Train with `loss`; batches are then made of groups of its `matrix_size` images."""
        self.loss = loss
        self.batch_multiple = loss.matrix_size

    def compile_parts(self) -> None:
        """Compile the blocks of a DiT, or the whole of a U-Net, and the decoder."""
        blocks = getattr(self.network.model, "blocks", None)
        for part in blocks if blocks is not None else (self.network.model,):
            part.compile()
        if self.codec is not None:
            self.codec.compile_decoder()

    def labels(self, indices: Sequence[int], noise: Noise) -> Tensor | None:
        """Class i mod num_classes for image i: every class equally often; draws nothing."""
        if self.num_classes == 0:
            return None
        return torch.tensor([index % self.num_classes for index in indices])

    @torch.no_grad()
    def sample(self, noise: Noise, labels: Tensor | None, settings: IMMSettings) -> Tensor:
        """Draws per image: the latents, then (restart) fresh noise of each step but the last; all float32."""
        shape = (self.network.img_channels, self.network.img_resolution, self.network.img_resolution)
        images = generate(
            self.network,
            noise.normal(*shape) * self.network.sigma_data,
            one_hot(labels, self.num_classes, self._device),
            settings,
            draw_noise=lambda: noise.normal(*shape),
        )
        return self._codec().decode(images) if self.in_latents else to_uint8(images)

    @torch.no_grad()
    def encode(self, images: Tensor, noise: Noise) -> Tensor:
        """uint8 [B, C, H, W] -> float32: pixels in [-1, 1], or [B, 8, h, w] means and deviations of latents.

        Draws nothing.
        """
        if self.in_latents:
            return self._codec().moments(images)
        return from_uint8(images)

    def training_loss(self, examples: Tensor, labels: Tensor | None, noise: Noise) -> Tensor:
        """Per group of `batch_multiple` images, the distance between two of its distributions: float64 [G].

        Draws per image: of latents the autoencoder's posterior; those of augmentation (if any); those of IMMLoss.
        """
        augment_labels = None
        if self.in_latents:
            draw = noise.normal(examples.shape[1] // 2, *examples.shape[2:])
            examples = IMAGENET.latents(examples, draw)
        elif self.augment is not None:
            examples, augment_labels = self.augment(examples, noise)
        classes = one_hot(labels, self.num_classes, self._device)
        return self.loss(self.network, examples, classes, noise, augment_labels)

    def _codec(self) -> Codec:
        if self.codec is None:
            raise RequestError("a network of latents needs its autoencoder; name it with --vae_path")
        return self.codec

    @property
    def _device(self) -> torch.device:
        return next(self.network.parameters()).device
