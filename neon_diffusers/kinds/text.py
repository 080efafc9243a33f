"""What kinds that are asked by prompts have in common: labels are the numbers of prompts, embedded once and kept."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from neon.checkpoint.weight_sets import PIPELINE_FILE
from neon.errors import RequestError
from neon.noise import Noise
from neon.precision import FP32
from neon_diffusers.encoders import TextEncoder
from neon_diffusers.kinds.kind import LABEL_DROP
from neon_diffusers.kinds.latents import Latents
from neon_diffusers.pipeline import Pipeline
from neon_diffusers.sampler import Predict
from neon_diffusers.vae import vae_weights

NONE = ""
"""the prompt that stands for none, in guidance and in training"""

Embedding = Mapping[str, Tensor]
"""what encoders say of prompts, by name: a row for each"""


class Text(Latents):
    """Guided by what it makes of the empty prompt."""

    tokenizers: ClassVar[Mapping[str, str]]
    """of each text encoder, by the names of the components"""
    optional: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    """text encoders that a pipeline may lack, with the classes that they may have"""
    num_classes = 0

    def __init__(self, pipeline: Pipeline) -> None:
        super().__init__(pipeline)
        for name, classes in self.optional.items():
            if name in pipeline.components:
                self._component(name, classes)
        self.prompts: tuple[str, ...] = ()
        self.encoders: dict[str, TextEncoder] = {}
        self._kept: dict[str, Embedding] = {}

    @abstractmethod
    def embed(self, prompt: str) -> Embedding:
        """What the encoders say of one prompt, [1, ...] each."""

    @abstractmethod
    def predict_of(self, network: nn.Module, embedded: Embedding) -> Predict:
        """What `network` says for images of prompts, as many as `embedded` has rows."""

    def predict(self, network: nn.Module, labels: Tensor | None, settings: Any) -> Predict:
        """none + guidance (prompt - none)."""
        device, prompts, guidance = _device_of(network), self._prompts_of(labels), settings.guidance
        if guidance == 1:
            return self.predict_of(network, self._embedded(prompts, device))
        both = self.predict_of(network, self._embedded([*[NONE] * len(prompts), *prompts], device))

        def guided(x: Tensor, t: Tensor) -> Tensor:
            none, of_prompt = both(torch.cat([x, x]), torch.cat([t, t])).float().chunk(2)
            return none + guidance * (of_prompt - none)

        return guided

    def predict_training(self, network: nn.Module, labels: Tensor | None, noise: Noise) -> Predict:
        """Draws per image: whether its prompt is left out."""
        dropped = (noise.uniform() < LABEL_DROP).tolist()
        prompts = [NONE if drop else one for drop, one in zip(dropped, self._prompts_of(labels), strict=True)]
        return self.predict_of(network, self._embedded(prompts, _device_of(network)))

    def frozen_file(self, named: Path | None) -> Path:
        """The pipeline, which holds autoencoder, text encoders and tokenizers."""
        place = self._place(named)
        if not (place / PIPELINE_FILE).is_file():
            raise RequestError(
                f"{place}: no {PIPELINE_FILE} there; name the pipeline, with its text encoders, by --vae"
            )
        return place

    def load_frozen(self, path: Path, device: torch.device) -> None:
        super().load_frozen(vae_weights(path), device)
        components = {name: self.pipeline.components.get(name) for name in self.tokenizers}
        self.encoders = {
            name: TextEncoder(
                component.class_name, component.config, path / name, path / self.tokenizers[name], self.length(name),
                device,
            )
            for name, component in components.items() if component is not None
        }  # fmt: skip
        self._kept = {}

    def length(self, encoder: str) -> int | None:
        """Tokens of a prompt, where the tokenizer of `encoder` does not decide."""
        return None

    def _prompts_of(self, labels: Tensor | None) -> list[str]:
        assert labels is not None
        return [self.prompts[label] for label in labels.tolist()]

    def _embedded(self, prompts: Sequence[str], device: torch.device) -> Embedding:
        """The embeddings of `prompts`, [B, ...] each; those of new ones are kept on the CPU.

        Each is computed alone and in float32, so that it is the same whatever it is used for.
        """
        if not self.encoders:
            raise RequestError("a network of prompts needs its text encoders; name its pipeline with --vae")
        for prompt in dict.fromkeys(prompts):
            if prompt not in self._kept:
                with torch.no_grad(), FP32.allowed_on(device):
                    self._kept[prompt] = {name: tensor.cpu() for name, tensor in self.embed(prompt).items()}
        rows = [self._kept[prompt] for prompt in prompts]
        return {name: torch.cat([row[name] for row in rows]).to(device) for name in rows[0]}


def _device_of(network: nn.Module) -> torch.device:
    return next(network.parameters()).device
