"""What transformers of several architectures have in common: adaptive layer norm, attention to groups, a cache.

Shapes: B images, L positions, n of them, H heads of d channels, D width.
"""

from itertools import pairwise
from typing import Generic, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Given = TypeVar("Given")
LARGE = 8
"""a group of positions is computed apart from one n-th of all positions on"""


def modulation_layer(width: int, count: int) -> nn.Sequential:
    """From a condition [..., D] to `count` vectors of its width: adaLN of DiT (arXiv 2212.09748)."""
    return nn.Sequential(nn.SiLU(), nn.Linear(width, count * width))


def modulated(x: Tensor, scale: Tensor, shift: Tensor, eps: float = 1e-6) -> Tensor:
    """x [B, n, D] with mean 0 and variance 1 over D, times 1 + `scale`, plus `shift`; float32."""
    return F.layer_norm(x.float(), x.shape[-1:], eps=eps) * (1 + scale) + shift


class BlockCausal(NamedTuple):
    """Who sees whom among n positions that come in groups: each its own group and all before it."""

    mask: Tensor
    """[1, 1, n, n], added to scores: minus infinity where a position is not seen"""
    ends: tuple[int, ...]
    """where the groups end, ascending; the last is n"""

    def first(self, count: int) -> "BlockCausal":
        """Those among the first positions, which are whole groups."""
        return BlockCausal(self.mask[:, :, :count, :count], tuple(end for end in self.ends if end <= count))

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        dropout: float = 0.0,
        scale: float | None = None,
        split: bool | None = None,
    ) -> Tensor:
        """Attention [B, H, n, d] with queries, keys and values of that shape.

        Any mask rules out the fastest kernel. So on a GPU, in half precision, large groups are computed one after the
        other, each of all that it sees and without a mask; the small ones before them together, under theirs. That
        also leaves out what nobody sees, a third of the work. `split` says so or not.
        """
        if split is None:
            split = q.is_cuda and q.dtype in (torch.float16, torch.bfloat16)
        if not split:
            mask = self.mask.to(q.dtype)
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, scale=scale)
        pieces = [
            F.scaled_dot_product_attention(
                q[:, :, start:end],
                k[:, :, :end],
                v[:, :, :end],
                attn_mask=None if start or end == self.ends[0] else self.mask[:, :, :end, :end].to(q.dtype),
                dropout_p=dropout,
                scale=scale,
            )
            for start, end in pairwise((0, *self._pieces()))
        ]
        return torch.cat(pieces, dim=2)

    def _pieces(self) -> tuple[int, ...]:
        """Where the pieces end that are computed apart: the small groups together, then each large one."""
        large = [end for start, end in pairwise((0, *self.ends)) if (end - start) * LARGE >= self.ends[-1]]
        first = large[0] if large else self.ends[-1]
        before = max((end for end in self.ends if end < first), default=0)
        return tuple(end for end in (before, *(end for end in self.ends if end > before)) if end)


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
