"""DiTTransformer2DModel over latents of an AutoencoderKL, guided by its null class: DiTPipeline."""

from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from neon.errors import RequestError
from neon.noise import Noise
from neon_diffusers.kinds.kind import Kind
from neon_diffusers.library import library
from neon_diffusers.pipeline import Pipeline
from neon_diffusers.sampler import Predict
from neon_diffusers.settings import GuidedSettings
from neon_diffusers.vae import CLASS, COMPONENT, Codec, downsampling, load_codec, vae_weights

LABEL_DROP = 0.1
"""share of training images that the null class takes the place of the class of, as diffusers and DiT have it"""


class Classes(Kind):
    """The class after the last one means none, as the embedding of diffusers has it."""

    pipelines = ("DiTPipeline",)
    component = "transformer"
    denoisers = dict.fromkeys(("DiTTransformer2DModel", "Transformer2DModel"), "DiTTransformer2DModel")
    frozen: ClassVar = {COMPONENT: (CLASS,)}

    def __init__(self, pipeline: Pipeline) -> None:
        super().__init__(pipeline)
        config, vae = self.denoiser.config, pipeline.components[COMPONENT].config
        channels, side = config.get("in_channels", 4), config.get("sample_size", 32)
        self.shape = (channels, side, side)
        self.num_classes = config.get("num_embeds_ada_norm", 1000)
        self.codec: Codec | None = None
        self.image_shape = (vae.get("out_channels", 3), *(side * downsampling(vae),) * 2)
        self.default_settings = GuidedSettings(scheduler=self.scheduler.class_name)

    def network(self) -> nn.Module:
        network = super().network()
        # Each block would leave out labels by itself, in a draw of its own that is nobody's; `predict_training` does.
        for module in network.modules():
            if isinstance(module, library("diffusers.models.embeddings").LabelEmbedding):
                module.dropout_prob = 0.0
        return network

    def predict(self, network: nn.Module, labels: Tensor | None, settings: Any) -> Predict:
        """none + guidance (class - none), of what is predicted; a learned variance is that of the class."""
        assert labels is not None
        channels, guidance = self.shape[0], settings.guidance
        if guidance == 1:
            return _of(network, labels)
        both = _of(network, torch.cat([labels, torch.full_like(labels, self.num_classes)]))

        def guided(x: Tensor, t: Tensor) -> Tensor:
            of_class, of_none = both(torch.cat([x, x]), torch.cat([t, t])).float().chunk(2)
            mean, none = of_class[:, :channels], of_none[:, :channels]
            return torch.cat([none + guidance * (mean - none), of_class[:, channels:]], dim=1)

        return guided

    def predict_training(self, network: nn.Module, labels: Tensor | None, noise: Noise) -> Predict:
        """Draws per image: whether its class is left out."""
        assert labels is not None
        dropped = noise.uniform() < LABEL_DROP
        return _of(network, torch.where(dropped, self.num_classes, labels.to(dropped.device)))

    def encode(self, images: Tensor) -> Tensor:
        """Mean and deviation of latents, [B, 2C, h, w]."""
        return self._codec().moments(images)

    def clean(self, examples: Tensor, noise: Noise) -> Tensor:
        """Draws per image: its latents, from the posterior."""
        return self._codec().latents(examples, noise.normal(*self.shape))

    def decode(self, x: Tensor) -> Tensor:
        return self._codec().decode(x)

    def frozen_file(self, named: Path | None) -> Path:
        place = named if named is not None else self.pipeline.folder()
        if place is None or not place.exists():
            raise RequestError(
                f"{place or self.pipeline.source}: not there, and with it the autoencoder; name the pipeline, or the "
                f"folder {COMPONENT} of one, with --vae"
            )
        return vae_weights(place)

    def load_frozen(self, path: Path, device: torch.device) -> None:
        codec = load_codec(path, device)
        if codec.latent_channels != self.shape[0]:
            raise RequestError(
                f"{path}: an autoencoder of {codec.latent_channels} channels, but the denoiser makes {self.shape[0]}; "
                "expected the one it was trained with"
            )
        self.codec = codec
        self.image_shape = (self.image_shape[0], *(self.shape[1] * codec.downsampling,) * 2)

    def _codec(self) -> Codec:
        if self.codec is None:
            raise RequestError("a network of latents needs its autoencoder; name it with --vae")
        return self.codec


def _of(network: nn.Module, labels: Tensor) -> Predict:
    return lambda x, t: network(x, timestep=t, class_labels=labels.to(x.device)).sample
