"""IMM as a GenerativeModel: a few steps over latents of a frozen autoencoder, or over pixels."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from imm.loss import IMMLoss
from imm.precond import IMMPrecond
from imm.published import canonical, published_row, recognise
from imm.recipe import IMMRecipe
from imm.sampler import generate
from imm.settings import IMMSettings
from imm.vae import DOWNSAMPLING, IMAGENET, LATENT_CHANNELS, VAE_FLAG, Codec, load_codec, weights_file
from neon.checkpoint import Checkpoint
from neon.data.augment import augment_dim, augmentation_for
from neon.data.images import from_uint8, to_uint8
from neon.errors import RequestError
from neon.model import GenerativeModel
from neon.noise import Noise
from neon.precision import FP32, TF32, Precision
from neon.runtime.compiling import compile_parts
from neon.sampling import one_hot
from neon.tunable import Choice, Range

ASSUMED = {"temb_type": "stride"}
"""of a network whose checkpoint does not tell it: that of ts_a2, from which Neon's published network was made"""
HALF = {"bf16": "bf16", "fp16": "fp16"}
"""the precisions that a network enters autocast for, by the names that it knows them by"""
AUGMENTATION = 0.12
"""of networks that read augmentation labels: the probability they were trained with"""


class IMM(GenerativeModel):
    """A preconditioned DiT or U-Net with its samplers and loss; `use_autoencoder` is for those of latents.

    config: {"network": keywords of IMMPrecond, "loss": keywords of IMMLoss (absent: those of the published network
    that it is, else IMMLoss's own)}. A config without temb_type is that of a bare state dict, which does not tell
    it; it is taken as that of the network that Neon published, ts_a2.
    """

    architecture = "imm"
    network: IMMPrecond
    second: tuple[IMMPrecond, float] | None
    combines = True

    sampling_precision = replace(TF32, reason="TF32, as published")
    # As published: float16 autocast, but no TF32 and no sums in half precision beside it.
    training_precision = Precision(
        name="fp16", autocast=torch.float16, reduced_sums=False, reason="float16 autocast, as published"
    )

    def __init__(
        self,
        config: dict[str, Any],
        *,
        precision: Precision = FP32,
        temb_type: str | None = None,
        augment: float | None = 0.0,
        loss: Mapping[str, Any] | None = None,
    ) -> None:
        """`temb_type`: in place of what the checkpoint says, or does not; the config then holds it.

        `augment`: probability of augmentations of training images in pixels; None: as networks that are told of them
        were trained. `loss`: keywords in place of those of the loss.
        """
        super().__init__()
        self.stored_temb_type: str | None = config["network"].get("temb_type")
        """the `temb_type` of the checkpoint; None: it does not tell it"""
        if temb_type is not None:
            config = {**config, "network": {**config["network"], "temb_type": temb_type}}
        self.config = config
        self.precision = precision
        keywords = {**ASSUMED, **config["network"]}
        self.network = IMMPrecond(**{**keywords, "mixed_precision": HALF.get(precision.name)})
        self.num_classes = self.network.label_dim
        row = published_row(keywords)
        self.default_settings = row.settings if row else IMMSettings(guidance=1.5 if self.num_classes else 1.0)
        self.tunable = {
            "discretization": Choice(("uniform", "edm")),
            "restart": Choice((False, True)),
            **({"guidance": Range(1.0, 4.0)} if self.num_classes else {}),
        }
        if hasattr(self.network.model, "blocks"):  # of a U-Net all layers
            self.lora_targets = ("attn.qkv", "attn.proj")
        self.recipe = IMMRecipe()
        usual = IMMLoss(**config["loss"]) if "loss" in config else row.loss if row else IMMLoss()
        self.loss = replace(usual, **(loss or {}))
        self.batch_multiple = self.loss.matrix_size
        self.codec: Codec | None = None
        side = self.network.img_resolution
        self.in_latents = self.network.img_channels == LATENT_CHANNELS  # pixels have 1 or 3
        if augment is None:
            augment = AUGMENTATION if augment_dim(self.network.model) and not self.in_latents else 0.0
        self.augment = augmentation_for(self.network.model, augment)
        self.image_shape = (self.network.img_channels, side, side)
        if self.in_latents:  # with the published autoencoder, until there is one
            self.image_shape = (3, side * DOWNSAMPLING, side * DOWNSAMPLING)
        self.protocol = {
            "uint8_rule": "truncate(255 clip((x + 1) / 2, 0, 1))" if self.in_latents else "truncate(127.5 x + 128)",
            "label_rule": "every class equally often, shuffled by the seed",
        }

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
        self.set_codec(load_codec(path.parent, self._network_device), path)

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

    def parts_of(self, network: IMMPrecond) -> Sequence[nn.Module]:
        """The blocks of a DiT, or the whole of a U-Net."""
        return tuple(getattr(network.model, "blocks", (network.model,)))

    def compile_parts(self) -> None:
        super().compile_parts()
        if self.codec is not None:
            compile_parts([self.codec.vae.decoder])

    def calls(self, settings: IMMSettings) -> int:
        return self._evaluated * settings.num_steps * (1 if settings.guidance == 1 else 2)

    def converged(self, settings: IMMSettings) -> IMMSettings:
        """Twice the most steps that were published; ratios of `mid_nt` are of as many steps as they are."""
        return replace(settings, num_steps=16, mid_nt=())

    @torch.no_grad()
    def sample(self, noise: Noise, labels: Tensor | None, settings: IMMSettings) -> Tensor:
        """Draws per image: the latents, then (restart) fresh noise of each step but the last; all float32."""
        shape = (self.network.img_channels, self.network.img_resolution, self.network.img_resolution)
        images = generate(
            self.network,
            noise.normal(*shape) * self.network.sigma_data,
            one_hot(labels, self.num_classes, self._network_device),
            settings,
            draw_noise=lambda: noise.normal(*shape),
            second=self.second,
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
        classes = one_hot(labels, self.num_classes, self._network_device)
        return self.loss(self.network, examples, classes, noise, augment_labels)

    def _codec(self) -> Codec:
        if self.codec is None:
            raise RequestError(f"a network of latents needs its autoencoder; name it with {VAE_FLAG}")
        return self.codec
