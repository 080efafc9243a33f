"""Gradient alignment: closed forms of a Gaussian, and standard errors."""

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from neon.errors import RequestError, WorkError
from neon.model import GenerativeModel
from neon.noise import Noise
from neon.recipe import Recipe
from neon.runtime.distributed import Processes, processes
from neon.runtime.files import write_json
from neon.tune.gradients import alignment, gradient_alignment, gradients
from neon.tune.predict import Estimate, sign_of
from tests.tiny import tiny_colour_images, tiny_edm, tiny_images
from tests.workers import Workers

DIMENSIONS = 4
ALONE = Processes()


class Gaussian(GenerativeModel):
    """Independent normal variables, trained by the negative log likelihood of already encoded points."""

    architecture = "gaussian"
    network: nn.ParameterDict

    def __init__(self, mean: float = 0.0, variance: float = 1.0) -> None:
        super().__init__()
        self.network = nn.ParameterDict(
            {
                "mean": torch.full((DIMENSIONS,), mean),
                "log_variance": torch.full((DIMENSIONS,), math.log(variance)),
            }
        )
        self.image_shape, self.num_classes, self.recipe = (1, 1, DIMENSIONS), 0, Recipe()

    def labels(self, indices: Sequence[int], noise: Noise) -> None:
        return None

    def sample(self, noise: Noise, labels: Tensor | None, settings: Any) -> Tensor:
        raise NotImplementedError

    def encode(self, images: Tensor, noise: Noise) -> Tensor:
        raise NotImplementedError

    def training_loss(self, examples: Tensor, labels: Tensor | None, noise: Noise) -> Tensor:
        mean, log_variance = self.network["mean"], self.network["log_variance"]
        return ((examples - mean).square() * (-log_variance).exp() + log_variance).sum(1) / 2


