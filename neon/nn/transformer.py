"""What transformers of several architectures have in common: adaptive layer norm, and a cache of keys and values.

Shapes: B images, L positions, n of them, H heads of d channels, D width.
"""

from typing import Generic, TypeVar

import torch.nn.functional as F
from torch import Tensor, nn

Given = TypeVar("Given")


def modulation_layer(width: int, count: int) -> nn.Sequential:
    """From a condition [..., D] to `count` vectors of its width: adaLN of DiT (arXiv 2212.09748)."""
    return nn.Sequential(nn.SiLU(), nn.Linear(width, count * width))


def modulated(x: Tensor, scale: Tensor, shift: Tensor, eps: float = 1e-6) -> Tensor:
    """x [B, n, D] with mean 0 and variance 1 over D, times 1 + `scale`, plus `shift`; float32."""
    return F.layer_norm(x.float(), x.shape[-1:], eps=eps) * (1 + scale) + shift


class KVCache:
    """Keys and values of one block for B images and all L positions, filled part by part in one allocation."""

    def __init__(self, batch: int, length: int) -> None:
        self.batch, self.length = batch, length
        self._both: tuple[Tensor, Tensor] | None = None

    def extend(self, keys: Tensor, values: Tensor, positions: slice) -> tuple[Tensor, Tensor]:
        """Write those at `positions`, each [b, H, n, d], over any that were there; returns all up to them.

        They may be of the first b images only; so are then those that are returned.
        """
        if self._both is None:
            shape = (self.batch, keys.shape[1], self.length, keys.shape[3])
            self._both = keys.new_empty(shape), values.new_empty(shape)
        for kept, new in zip(self._both, (keys, values), strict=True):
            kept[: len(new), :, positions] = new
        return self.first(len(keys), positions.stop)

    def first(self, batch: int, length: int) -> tuple[Tensor, Tensor]:
        """Those of the first images and positions."""
        assert self._both is not None, "nothing was written"
        keys, values = (kept[:batch, :, :length] for kept in self._both)
        return keys, values


class Generation(Generic[Given]):
    """How far B images have been generated: what steers them, and the keys and values of the positions behind."""

    def __init__(self, given: Given, batch: int, depth: int, length: int) -> None:
        self.given = given
        """of the images, once for all positions: labels, or what was made of them"""
        self.memory = [KVCache(batch, length) for _ in range(depth)]
        self.finished = 0
        """positions"""
