"""The demo's real images and what is embedded of them."""

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from neon.checkpoint import open_checkpoint
from neon.demo.assets import BASE, FEATURES, TEST_STATISTICS, TRAIN_STATISTICS, real_images
from neon.demo.fashion import halve, load_fashion
from neon.demo.train import ARCHITECTURE, CONFIG
from neon.errors import RequestError
from neon.metrics import Statistics, frechet_distance
from neon.metrics.features import features_of
from neon.metrics.small import load_features


def write_split(folder: Path, count: int = 3) -> np.ndarray:
    images = np.random.default_rng(0).integers(0, 256, (count, 28, 28), dtype=np.uint8)
    head = np.array([0x0803, count, 28, 28], ">i4").tobytes()
    (folder / "t10k-images-idx3-ubyte.gz").write_bytes(gzip.compress(head + images.tobytes()))
    labels = np.array([0x0801, count], ">i4").tobytes() + bytes(range(count))
    (folder / "t10k-labels-idx1-ubyte.gz").write_bytes(gzip.compress(labels))
    return images


def test_the_original_files_are_read_and_halved(tmp_path: Path) -> None:
    images = write_split(tmp_path)
    dataset = load_fashion(tmp_path, "test")
    assert dataset.image_shape == (1, 14, 14) and dataset.labels.tolist() == [0, 1, 2]
    expected = images[1, 4:6, 6:8].mean()
    assert abs(float(dataset.images[1, 0, 2, 3]) - expected) <= 0.5


def test_halving_a_flat_image_keeps_it() -> None:
    assert torch.equal(halve(torch.full((1, 1, 4, 4), 77, dtype=torch.uint8)), torch.full((1, 1, 2, 2), 77))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda data: None, "no such file; install"),
        (lambda data: data[: len(data) // 2], "not a whole gzip file"),
        (lambda data: gzip.compress(b"\0" * 100), "not an IDX file"),
    ],
)
def test_missing_or_broken_files_are_refused_by_name(tmp_path: Path, spoil, message: str) -> None:
    write_split(tmp_path)
    file = tmp_path / "t10k-images-idx3-ubyte.gz"
    spoiled = spoil(file.read_bytes())
    file.unlink()
    if spoiled is not None:
        file.write_bytes(spoiled)
    with pytest.raises(RequestError, match=rf"t10k-images-idx3-ubyte\.gz: {message}"):
        load_fashion(tmp_path, "test")


def test_the_embedded_base_is_what_its_training_script_trains() -> None:
    with open_checkpoint(BASE) as checkpoint:
        assert checkpoint.metadata["architecture"] == ARCHITECTURE
        assert json.loads(checkpoint.metadata["config"]) == CONFIG
    assert BASE.stat().st_size < 8e6


def test_the_embedded_features_statistics_and_images_belong_together() -> None:
    extractor = load_features(FEATURES)
    images = real_images()
    assert images.shape == (2000, 1, 14, 14) and images.dtype == torch.uint8
    real = Statistics.from_features(features_of(extractor, images))
    train, test = Statistics.load(TRAIN_STATISTICS), Statistics.load(TEST_STATISTICS)
    assert (train.count, test.count) == (60_000, 10_000)
    assert frechet_distance(train, test) < 1
    assert frechet_distance(real, test) < 2, "2,000 of the 10,000 images behind the statistics"
    inverted = Statistics.from_features(features_of(extractor, 255 - images))
    assert frechet_distance(inverted, test) > 100
