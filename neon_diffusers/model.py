"""A pipeline of diffusers as a GenerativeModel: its denoiser is what is trained and merged."""

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from neon.checkpoint import Checkpoint
from neon.errors import DegenerateError, RequestError
from neon.model import GenerativeModel, of_both
from neon.noise import Noise
from neon.precision import FP32, TF32, Precision
from neon.recipe import Recipe
from neon.tunable import Choice, Range, Tunables
from neon_diffusers.kinds.served import kind_of
from neon_diffusers.kinds.text import Text
from neon_diffusers.loss import diffusion_loss, flow_loss
from neon_diffusers.pipeline import Pipeline, described
from neon_diffusers.sampler import Predict, integrate
from neon_diffusers.schedulers import FLOW_PREDICTION, SEARCHED, SPACINGS, UNABLE, WITH_ETA, made
from neon_diffusers.settings import DEFAULT, DiffusionSettings, FlowSettings

Settings = DiffusionSettings | FlowSettings
CONVERGED = 100
"""steps beyond which a deterministic scheduler changes little"""


class DiffusersModel(GenerativeModel):
    """The denoiser of a pipeline with its scheduler and, if it works on latents, its frozen parts.

    config: what `neon_diffusers.pipeline.described` tells of the pipeline. Of one over pixels it does not say the
    place, which nothing is read from any more.
    """

    architecture = "diffusers"
    combines = True
    sampling_precision = TF32
    training_precision = TF32

    def __init__(
        self, config: dict[str, Any], *, precision: Precision = FP32, loss: Mapping[str, float] | None = None
    ) -> None:
        """`loss`: {"min_snr": gamma} by which it weighs timesteps; by default all weigh the same."""
        super().__init__()
        self.kind = kind_of(Pipeline.of(config))
        self.config = config if self.kind.frozen else {name: value for name, value in config.items() if name != "place"}
        self.precision, self.min_snr = precision, _min_snr(loss or {})
        self.network = self.kind.network()
        self.component = self.kind.in_adapters
        names = [f".{name}" for name, _ in self.network.named_modules()]
        self.lora_targets = tuple(  # a small network may lack some
            target for target in self.kind.lora_targets if any(name.endswith(f".{target}") for name in names)
        )
        self.example_kind = self.kind.example_kind
        self.num_classes, self.image_shape = self.kind.num_classes, self.kind.image_shape
        self.default_settings: Settings = self.kind.default_settings
        self.tunable = _tunable(self.default_settings, self.kind.prediction)
        if self.min_snr is not None and self.kind.prediction == FLOW_PREDICTION:
            raise RequestError(f"{self.kind.pipeline.source}: min-SNR weights are not of a flow; leave them out")
        if isinstance(self.kind, Text):
            self.prompts = ()
        self.recipe = Recipe(batch_size=64, lr=1e-5)
        asked = "class" if self.prompts is None else "prompt"
        self.protocol = MappingProxyType(
            {
                "uint8_rule": "round(255 clip((x + 1) / 2, 0, 1))",
                "label_rule": f"every {asked} equally often, shuffled by the seed",
            }
        )

    @classmethod
    def config_of(cls, checkpoint: Checkpoint) -> dict[str, Any] | None:
        return described(checkpoint.files[0])

    def autoencoder_file(self, named: Path | None) -> Path | None:
        """What is frozen, at `named` or in the pipeline's folder."""
        return self.kind.frozen_file(named) if self.kind.frozen else super().autoencoder_file(named)

    def use_autoencoder(self, path: Path) -> None:
        """Load what `autoencoder_file` found, frozen, onto the network's device."""
        self.kind.load_frozen(path, self._network_device)
        self.image_shape = self.kind.image_shape

    def use_prompts(self, prompts: Sequence[str]) -> None:
        super().use_prompts(prompts)
        assert isinstance(self.kind, Text) and self.prompts is not None
        self.kind.prompts = self.prompts

    def scheduler(self, settings: Settings) -> Any:
        """The scheduler of `settings` with its timesteps set, on the device of the network.

        Raises:
            RequestError: it takes fewer steps, or its configuration makes no sense.
        """
        own, source = self.kind.scheduler, self.kind.pipeline.source
        if settings.scheduler in UNABLE.get(self.kind.prediction, ()):
            raise RequestError(
                f"{source}: its network predicts the {self.kind.prediction}, which {settings.scheduler} does not know; "
                "set another scheduler"
            )
        if settings.num_steps > self._trained_steps:
            raise RequestError(
                f"num_steps is {settings.num_steps}; expected at most {self._trained_steps}, as many timesteps as the "
                "network was trained on"
            )
        try:
            scheduler = made(settings.scheduler, own.config, **settings.changed)
            scheduler.set_timesteps(settings.num_steps, device=self._network_device)
        except RequestError:
            raise
        except Exception as error:  # a foreign configuration, of which diffusers checks little
            raise RequestError(
                f"{source}: {settings.scheduler} with {settings.num_steps} steps cannot be made of its scheduler's "
                f"configuration ({type(error).__name__}: {error}); set another one, or other num_steps"
            ) from error
        return scheduler

    def parts_of(self, network: Any) -> Sequence[nn.Module]:
        """The blocks of a transformer, or the whole of a U-Net."""
        return tuple(getattr(network, "transformer_blocks", (network,)))

    def calls(self, settings: Settings) -> int | None:
        """None: the scheduler takes no such number of steps."""
        guided = getattr(settings, "guidance", 1) != 1
        try:
            return self._evaluated * len(self.scheduler(settings).timesteps) * (2 if guided else 1)
        except RequestError:
            return None

    def converged(self, settings: Settings) -> Settings:
        return replace(settings, num_steps=max(settings.num_steps, min(CONVERGED, self._trained_steps)))

    @property
    def _trained_steps(self) -> int:
        """On how many timesteps the network was trained."""
        return int(self._trained_scheduler.config["num_train_timesteps"])

    @torch.no_grad()
    def sample(self, noise: Noise, labels: Tensor | None, settings: Settings) -> Tensor:
        """Draws per image: what it starts from, then whatever the scheduler draws, from the same generator."""
        predict = of_both(lambda network: self.kind.predict(network, labels, settings), self.network, self.second)
        start, scheduler = noise.normal(*self.kind.shape), self.scheduler(settings)
        images = self.kind.decode(integrate(self._cast(predict), start, scheduler, noise.generators, settings.eta))
        if not images.isfinite().all():
            raise DegenerateError(
                f"images of the sampler are not finite, computed in {self.precision.name}; if the base's are, too, "
                "compute in another precision (--precision fp32)"
            )
        return ((images + 1) / 2).clamp(0, 1).mul(255).round().to(torch.uint8)

    @torch.no_grad()
    def encode(self, images: Tensor, noise: Noise) -> Tensor:
        """uint8 [B, C, H, W] -> float32: pixels in [-1, 1], or means and deviations of latents. Draws nothing."""
        return self.kind.encode(images)

    def training_loss(self, examples: Tensor, labels: Tensor | None, noise: Noise) -> Tensor:
        """Per image, the error of the scheduler's prediction: float32 [B].

        Draws per image: those of the kind (latents of the posterior, whether the class is left out), then those of
        `diffusion_loss` or `flow_loss`.
        """
        clean = self.kind.clean(examples, noise)
        predict = self._cast(self.kind.predict_training(self.network, labels, noise))
        if self.kind.prediction == FLOW_PREDICTION:
            return flow_loss(predict, clean, self._trained_scheduler, noise)
        return diffusion_loss(predict, clean, self._trained_scheduler, noise, self.min_snr)

    @functools.cached_property
    def _trained_scheduler(self) -> Any:
        """The pipeline's own scheduler, whose noise the network was trained on."""
        return made(self.kind.scheduler.class_name, self.kind.scheduler.config)

    def _cast(self, predict: Predict) -> Predict:
        """`predict` under autocast, if any; what schedulers add up stays in float32."""

        def call(x: Tensor, t: Tensor) -> Tensor:
            with self.precision.autocast_on(x.device):
                return predict(x, t)

        return call


def _min_snr(loss: Mapping[str, float]) -> float | None:
    """The one setting of the loss; a RequestError for others, or a number that is not positive."""
    for name, value in loss.items():
        if name != "min_snr" or not 0 < value < math.inf:
            raise RequestError(f"--loss {name}={value:g}: expected min_snr and a positive number, such as min_snr=5")
    return loss.get("min_snr")


def _tunable(own: Settings, prediction: str) -> Tunables:
    """What may be searched: the scheduler and its timesteps, eta if the pipeline's own has one, and guidance.

    Of a flow: the shift of its times, and guidance.
    """
    if isinstance(own, FlowSettings):
        return {"shift": Range(1.0, 12.0, "log"), "guidance": Range(1.0, 8.0)}
    able = [name for name in SEARCHED if name not in UNABLE.get(prediction, ())]
    return {
        "scheduler": Choice(tuple(dict.fromkeys((own.scheduler, *able)))),
        "spacing": Choice((DEFAULT, *SPACINGS)),
        **({"eta": Range(0.0, 1.0)} if own.scheduler in WITH_ETA else {}),
        **({"guidance": Range(1.0, 8.0)} if hasattr(own, "guidance") else {}),
    }
