"""Feature extractors: images in, features out, and the names that go into scores."""

import importlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, TypeAlias

import torch
from torch import Tensor

Images: TypeAlias = Tensor | Sequence[Tensor]
"""uint8 [B, C, H, W]; or B images [C, H, W] that may differ in size, for extractors that take `any_size`"""


class FeatureExtractor(ABC):
    """What a metric needs of a feature network."""

    name: str
    """goes into the names of scores"""
    dim: int
    """F, the number of features"""
    any_size: bool = False
    """whether images of one set may differ in size: each is then resized by itself"""
    protocol: Mapping[str, str] = MappingProxyType({})
    """how images become features, by name, where that is not the only way of this network; recorded with every score"""
    reads_prompts: bool = False
    """whether `fit` holds images against prompts"""

    @property
    def identity(self) -> str:
        """Tells features of different networks, or of different ways to resize, apart; statistics carry it."""
        return self.name

    @property
    def score_name(self) -> str:
        """What records call a Fréchet distance of these features."""
        return f"fd_{self.name}"

    @abstractmethod
    def __call__(self, images: Images) -> Tensor:
        """Images -> float32 [B, F]; row b depends on image b only."""

    def logits(self, features: Tensor) -> Tensor | None:
        """float32 [B, F] -> class logits [B, 1008] for an Inception Score; None: this network earns none.

        Only where there are logits are `is_mean` and `is_std` among the scores.
        """
        return None

    def fit(self, features: Tensor, prompts: Sequence[str]) -> Tensor:
        """float32 [B, F], B prompts -> how well each image fits its own, float32 [B] in 0..100, higher is better.

        Only of a network that `reads_prompts`.
        """
        raise NotImplementedError


@torch.no_grad()
def features_of(extractor: FeatureExtractor, images: Tensor, batch_size: int = 500) -> Tensor:
    """Features of many images in memory: uint8 [N, C, H, W] -> float32 [N, F]."""
    return torch.cat([extractor(batch) for batch in images.split(batch_size)])


def __getattr__(name: str) -> Any:
    """`SmallFeatures` and `load_features`, which lay here before: code of others names them so."""
    if name in ("SmallFeatures", "load_features"):
        return getattr(importlib.import_module("neon.metrics.small"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
