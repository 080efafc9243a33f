"""A pipeline of diffusers as a GenerativeModel: its denoiser is what is trained and merged."""

import functools
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from neon.checkpoint import Checkpoint
from neon.errors import DegenerateError, RequestError
from neon.model import GenerativeModel, of_both
from neon.noise import Noise
from neon.precision import FP32, TF32, Precision
from neon.recipe import Recipe
from neon.tunable import Choice, Range, Tunables
from neon_diffusers.kinds.served import kind_of
from neon_diffusers.loss import diffusion_loss
from neon_diffusers.pipeline import Pipeline, described
from neon_diffusers.sampler import Predict, integrate
from neon_diffusers.schedulers import SEARCHED, SPACINGS, UNABLE, WITH_ETA, made
from neon_diffusers.settings import DEFAULT, DiffusionSettings

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

    def __init__(self, config: dict[str, Any], *, precision: Precision = FP32, min_snr: float | None = None) -> None:
        """`min_snr`: gamma by which the loss weighs timesteps; None: all alike."""
        super().__init__()
        self.kind = kind_of(Pipeline.of(config))
        self.config = config if self.kind.frozen else {name: value for name, value in config.items() if name != "place"}
        self.precision, self.min_snr = precision, min_snr
        self.network = self.kind.network()
        self.num_classes, self.image_shape = self.kind.num_classes, self.kind.image_shape
        self.default_settings: DiffusionSettings = self.kind.default_settings
        self.tunable = _tunable(self.default_settings, self.kind.prediction)
        self.recipe = Recipe(batch_size=64, lr=1e-5)
        self.protocol = MappingProxyType(
            {
                "uint8_rule": "round(255 clip((x + 1) / 2, 0, 1))",
                "label_rule": "every class equally often, shuffled by the seed",
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

    def scheduler(self, settings: DiffusionSettings) -> Any:
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
        changed = {} if settings.spacing == DEFAULT else {"timestep_spacing": settings.spacing}
        try:
            scheduler = made(settings.scheduler, own.config, **changed)
            scheduler.set_timesteps(settings.num_steps, device=self._network_device)
        except RequestError:
            raise
        except Exception as error:  # a foreign configuration, of which diffusers checks little
            raise RequestError(
                f"{source}: {settings.scheduler} with {settings.num_steps} steps cannot be made of its scheduler's "
                f"configuration ({type(error).__name__}: {error}); set another one, or other num_steps"
            ) from error
        return scheduler

    def calls(self, settings: DiffusionSettings) -> int | None:
        """None: the scheduler takes no such number of steps."""
        guided = getattr(settings, "guidance", 1) != 1
        try:
            return self._evaluated * len(self.scheduler(settings).timesteps) * (2 if guided else 1)
        except RequestError:
            return None

    def converged(self, settings: DiffusionSettings) -> DiffusionSettings:
        return replace(settings, num_steps=max(settings.num_steps, min(CONVERGED, self._trained_steps)))

    @property
    def _trained_steps(self) -> int:
        """On how many timesteps the network was trained."""
        return int(self._trained_scheduler.config["num_train_timesteps"])

    @torch.no_grad()
    def sample(self, noise: Noise, labels: Tensor | None, settings: DiffusionSettings) -> Tensor:
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
        `diffusion_loss`.
        """
        clean = self.kind.clean(examples, noise)
        predict = self._cast(self.kind.predict_training(self.network, labels, noise))
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


def _tunable(own: DiffusionSettings, prediction: str) -> Tunables:
    """What may be searched: the scheduler and its timesteps, eta if the pipeline's own has one, and guidance."""
    able = [name for name in SEARCHED if name not in UNABLE.get(prediction, ())]
    return {
        "scheduler": Choice(tuple(dict.fromkeys((own.scheduler, *able)))),
        "spacing": Choice((DEFAULT, *SPACINGS)),
        **({"eta": Range(0.0, 1.0)} if own.scheduler in WITH_ETA else {}),
        **({"guidance": Range(1.0, 8.0)} if hasattr(own, "guidance") else {}),
    }
