"""Inception's features, FID and the Inception Score, beside torch-fidelity's own on the same images and weights."""

import os
import pickle
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch_fidelity import calculate_metrics
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_isc import isc_features_to_metric

from neon.checkpoint import save_safetensors
from neon.cli import main
from neon.errors import RequestError, WorkError
from neon.metrics import InceptionScore, Statistics, frechet_distance
from neon.metrics.features import features_of
from neon.metrics.inception import InceptionFeatures
from neon.metrics.small import SmallFeatures
from tests.inception import random_inception, varied_images

GENERATED, REAL = varied_images(24, seed=1), varied_images(16, seed=2)


@dataclass(frozen=True)
class Case:
    """Random weights, and what Neon makes of the images with them."""

    weights: Path
    inception: InceptionFeatures
    features: Tensor
    """of GENERATED"""


@pytest.fixture(scope="session")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    weights = tmp_path_factory.mktemp("inception") / "inception.pth"
    torch.save(random_inception(), weights)
    inception = InceptionFeatures.load(weights)
    return Case(weights, inception, features_of(inception, GENERATED))


def difference(found: Tensor, expected: Tensor) -> float:
    """Relative to the size of what was expected."""
    return float(torch.linalg.vector_norm(found - expected) / torch.linalg.vector_norm(expected))


# The network


def test_features_and_logits_are_those_of_torch_fidelity(case: Case) -> None:
    theirs = FeatureExtractorInceptionV3("theirs", ["2048", "logits_unbiased"], str(case.weights))
    for images in (GENERATED[:4], varied_images(2, size=70), REAL[:2, :, :20]):  # enlarged; not square
        features, logits = theirs(images)
        ours = case.inception(images)
        assert ours.dtype == torch.float32 and ours.shape == (len(images), case.inception.dim)
        assert difference(ours, features) < 1e-5
        assert difference(case.inception.logits(features), logits) < 1e-6


def test_images_are_resized_as_the_network_does_it_unless_another_mode_is_asked_for(case: Case) -> None:
    network = case.inception._network
    usual, named, *others = (
        InceptionFeatures(network, mode) for mode in (None, "legacy_tensorflow", "legacy_pytorch", "clean")
    )
    for images in (GENERATED[:4], varied_images(2, size=70), REAL[:2, :, :20]):
        with torch.no_grad():
            (expected,) = network(images)
        assert torch.equal(usual(images), expected) and torch.equal(named(images), expected)
        assert all(difference(other(images), expected) > 1e-3 for other in others)
    fitting = varied_images(1, size=299)
    assert all(torch.equal(other(fitting), usual(fitting)) for other in others)
    assert usual.identity == named.identity == "inception" and not usual.protocol and not named.protocol
    assert [other.identity for other in others] == ["inception:legacy_pytorch", "inception:clean"]
    assert others[1].protocol == {"resize": "clean"}


def test_images_of_several_sizes_need_a_mode_of_resizing(
    case: Case, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = [*REAL[:2], REAL[2, :, :20], varied_images(1, size=50)[0]]
    (tmp_path / "uneven").mkdir()
    for index, image in enumerate(images):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / "uneven" / f"{index}.png")

    def stats(more: str) -> int:
        return main(f"stats {tmp_path}/uneven {tmp_path}/out.npz --features inception={case.weights} {more}".split())

    assert stats("") == 2
    told = capsys.readouterr().err
    assert "2.png is (3, 20, 32)" in told and "--resize MODE" in told and not (tmp_path / "out.npz").exists()
    assert stats("--resize clean") == 0
    clean = InceptionFeatures(case.inception._network, "clean")
    features = torch.cat([clean(image[None]) for image in images])
    made = Statistics.load(tmp_path / "out.npz", "inception:clean")
    assert difference(torch.from_numpy(made.mu), features.double().mean(0)) < 1e-6
    with pytest.raises(RequestError, match="inception:clean"):
        Statistics.load(tmp_path / "out.npz", "inception")


def test_the_features_of_an_image_do_not_depend_on_the_others_in_its_batch(case: Case) -> None:
    alone = torch.cat([case.inception(GENERATED[:1]), case.inception(GENERATED[21:])])
    assert difference(alone, case.features[[0, 21, 22, 23]]) < 1e-5


def test_a_grey_image_has_the_features_of_its_three_equal_channels(case: Case) -> None:
    grey = varied_images(2, channels=1)
    assert torch.equal(case.inception(grey), case.inception(grey.repeat(1, 3, 1, 1)))


