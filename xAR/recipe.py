"""How xAR is trained: AdamW, a learning rate by epochs, clipped gradients, and an average of the weights."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import count

import torch
from torch import nn

from neon.recipe import Recipe, beta_of, halflife_of

FALL_BEGINS, FALL_ENDS = 600, 800
"""epochs of the published schedule, however long a run is: from one to the other the learning rate falls"""
PUBLISHED_SET = 30_000
"""images of the published set S, 30 of each class, to which the published epochs belong"""


def images_in_batches(num_images: int, batch_size: int) -> int:
    """How many images of a set fill whole batches: those of an epoch. All, if the set is smaller than a batch."""
    return num_images - num_images % batch_size or num_images


@dataclass(frozen=True, kw_only=True)
class XARRecipe(Recipe):
    """The published self-training of xAR-B on 30 images per class; the averaged weights are the result."""

    batch_size: int = 256
    lr: float = 1e-6
    """learning rate after the warm-up; a run of fewer epochs never gets there"""
    betas: tuple[float, float] = (0.9, 0.96)
    min_lr: float = 1e-5
    """where the fall from epoch 600 to 800 ends, even if above `lr`; after it the cosine rises again"""
    warmup_epochs: float = 250
    """epochs over which the learning rate rises linearly from 0"""
    images_per_epoch: int = images_in_batches(PUBLISHED_SET, 256)
    """of the set trained on"""
    weight_decay: float = 0.02
    """of what has two or more dimensions; not of biases and normalisations"""
    max_norm: float = 1.0
    """gradients are shortened to this global norm"""
    ema_rate: float = 0.9999
    """share of the average that stays in each step, of whatever batch size; 0: no average, the raw weights count"""
    first_scale: float = 2.0**16
    largest_scale: float | None = None
    scale_steps: int = 2000
    budget_images: int | None = 7_500_000

    @property
    def rampup_kimg(self) -> float:
        return self.warmup_epochs * self.images_per_epoch / 1000

    def with_rampup(self, kimg: float) -> "XARRecipe":
        return replace(self, warmup_epochs=1000 * kimg / self.images_per_epoch)

    @property
    def halflife_kimg(self) -> float | None:
        return halflife_of(self.ema_rate, self.batch_size)

    def with_halflife(self, kimg: float | None) -> "XARRecipe":
        return replace(self, ema_rate=beta_of(kimg, self.batch_size))

    @property
    def averages(self) -> bool:
        return self.ema_rate > 0

    def average_decay(self, images_seen: int) -> float:
        return self.ema_rate

    def optimizer(self, network: nn.Module) -> torch.optim.Optimizer:
        """AdamW with two groups, the second without weight decay."""
        parameters = list(network.parameters())
        return torch.optim.AdamW(
            [
                {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": self.weight_decay},
                {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
            ],
            lr=self.lr,
            betas=self.betas,
            eps=self.eps,
        )

    def lr_at(self, images_seen: int) -> float:
        epoch = images_seen / self.images_per_epoch
        if epoch < self.warmup_epochs:
            return self.lr * epoch / self.warmup_epochs
        if epoch < FALL_BEGINS:
            return self.lr
        fallen = (epoch - FALL_BEGINS) / (FALL_ENDS - FALL_BEGINS)
        return self.min_lr + (self.lr - self.min_lr) * 0.5 * (1 + math.cos(math.pi * fallen))

    def repair_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Shorten the gradient of all parameters to `max_norm`, in place."""
        torch.nn.utils.clip_grad_norm_(parameters, self.max_norm)

    def visits(self, num_images: int, seed: int) -> Iterator[int]:
        """A shuffle per epoch, seeded by `seed` and the epoch; what does not fill a batch is left out.

        The batches, as sets, of torch's DistributedSampler(seed=seed) and a loader that drops the last.
        """
        for epoch in count():
            order = torch.randperm(num_images, generator=torch.Generator().manual_seed(seed + epoch))
            yield from order[: images_in_batches(num_images, self.batch_size)].tolist()
