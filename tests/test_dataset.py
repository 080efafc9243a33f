"""Image sets on disk: what is written is what is read, and broken sets are refused by name."""

import json
import zipfile
from collections import Counter
from itertools import islice
from pathlib import Path

import pytest
import torch
from PIL import Image

from neon.data.images import ImageDataset, to_uint8, visit_order, write_images, write_labels
from neon.errors import RequestError


def make_set(folder: Path, count: int = 5, channels: int = 1, labels: bool = True) -> torch.Tensor:
    images = torch.randint(0, 256, (count, channels, 6, 6), dtype=torch.uint8)
    write_images(folder, range(count), images)
    write_labels(folder, [i % 3 for i in range(count)] if labels else None, count)
    return images


@pytest.mark.parametrize("channels", [1, 3])
def test_a_written_set_reads_back_exactly(tmp_path: Path, channels: int) -> None:
    images = make_set(tmp_path, channels=channels)
    dataset = ImageDataset(tmp_path)
    read, labels = dataset.load([3, 0])
    assert len(dataset) == 5 and dataset.image_shape == (channels, 6, 6)
    assert torch.equal(read, images[[3, 0]]) and labels.tolist() == [0, 0]


def test_a_zip_of_a_set_is_the_same_set(tmp_path: Path) -> None:
    images = make_set(tmp_path / "set")
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
        for file in (tmp_path / "set").iterdir():
            archive.write(file, file.name)
    read, labels = ImageDataset(tmp_path / "set.zip").load(range(5))
    assert torch.equal(read, images) and labels.tolist() == [0, 1, 2, 0, 1]


def test_class_folders_become_labels_in_sorted_order(tmp_path: Path) -> None:
    for name in ("zebra", "ant"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (4, 4)).save(tmp_path / name / "a.png")
    assert ImageDataset(tmp_path).labels.tolist() == [0, 1]


def test_a_set_without_labels_has_none(tmp_path: Path) -> None:
    make_set(tmp_path, labels=False)
    assert ImageDataset(tmp_path).labels is None


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: (f / "00000002.png").write_bytes(b"<html>"), "00000002.png cannot be read"),
        (lambda f: Image.new("L", (3, 3)).save(f / "00000002.png"), "one size"),
        (lambda f: (f / "dataset.json").write_text("{}"), "labels"),
        (lambda f: (f / "dataset.json").write_text(json.dumps({"labels": [["00000000.png", 1]]})), "no label for 4"),
    ],
)
def test_a_broken_set_is_refused_by_name(tmp_path: Path, spoil, message: str) -> None:
    make_set(tmp_path)
    spoil(tmp_path)
    with pytest.raises(RequestError, match=message):
        ImageDataset(tmp_path).load(range(5))


def test_what_is_no_set_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    for name, message in (("empty", "found none"), ("file", "not a zip"), ("nothing", "found nothing")):
        with pytest.raises(RequestError, match=message):
            ImageDataset(tmp_path / name)


def test_uint8_survives_the_trip_to_floats_and_back() -> None:
    values = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(values.float() / 127.5 - 1), values)


def test_training_visits_every_image_about_equally_often_in_changing_order() -> None:
    visits = list(islice(visit_order(10, seed=4), 1000))
    assert set(Counter(visits)) == set(range(10))
    assert min(Counter(visits).values()) > 60
    assert visits[:10] != visits[10:20]
