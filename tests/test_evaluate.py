"""From a model to scores, and the log that never computes a score twice."""

import dataclasses
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

from neon import sampling
from neon.checkpoint import save_safetensors
from neon.data.images import ImageDataset
from neon.errors import RequestError, WorkError
from neon.evaluate import RealFeatures, Reference, ScoreLog, Scores, evaluate, features_in_order, sampled_images
from neon.metrics import FrechetReference, Manifold, Statistics
from neon.metrics.features import features_of
from neon.metrics.small import SmallFeatures, load_features
from neon.runtime import background
from neon.runtime.blocks import blocks
from neon.runtime.distributed import Processes
from neon.sampling import sample_set, write_samples
from tests.tiny import tiny_edm, tiny_images


def extractor() -> SmallFeatures:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return SmallFeatures("tiny6", (1, 8, 8), dim=6, num_classes=3).eval().requires_grad_(False)


def score(model, seeds, batch_size: int = 8, features=None) -> Scores:
    features = features or extractor()
    real = features_of(features, tiny_images(60).images)
    reference = Reference(
        extractor=features,
        frechet=FrechetReference(Statistics.from_features(real)),
        real=RealFeatures(manifold=Manifold(real, k=3)),
    )
    settings = dataclasses.replace(model.default_settings, num_steps=2)
    return evaluate(model, seeds, settings, [reference], batch_size=batch_size, processes=Processes())


def test_scores_equal_those_of_the_images_sampled_one_by_one() -> None:
    model, features, seeds = tiny_edm(), extractor(), range(20)
    scores = score(model, seeds, batch_size=7)
    settings = dataclasses.replace(model.default_settings, num_steps=2)
    compute = sampled_images(model, seeds, settings, Processes())
    alone = features_in_order(compute, len(seeds), [features], batch_size=1, processes=Processes(), title="one by one")
    one_by_one = torch.cat([rows for (rows,) in alone])
    real = Statistics.from_features(features_of(features, tiny_images(60).images))
    expected = FrechetReference(real).distance(Statistics.from_features(one_by_one))
    assert scores.distance == pytest.approx(expected, rel=1e-3), "another batch size may flip a rounding, no more"
    assert scores.num_images == 20


def test_the_same_seeds_give_the_same_scores_and_others_do_not() -> None:
    model = tiny_edm()
    first, again, other = score(model, range(16)), score(model, range(16)), score(model, range(16, 32))
    assert first.distance == again.distance != other.distance
    assert (first.precision, first.recall) == (again.precision, again.recall)


def test_broken_weights_are_reported_not_scored() -> None:
    class Broken(SmallFeatures):
        def forward(self, images: Tensor) -> Tensor:
            return super().forward(images) * torch.nan

    with pytest.raises(WorkError, match="not finite"):
        score(tiny_edm(), range(16), features=Broken("tiny6", (1, 8, 8), 6, 3))


def test_blocks_cover_every_index_once_and_only_the_last_is_short() -> None:
    cut = blocks(10, 4)
    assert [list(block) for block in cut] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


def test_written_samples_carry_their_labels_and_are_not_sampled_again(tmp_path: Path) -> None:
    model = tiny_edm()
    settings = dataclasses.replace(model.default_settings, num_steps=2)

    def write(folder: Path) -> ImageDataset:
        write_samples(model, range(10), settings, folder, batch_size=4, processes=Processes())
        return ImageDataset(folder)

    first = write(tmp_path / "a")
    images, labels = first.load(range(10))
    assert len(first) == 10 and set(labels.tolist()) <= {0, 1, 2}
    # A killed run: the label file and one block are missing, a second block is half there.
    for lost in ("dataset.json", "00000003.png", "00000008.png", "00000009.png"):
        (tmp_path / "a" / lost).unlink()
    kept = (tmp_path / "a" / "00000005.png").stat().st_mtime_ns
    again, again_labels = write(tmp_path / "a").load(range(10))
    assert torch.equal(images, again) and torch.equal(labels, again_labels)
    assert (tmp_path / "a" / "00000005.png").stat().st_mtime_ns == kept


def test_a_finished_set_that_lost_images_is_made_whole(tmp_path: Path) -> None:
    model = tiny_edm()
    settings = dataclasses.replace(model.default_settings, num_steps=2)
    write_samples(model, range(10), settings, tmp_path, batch_size=4, processes=Processes())
    whole = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    (tmp_path / "00000003.png").unlink()
    (tmp_path / "00000009.png").write_bytes(b"")  # as a crash of the machine leaves it
    write_samples(model, range(10), settings, tmp_path, batch_size=4, processes=Processes())
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == whole