@pytest.mark.parametrize("images", [torch.zeros(2, 3, 8, 8), torch.zeros(2, 4, 8, 8, dtype=torch.uint8)])
def test_images_of_another_kind_are_refused(case: Case, images: Tensor) -> None:
    with pytest.raises(RequestError, match=r"need uint8 images \[B, 1 or 3, H, W\], found"):
        case.inception(images)


def test_a_program_that_asks_for_less_precision_gets_the_same_scores(case: Case) -> None:
    features, logits = case.inception(GENERATED[:4]), case.inception.logits(case.features)
    torch.set_float32_matmul_precision("medium")  # bfloat16 where the processor has it, TF32 on a GPU
    try:
        assert torch.equal(case.inception(GENERATED[:4]), features)
        assert torch.equal(case.inception.logits(case.features), logits)
        assert torch.get_float32_matmul_precision() == "medium", "the program's choice must survive"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_only_inception_earns_the_name_fid_and_an_inception_score(case: Case) -> None:
    assert case.inception.score_name == "fid"
    other = SmallFeatures("inception", (1, 8, 8), dim=6, num_classes=3)
    assert other.score_name == "fd_inception"
    assert other.logits(torch.zeros(2, 6)) is None


# The file of its weights


def test_weights_are_read_from_safetensors_too(case: Case, tmp_path: Path) -> None:
    save_safetensors(tmp_path / "inception.safetensors", torch.load(case.weights), {})
    again = InceptionFeatures.load(tmp_path / "inception.safetensors")
    assert torch.equal(again(GENERATED[:1]), case.inception(GENERATED[:1]))


def test_without_a_name_the_weights_are_those_in_the_cache_of_torch_fidelity(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    cached = tmp_path / "hub" / "checkpoints" / "weights-inception-2015-12-05-6726825d.pth"
    with pytest.raises(RequestError) as caught:
        InceptionFeatures.load()
    message = str(caught.value)
    assert message.startswith(f"{cached}: no such file") and "--inception_weights FILE" in message
    assert f"`curl -L --create-dirs -o {cached} https://github.com/toshas/torch-fidelity/" in message
    assert "\n" not in message and not cached.parent.exists()

    cached.parent.mkdir(parents=True)
    cached.symlink_to(case.weights)
    assert torch.equal(InceptionFeatures.load()(GENERATED[:1]), case.inception(GENERATED[:1]))


def test_a_file_of_something_else_is_refused_in_one_line(case: Case, tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"

    def refusal() -> str:
        with pytest.raises(RequestError) as caught:
            InceptionFeatures.load(path)
        assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)
        return str(caught.value)

    path.write_bytes(b"<!DOCTYPE html><html>Not Found</html>")
    assert "HTML" in refusal()
    torch.save({"fc.weight": torch.zeros(10, 512)}, path)
    assert 'Missing key(s) in state_dict: "Conv2d_1a_3x3.conv.weight"' in refusal()
    torch.save({**torch.load(case.weights), "fc.weight": torch.zeros(1000, 2048)}, path)
    assert "size mismatch for fc.weight: copying a param with shape torch.Size([1000, 2048])" in refusal()
    assert "fetch them with `curl" in refusal()


def test_nothing_in_a_weights_file_is_executed(tmp_path: Path) -> None:
    class Hostile:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.system, (f"touch {tmp_path / 'executed'}",)

    pickled, saved = tmp_path / "pickled.pth", tmp_path / "saved.pth"
    pickled.write_bytes(pickle.dumps(Hostile()))
    torch.save(OrderedDict(harmless=torch.zeros(2), hostile=Hostile()), saved)
    for path in (pickled, saved):
        with pytest.raises(RequestError, match=path.name):
            InceptionFeatures.load(path)
    assert not (tmp_path / "executed").exists()


# Scores


@pytest.mark.slow
def test_fid_and_inception_score_of_png_folders_are_those_of_torch_fidelity(case: Case, tmp_path: Path) -> None:
    for folder, images in (("generated", GENERATED), ("real", REAL)):
        (tmp_path / folder).mkdir()
        for index, image in enumerate(images):
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / folder / f"{index:08d}.png")
    theirs = calculate_metrics(
        input1=str(tmp_path / "generated"),
        input2=str(tmp_path / "real"),
        fid=True,
        isc=True,
        feature_extractor_weights_path=str(case.weights),
        cuda=False,
        cache=False,
        save_cpu_ram=True,
        verbose=False,
    )
    generated = Statistics.from_features(case.features)
    fid = frechet_distance(Statistics.from_features(features_of(case.inception, REAL)), generated)
    # With fewer images than features, torch-fidelity sums the roots of 2,000 eigenvalues that are zero up to rounding.
    assert fid == pytest.approx(theirs["frechet_inception_distance"], rel=2e-6)
    score = InceptionScore(len(GENERATED))
    score.update(case.inception.logits(case.features))
    expected = theirs["inception_score_mean"], theirs["inception_score_std"]
    assert score.score() == pytest.approx(expected, rel=1e-4)
    assert expected[0] > 1.5, "images that the network does not tell apart would test nothing"


