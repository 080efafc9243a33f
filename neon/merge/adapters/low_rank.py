"""Weights that differ from the base's by an adapter: the arithmetic, a few rows of a layer at a time."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from neon.checkpoint import TensorSpec

_BLOCK = 1 << 20  # elements computed at a time

Rows = Callable[[int, int], Tensor]
"""rows of the base's weight from one number to another, float64 [rows, columns]"""


class Changed(ABC):
    """One tensor of the base as the adapter leaves it."""

    @abstractmethod
    def rows(self, base: Rows, start: int, stop: int) -> Tensor:
        """Rows `start` to `stop` of the changed tensor, float64 [rows, columns]."""

    def rows_at_once(self, spec: TensorSpec) -> int:
        """How many rows are to be asked for: always the same cut, so that values do not depend on how they are read."""
        return max(1, _BLOCK // max(1, columns(spec)))


@dataclass(frozen=True)
class Product(Changed):
    """base + left right, in the layout of the base; with magnitudes, that of DoRA (arXiv 2402.09353)."""

    left: Tensor
    """float64 [rows, r]"""
    right: Tensor
    """float64 [r, columns]"""
    magnitude: Tensor | None = None
    """float64, the norm of the weights of each output, which their direction is multiplied with"""
    by_columns: bool = False
    """the outputs are columns"""

    def rows(self, base: Rows, start: int, stop: int) -> Tensor:
        total = base(start, stop).addmm_(self.left[start:stop], self.right)
        if self.magnitude is None:
            return total
        norm = torch.linalg.vector_norm(total, dim=0 if self.by_columns else 1)
        factor = self.magnitude[: len(norm)] if self.by_columns else self.magnitude[start:stop]
        factor = factor / norm
        return total * (factor if self.by_columns else factor[:, None])

    def rows_at_once(self, spec: TensorSpec) -> int:
        whole = self.magnitude is not None and self.by_columns  # whose norms take all rows
        return spec.shape[0] if whole else super().rows_at_once(spec)


@dataclass(frozen=True)
class Sum(Changed):
    """base + added."""

    added: Tensor
    """float64 [rows, columns]"""

    def rows(self, base: Rows, start: int, stop: int) -> Tensor:
        return base(start, stop).add_(self.added[start:stop])


def columns(spec: TensorSpec) -> int:
    """Elements of one row, which is all that lies at one place of the first dimension."""
    return math.prod(spec.shape[1:])


def truncated(update: Tensor, rank: int, seed: int) -> tuple[Tensor, Tensor]:
    """The best factors of a rank: up [m, rank] and down [rank, n], whose product is nearest to `update` [m, n].

    Randomised (Halko, Martinsson and Tropp, arXiv 0909.4061, algorithms 4.4 and 5.1): a range that two power
    iterations sharpen, then a small exact decomposition. The same for the same seed. Float32 or wider; both factors
    carry the square root of the singular values.
    """
    generator = torch.Generator(update.device).manual_seed(seed)
    sketch = min(rank + _OVERSAMPLED, *update.shape)
    found = update @ torch.randn(update.shape[1], sketch, generator=generator, dtype=update.dtype)
    for _ in range(_POWER_ITERATIONS):
        basis = torch.linalg.qr(found).Q
        found = update @ torch.linalg.qr(update.T @ basis).Q
    basis = torch.linalg.qr(found).Q
    U, S, V = torch.linalg.svd(basis.T @ update, full_matrices=False)
    root = S[:rank].sqrt()
    return (basis @ U[:, :rank]) * root, root[:, None] * V[:rank]


_OVERSAMPLED = 8
_POWER_ITERATIONS = 2
