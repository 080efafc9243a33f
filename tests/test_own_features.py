"""`neon features`: a network of one's own images, from what they tell, for `neon stats`, `neon fid` and the rest."""

import json
import re
from pathlib import Path

import pytest
import torch

from neon.checkpoint import open_checkpoint
from neon.cli import app as cli
from neon.data.images import write_images, write_labels
from neon.demo.assets import real_images
from neon.demo.train import TrainFeatures
from neon.errors import RequestError
from neon.metrics.small import SmallFeatures, load_features, usual_stride
from tests.test_fashion import write_split
from tests.tiny import tiny_images


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(folder: str, images: torch.Tensor, labels: list[int] | None = None) -> None:
    write_images(folder, range(len(images)), images)
    write_labels(folder, labels, len(images))


def write_tiny(folder: str, count: int = 200, seed: int = 0) -> None:
    """Images of three classes that are easily told."""
    tiny = tiny_images(count, seed)
    assert tiny.labels is not None
    write(folder, tiny.images, tiny.labels.tolist())


def run(command: str) -> int:
    return cli.main(command.split())


def accuracy(said: str) -> tuple[float, float, int]:
    """What the command said: share of right answers, that of the most frequent, and images."""
    found = re.search(r"accuracy (\S+) on (\S+) held-out images \(chance (\S+)\)", said)
    assert found, said
    return float(found[1]), float(found[3]), int(found[2].replace(",", ""))


