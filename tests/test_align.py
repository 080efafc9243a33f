"""`neon align`: the predicted curve where it is exact, its errors, the command."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from neon.checkpoint import load_state
from neon.cli import app as cli
from neon.data.images import write_images, write_labels
from neon.errors import DegenerateError, RequestError
from neon.evaluate import Reference, evaluate
from neon.merge import LiveMerge
from neon.metrics import FrechetReference, Statistics, frechet_distance
from neon.metrics.small import load_features
from neon.model import load_model
from neon.noise import Purpose, image_seeds
from neon.runtime.distributed import Processes, processes
from neon.runtime.files import write_json
from neon.tune.align import features_at, predict_from_few, rounding
from neon.tune.predict import (
    CERTAIN,
    NODES,
    Estimate,
    Prediction,
    distances_along,
    interpolation,
    interval_around,
    lowest_point,
    predict,
)
from tests.programs import work_in, write_pair
from tests.tiny import tiny_images
from tests.workers import Workers

ALONE = Processes()
DIMENSIONS = 4


def generator_of_gaussians(count: int, seed: int, drift: float = 0.4, growth: float = 0.5):
    """Features at w of a generator of N(drift w, (1 + growth w)^2) in each dimension, linear in w."""
    noise = torch.randn(count, DIMENSIONS, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return lambda w: drift * w + (1 + growth * w) * noise


def real(mean: float, deviation: float) -> Statistics:
    return Statistics(mu=np.full(DIMENSIONS, mean), sigma=np.eye(DIMENSIONS) * deviation**2)


FOUR = (*NODES, 1.0)


def prediction(count: int, seed: int, reference: Statistics, nodes: tuple[float, ...] = FOUR):
    at = generator_of_gaussians(count, seed)
    return predict(torch.stack([at(w) for w in nodes]), reference, nodes)


def best_w(mean: float, deviation: float, drift: float = 0.4, growth: float = 0.5) -> float:
    """Where (drift w - mean)^2 + (1 + growth w - deviation)^2 is lowest."""
    return (drift * mean + growth * (deviation - 1)) / (drift**2 + growth**2)


@pytest.mark.parametrize(("mean", "deviation"), [(0.5, 1.4), (-0.2, 0.8)])
def test_the_best_w_of_a_gaussian_is_found(mean: float, deviation: float) -> None:
    found = prediction(20_000, 1, real(mean, deviation))
    expected = best_w(mean, deviation)
    assert found.w.value == pytest.approx(expected, abs=3 * found.w.error)
    assert found.w.error < 0.05
    assert found.sign == ("w > 0" if expected > 0 else "w < 0")
    gain = DIMENSIONS * (mean**2 + (1 - deviation) ** 2)
    gain -= DIMENSIONS * ((0.4 * expected - mean) ** 2 + (1 + 0.5 * expected - deviation) ** 2)
    assert found.gain.value == pytest.approx(gain, abs=3 * found.gain.error)


def test_distances_of_features_that_are_linear_in_w_are_those_of_the_features_themselves() -> None:
    reference, at, ws = real(0.5, 1.4), generator_of_gaussians(10_000, 2), [-1.0, -0.3, 0.0, 1.7]
    found = distances_along(reference, NODES, ws, torch.stack([at(w) for w in NODES]))(torch.arange(10_000))
    for w, distance in zip(ws, found[0].tolist(), strict=True):
        assert distance == pytest.approx(frechet_distance(reference, Statistics.from_features(at(w))), abs=0.01)


@pytest.mark.parametrize(("count", "dim"), [(100, 40), (100, 400), (60, 600)])
def test_few_images_do_not_predict_another_w_than_many(count: int, dim: int) -> None:
    """Real features of a wide spectrum; images spread as these at w = 0.8, in directions turned by 0.3 of it.

    With the bias that distances of so few images have, every w is far too low: near 0 with 400 features.
    """
    generator = torch.Generator().manual_seed(0)
    roots = torch.arange(1, dim + 1, dtype=torch.float64) ** -0.5
    turn = torch.linalg.qr(torch.eye(dim) + 0.3 * torch.randn(dim, dim, generator=generator) / dim**0.5)[0].double()
    reference = Statistics(mu=np.full(dim, 0.02), sigma=np.diag(roots.square().numpy()))

    def spread(w: float) -> torch.Tensor:
        """Maps noise to features."""
        return (0.6 + 0.5 * w) * roots[:, None] * turn.T

    def distance(w: float) -> float:
        factor = spread(w).numpy()
        return frechet_distance(reference, Statistics(mu=np.full(dim, 0.01 * w), sigma=factor @ factor.T))

    slope, curvature = distance(1) - distance(-1), distance(1) - 2 * distance(0) + distance(-1)
    expected = -slope / (2 * curvature)  # a parabola: all of its covariances are multiples of one
    found = []
    for seed in range(5):
        noise = torch.randn(count, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        features = torch.stack([0.01 * w + noise @ spread(w).T for w in FOUR])
        found.append(predict(features, reference, FOUR))
    values = torch.tensor([one.w.value for one in found])
    assert float(values.mean()) == pytest.approx(expected, abs=0.06)
    assert sum(low <= expected <= high for low, high in (one.interval for one in found)) >= 4
    assert np.mean([one.curve[0.0] for one in found]) == pytest.approx(distance(0.0), rel=0.1)


def test_the_interval_holds_what_the_interpolation_leaves_out() -> None:
    """A mean that grows faster than a parabola: three nodes are surely wrong, the fourth shows by how much."""
    noise = torch.randn(2000, DIMENSIONS, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    features = torch.stack([noise + math.expm1(2 * w) * torch.ones(DIMENSIONS) for w in FOUR])
    reference, best = real(4.0, 1.0), math.log(5) / 2
    three, four = predict(features[:3], reference), predict(features, reference, FOUR)
    assert not three.interval[0] <= best <= three.interval[1] or three.interval[1] == max(three.curve)
    assert four.interval[0] < best < four.interval[1] < max(four.curve)
    assert abs(four.w.value - best) < abs(three.w.value - best)
    assert CERTAIN * four.w.error < (four.interval[1] - four.interval[0]) / 4, "images alone tell w far better"


def test_intervals_hold_the_best_w_as_often_as_they_say() -> None:
    """No error of interpolation here: what is left is that of the images."""
    expected = best_w(0.5, 1.4)
    intervals = [prediction(200, seed, real(0.5, 1.4)).interval for seed in range(100)]
    assert 88 <= sum(low <= expected <= high for low, high in intervals) <= 100
    assert max(high - low for low, high in intervals) < 1


@pytest.mark.parametrize(
    ("w", "interval", "expected"), [(0.9, (0.4, 1.0), 1.0), (-0.2, (-0.6, 0.1), -1.0), (0.1, (-0.1, 0.3), 0.25)]
)
def test_the_last_node_lies_where_the_lowest_distance_may_be(
    w: float, interval: tuple[float, float], expected: float
) -> None:
    nothing = Estimate(value=0.0, error=0.0)
    at_w = Estimate(value=w, error=0.0)
    assert Prediction(
        nodes=NODES, slope=nothing, w=at_w, interval=interval, gain=nothing, curve={}
    ).next_node() == expected  # fmt: skip


def test_an_interval_ends_where_the_slope_is_certain_or_with_the_curve() -> None:
    ws = [0.0, 0.5, 1.0, 1.5]
    slopes = torch.tensor([-3.0, -1.0, 1.0, 3.0])
    assert interval_around(0.75, ws, slopes, torch.tensor([2.0] * 4)) == (0.25, 1.25)
    assert interval_around(0.75, ws, slopes, torch.tensor([0.0] * 4)) == (0.75, 0.75)
    assert interval_around(0.5, ws, slopes, torch.tensor([5.0, 2.0, 1.0, 1.0])) == (0.0, 1.0)
    assert interval_around(1.5, ws, torch.tensor([-3.0, -2.0, -1.0, -1.0]), torch.tensor([0.5] * 4)) == (1.5, 1.5)
    assert interval_around(1.5, ws, torch.tensor([-3.0, -2.0, -1.0, -1.0]), torch.tensor([1.5] * 4)) == (0.75, 1.5)


def test_standard_errors_are_the_spread_over_repetitions() -> None:
    found = [prediction(300, seed, real(0.5, 1.4)) for seed in range(80)]
    for name in ("slope", "w", "gain"):
        values, errors = torch.tensor([(getattr(one, name).value, getattr(one, name).error) for one in found]).T
        assert float(errors.square().mean().sqrt() / values.std()) == pytest.approx(1, abs=0.3)


def test_a_base_that_is_as_good_as_real_images_is_undecided() -> None:
    signs = [prediction(300, seed, real(0.0, 1.0)).sign for seed in range(40)]
    assert signs.count("undecided") >= 34, "noise passes that many standard errors about once in twenty times"


def test_classes_in_turn_are_no_noise() -> None:
    """Ten classes in turn, far apart: groups that were classes would take their distances for noise."""
    at, centres = generator_of_gaussians(300, 3), torch.arange(10).repeat(30)[:, None] * 3.0
    features = torch.stack([at(w) + centres for w in NODES])
    reference = Statistics.from_features(
        generator_of_gaussians(10_000, 4)(1.0) + 3.0 * (torch.arange(10_000) % 10)[:, None]
    )
    in_turn, sorted_ = (
        predict(features[:, order], reference) for order in (torch.arange(300), centres[:, 0].argsort())
    )
    assert in_turn.w.error == pytest.approx(sorted_.w.error, rel=1)


def test_values_between_the_nodes_are_those_of_the_polynomial() -> None:
    for w in (-1.0, 0.25, 2.0):
        values = torch.tensor([3 * node**2 - node + 2 for node in NODES], dtype=torch.float64)
        assert float(interpolation(NODES, w) @ values) == pytest.approx(3 * w**2 - w + 2)


def test_the_lowest_point_is_that_of_the_parabola_or_an_end() -> None:
    ws = [0.0, 0.5, 1.0, 1.5]
    w, lowest_value = lowest_point(ws, torch.tensor([(w - 0.8) ** 2 + 3 for w in ws], dtype=torch.float64))
    assert (float(w), float(lowest_value)) == pytest.approx((0.8, 3))
    assert tuple(map(float, lowest_point(ws, torch.tensor([4.0, 3.0, 2.0, 1.0])))) == (1.5, 1.0)


def test_features_without_noise_to_tell_are_refused() -> None:
    with pytest.raises(RequestError, match="19 images say nothing of the noise; expected at least 20"):
        predict(torch.randn(3, 19, DIMENSIONS), real(0.0, 1.0))
    features = torch.randn(3, 40, DIMENSIONS)
    features[1, 7, 0] = torch.nan
    with pytest.raises(DegenerateError, match="features are not finite"):
        predict(features, real(0.0, 1.0))


FLAGS = (
    "--base base.safetensors --self-trained tuned.safetensors --stats real.npz --features features.safetensors "
    "--num-images 40 --batch-size 7 --set num_steps=2 solver=euler --device cpu"
)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, weights some way from it, features and statistics of real images, and some that do not fit."""
    folder = tmp_path_factory.mktemp("files")
    write_pair(folder)
    return folder


