"""How a network is trained: optimiser, learning rate by images seen, gradient repair, weight averaging.

One recipe belongs to each architecture; `neon.selftrain` runs any of them.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from neon.data.images import visit_order
from neon.runtime.distributed import local_part


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Adam with a linear ramp of the learning rate and an optional moving average of the weights.

    An architecture that trains otherwise subclasses this and overrides a method; one that tells its ramp or its
    average by other fields overrides `rampup_kimg`, `halflife_kimg` and what sets them.
    """

    batch_size: int = 512
    """images per optimiser step, over all processes"""
    lr: float = 1e-3
    """learning rate after the ramp"""
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    lr_rampup_kimg: float = 0.0
    """thousand images over which the learning rate rises linearly from 0; 0: no ramp"""
    loss_scaling: float = 1.0
    """factor on the loss and its gradients, for half precision; Adam undoes it"""
    scale_losses: bool = False
    """scale losses by a factor that grows until a gradient overflows, for float16 on GPUs; gradients are scaled back"""
    first_scale: float = 2.0**11
    """where that factor begins"""
    largest_scale: float | None = 2.0**15
    """where it stops growing; None: nowhere"""
    scale_steps: int = 1000
    """steps without an overflow after which it doubles"""
    max_gradient: float = 1e5
    """infinite gradient entries become +- this; NaN becomes 0"""
    ema_halflife_kimg: float | None = None
    """half-life of the average of the weights, which is then the result; None: the raw weights are"""
    ema_rampup_ratio: float | None = None
    """the half-life is at most this share of the images seen, for training from scratch; None: no limit"""
    budget_images: int | None = None
    """images of the self-training that ramp and average are made for: `scaled_to` shortens both for fewer; None: any"""

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"batch_size is {self.batch_size}; expected at least 1")
        if not 0 < self.lr < math.inf:
            raise ValueError(f"lr is {self.lr}; expected a positive number")

    def facts(self) -> dict[str, Any]:
        """What training is determined by, as JSON: all but the budget that this was made for."""
        return {name: value for name, value in asdict(self).items() if name != "budget_images"}

    @property
    def rampup_kimg(self) -> float:
        """Thousand images over which the learning rate rises from 0; 0: it is constant."""
        return self.lr_rampup_kimg

    def with_rampup(self, kimg: float) -> "Recipe":
        """This recipe with another `rampup_kimg`."""
        return replace(self, lr_rampup_kimg=kimg)

    @property
    def halflife_kimg(self) -> float | None:
        """Half-life of the average in thousand images; None: the raw weights are the result."""
        return self.ema_halflife_kimg

    def with_halflife(self, kimg: float | None) -> "Recipe":
        """This recipe with another `halflife_kimg`."""
        return replace(self, ema_halflife_kimg=kimg)

    def scaled_to(self, total_images: int) -> "Recipe":
        """This recipe for a self-training of `total_images`, in which they take the same share of the run as published.

        Ramp and half-life are multiplied by `total_images` / `budget_images` if that is below 1. As published they
        would swallow a short run: its learning rate would stay near 0, and the average near the base.
        """
        if self.budget_images is None or total_images >= self.budget_images:
            return self
        share = total_images / self.budget_images
        scaled = self.with_rampup(self.rampup_kimg * share)
        return scaled if self.halflife_kimg is None else scaled.with_halflife(self.halflife_kimg * share)

    def visits(self, num_images: int, seed: int) -> Iterator[int]:
        """The endless order in which training visits the images of a set."""
        return visit_order(num_images, seed)

    @property
    def averages(self) -> bool:
        """Whether the result is an average of the weights rather than the weights of the last step."""
        return self.ema_halflife_kimg is not None

    def optimizer(self, network: nn.Module) -> torch.optim.Optimizer:
        """A fresh optimiser over all parameters of `network`."""
        return torch.optim.Adam(network.parameters(), lr=self.lr, betas=self.betas, eps=self.eps)

    def lr_at(self, images_seen: int) -> float:
        """Learning rate of the step that follows `images_seen` images."""
        ramp = self.lr_rampup_kimg * 1000
        return self.lr * min(images_seen / ramp, 1.0) if ramp > 0 else self.lr

    def repair_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Make every gradient finite, in place."""
        limit = self.max_gradient
        for parameter in parameters:
            if parameter.grad is not None:
                gradient = local_part(parameter.grad)
                torch.nan_to_num(gradient, nan=0, posinf=limit, neginf=-limit, out=gradient)

    def average_decay(self, images_seen: int) -> float:
        """beta of average = beta average + (1 - beta) weights, for the step that follows `images_seen` images."""
        assert self.ema_halflife_kimg is not None
        halflife = self.ema_halflife_kimg * 1000
        if self.ema_rampup_ratio is not None:
            halflife = min(halflife, images_seen * self.ema_rampup_ratio)
        return 0.5 ** (self.batch_size / halflife) if halflife > 0 else 0.0

    @torch.no_grad()
    def update_average(self, average: list[Tensor], weights: list[Tensor], images_seen: int) -> None:
        """Move `average` towards `weights` by one step, in place."""
        torch._foreach_lerp_(average, weights, 1 - self.average_decay(images_seen))


def halflife_of(beta: float, batch_size: int) -> float | None:
    """Half-life in thousand images of an average of which a share `beta` stays in each step; None for no average."""
    return batch_size / 1000 * math.log(0.5) / math.log(beta) if beta > 0 else None


def beta_of(halflife_kimg: float | None, batch_size: int) -> float:
    """The share that stays in each step of an average of this half-life; 0 for no average."""
    return 0.5 ** (batch_size / (1000 * halflife_kimg)) if halflife_kimg else 0.0
