"""Real images of each study, in two feature spaces: one that has learned classes, and one that has learned turns."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import small_digits
import torch
from small_study import ASSETS, FEATURES, ROOT, colour_images

from neon.data.images import ArrayDataset
from neon.demo import assets
from neon.demo.fashion import DEBIAN_FOLDER, load_fashion
from neon.evaluate import RealFeatures, Reference
from neon.metrics import FrechetReference, Manifold, Statistics
from neon.metrics.features import features_of
from neon.metrics.small import SmallFeatures, fit_classifier, load_features, quarter_turns

NEAREST_K = 5
NUM_REAL = 2000
"""real images behind precision and recall"""
CACHE = ROOT / "runs" / "study" / "data"


@dataclass(frozen=True, kw_only=True)
class Data:
    """What choices are made by, what rows are scored by, and what bases were trained on."""

    selection: Reference
    """training images in the first feature space"""
    reporting: tuple[Reference, ...]
    """test images in each feature space"""
    real: Callable[[], ArrayDataset]
    """training images"""


def demo_data() -> Data:
    """Of Fashion-MNIST at 14 x 14, by the networks and statistics of the demo."""
    first, second = load_features(assets.FEATURES), load_features(assets.SECOND_FEATURES)
    manifold = Manifold(features_of(first, assets.real_images()), k=NEAREST_K)
    return Data(
        selection=_reference(first, Statistics.load(assets.TRAIN_STATISTICS)),
        reporting=(
            _reference(first, Statistics.load(assets.TEST_STATISTICS), manifold),
            _reference(second, Statistics.load(assets.SECOND_TEST_STATISTICS)),
        ),
        real=lambda: load_fashion(DEBIAN_FOLDER, "train"),
    )


def colour_data() -> Data:
    """Of Fashion-MNIST in colour at 16 x 16."""
    return _data("colour", lambda split: colour_images(split, DEBIAN_FOLDER), FEATURES, "rotation_rgb64", passes=3)


def digits_data() -> Data:
    """Of scikit-learn's digits."""
    return _data(
        "digits", lambda split: small_digits.halves()[split], small_digits.FEATURES, "rotation_digits64", passes=40
    )


def _reference(extractor: SmallFeatures, statistics: Statistics, manifold: Manifold | None = None) -> Reference:
    real = None if manifold is None else RealFeatures(manifold=manifold)
    return Reference(extractor=extractor, frechet=FrechetReference(statistics), real=real)


def _data(name: str, images: Callable[[str], ArrayDataset], features: Path, turned: str, passes: int) -> Data:
    first, second = load_features(features), _turned_features(turned, images, passes)
    manifold = Manifold(features_of(first, images("test").images[:NUM_REAL]), k=NEAREST_K)
    return Data(
        selection=_reference(first, _statistics(name, "train", first, images)),
        reporting=(
            _reference(first, _statistics(name, "test", first, images), manifold),
            _reference(second, _statistics(name, "test", second, images)),
        ),
        real=lambda: images("train"),
    )


def _statistics(name: str, split: str, extractor: SmallFeatures, images: Callable[[str], ArrayDataset]) -> Statistics:
    path = CACHE / f"{name}-{split}-{extractor.identity.replace(':', '-')}.npz"
    if not path.exists():
        Statistics.from_features(features_of(extractor, images(split).images)).save(path)
    return Statistics.load(path)


def _turned_features(name: str, images: Callable[[str], ArrayDataset], passes: int) -> SmallFeatures:
    """The network that tells quarter turns of these images; trained where there is none yet."""
    path = ASSETS / f"{name}.safetensors"
    if not path.exists():
        training = images("train")
        torch.manual_seed(0)
        side = training.image_shape[-1]
        extractor = SmallFeatures(name, training.image_shape, 64, 4, stride=2 if side > 8 else 1, width=32)
        fit_classifier(extractor, quarter_turns(training), torch.arange(len(training)), passes)
        extractor.save(path)
    return load_features(path)
