"""Extractors and statistics by the names that users give them, checked against each other."""

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from neon.data.fingerprint import fingerprints
from neon.errors import RequestError, warn
from neon.metrics import Statistics, load_all_statistics
from neon.metrics.features import FeatureExtractor, load_features, score_name
from neon.metrics.inception import InceptionFeatures, load_inception, weights_file
from neon.model import GenerativeModel
from neon.runtime.files import hashes

INCEPTION, INCEPTION_DIM = InceptionFeatures.name, InceptionFeatures.dim


def load_extractor(features: str, inception_weights: Path | None, device: torch.device) -> FeatureExtractor:
    """The feature network that the flags `--features` and `--inception_weights` name."""
    if features == INCEPTION:
        return load_inception(inception_weights, device)
    return load_features(features, device)


def features_file(features: str, inception_weights: Path | None) -> Path:
    """The file of that network."""
    return weights_file(inception_weights) if features == INCEPTION else Path(features)


def load_extractors(
    features: Sequence[str], inception_weights: Path | None, device: torch.device
) -> list[FeatureExtractor]:
    """The feature networks of those flags; a RequestError if two are one."""
    found = [load_extractor(name, inception_weights, device) for name in features]
    scores = [score_name(extractor) for extractor in found]
    if len(set(scores)) < len(scores):
        raise RequestError(
            f"--features {' '.join(features)}: two of them score {max(scores, key=scores.count)}; give networks of "
            "different names"
        )
    return found


def features_facts(
    features: Sequence[str], inception_weights: Path | None, extractors: Sequence[FeatureExtractor]
) -> dict[str, Any]:
    """What tells these feature networks from others, as JSON: of the first by its keys, of others in `beside`."""
    facts = [
        {
            "features": extractor.name,
            **hashes({"feature_weights_sha256": inception_weights if name == INCEPTION else Path(name)}),
            **fingerprints({"features_fingerprint": features_file(name, inception_weights)}),
        }
        for name, extractor in zip(features, extractors, strict=True)
    ]
    return {**facts[0], "beside": facts[1:]} if len(facts) > 1 else facts[0]


def load_statistics(ref: Path, model: GenerativeModel, extractor: FeatureExtractor) -> Statistics:
    """The statistics in `ref`; a RequestError if they are of other features, or of images of another resolution."""
    statistics = features_in(ref, extractor)
    _check_resolution(ref, model.image_shape[-1])
    return statistics


def features_in(path: Path, extractor: FeatureExtractor) -> Statistics:
    """The statistics in `path` of the features of `extractor`; a RequestError if they are of others."""
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
    found = []
    for statistics in load_all_statistics(path):
        features = statistics.features
        if features is None and statistics.dim == INCEPTION_DIM:
            features = INCEPTION
        if features is None:
            raise RequestError(
                f"{path}: statistics of {statistics.dim} features that do not say of which network; make them again "
                "with `neon stats`"
            )
        if features in [extractor.identity for extractor in extractors]:
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
