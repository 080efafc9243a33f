"""Extractors and statistics by the names that users give them, checked against each other."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from neon.data.fingerprint import fingerprints
from neon.errors import RequestError, warn
from neon.metrics import Statistics, load_all_statistics
from neon.metrics.clip import CLIPFeatures
from neon.metrics.dinov2 import DINOv2Features
from neon.metrics.features import FeatureExtractor
from neon.metrics.inception import InceptionFeatures
from neon.metrics.networks import PublishedNetwork
from neon.metrics.resizing import RESIZERS
from neon.metrics.small import load_features
from neon.model import GenerativeModel
from neon.runtime.files import hashes

INCEPTION, INCEPTION_DIM = InceptionFeatures.name, InceptionFeatures.dim
NETWORKS: dict[str, type[PublishedNetwork]] = {
    network.name: network for network in (InceptionFeatures, DINOv2Features, CLIPFeatures)
}
"""the feature networks that have a name; any other is a file of a small one"""


@dataclass(frozen=True, kw_only=True)
class NamedFeatures:
    """Feature networks as a user names them."""

    names: tuple[str, ...]
    """of each: a name of `NETWORKS`, NAME=FILE with its weights, or the file of a small network"""
    inception_weights: Path | None = None
    """of Inception; None: those in torch-fidelity's cache"""
    resize: str | None = None
    """a mode of `RESIZERS`, for the networks that let it be chosen; None: as usual with each"""

    def check(self) -> None:
        """A RequestError if there is no network, or something is named that is of none of them."""
        if not self.names:
            raise RequestError(f"--features: expected a feature network, such as {INCEPTION}")
        networks, names = [_parsed(name)[0] for name in self.names], " ".join(self.names)
        if self.inception_weights is not None and InceptionFeatures not in networks:
            raise RequestError(
                f"--inception_weights {self.inception_weights}: --features {names} is another network; leave one of "
                "them out"
            )
        if self.resize not in (None, *RESIZERS):
            raise RequestError(f"--resize {self.resize}: expected {', '.join(RESIZERS)}")
        if self.resize is not None and not any(network is not None and network.modes for network in networks):
            raise RequestError(
                f"--resize {self.resize}: {names} features know one way to resize images, if any; leave the flag out, "
                f"or compare by {INCEPTION} features"
            )

    def load(self, device: torch.device) -> list[FeatureExtractor]:
        """The networks, in eval mode.

        Raises:
            RequestError: as of `check`; there is no such network, its weights are not there or others, or two would
                give one name to their scores.
        """
        self.check()
        found = [self._load(name, device) for name in self.names]
        scores = [extractor.score_name for extractor in found]
        if len(set(scores)) < len(scores):
            raise RequestError(
                f"--features {' '.join(self.names)}: two of them score {max(scores, key=scores.count)}; give networks "
                "of different names"
            )
        return found

    def facts(self, extractors: Sequence[FeatureExtractor]) -> dict[str, Any]:
        """What tells the `extractors` from others, as JSON: those after the first in `other_features`."""
        facts = [
            {
                "features": extractor.name,
                **extractor.protocol,
                **hashes({"feature_weights_sha256": self._named_file(name)}),
                **fingerprints({"features_fingerprint": self._file(name)}),
            }
            for name, extractor in zip(self.names, extractors, strict=True)
        ]
        return {**facts[0], "other_features": facts[1:]} if len(facts) > 1 else facts[0]

    def _load(self, name: str, device: torch.device) -> FeatureExtractor:
        network, _ = _parsed(name)
        if network is not None:
            return network.load(self._named_file(name), device, self.resize if network.modes else None)
        if not Path(name).exists():
            raise RequestError(
                f"features {name!r}: neither a feature network (expected {', '.join(NETWORKS)}, or NAME=FILE with "
                "its weights) nor a file of one"
            )
        return load_features(name, device)

    def _named_file(self, name: str) -> Path | None:
        """The file of that network, if one is named; None: it lies where it usually does."""
        network, file = _parsed(name)
        return self.inception_weights if file is None and network is InceptionFeatures else file

    def _file(self, name: str) -> Path:
        """The file of that network, named or usual; a RequestError if the usual one is not there."""
        network, _ = _parsed(name)
        return Path(name) if network is None else network.weights_file(self._named_file(name))


def _parsed(name: str) -> tuple[type[PublishedNetwork] | None, Path | None]:
    """The network and the file in NAME or NAME=FILE; of any other text, which is a file, (None, file)."""
    network, equals, file = name.partition("=")
    if network not in NETWORKS:
        return None, Path(name)
    if equals and not file:
        raise RequestError(f"features {name!r}: names no file; expected {network}=FILE, or {network}")
    return NETWORKS[network], Path(file) if file else None


def load_statistics(ref: Path, model: GenerativeModel, extractors: Sequence[FeatureExtractor]) -> list[Statistics]:
    """`statistics_in` the file `ref`; a RequestError, too, if they are of images of another resolution."""
    found = statistics_in(ref, extractors)
    _check_resolution(ref, model.image_shape[-1])
    return found


def statistics_in(path: Path, extractors: Sequence[FeatureExtractor]) -> list[Statistics]:
    """The statistics in `path` of the features of each of `extractors`.

    Raises:
        RequestError: they are of others, or do not say whose they are and are to serve several.
    """
    found = [_statistics_of(path, extractor) for extractor in extractors]
    if sum(statistics.features is None for statistics in found) > 1:
        names = " and ".join(extractor.name for extractor in extractors)
        raise RequestError(
            f"{path}: does not say of which network its statistics are, and they can be of one only; make those of "
            f"{names} with `neon stats`"
        )
    return found


def _statistics_of(path: Path, extractor: FeatureExtractor) -> Statistics:
    statistics = Statistics.load(path, extractor.identity)
    if statistics.dim != extractor.dim:
        raise RequestError(
            f"{path}: statistics of {statistics.dim} features, but {extractor.name} has {extractor.dim}; "
            "use statistics made with the same features (`neon stats`)"
        )
    return statistics


def statistics_beside(path: Path, extractors: Sequence[FeatureExtractor]) -> list[Statistics]:
    """The statistics in `path`, to be held beside those of `extractors`, each with the name of its features.

    Raises:
        RequestError: their features are not known, or are among those of `extractors`.
    """
    found, own = list[Statistics](), [extractor.identity for extractor in extractors]
    for statistics in load_all_statistics(path):
        features = statistics.features
        if features is None and statistics.dim == INCEPTION_DIM:
            features = INCEPTION
        if features is None:
            raise RequestError(
                f"{path}: statistics of {statistics.dim} features that do not say of which network; make them again "
                "with `neon stats`"
            )
        if features in own:
            raise RequestError(
                f"{path}: holds statistics of {features}, which are computed here; leave one of them out"
            )
        found.append(replace(statistics, features=features))
    return found


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