def test_classes_are_learned_where_there_are_some(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_tiny("real")
    assert run("features real own.safetensors --dim 16 --total_images 6400") == 0
    said = capsys.readouterr().out
    right, chance, images = accuracy(said)
    assert said.startswith("learning the classes") and "fd_own" in said
    assert images == 20 and right > 0.9 and chance < 0.6
    extractor = load_features("own.safetensors")
    assert (extractor.name, extractor.dim, extractor.image_shape) == ("own", 16, (1, 8, 8))


def test_classes_may_have_any_numbers_and_a_test_set(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for folder, count, seed in (("real", 120, 0), ("test", 60, 1)):
        tiny = tiny_images(count, seed)
        write(folder, tiny.images, [[7, 1000, 90_000][label] for label in tiny.labels.tolist()])
    assert run("features real own.safetensors --total_images 6400 --test test") == 0
    right, _, images = accuracy(capsys.readouterr().out)
    assert images == 60 and right > 0.9
    assert Path("own.safetensors").stat().st_size < 1e6, "a network of three classes, not of 90,000"


def test_quarter_turns_are_learned_where_there_are_no_classes(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write("real", real_images()[:600])
    assert run("features real own.safetensors --total_images 6400 --name turned") == 0
    said = capsys.readouterr().out
    right, chance, _ = accuracy(said)
    assert said.startswith("learning by how many quarter turns images are turned: real has no classes")
    assert right > 0.6 and chance < 0.45
    assert load_features("own.safetensors").name == "turned"


def test_weights_are_random_where_nothing_can_be_learned(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write("real", tiny_images(80).images[..., :6])
    assert run("features real own.safetensors") == 0
    said = capsys.readouterr().out
    assert said.startswith(
        "random weights, nothing is learned: real has no classes, and images of 6 x 8 pixels are not"
    )
    assert "accuracy" not in said
    found = load_features("own.safetensors")(tiny_images(80).images[..., :6])
    assert (found.std(0) > 0.1).all(), "each feature varies over the images"


def test_features_serve_statistics_and_scores(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_tiny("real")
    write_tiny("alike", seed=1)
    write("other", 255 - tiny_images(200).images)
    assert run("features real own.safetensors --dim 8 --total_images 1280") == 0
    assert run("stats real real.npz --features own.safetensors") == 0
    distances = []
    for name in ("alike", "other"):
        assert run(f"fid {name} real.npz --features own.safetensors --json {name}.json") == 0
        distances.append(json.loads(Path(f"{name}.json").read_text())["fd_own"])
    assert distances[0] < 0.1 * distances[1]


@pytest.mark.parametrize("task", ["classes", "rotation", "random"])
def test_one_seed_gives_the_same_bytes_again_and_another_others(here: Path, task: str) -> None:
    write_tiny("real", 60)
    budget = "" if task == "random" else "--total_images 256"
    for name, seed in (("one", 0), ("two", 0), ("three", 1)):
        command = f"features real {name}.safetensors --name own --task {task} {budget} --dim 4 --seed {seed}"
        assert run(command) == 0
    one, two, three = (Path(f"{name}.safetensors").read_bytes() for name in ("one", "two", "three"))
    assert one == two != three
    with open_checkpoint("one.safetensors") as file:
        assert file.metadata["task"] == task and file.metadata["seed"] == "0"
        assert ("accuracy" in file.metadata) == (task != "random")


def test_what_learned_nothing_is_said(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    noise = torch.randint(0, 256, (200, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    write("real", noise)
    assert run("features real own.safetensors --dim 4 --total_images 512") == 0
    assert "warning: these features have learned nothing that shows" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("real own.npz", "own.npz: features are written as safetensors; end the name"),
        ("real real.safetensors", "real.safetensors: already exists; choose another name or pass --overwrite"),
        ("real own.safetensors --dim 0", "--dim 0: expected 1 to 16384"),
        ("real own.safetensors --dim 1000000000", "--dim 1000000000: expected 1 to 16384"),
        ("real own.safetensors --total_images 0", "--total_images 0: expected at least 1"),
        ("real own.safetensors --seed -1", "--seed -1: expected 0 to 999999"),
        ("real own.safetensors --name a/b", "--name a/b: becomes a part of the score's name, fd_NAME; expected"),
        ("real inception.safetensors", "--name inception: becomes a part of the score's name"),
        ("few own.safetensors", "few: 40 images are too few; expected at least 50"),
        ("alike own.safetensors --task classes", "--task classes: alike has one class only; leave the flag out"),
        ("many own.safetensors --task classes", "--task classes: many has 60 classes of 60 images, too few of each"),
        ("none own.safetensors --task classes", "--task classes: none has no classes; leave"),
        ("negative own.safetensors", "expected a class number, 0 to 1048575. Or say --task rotation"),
        ("oblong own.safetensors --task rotation", "--task rotation: oblong: images of 6 x 8 pixels are not square"),
        ("sizes own.safetensors --task rotation", "expected images of one size"),
        ("real own.safetensors --test oblong", "--test oblong: images of shape (1, 8, 6) (C, H, W), those of real are"),
        (
            "real own.safetensors --test alike",
            "--test alike: has 1 classes, not the 3 of real; expected images",
        ),
        ("real own.safetensors --test none", "--test none: has no classes, not the 3 of real; expected"),
        ("oblong own.safetensors --test oblong", "--test: random weights learn nothing from images; leave it out"),
        ("nowhere own.safetensors", "nowhere: expected a folder or zip of images, found nothing"),
    ],
)
def test_wrong_requests_are_one_line_and_leave_nothing(
    here: Path, capsys: pytest.CaptureFixture[str], flags: str, message: str
) -> None:
    tiny = tiny_images(60).images
    write_tiny("real", 60)
    write_tiny("few", 40)
    write("alike", tiny, [3] * 60)
    write("many", tiny, list(range(60)))
    write("none", tiny)
    write("negative", tiny, [-1] * 60)
    write("oblong", tiny[..., :6])
    write("sizes", tiny)
    write_images("sizes", [59], tiny[:1, :, :6])
    Path("real.safetensors").touch()
    assert run(f"features {flags}") == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert message in error
    assert sorted(here.glob("*.safetensors")) == [here / "real.safetensors"]


@pytest.mark.parametrize("shape", [(3, 256, 256), (1, 28, 28), (3, 100, 37), (3, 17, 33)])
def test_networks_of_large_images_are_small_and_see_them_to_the_edges(shape: tuple[int, int, int]) -> None:
    extractor = SmallFeatures("own", shape, 64, 10, stride=usual_stride(shape))
    assert sum(parameter.numel() for parameter in extractor.parameters()) < 500_000
    extractor.standardise(torch.randint(0, 256, (20, *shape), dtype=torch.uint8))
    black = torch.zeros(1, *shape, dtype=torch.uint8)
    for row, column in ((0, 0), (shape[1] - 1, shape[2] - 1)):
        image = black.clone()
        image[0, :, row, column] = 255
        assert not torch.equal(extractor(image), extractor(black))


def test_files_of_before_there_was_a_stride_open_and_are_written_alike(tmp_path: Path) -> None:
    config = {"name": "old", "image_shape": [1, 14, 14], "dim": 64, "num_classes": 10}
    extractor = SmallFeatures(**config)
    assert extractor.config == config
    extractor.save(tmp_path / "features.safetensors")
    with open_checkpoint(tmp_path / "features.safetensors") as file:
        assert json.loads(file.metadata["features"]) == config and set(file.metadata) == {"features"}


@pytest.mark.parametrize("entry", [{"stride": 0}, {"stride": 3}, {"width": 10**9}, {"width": "64"}, {"steps": 2}])
def test_a_file_that_tells_another_network_than_it_holds_is_refused(tmp_path: Path, entry: dict[str, object]) -> None:
    extractor = SmallFeatures("own", (1, 8, 8), 4, 3)
    extractor.config |= entry
    extractor.save(tmp_path / "own.safetensors")
    with pytest.raises(RequestError, match=r"own\.safetensors: .*(describe no feature network|do not fit)"):
        load_features(tmp_path / "own.safetensors")


def test_the_demo_makes_both_networks_elsewhere_than_where_they_are_embedded(tmp_path: Path) -> None:
    write_split(tmp_path, 10)
    for end in ("images-idx3", "labels-idx1"):
        (tmp_path / f"train-{end}-ubyte.gz").write_bytes((tmp_path / f"t10k-{end}-ubyte.gz").read_bytes())
    TrainFeatures(data=tmp_path, output=tmp_path / "made", epochs=1)()
    made = {path.name for path in (tmp_path / "made").iterdir()}
    assert {"features.safetensors", "second-features.safetensors", "second-test-statistics.npz"} <= made
