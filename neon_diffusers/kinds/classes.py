"""DiTTransformer2DModel over latents of an AutoencoderKL, guided by its null class: DiTPipeline."""

from typing import Any

import torch
from torch import Tensor, nn

from neon.noise import Noise
from neon_diffusers.kinds.kind import LABEL_DROP
from neon_diffusers.kinds.latents import Latents
from neon_diffusers.library import library
from neon_diffusers.pipeline import Pipeline
from neon_diffusers.sampler import Predict
from neon_diffusers.settings import GuidedSettings


class Classes(Latents):
    """The class after the last one means none, as the embedding of diffusers has it."""

    pipelines = ("DiTPipeline",)
    component = "transformer"
    denoisers = dict.fromkeys(("DiTTransformer2DModel", "Transformer2DModel"), "DiTTransformer2DModel")
    usual_size = 32

    def __init__(self, pipeline: Pipeline) -> None:
        super().__init__(pipeline)
        self.num_classes = self.denoiser.config.get("num_embeds_ada_norm", 1000)
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


def _of(network: nn.Module, labels: Tensor) -> Predict:
    return lambda x, t: network(x, timestep=t, class_labels=labels.to(x.device)).sample