@pytest.mark.parametrize("output", ["set", "set.zip"])
def test_images_that_vanish_while_others_are_sampled_are_missed(
    tmp_path: Path, output: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_edm()
    settings = dataclasses.replace(model.default_settings, num_steps=2)
    write = sampling.write_images

    def write_and_lose(folder: Path, block: range, images: Tensor) -> None:
        write(folder, block, images)
        if block.start == 4:
            shutil.rmtree(folder)

    monkeypatch.setattr(sampling, "write_images", write_and_lose)
    monkeypatch.setattr(background, "MOST_THREADS", 1)  # the batches one after another
    with pytest.raises(WorkError, match="images 0 to 3 were written and some are gone, in 2 of 3 batches"):
        sample_set(model, range(10), settings, tmp_path / output, batch_size=4, processes=Processes(), identity={})
    assert not list(tmp_path.rglob("dataset.json")) and not (tmp_path / "set.zip").exists()


def test_a_recorded_score_is_never_computed_again(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    made = Scores(distance=1.5, precision=0.5, recall=0.25, num_images=10, seconds=1.0)
    ScoreLog(path, Processes()).get_or("w 1", lambda: made)

    def refuse() -> Scores:
        raise AssertionError("computed again")

    assert ScoreLog(path, Processes()).get_or("w 1", refuse) == made


def test_half_a_line_left_by_a_killed_run_is_computed_again_and_spoils_nothing(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    log = ScoreLog(path, Processes())
    for i in range(2):
        log.get_or(f"w {i}", lambda i=i: Scores(distance=float(i), num_images=1, seconds=0.0))
    path.write_bytes(path.read_bytes()[:-20])
    torn = ScoreLog(path, Processes())
    assert list(torn.entries) == ["w 0"]
    torn.get_or("w 1", lambda: Scores(distance=7.0, num_images=1, seconds=0.0))
    assert {name: s.distance for name, s in ScoreLog(path, Processes()).entries.items()} == {"w 0": 0.0, "w 1": 7.0}


def test_a_feature_network_is_saved_with_its_name_and_refuses_other_images(tmp_path: Path) -> None:
    extractor().save(tmp_path / "features.safetensors")
    loaded = load_features(tmp_path / "features.safetensors")
    images = tiny_images(5).images
    assert torch.equal(loaded(images), extractor()(images)) and loaded.score_name == "fd_tiny6"
    with pytest.raises(RequestError, match="name another extractor"):
        loaded(torch.zeros(1, 3, 8, 8, dtype=torch.uint8))


@pytest.mark.parametrize(
    ("description", "message"),
    [
        ("[", "describe no feature network"),
        ("[" * 50_000, "describe no feature network"),
        ("null", "describe no feature network"),
        ("[1]", "describe no feature network"),
        ('{"name": 3, "image_shape": [1, 8, 8], "dim": 6, "num_classes": 3}', "describe no feature network"),
        ('{"name": "x", "image_shape": [1, 8], "dim": 6, "num_classes": 3}', "describe no feature network"),
        ('{"name": "x", "image_shape": [1, 8, 8], "dim": 6.5, "num_classes": 3}', "describe no feature network"),
        ('{"name": "x", "image_shape": [1, 8, 8], "dim": -6, "num_classes": 3}', "describe no feature network"),
        ('{"name": "x", "image_shape": [1, 8, 8], "dim": 7, "num_classes": 3}', "the weights do not fit"),
        ('{"name": "x", "image_shape": [1, 8, 8], "dim": 1000000000, "num_classes": 3}', "the weights do not fit"),
    ],
    ids=lambda text: text[-40:],
)
def test_a_feature_network_of_damaged_metadata_is_refused_by_name(
    tmp_path: Path, description: str, message: str
) -> None:
    file = tmp_path / "features.safetensors"
    save_safetensors(file, extractor().state_dict(), {"features": description})
    with pytest.raises(RequestError, match=rf"features\.safetensors: .*{message}"):
        load_features(file)


def test_a_model_is_no_feature_network(tmp_path: Path) -> None:
    from neon.model import save_model

    save_model(tmp_path / "model.safetensors", tiny_edm())
    with pytest.raises(RequestError, match="not a feature network"):
        load_features(tmp_path / "model.safetensors")


def test_small_networks_are_found_where_they_lay_before() -> None:
    from neon.metrics import features

    assert features.SmallFeatures is SmallFeatures and features.load_features is load_features
    with pytest.raises(AttributeError, match="no attribute"):
        _ = features.anything_else
