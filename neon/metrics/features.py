"""Feature extractors: images in, features out, and the name that goes into the score."""

from typing import Protocol

import torch
from torch import Tensor

from neon.metrics.inception import InceptionFeatures


class FeatureExtractor(Protocol):
    """What a metric needs of a feature network."""

    name: str
    """goes into the name of the score, see `score_name`"""
    dim: int
    """F, the number of features"""

    def __call__(self, images: Tensor) -> Tensor:
        """uint8 [B, C, H, W] -> float32 [B, F]; row b depends on image b only."""
        ...

    def logits(self, features: Tensor) -> Tensor | None:
        """float32 [B, F] -> class logits [B, 1008] for an Inception Score; None: this network earns none.

        Only where there are logits are `is_mean` and `is_std` among the scores.
        """
        ...


def score_name(extractor: FeatureExtractor) -> str:
    """`fid`, or `fd_<features>`: only Inception's 2048 features earn the name FID."""
    return "fid" if isinstance(extractor, InceptionFeatures) else f"fd_{extractor.name}"


@torch.no_grad()
def features_of(extractor: FeatureExtractor, images: Tensor, batch_size: int = 500) -> Tensor:
    """Features of many images in memory: uint8 [N, C, H, W] -> float32 [N, F]."""
    return torch.cat([extractor(batch) for batch in images.split(batch_size)])
