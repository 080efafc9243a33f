"""How VAR is trained on its own samples: AdamW, a learning rate that rises over the whole run, clipped gradients."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import count

import torch
from torch import nn

from neon.recipe import Recipe

UNDECAYED = ("pos_1LC", "pos_start", "lvl_embed", "ada_gss", "scale_mul")
"""parts of the names of weights that never decay, besides vectors and biases"""


@dataclass(frozen=True, kw_only=True)
class VARRecipe(Recipe):
    """The published self-training; the raw weights of the last step are the result."""

    batch_size: int = 768
    lr: float = 1e-5
    """target that the learning rate would reach after `total_images`"""
    betas: tuple[float, float] = (0.9, 0.95)
    total_images: int = 7_500_000
    """images over which the learning rate rises linearly from 0; 0: it is constant"""
    weight_decay: float = 0.0
    """the published program has flags for it that have no effect"""
    max_norm: float = 2.0
    """gradients are shortened to this global norm"""
    budget_images: int | None = 7_500_000

    @property
    def rampup_kimg(self) -> float:
        return self.total_images / 1000

    def with_rampup(self, kimg: float) -> "VARRecipe":
        return replace(self, total_images=round(1000 * kimg))

    def optimizer(self, network: nn.Module) -> torch.optim.Optimizer:
        """AdamW with two groups, the second without weight decay."""
        groups: tuple[list[nn.Parameter], list[nn.Parameter]] = ([], [])
        for name, parameter in network.named_parameters():
            spared = parameter.ndim == 1 or name.endswith("bias") or any(part in name for part in UNDECAYED)
            groups[spared].append(parameter)
        decayed, spared_ones = groups
        return torch.optim.AdamW(
            [{"params": decayed, "weight_decay": self.weight_decay}, {"params": spared_ones, "weight_decay": 0.0}],
            lr=self.lr,
            betas=self.betas,
            eps=self.eps,
        )

    def lr_at(self, images_seen: int) -> float:
        total = self.total_images
        return self.lr * min(images_seen, total) / total if total else self.lr

    def repair_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Shorten the gradient of all parameters to `max_norm`, in place."""
        torch.nn.utils.clip_grad_norm_(parameters, self.max_norm)

    def visits(self, num_images: int, seed: int) -> Iterator[int]:
        """The published order of one process; it does not depend on `seed`."""
        for epoch in count():
            yield from epoch_order(num_images, self.batch_size, epoch)


def epoch_order(num_images: int, batch_size: int, epoch: int, world_size: int = 1) -> list[int]:
    """The images of one epoch: batch by batch, in each batch process by process.

    A shuffle seeded by the epoch, filled up with its own first entries to whole batches; each process takes a
    contiguous part of it and walks through that.
    """
    order = torch.randperm(num_images, generator=torch.Generator().manual_seed(epoch))
    batches = -(-num_images // batch_size)
    filled = order.repeat(-(-batches * batch_size // num_images))[: batches * batch_size]
    return filled.view(world_size, batches, batch_size // world_size).transpose(0, 1).flatten().tolist()
