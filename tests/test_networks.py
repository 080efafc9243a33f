"""Feature networks by name, DINOv2 beside timm's, resizing beside clean-fid's, and sets of images of several sizes."""

import json
import shlex
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_data_config
from torch import Tensor

from neon.checkpoint import save_safetensors
from neon.cli import main
from neon.cli.flags import Resizing
from neon.errors import RequestError
from neon.metrics import Statistics, frechet_distance
from neon.metrics.dinov2 import DINOv2Features
from neon.metrics.features import FeatureExtractor
from neon.metrics.networks import PublishedNetwork
from neon.metrics.reference import NETWORKS, NamedFeatures
from neon.metrics.resizing import RESIZERS
from neon.metrics.small import SmallFeatures, load_features
from tests.inception import varied_images

CPU = torch.device("cpu")


class SmallDINOv2(DINOv2Features):
    """The same of the smallest variant."""

    variant = "vit_small_patch14_dinov2"
    dim = 384


class Means(PublishedNetwork):
    """A network of one's own: the means of the channels."""

    name = "means"
    dim = 3
    any_size = True

    @classmethod
    def weights_file(cls, named: Path | None = None) -> Path:
        return Path(__file__) if named is None else named

    @classmethod
    def load(cls, weights: Path | None, device: torch.device, resize: str | None) -> "Means":
        return cls()

    def resized(self, images: Tensor) -> Tensor:
        return RESIZERS["clean"](images, 8)

    def features(self, images: Tensor) -> Tensor:
        return images.mean((2, 3))


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    """Random weights of the small variant, of 518 pixels as timm's file has them."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = timm.create_model(SmallDINOv2.variant)
        return {
            name: 0.05 * torch.randn_like(tensor) + ("norm" in name and "weight" in name)
            for name, tensor in network.state_dict().items()
        }


@pytest.fixture(scope="module")
def file(weights: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("dinov2") / "model.safetensors"
    save_safetensors(path, weights, {})
    return path


@pytest.fixture(scope="module")
def dinov2(file: Path) -> SmallDINOv2:
    return SmallDINOv2.load(file)


@pytest.fixture
def small_instead(monkeypatch: pytest.MonkeyPatch) -> None:
    """What commands call dinov2 is the small variant."""
    monkeypatch.setitem(NETWORKS, "dinov2", SmallDINOv2)


def load(*names: str, resize: str | None = None) -> list[FeatureExtractor]:
    return NamedFeatures(names=names, resize=resize).load(CPU)


def refusal(*names: str, resize: str | None = None) -> str:
    with pytest.raises(RequestError) as caught:
        load(*names, resize=resize)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def run(command: str) -> int:
    return main(shlex.split(command))


# By name


def test_one_more_network_is_one_class(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(NETWORKS, Means.name, Means)
    [means] = load("means")
    assert (means.score_name, means.identity) == ("fd_means", "means")
    assert means.logits(torch.zeros(1, 3)) is None
    assert means(torch.full((2, 1, 20, 9), 7, dtype=torch.uint8)).tolist() == [[7, 7, 7]] * 2
    assert NamedFeatures(names=("means",)).facts([means])["features"] == "means"


def test_a_name_that_is_none_is_refused_with_those_that_are(tmp_path: Path) -> None:
    unknown = refusal("incption")
    assert "'incption': neither a feature network (expected inception, dinov2, clip, or NAME=FILE" in unknown
    assert "names no file; expected dinov2=FILE, or dinov2" in refusal("dinov2=")
    assert "neither a feature network" in refusal(f"resnet={tmp_path}/weights.pth")


def test_a_checkpoint_of_something_else_is_no_feature_network(file: Path) -> None:
    assert refusal(str(file)).startswith(f"{file}: not a feature network; expected ")


def test_small_networks_of_one_name_are_told_apart_by_their_weights(tmp_path: Path) -> None:
    torch.manual_seed(0)
    first, second = (SmallFeatures("own", (1, 8, 8), dim=6, num_classes=3) for _ in range(2))
    first.save(tmp_path / "first.safetensors")
    assert load_features(tmp_path / "first.safetensors").identity == first.identity != second.identity
    name, _, digest = first.identity.partition(":")
    assert name == "own" and len(digest) == 12
    with torch.no_grad():
        first.head.bias += 1
    assert load_features(tmp_path / "first.safetensors").identity != first.identity


def test_the_way_to_resize_is_refused_where_there_is_no_choice(tmp_path: Path) -> None:
    SmallFeatures("own", (1, 8, 8), dim=6, num_classes=3).save(tmp_path / "own.safetensors")
    for names in (["dinov2"], [f"{tmp_path}/own.safetensors"], ["dinov2", f"{tmp_path}/own.safetensors"]):
        assert refusal(*names, resize="clean").startswith("--resize clean: ")
    assert (
        refusal("inception", resize="bicubic") == "--resize bicubic: expected clean, legacy_pytorch, legacy_tensorflow"
    )


# DINOv2


def test_features_are_those_of_timm(dinov2: SmallDINOv2, file: Path) -> None:
    theirs = timm.create_model(
        SmallDINOv2.variant, pretrained=True, pretrained_cfg_overlay={"file": str(file)}, img_size=224, num_classes=0
    ).eval()
    transform = create_transform(**resolve_data_config({"img_size": 224}, model=theirs))

    def features(images: Tensor) -> Tensor:
        pictures = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images]
        with torch.no_grad():
            return theirs(torch.stack([transform(picture) for picture in pictures]))

    images = varied_images(3, size=224)
    found = dinov2(images)
    assert found.dtype == torch.float32 and found.shape == (3, dinov2.dim)
    torch.testing.assert_close(found, features(images), rtol=1e-5, atol=1e-5)
    # timm's transform rounds resized images to 8 bits, clean-fid and this do not.
    small = varied_images(3, size=60)
    found, expected = dinov2(small), features(small)
    spread = torch.linalg.vector_norm(expected[0] - expected[1])
    assert 0 < torch.linalg.vector_norm(found - expected, dim=1).max() < 0.1 * spread


def test_features_do_not_depend_on_the_batch_and_grey_is_three_equal_channels(dinov2: SmallDINOv2) -> None:
    images = varied_images(3, size=30)
    together, alone = dinov2(images), torch.cat([dinov2(image[None]) for image in images])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    assert torch.equal(dinov2(images[:, :1]), dinov2(images[:, :1].repeat(1, 3, 1, 1)))
    assert torch.equal(dinov2(list(images)), together)


def test_metas_names_in_a_torch_file_are_read_too(
    dinov2: SmallDINOv2, weights: dict[str, Tensor], tmp_path: Path
) -> None:
    torch.save({**weights, "mask_token": torch.zeros(1, 384)}, tmp_path / "dinov2.pth")
    images = varied_images(1)
    assert torch.equal(SmallDINOv2.load(tmp_path / "dinov2.pth")(images), dinov2(images))


def test_it_says_what_it_is_not_comparable_with(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    loaded = SmallDINOv2.load(file)
    assert "not comparable with published figures" in capsys.readouterr().err
    assert (loaded.score_name, loaded.identity) == ("fd_dinov2", "dinov2")
    assert "resample_abs_pos_embed" in loaded.protocol["position_embeddings"]
    json.dumps(dict(loaded.protocol))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda state: {"fc.weight": torch.zeros(10, 512)}, "missing: cls_token"),
        (lambda state: {**state, "register_tokens": torch.zeros(1, 4, 384)}, "not in the model: register_tokens"),
        (lambda state: {**state, "pos_embed": torch.zeros(1, 1000, 384)}, "of another shape: pos_embed"),
        (lambda state: {**state, "pos_embed": torch.zeros(1, 1370, 768)}, "of another shape: pos_embed"),
    ],
)
@pytest.mark.usefixtures("small_instead")
def test_a_file_of_another_network_is_refused(change, told: str, weights: dict[str, Tensor], tmp_path: Path) -> None:
    path = tmp_path / "other.pth"
    torch.save(change(dict(weights)), path)
    message = refusal(f"dinov2={path}")
    assert message.startswith(f"{path}: the weights do not fit") and told in message
    assert "`hf download timm/vit_small_patch14_dinov2.lvd142m model.safetensors`" in message


@pytest.mark.usefixtures("small_instead")
def test_without_a_file_the_weights_are_those_in_the_cache_of_the_hub(
    dinov2: SmallDINOv2, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    message = refusal("dinov2")
    assert "`hf download timm/vit_small_patch14_dinov2.lvd142m model.safetensors`" in message
    assert "dinov2=FILE" in message
    assert "no such file" in refusal(f"dinov2={tmp_path}/none.pth")

    repository = tmp_path / "models--timm--vit_small_patch14_dinov2.lvd142m"
    for folder in ("refs", "snapshots/0123"):
        (repository / folder).mkdir(parents=True)
    (repository / "refs" / "main").write_text("0123")
    (repository / "snapshots" / "0123" / "model.safetensors").symlink_to(file)
    [found] = load("dinov2")
    assert torch.equal(found(varied_images(1)), dinov2(varied_images(1)))
    facts = NamedFeatures(names=("dinov2",)).facts([found])
    assert facts["features"] == "dinov2" and facts["output"] == "class token after the final norm"


# Resizing


def pattern(height: int, width: int) -> np.ndarray:
    """A coloured image [H, W, 3] by a formula."""
    row, column, channel = np.ogrid[:height, :width, :3]
    return ((row * row * 7 + column * 31 + row * column * 5 + channel * 90) % 256).astype(np.uint8)


# At (0, 0) red, (10, 200) green, (298, 298) blue, (150, 20) red, and the mean: by build_resizer of clean-fid 0.1.35.
CLEAN_FID = [
    ("clean", 40, 30, (0.0, 28.9986, 255.0, 191.8521, 126.5868)),
    ("clean", 299, 299, (0.0, 94.0, 122.0, 64.0, 127.8286)),
    ("clean", 350, 601, (17.3977, 115.0096, 179.3136, 165.8473, 127.7667)),
    ("clean", 17, 500, (9.9691, 196.6916, 76.3855, 112.9475, 128.2168)),
    ("legacy_pytorch", 40, 30, (0.0, 49.5989, 229.0, 178.8716, 126.5964)),
    ("legacy_pytorch", 350, 601, (16.4679, 94.4485, 181.1319, 180.6169, 127.7803)),
    ("legacy_pytorch", 17, 500, (10.4197, 217.5399, 65.7331, 85.1521, 128.1498)),
]


@pytest.mark.parametrize(("mode", "height", "width", "expected"), CLEAN_FID)
def test_resizing_is_that_of_clean_fid(mode: str, height: int, width: int, expected: tuple[float, ...]) -> None:
    images = torch.from_numpy(pattern(height, width)).permute(2, 0, 1)[None]
    found = RESIZERS[mode](images, 299)
    assert found.dtype == torch.float32 and found.shape == (1, 3, 299, 299)
    image = found[0].double()
    some = image[0, 0, 0], image[1, 10, 200], image[2, 298, 298], image[0, 150, 20], image.mean()
    assert [float(value) for value in some] == pytest.approx(expected, abs=2e-4)


@pytest.mark.parametrize("mode", RESIZERS)
def test_images_are_resized_one_by_one_and_not_where_they_fit(mode: str) -> None:
    images = varied_images(3, size=40)
    together = RESIZERS[mode](images, 24)
    assert torch.equal(together, torch.cat([RESIZERS[mode](image[None], 24) for image in images]))
    assert torch.equal(RESIZERS[mode](images, 40), images.float())
    assert together.min() >= 0 and together.max() <= 255


def test_the_flag_offers_every_mode() -> None:
    literal, _ = get_args(Resizing)
    assert set(get_args(literal)) == set(RESIZERS)


# Sets of images that differ in size


@pytest.fixture
def uneven(tmp_path: Path) -> Path:
    """Images of several sizes, the first of them and one more grey."""
    (tmp_path / "uneven").mkdir()
    for index, (height, width) in enumerate([(20, 20), (30, 20), (20, 44), (9, 9), (20, 20)]):
        picture = Image.fromarray(pattern(height, width) ^ np.uint8(index * 37))
        (picture.convert("L") if index in (0, 3) else picture).save(tmp_path / "uneven" / f"{index}.png")
    return tmp_path / "uneven"


def test_images_of_several_sizes_are_scored_by_a_network_that_resizes_each(
    uneven: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(NETWORKS, Means.name, Means)
    pictures = [Image.open(path).convert("RGB") for path in sorted(uneven.iterdir())]
    features = torch.cat([Means()(torch.from_numpy(np.array(one)).permute(2, 0, 1)[None]) for one in pictures])
    assert run(f"stats {uneven} {tmp_path}/uneven.npz --features means") == 0
    made = Statistics.load(tmp_path / "uneven.npz")
    np.testing.assert_allclose(made.mu, features.double().mean(0), rtol=1e-6)

    other = Statistics(mu=np.zeros(3), sigma=np.eye(3), count=9)
    other.save(tmp_path / "other.npz")
    assert run(f"fid {uneven} {tmp_path}/other.npz --features means --json {tmp_path}/score.json") == 0
    expected = frechet_distance(Statistics.from_features(features), other)
    assert json.loads((tmp_path / "score.json").read_text())["fd_means"] == pytest.approx(expected, rel=1e-6)


def test_images_of_several_sizes_are_refused_where_nothing_says_how_to_resize_them(
    uneven: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    SmallFeatures("own", (3, 20, 20), dim=3, num_classes=3).save(tmp_path / "own.safetensors")
    assert run(f"stats {uneven} {tmp_path}/uneven.npz --features {tmp_path}/own.safetensors") == 2
    told = capsys.readouterr().err
    assert "1.png is (3, 30, 20)" in told and "--resize MODE" in told
    assert not (tmp_path / "uneven.npz").exists()


@pytest.mark.parametrize("few_side", ["a", "b"])
def test_a_distance_of_few_images_on_either_side_is_shown_with_three_digits(
    few_side: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    SmallFeatures("own", (3, 8, 8), dim=6, num_classes=3).save(tmp_path / "own.safetensors")
    for side in ("a", "b"):
        (tmp_path / side).mkdir()
        for index, image in enumerate(varied_images(4 if side == few_side else 12, size=8, seed=ord(side))):
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / side / f"{index}.png")
    assert run(f"fid {tmp_path}/a {tmp_path}/b --features {tmp_path}/own.safetensors") == 0
    shown = capsys.readouterr()
    assert f"{tmp_path}/{few_side}: 4 images for 6 features" in shown.err
    distance = shown.out.split()[0].removeprefix("FD_own=")
    assert len(distance.partition("e")[0].replace(".", "").lstrip("0")) <= 3
