"""Extractors and statistics by the names that users give them, checked against each other."""

import re
from pathlib import Path

import torch

from neon.errors import RequestError, warn
from neon.metrics import Statistics
from neon.metrics.dinov2 import DINOv2Features
from neon.metrics.features import FeatureExtractor
from neon.metrics.inception import InceptionFeatures
from neon.metrics.networks import PublishedNetwork
from neon.metrics.small import load_features
from neon.model import GenerativeModel

INCEPTION, INCEPTION_DIM = InceptionFeatures.name, InceptionFeatures.dim
NETWORKS: dict[str, type[PublishedNetwork]] = {network.name: network for network in (InceptionFeatures, DINOv2Features)}
"""the feature networks that have a name; any other is a file of a small one"""


def load_extractor(
    features: str, inception_weights: Path | None, device: torch.device, resize: str | None = None
) -> FeatureExtractor:
    """The feature network that the flags `--features`, `--inception_weights` and `--resize` name.

    Args:
        features: A name of `NETWORKS`, NAME=FILE with its weights, or the file of a small network.
        resize: A mode of `RESIZERS`; None: as usual with that network.

    Raises:
        RequestError: there is no such network, its weights are not there or others, or it does not resize so.
    """
    network, _ = _parsed(features)
    if resize is not None and not takes_resize(features):
        raise RequestError(
            f"--resize {resize}: {features} features know one way to resize images, if any; leave the flag out, or "
            f"compare by {INCEPTION} features"
        )
    if network is not None:
        return network.load(weights_named(features, inception_weights), device, resize)
    if not Path(features).exists():
        raise RequestError(
            f"features {features!r}: neither a feature network (expected {' or '.join(NETWORKS)}, or NAME=FILE with "
            "its weights) nor a file of one"
        )
    return load_features(features, device)


def takes_resize(features: str) -> bool:
    """Whether the network called `features` lets a mode of resizing be chosen."""
    network, _ = _parsed(features)
    return network is not None and bool(network.modes)


def weights_named(features: str, inception_weights: Path | None) -> Path | None:
    """The file that is named for that network; None: its usual one."""
    network, file = _parsed(features)
    return inception_weights if file is None and network is InceptionFeatures else file


def features_file(features: str, inception_weights: Path | None) -> Path:
    """The file of that network, named or usual; a RequestError if the usual one is not there."""
    network, _ = _parsed(features)
    named = weights_named(features, inception_weights)
    return Path(features) if network is None else network.weights_file(named)


def _parsed(features: str) -> tuple[type[PublishedNetwork] | None, Path | None]:
    """The network and the file in NAME or NAME=FILE; of any other text, which is a file, (None, file)."""
    name, equals, file = features.partition("=")
    if name not in NETWORKS:
        return None, Path(features)
    if equals and not file:
        raise RequestError(f"features {features!r}: names no file; expected {name}=FILE, or {name}")
    return NETWORKS[name], Path(file) if file else None


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