class Points:
    """Points drawn from a normal distribution, as a set of encoded images."""

    encoded, labels, image_shape = True, None, (1, 1, DIMENSIONS)

    def __init__(self, count: int, seed: int, *, mean: float = 0.0, variance: float = 1.0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.points = mean + variance**0.5 * torch.randn(count, DIMENSIONS, generator=generator)
        self.path = Path(f"points {seed}")

    def __len__(self) -> int:
        return len(self.points)

    def examples(self, indices: Sequence[int]) -> Tensor:
        return self.points[torch.as_tensor(indices)]

    def load(self, indices: Sequence[int]) -> tuple[Tensor, None]:
        return self.examples(indices), None


def gaussian_report(mean: float, variance: float, *, seed: int = 0, count: int = 2000, batch_size: int = 250):
    """The report on a Gaussian model of unit normal data that samples with 0.9 of its variance."""
    real = Points(count, 2 * seed)
    synthetic = Points(count, 2 * seed + 1, mean=mean, variance=0.9 * variance)
    return gradient_alignment(
        Gaussian(mean, variance), real, synthetic, num_images=count, batch_size=batch_size, processes=ALONE
    )


def true_gradients(mean: float, variance: float) -> tuple[Tensor, Tensor]:
    """The expected gradients on unit normal data and on samples with 0.9 of the variance."""
    on_real = torch.tensor([mean / variance, (1 - (1 + mean**2) / variance) / 2])
    on_synthetic = torch.tensor([0.0, (1 - 0.9) / 2])
    return on_real.repeat_interleave(DIMENSIONS), on_synthetic.repeat_interleave(DIMENSIONS)


@pytest.mark.parametrize("seed", [1, 2])
def test_alignment_is_that_of_the_true_gradients(seed: int) -> None:
    found = gaussian_report(0.3, 0.7, seed=seed, count=20_000, batch_size=1000).alignment
    g, h = true_gradients(0.3, 0.7)
    assert found.inner.value == pytest.approx(float(g @ h), abs=3 * found.inner.error)
    assert found.inner.error < 0.2 * abs(float(g @ h))
    assert found.cosine is not None
    assert found.cosine.value == pytest.approx(float(g @ h / g.norm() / h.norm()), abs=3 * found.cosine.error)
    assert found.cosine.error < 0.1
    assert found.real_norm == pytest.approx(float(g.norm()), rel=0.05)
    assert found.synthetic_norm == pytest.approx(float(h.norm()), rel=0.1)


def test_gradients_of_a_narrow_sampler_oppose_real_ones_only_if_the_model_is_too_narrow() -> None:
    for variance, sign in ((0.8, -1), (1.25, 1)):
        inner = gaussian_report(0.0, variance).alignment.inner
        assert sign * inner.value > 2 * inner.error
    inner = gaussian_report(0.0, 1.0, seed=3).alignment.inner
    assert abs(inner.value) < 2 * inner.error


def test_noise_does_not_pull_the_cosine_towards_0() -> None:
    """With six batches whose noise is as long as the gradient, the cosine of the mean gradients is a seventh short."""
    generator = torch.Generator().manual_seed(0)
    direction = torch.nn.functional.normalize(torch.randn(400, generator=generator), dim=0)

    def noisy() -> Tensor:
        return direction + torch.randn(6, 400, generator=generator) / 20

    plain, naive = [], []
    for _ in range(100):
        g, h = noisy(), noisy()
        found = alignment(list(g), list(h)).cosine
        assert found is not None
        plain.append(found.value)
        naive.append(float(torch.cosine_similarity(g.mean(0), h.mean(0), dim=0)))
    assert sum(plain) / 100 == pytest.approx(1, abs=0.02)
    assert sum(naive) / 100 == pytest.approx(6 / 7, abs=0.02)


@pytest.mark.parametrize("length", [0.0, 0.1, 1.0], ids=["noise only", "mixed", "mostly signal"])
def test_standard_errors_are_the_spread_over_repetitions(length: float) -> None:
    generator = torch.Generator().manual_seed(1)
    g, h = torch.randn(2, 50, generator=generator) * length
    repetitions = [
        alignment(list(g + torch.randn(8, 50, generator=generator)), list(h + torch.randn(6, 50, generator=generator)))
        for _ in range(300)
    ]
    for found in ([r.inner for r in repetitions], [r.cosine for r in repetitions if length == 1 and r.cosine]):
        if found:
            values, errors = torch.tensor([(estimate.value, estimate.error) for estimate in found]).T
            assert 0.9 < float(errors.square().mean().sqrt() / values.std()) < 1.25
    if length == 0:
        wrong = sum(abs(r.inner.value) > 2 * r.inner.error for r in repetitions) / 300
        assert 0.01 < wrong < 0.07, "noise passes two standard errors about once in twenty times"


def test_a_gradient_that_is_hidden_in_noise_has_no_cosine() -> None:
    real = [torch.tensor([1.0, 0.0]), torch.tensor([-1.0, 0.1])]
    synthetic = [torch.tensor([0.0, 1.0]), torch.tensor([0.1, 1.0])]
    found = alignment(real, synthetic)
    assert found.cosine is None and found.real_norm is None
    assert found.synthetic_norm == pytest.approx(1)


def awake(model: GenerativeModel) -> GenerativeModel:
    """An untrained model whose parts that begin at 0 do not stay there."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        for parameter in model.network.parameters():
            parameter.data.add_(0.05 * torch.randn_like(parameter))
    return model


def test_the_mean_gradient_does_not_depend_on_micro_batches() -> None:
    settings = {"batches": 2, "batch_size": 8, "seed": 0, "processes": ALONE}
    whole, cut = (list(gradients(tiny_edm(), tiny_images(), micro_batch=size, **settings)) for size in (8, 2))
    for a, b in zip(whole, cut, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def tiny_report(**changes: Any):
    """The report on a tiny EDM with two batches of each set."""
    model = awake(tiny_edm())
    keywords = {"real": tiny_images(40), "synthetic": tiny_images(24, seed=1)}
    keywords |= {"batch_size": 12, "processes": ALONE, **changes}
    return gradient_alignment(model, **keywords)


def test_equal_seeds_give_equal_reports_and_others_do_not() -> None:
    first = tiny_report()
    assert first == tiny_report()
    assert first.alignment != tiny_report(seed=1).alignment


def test_a_report_is_json_and_a_line(tmp_path: Path) -> None:
    report = tiny_report()
    write_json(tmp_path / "align.json", dataclasses.asdict(report))
    assert json.loads((tmp_path / "align.json").read_text()) == dataclasses.asdict(report)
    assert (report.num_real, report.num_synthetic) == (36, 24)
    assert report.alignment.cosine is None or str(report.alignment.cosine) in str(report)
    assert "36 real and 24 synthetic images" in str(report)


@pytest.mark.parametrize(
    ("value", "error", "expected"),
    [(-2.3, 1.0, "w > 0"), (2.3, 1.0, "w < 0"), (-2.2, 1.0, "undecided"), (0.0, 0.0, "undecided")],
)
def test_a_sign_is_predicted_where_95_percent_are_on_one_side(value: float, error: float, expected: str) -> None:
    assert sign_of(Estimate(value=value, error=error)) == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"real": tiny_images(20)}, r"tiny images: 20 images do not make two batches of 12"),
        ({"num_images": 23}, "23 images do not make two batches of 12"),
        ({"real": tiny_colour_images()}, r"images are \(3, 8, 8\) .* the model makes \(1, 8, 8\)"),
        ({"micro_batch": 5}, "a batch of 12 images in micro-batches of 5"),
        ({"batch_size": 0}, "a batch of 0 images"),
    ],
)
def test_what_does_not_fit_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        tiny_report(**changes)


def test_a_conditional_model_needs_labels() -> None:
    images = tiny_images()
    images.labels = None
    with pytest.raises(RequestError, match="no labels, but the model knows 3 classes"):
        tiny_report(synthetic=images)


def test_broken_weights_are_told() -> None:
    model = tiny_edm()
    next(model.parameters()).data.fill_(torch.nan)
    with pytest.raises(WorkError, match="gradient on batch 0 of tiny images is not finite"):
        gradient_alignment(model, tiny_images(), tiny_images(), batch_size=8, processes=ALONE)


def align_in_a_process() -> None:
    with processes("cpu") as group:
        report = tiny_report(processes=group)
        write_json(Path(f"{group.rank}.json"), dataclasses.asdict(report))


@pytest.mark.slow
def test_the_report_does_not_depend_on_the_number_of_processes(tmp_path: Path, workers: Workers) -> None:
    workers.run("tests.test_gradients:align_in_a_process", folder=tmp_path, world_size=2)
    for rank in (0, 1):
        assert json.loads((tmp_path / f"{rank}.json").read_text()) == dataclasses.asdict(tiny_report())
