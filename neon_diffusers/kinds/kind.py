"""What a kind of pipelines says of itself, for the sampler and the loss that all kinds have in common.

To serve another one write a subclass in a module of its own and name it in `neon_diffusers.kinds.served`:

| member | what it is |
|---|---|
| `pipelines` | the classes of pipelines that are of this kind, as `model_index.json` names them |
| `component`, `denoisers` | the denoiser's folder; the classes it may have, each with the one that is built |
| `frozen` | further components that are read, and the classes they may have |
| `schedulers` | the classes that its scheduler may have, by what the denoiser is trained for |
| `lora_targets` | the layers that a LoRA adapts unless told otherwise: those of attention |
| `in_adapters` | what adapters of diffusers call the denoiser ("": diffusers loads none into this class, PEFT does) |
| `example_kind` | what sets of encoded images are called, if encoding is worth keeping ("": it is not) |
| `__init__(pipeline)` | reads the checked description: sets `shape`, `image_shape`, `num_classes`, `default_settings` |
| `network()` | builds the denoiser, from its configuration alone |
| `predict(network, labels, settings)` | what samples: a function of x and timesteps (guidance belongs here) |
| `predict_training(network, labels, noise)` | what is trained: likewise, with labels left out at random |
| `encode(images)`, `clean(examples, noise)` | images to examples, which are kept; examples to what is noised |
| `decode(x)` | what the sampler ends at to images in [-1, 1] |
| `frozen_file(named)`, `load_frozen(path, device)` | finds and loads the frozen parts; not for kinds of pixels |
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from neon.errors import RequestError
from neon.noise import Noise
from neon_diffusers.library import library
from neon_diffusers.pipeline import SCHEDULER, Component, Pipeline
from neon_diffusers.sampler import Predict
from neon_diffusers.schedulers import DIFFUSION, check_scheduler

LABEL_DROP = 0.1
"""share of training images whose class or prompt is left out, of networks that are guided by what they make without"""


class Kind(ABC):
    """Pipelines of one kind; an object is one of them, without its denoiser's weights."""

    pipelines: ClassVar[tuple[str, ...]]
    component: ClassVar[str]
    denoisers: ClassVar[Mapping[str, str]]
    frozen: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    schedulers: ClassVar[tuple[str, ...]] = DIFFUSION
    lora_targets: ClassVar[tuple[str, ...]] = ("to_q", "to_k", "to_v", "to_out.0")
    in_adapters: ClassVar[str] = ""
    example_kind: ClassVar[str] = ""

    shape: tuple[int, int, int]
    """of what is noised: [C, h, w]"""
    image_shape: tuple[int, int, int]
    num_classes: int
    """0: none"""
    default_settings: Any

    def __init__(self, pipeline: Pipeline) -> None:
        """Check the classes of the components that this kind reads.

        Raises:
            RequestError: one is missing, or of a class that is not served.
        """
        self.pipeline = pipeline
        self.denoiser = self._component(self.component, tuple(self.denoisers))
        self.scheduler = self._component(SCHEDULER)
        self.prediction = check_scheduler(
            self.scheduler.class_name, self.scheduler.config, pipeline.source, self.schedulers
        )
        """what the scheduler asks of the denoiser"""
        for name, classes in self.frozen.items():
            self._component(name, classes)

    def _component(self, name: str, classes: tuple[str, ...] = ()) -> Component:
        """A component that there must be, of one of these classes if there are any."""
        found = self.pipeline.components.get(name)
        if found is None:
            raise RequestError(f"{self.pipeline.source}: its {name} has no configuration; download the pipeline again")
        if classes and found.class_name not in classes:
            raise RequestError(
                f"{self.pipeline.source}: its {name} is a {found.class_name}; of a {self.pipeline.class_name} "
                f"{' or '.join(classes)} is served"
            )
        return found

    def network(self) -> nn.Module:
        """The denoiser with random weights; whatever diffusers raises where the configuration makes no sense."""
        kind = getattr(library("diffusers.models"), self.denoisers[self.denoiser.class_name])
        network: nn.Module = kind.from_config(self.denoiser.config)
        return network

    @abstractmethod
    def predict(self, network: nn.Module, labels: Tensor | None, settings: Any) -> Predict:
        """What the sampler asks of `network` for images of `labels` int64 [B], with guidance as `settings` say."""

    @abstractmethod
    def predict_training(self, network: nn.Module, labels: Tensor | None, noise: Noise) -> Predict:
        """What is trained; draws per image, if any, after those of `clean`."""

    @abstractmethod
    def encode(self, images: Tensor) -> Tensor:
        """uint8 [B, C, H, W] -> float32 examples, of which a set may be kept; draws nothing."""

    @abstractmethod
    def clean(self, examples: Tensor, noise: Noise) -> Tensor:
        """Examples -> what is noised, float32 [B, *shape]."""

    @abstractmethod
    def decode(self, x: Tensor) -> Tensor:
        """What the sampler ends at -> images float32 [B, *image_shape] in [-1, 1], or somewhat beyond."""

    def frozen_file(self, named: Path | None) -> Path:
        """The file or folder of what is frozen, at `named` or where the pipeline lies; its hash tells it from others.

        Raises:
            RequestError: it is not there.
        """
        raise NotImplementedError(f"{type(self).__name__} has no frozen part")

    def load_frozen(self, path: Path, device: torch.device) -> None:
        """Load what `frozen_file` found.

        Raises:
            RequestError: it does not fit the denoiser.
        """
        raise NotImplementedError(f"{type(self).__name__} has no frozen part")


def height_and_width(side: Any) -> tuple[Any, Any]:
    """The `sample_size` of a denoiser's configuration as two: one number is both."""
    return tuple(side) if isinstance(side, list) and len(side) == 2 else (side, side)