def test_the_distance_is_torch_fidelitys_where_its_formula_is_well_conditioned(case: Case) -> None:
    generated, real = case.features.double()[:, :12], case.features.double()[:, 12:24]  # fewer features than images
    theirs = fid_statistics_to_metric(*map(fid_features_to_statistics, (generated, real)), verbose=False)
    ours = frechet_distance(Statistics.from_features(generated), Statistics.from_features(real))
    assert ours == pytest.approx(theirs["frechet_inception_distance"], rel=1e-10)


# The Inception Score


def spread_logits(count: int) -> Tensor:
    return 3 * torch.randn(count, 1008, generator=torch.Generator().manual_seed(count))


@pytest.mark.parametrize(("count", "splits", "seed"), [(10, 10, 2020), (137, 10, 2020), (60, 7, 3), (25, 1, 0)])
def test_the_streamed_inception_score_is_that_of_all_logits_at_once(count: int, splits: int, seed: int) -> None:
    logits = spread_logits(count)
    score = InceptionScore(count, splits, seed)
    for block in logits.split([0, 3, count - 3]):
        score.update(block)
    theirs = isc_features_to_metric(logits, splits=splits, shuffle=True, rng_seed=seed)
    expected = theirs["inception_score_mean"], theirs["inception_score_std"]
    assert score.score() == pytest.approx(expected, rel=1e-10, abs=1e-10)


def test_sure_answers_score_the_number_of_classes_and_equal_answers_score_one() -> None:
    sure = InceptionScore(12, splits=1)
    sure.update(2000 * torch.eye(1008)[torch.arange(12) % 4])  # probabilities of the other classes underflow to 0
    assert sure.score() == pytest.approx((4, 0), abs=1e-12)
    equal = InceptionScore(20)
    equal.update(spread_logits(1).expand(20, -1))
    assert equal.score() == pytest.approx((1, 0), abs=1e-12)


def test_an_inception_score_that_was_saved_and_restored_goes_on_bit_identically() -> None:
    blocks = spread_logits(50).split(13)
    straight, stopped = InceptionScore(50, splits=4, seed=9), InceptionScore(50, splits=4, seed=9)
    for block in blocks[:2]:
        straight.update(block)
        stopped.update(block)
    state = stopped.state()
    stopped.update(blocks[0])  # what happens after saving does not reach the saved state
    resumed = InceptionScore.from_state(state)
    for block in blocks[2:]:
        straight.update(block)
        resumed.update(block)
    assert resumed.score() == straight.score()


def test_a_saved_inception_score_with_missing_or_misshapen_entries_is_refused() -> None:
    state = InceptionScore(20).state()
    with pytest.raises(RequestError, match=r"lacks \['seed'\]"):
        InceptionScore.from_state({name: tensor for name, tensor in state.items() if name != "seed"})
    with pytest.raises(RequestError, match="must be"):
        InceptionScore.from_state({**state, "negentropy": torch.zeros(9, dtype=torch.float64)})


def test_an_inception_score_needs_all_of_its_images_and_no_more() -> None:
    with pytest.raises(RequestError, match="10 splits needs at least 10 images, found 9"):
        InceptionScore(9)
    score = InceptionScore(20)
    score.update(spread_logits(15))
    with pytest.raises(RequestError, match="20 images has seen 15"):
        score.score()
    with pytest.raises(RequestError, match="20 images was given 30"):
        score.update(spread_logits(15))
    with pytest.raises(RequestError, match=r"floats of shape \[B, 1008\], found torch.float32 \[5, 1000\]"):
        score.update(torch.zeros(5, 1000))


def test_logits_that_are_not_finite_fail_the_work() -> None:
    score = InceptionScore(10)
    score.update(torch.where(torch.arange(10)[:, None] == 4, np.nan, spread_logits(10)))
    with pytest.raises(WorkError, match="class logits of 10 images are not finite"):
        score.score()
