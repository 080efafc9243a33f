"""EDM as a GenerativeModel: pixels in [-1, 1], class-conditional or not."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from edm.loss import Augment, loss_of
from edm.precond import PRECONDS, Precond
from edm.sampler import Denoiser, integrate
from edm.settings import EDMSettings, SamplerSettings
from neon.checkpoint import Checkpoint
from neon.data.augment import augmentation_for
from neon.data.images import from_uint8, to_uint8
from neon.errors import RequestError
from neon.model import GenerativeModel, extrapolated, of_both
from neon.nn.unet import UNetBlock
from neon.noise import Noise
from neon.precision import FP32, Precision
from neon.recipe import Recipe
from neon.sampling import one_hot
from neon.tunable import Choice, Range

BUDGET, FACES_BUDGET = 6_000_000, 3_000_000
"""images of Neon's self-trainings: of the networks of CIFAR-10, and of that of FFHQ"""


class EDM(GenerativeModel):
    """A preconditioned U-Net with EDM's sampler and loss.

    config: {"precond": class name (EDMPrecond if absent), "network": its keywords, "label_dropout": share of
    training images shown without their class (0 if absent)}. Guidance needs a network trained with label dropout.
    """

    architecture = "edm"
    network: Precond
    second: tuple[Precond, float] | None
    combines = True
    protocol = {  # noqa: RUF012 - a constant
        "uint8_rule": "truncate(clip(127.5 x + 128, 0, 255))",
        "label_rule": "a uniform class per image from its own generator, after its latents",
    }

    # As published: torch's default, which rounds convolutions on GPUs; training in full float32.
    sampling_precision = Precision(name="tf32", tf32_convolutions=True, reason="TF32 convolutions, as published")
    training_precision = Precision(reduced_sums=False, reason="float32, as published")

    def __init__(
        self,
        config: dict[str, Any],
        *,
        precision: Precision = FP32,
        augment: float = 0.0,
        dropout: float | None = None,
    ) -> None:
        """`augment`: probability of augmentations of training images, which the network may be told of.

        `dropout`: in place of that the network was trained with.
        """
        super().__init__()
        self.config = config
        self.precision = precision
        self.network = PRECONDS[config.get("precond", "EDMPrecond")](**config["network"])
        self.label_dropout = float(config.get("label_dropout", 0))
        self.image_shape = (self.network.img_channels, self.network.img_resolution, self.network.img_resolution)
        self.num_classes = self.network.label_dim
        self.default_settings = EDMSettings()
        self.tunable = {
            "solver": Choice(("euler", "heun")),
            "sigma_max": Range(2.0, 160.0, "log"),
            "sigma_min": Range(0.002, 0.5, "log"),
            "rho": Range(1.0, 20.0, "log"),
            **({"guidance": Range(0.0, 3.0)} if self.num_classes and self.label_dropout else {}),
        }
        of_faces = self.network.img_resolution == 64 and self.num_classes == 0
        self.recipe = Recipe(
            lr_rampup_kimg=10_000, ema_halflife_kimg=500, budget_images=FACES_BUDGET if of_faces else BUDGET
        )
        self.loss = loss_of(self.network)
        self.augment: Augment | None = augmentation_for(self.network.model, augment)
        if dropout is not None:
            for module in self.network.modules():
                if isinstance(module, UNetBlock):
                    module.dropout = dropout

    @classmethod
    def config_of(cls, checkpoint: Checkpoint) -> dict[str, Any] | None:
        constructor = checkpoint.constructor
        if constructor is None or constructor.class_name not in PRECONDS:
            return None
        return {"precond": constructor.class_name, "network": constructor.keywords}

    def calls(self, settings: SamplerSettings) -> int:
        each = settings.num_steps if settings.solver == "euler" else 2 * settings.num_steps - 1
        return self._evaluated * (each if settings.guidance in (0, -1) else 2 * each)

    def converged(self, settings: SamplerSettings) -> EDMSettings:
        """The published sampler: Heun's, with 18 steps below 64 pixels and 40 from there on."""
        return EDMSettings(num_steps=18 if self.network.img_resolution < 64 else 40, guidance=settings.guidance)

    def set_labels(self, num_images: int, seed: int) -> None:
        """None: the class belongs to the image."""

    def labels(self, indices: Sequence[int], noise: Noise) -> Tensor | None:
        """A uniform class per image, drawn from its own stream after its latents."""
        if self.num_classes == 0:
            return None
        stream = noise.restarted()
        stream.normal(*self.image_shape)
        return stream.integers(self.num_classes)

    @torch.no_grad()
    def sample(self, noise: Noise, labels: Tensor | None, settings: SamplerSettings) -> Tensor:
        """Draws per image: latents float32, a class (conditional networks), noise per step under churn.

        With a second network from (1 + g) D - g D_second, each guided by itself, as the published sampler of two: in
        float32 with noise of float32, drawn only where a step churns, and at whatever noise levels. So g = 0 and -1
        give the images of either network up to rounding, and under churn up to other noise.
        """
        if settings.guidance and self.num_classes == 0:
            raise RequestError(
                f"guidance is {settings.guidance} but the model is unconditional; expected guidance 0, "
                "or a class-conditional model trained with label dropout"
            )
        latents = noise.normal(*self.image_shape)
        if self.num_classes:
            noise.integers(self.num_classes)  # the draw behind `labels`: keeps later draws in place
        classes = one_hot(labels, self.num_classes, latents.device)

        def denoiser(network: Precond, classes: Tensor | None) -> Denoiser:
            def denoise(x: Tensor, sigma: Tensor) -> Tensor:
                with self.precision.autocast_on(x.device):
                    return network(x, sigma, classes)

            return denoise

        def guided(network: Precond) -> Denoiser:
            return extrapolated(denoiser(network, classes), denoiser(network, None), settings.guidance)

        denoise = of_both(guided, self.network, self.second)
        dtype = torch.float64 if self.second is None else torch.float32

        def draw_noise() -> Tensor:
            return noise.normal(*self.image_shape, dtype=dtype)

        if self.second is None:
            images = integrate(
                denoise,
                latents,
                settings,
                sigma_limits=(self.network.sigma_min, self.network.sigma_max),
                round_sigma=self.network.round_sigma,
                draw_noise=draw_noise,
            )
        else:
            images = integrate(denoise, latents, settings, draw_noise=draw_noise, dtype=dtype, draw_at_rest=False)
        return to_uint8(images)

    def encode(self, images: Tensor, noise: Noise) -> Tensor:
        """uint8 -> float32 in [-1, 1]; draws nothing."""
        return from_uint8(images)

    def training_loss(self, examples: Tensor, labels: Tensor | None, noise: Noise) -> Tensor:
        """Per image, the weighted denoising error summed over pixels: float32 [B].

        Draws per image: a uniform for label dropout (if there is any), then those of the loss.
        """
        classes = one_hot(labels, self.num_classes, examples.device)
        if classes is not None and self.label_dropout:
            classes = classes * (noise.uniform(1) >= self.label_dropout)
        with self.precision.autocast_on(examples.device):
            loss = self.loss(self.network, examples, classes, noise, self.augment)
        return loss.sum(dim=(1, 2, 3))
