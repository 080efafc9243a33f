"""Extractors and statistics by the names that users give them, checked against each other."""

import re
from pathlib import Path

import torch

from neon.errors import RequestError, warn
from neon.metrics import Statistics
from neon.metrics.features import FeatureExtractor
from neon.metrics.inception import InceptionFeatures, load_inception, weights_file
from neon.metrics.small import load_features
from neon.model import GenerativeModel

INCEPTION, INCEPTION_DIM = InceptionFeatures.name, InceptionFeatures.dim


def load_extractor(features: str, inception_weights: Path | None, device: torch.device) -> FeatureExtractor:
    """The feature network that the flags `--features` and `--inception_weights` name."""
    if features == INCEPTION:
        return load_inception(inception_weights, device)
    return load_features(features, device)


def features_file(features: str, inception_weights: Path | None) -> Path:
    """The file of that network."""
    return weights_file(inception_weights) if features == INCEPTION else Path(features)


def load_statistics(ref: Path, model: GenerativeModel, extractor: FeatureExtractor) -> Statistics:
    """The statistics in `ref`; a RequestError if they are of other features, or of images of another resolution."""
    statistics = Statistics.load(ref)
    _check_resolution(ref, model.image_shape[-1])
    if statistics.dim != extractor.dim:
        raise RequestError(
            f"{ref}: statistics of {statistics.dim} features, but {extractor.name} has {extractor.dim}; "
            "use statistics made with the same features (`neon stats`)"
        )
    return statistics


def _check_resolution(ref: Path, side: int) -> None:
    """Refuse ImageNet's statistics of the other resolution; only their name tells it."""
    found = re.search(r"(?:in|imagenet)[-_]?(256|512)(?!\d)", ref.name)
    named = int(found[1]) if found else side
    if {named, side} == {256, 512}:
        raise RequestError(
            f"{ref}: statistics of {named} pixels by their name, but images have {side}; use those of {side}"
        )
    if named != side:
        warn(f"{ref}: statistics of {named} pixels by their name; images have {side}")