@pytest.fixture
def here(files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return work_in(tmp_path, files, monkeypatch)


def align(flags: str) -> int:
    return cli.main(["align", *FLAGS.split(), *flags.split()])


def test_the_command_tells_and_writes_what_evaluations_of_the_same_images_give(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert align("--json align.json") == 0
    found = json.loads(Path("align.json").read_text())
    table = capsys.readouterr().out
    assert "fd_tiny6 predicted from 40 images at each of w = -0.5, 0, 0.5, " in table and found["sign"] in table
    assert str(Estimate(**found["slope"])) in table and str(Estimate(**found["gain"])) in table
    model = load_model("base.safetensors")
    live = LiveMerge(model.network, load_state("base.safetensors"), load_state("tuned.safetensors"))
    settings = type(model.default_settings)(num_steps=2, solver="euler")
    for w in NODES:
        live.set(w)
        reference = Reference(
            extractor=load_features("features.safetensors"), frechet=FrechetReference(Statistics.load("real.npz"))
        )  # fmt: skip
        scores = evaluate(
            model, image_seeds(Purpose.SELECTION, 0, 40), settings, [reference], batch_size=7, processes=ALONE,
        )  # fmt: skip
        assert 0.9 * scores.distance < found["curve"][str(w)] < scores.distance, "less the bias of 40 images"


def test_gradients_are_compared_of_real_and_synthetic_images(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_images("synthetic", range(256), tiny_images(256, 1).images)
    write_labels("synthetic", tiny_images(256, 1).labels.tolist(), 256)  # type: ignore[union-attr]
    assert align("--synthetic synthetic --real synthetic --json align.json") == 0
    found = json.loads(Path("align.json").read_text())
    cosine = Estimate(**found["gradients"]["alignment"]["cosine"])
    assert found["gradients"]["num_real"] == 256 and cosine.value > 0
    table = capsys.readouterr().out
    assert f"the loss on 256 real and 256 synthetic images: {cosine}" in table
    assert [entry["dtype"] for entry in found["rounding"]] == ["float32", "bfloat16", "float16"]
    assert f"in bfloat16  {found['rounding'][1]['share_kept']:.1%} of the elements of the update survive" in table


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--stats seven.npz", "statistics of 7 features, but tiny6 has 6"),
        ("--num-images 19", "--num_images 19: too few to tell their noise; expected at least 20"),
        ("--real real", "--real, --synthetic: gradients are compared of both"),
        ("--real real --synthetic real", "real: 60 images do not make two batches of 128"),
        ("--batch-size 0", "--batch_size 0: expected at least 1"),
        ("--self-trained wide.safetensors", "do not fit each other"),
        ("--self-trained nowhere.safetensors", "nowhere.safetensors"),
        ("--set steps=3", "--set steps=3: expected NAME=VALUE"),
        ("--vae base.safetensors", "leave its autoencoder out"),
    ],
)
def test_what_does_not_fit_is_refused_before_sampling(
    here: Path, capsys: pytest.CaptureFixture[str], flags: str, message: str
) -> None:
    assert align(flags) == 2
    told = capsys.readouterr().err
    assert message in told and "sampling at" not in told


def features_in_a_process(*arguments: str) -> None:
    base, tuned, features, output = map(Path, arguments)
    with processes("cpu") as group:
        model = load_model(base)
        live = LiveMerge(model.network, load_state(base), load_state(tuned))
        settings = type(model.default_settings)(num_steps=2, solver="euler")
        extractor, reference = load_features(features), Statistics.load(base.with_name("real.npz"))

        def sample(ws: Sequence[float]) -> torch.Tensor:
            return features_at(model, live, ws, settings, extractor, 40, batch_size=7, processes=group)

        write_json(output / f"{group.rank}.json", asdict(predict_from_few(sample, reference, group)))


@pytest.mark.slow
def test_the_prediction_does_not_depend_on_the_number_of_processes(here: Path, workers: Workers) -> None:
    names = [str(here / name) for name in ("base.safetensors", "tuned.safetensors", "features.safetensors")]
    workers.run("tests.test_align:features_in_a_process", *names, str(here), folder=here, world_size=2)
    assert align("--json align.json") == 0
    alone = json.loads(Path("align.json").read_text())
    for rank in (0, 1):
        found = json.loads(Path(f"{rank}.json").read_text())
        assert found == {key: alone[key] for key in found}


def test_small_updates_do_not_survive_in_low_precision() -> None:
    network = nn.Linear(50, 50)
    state = {name: p.detach() * (1 + 1e-3) for name, p in network.named_parameters()}
    wide, half, brain = rounding(network, state, [torch.float32, torch.float16, torch.bfloat16, torch.float32])
    assert (wide.dtype, half.dtype, brain.dtype) == ("float32", "float16", "bfloat16")
    assert wide.share_kept == 1 and wide.relative_error < 1e-3
    # A step of 2^-10 of the value against spacings of 2^-10 to 2^-11 and of 2^-7 to 2^-8.
    assert half.share_kept > 0.9 and brain.share_kept < 0.3
    assert brain.relative_error > 3 * half.relative_error
