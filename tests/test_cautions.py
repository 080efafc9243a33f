"""What a user is told before believing a choice: references far apart or of few images, and classes out of balance."""

from unittest import mock

import numpy as np
import pytest
import torch

from neon.demo.assets import FEATURES, TEST_STATISTICS, TRAIN_STATISTICS, real_images
from neon.metrics import Statistics, frechet_distance
from neon.metrics.features import features_of
from neon.metrics.small import load_features
from neon.tune import cautions
from neon.tune.cautions import balance_cautions, explained_by_sizes, reference_cautions
from tests.tiny import tiny_edm, tiny_var

TRAIN, TEST = Statistics.load(TRAIN_STATISTICS), Statistics.load(TEST_STATISTICS)


@pytest.fixture(scope="module")
def features() -> torch.Tensor:
    """Of 2,000 real images, [2000, 64]."""
    return features_of(load_features(FEATURES, torch.device("cpu")), real_images())


def some(features: torch.Tensor, count: int, seed: int = 0, name: str = "some.npz") -> Statistics:
    order = torch.randperm(len(features), generator=torch.Generator().manual_seed(seed))
    return Statistics.from_features(features[order[:count]], name)


def uncounted(statistics: Statistics) -> Statistics:
    return Statistics(mu=statistics.mu, sigma=statistics.sigma, name=statistics.name)


def shifted(statistics: Statistics, distance: float) -> Statistics:
    """The same features moved, which is `distance` away."""
    mu = statistics.mu + np.eye(1, statistics.dim)[0] * distance**0.5
    return Statistics(mu=mu, sigma=statistics.sigma, count=statistics.count, name="moved.npz")


@pytest.mark.parametrize("gain", [2.0, 10.0, 40.0])
def test_the_references_of_the_demo_are_no_reason_to_doubt(gain: float) -> None:
    assert reference_cautions(TRAIN, TEST, gain) == []
    assert reference_cautions(uncounted(TRAIN), uncounted(TEST), gain) == []
    assert reference_cautions(TEST, TEST, gain) == []


@pytest.mark.parametrize(
    ("distance", "gain", "cautioned"), [(20, 40, True), (5, 40, False), (5, 10, True), (5, 0, False)]
)
def test_references_far_apart_for_the_gain_are_named(distance: float, gain: float, cautioned: bool) -> None:
    found = reference_cautions(shifted(TRAIN, distance), TEST, gain)
    assert len(found) == cautioned
    for text in found:
        assert "moved.npz" in text and TEST.name in text and f"the gain is {gain}" in text


def test_a_distance_that_few_images_explain_is_said_of_their_number_instead(features: torch.Tensor) -> None:
    few = some(features, 100)
    [text] = reference_cautions(few, TEST, 40.0)
    assert frechet_distance(few, TEST) > 20
    assert "some.npz, of 100 images for 64 features" in text
    [text] = reference_cautions(uncounted(few), TEST, 40.0)
    assert "apart" in text and "explain" not in text


@pytest.mark.parametrize("count", [80, 200, 1000])
def test_sizes_explain_the_distance_of_two_samples(features: torch.Tensor, count: int) -> None:
    distances = [frechet_distance(some(features, count, seed), TEST) for seed in range(4)]
    assert explained_by_sizes(some(features, count), TEST) == pytest.approx(np.mean(distances), rel=0.35)
    assert explained_by_sizes(uncounted(TRAIN), TEST) == 0


def test_sizes_explain_what_normal_features_of_less_than_full_rank_have() -> None:
    random = np.random.default_rng(0)
    mixing = random.normal(size=(5, 8)) * np.geomspace(1, 10, 5)[:, None]

    def sample(count: int) -> Statistics:
        return Statistics.from_features(torch.from_numpy(random.normal(size=(count, 5)) @ mixing))

    pairs = [(sample(300), sample(200)) for _ in range(40)]
    found, expected = (np.mean([of(*pair) for pair in pairs]) for of in (frechet_distance, explained_by_sizes))
    assert found == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize(("count", "dim", "cautioned"), [(1300, 64, True), (10_000, 64, False), (50_000, 2048, False)])
def test_few_images_are_few_for_their_features(count: int, dim: int, cautioned: bool) -> None:
    reference = Statistics(mu=np.zeros(dim), sigma=np.eye(dim), count=count, name="few.npz")
    with mock.patch.object(cautions, "frechet_distance", return_value=0.0):  # takes seconds of 2,048 features
        assert len(reference_cautions(reference, reference, 10.0)) == cautioned


def test_classes_that_images_draw_differ_in_small_sets() -> None:
    model = tiny_edm()
    [text] = balance_cautions(model, 20)
    assert "20 images are 6.7 of each of 3 classes" in text and "use 30 images or more" in text
    assert balance_cautions(model, 30) == []
    assert balance_cautions(tiny_edm(label_dim=0), 5) == []


def test_classes_that_are_dealt_are_left_out_of_sets_smaller_than_their_number() -> None:
    model = tiny_var()
    [text] = balance_cautions(model, 2)
    assert "2 images are fewer than the 3 classes" in text
    assert balance_cautions(model, 3) == []
