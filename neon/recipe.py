"""How a network is trained: optimiser, learning rate by images seen, gradient repair, weight averaging.

One recipe belongs to each architecture; `neon.selftrain` runs any of them.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from neon.data.images import visit_order


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Adam with a linear ramp of the learning rate and an optional moving average of the weights.

    An architecture that trains otherwise subclasses this and overrides a method.
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

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"batch_size is {self.batch_size}; expected at least 1")
        if not 0 < self.lr < math.inf:
            raise ValueError(f"lr is {self.lr}; expected a positive number")

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
                torch.nan_to_num(parameter.grad, nan=0, posinf=limit, neginf=-limit, out=parameter.grad)

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
