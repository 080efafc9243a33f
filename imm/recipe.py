"""How IMM is trained: AdamW at a constant learning rate, and an average of the weights."""

from dataclasses import dataclass, replace

import torch
from torch import nn

from neon.recipe import Recipe, beta_of, halflife_of


@dataclass(frozen=True, kw_only=True)
class IMMRecipe(Recipe):
    """The published self-training on 30 images per class; the averaged weights are the result."""

    batch_size: int = 512
    lr: float = 1e-6
    weight_decay: float = 0.0
    """of all parameters alike"""
    ema_beta: float = 0.9999
    """share of the average that stays in each step, of whatever batch size; 0: no average, the raw weights count"""
    first_scale: float = 2.0**16
    largest_scale: float | None = None
    scale_steps: int = 2000
    budget_images: int | None = 59 * 102_400 + 512
    """60 snapshots, 200 steps apart, the last one step after the last but one"""

    @property
    def halflife_kimg(self) -> float | None:
        return halflife_of(self.ema_beta, self.batch_size)

    def with_halflife(self, kimg: float | None) -> "IMMRecipe":
        return replace(self, ema_beta=beta_of(kimg, self.batch_size))

    @property
    def averages(self) -> bool:
        return self.ema_beta > 0

    def average_decay(self, images_seen: int) -> float:
        return self.ema_beta

    def optimizer(self, network: nn.Module) -> torch.optim.Optimizer:
        """AdamW over all parameters in one group, the position table included."""
        return torch.optim.AdamW(
            network.parameters(), lr=self.lr, betas=self.betas, eps=self.eps, weight_decay=self.weight_decay
        )
