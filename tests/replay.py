"""Recorded random draws, handed out through the door that samplers and losses draw from."""

from collections.abc import Iterable

import torch
from torch import Tensor


class RecordedNoise:
    """Gives the recorded tensors [B, ...] one after the other, reshaped as asked, whatever the distribution."""

    def __init__(self, draws: Iterable[Tensor]) -> None:
        self._all = list(draws)
        self._left = iter(self._all)

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        draw = next(self._left)
        return draw.reshape(len(draw), *shape).to(dtype)

    uniform = normal
    exponential = normal

    def integers(self, high: int, *shape: int) -> Tensor:
        return self.normal(*shape, dtype=torch.int64)

    def used_up(self) -> bool:
        """Whether every recorded draw was handed out."""
        return next(self._left, None) is None

    def restarted(self) -> "RecordedNoise":
        return RecordedNoise(self._all)
