"""Gradient alignment: closed forms of a Gaussian, its signs and standard errors, and derivatives against a fit."""

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from imm.loss import IMMLoss
from neon.errors import RequestError, WorkError
from neon.model import GenerativeModel
from neon.noise import Noise
from neon.recipe import Recipe
from neon.runtime.distributed import Processes, processes
from neon.runtime.files import write_json
from neon.runtime.launch import run_in_processes
from neon.tune.gradients import (
    Estimate,
    alignment,
    curve,
    gradient_report,
    gradients,
    lowest,
    text_table,
)
from neon.tune.predict import sign_of
from tests.tiny import tiny_colour_images, tiny_edm, tiny_images, tiny_imm, tiny_var, tiny_xar

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

    def load(self, indices: Sequence[int]) -> tuple[Tensor, None]:
        return self.points[torch.as_tensor(indices)], None


class Latents(Points):
    """Means and deviations of latents for `tiny_imm`, of three classes."""

    image_shape = (3, 16, 16)

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.points, self.path = torch.rand(40, 8, 2, 2, generator=generator), Path("latents")
        self.labels = torch.randint(3, (40,), generator=generator)

    def load(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        chosen = torch.as_tensor(indices)
        return self.points[chosen], self.labels[chosen]


def gaussian_report(mean: float, variance: float, *, seed: int = 0, count: int = 2000, batch_size: int = 250):
    """The report on a Gaussian model of unit normal data that samples with 0.9 of its variance."""
    real = Points(count, 2 * seed)
    synthetic = Points(count, 2 * seed + 1, mean=mean, variance=0.9 * variance)
    return gradient_report(
        Gaussian(mean, variance), real, synthetic, num_images=count, batch_size=batch_size, processes=ALONE
    )


def true_gradients(mean: float, variance: float) -> tuple[Tensor, Tensor]:
    """The expected gradients on unit normal data and on samples with 0.9 of the variance."""
    on_real = torch.tensor([mean / variance, (1 - (1 + mean**2) / variance) / 2])
    on_synthetic = torch.tensor([0.0, (1 - 0.9) / 2])
    return on_real.repeat_interleave(DIMENSIONS), on_synthetic.repeat_interleave(DIMENSIONS)


@pytest.mark.parametrize("seed", [1, 2])
def test_alignment_is_that_of_the_true_gradients(seed: int) -> None:
    found = gaussian_report(0.3, 0.7, seed=seed, count=20_000, batch_size=1000).plain
    g, h = true_gradients(0.3, 0.7)
    assert found.inner.value == pytest.approx(float(g @ h), abs=3 * found.inner.error)
    assert found.inner.error < 0.2 * abs(float(g @ h))
    assert found.cosine is not None
    assert found.cosine.value == pytest.approx(float(g @ h / g.norm() / h.norm()), abs=3 * found.cosine.error)
    assert found.cosine.error < 0.1
    assert found.real_norm == pytest.approx(float(g.norm()), rel=0.05)
    assert found.synthetic_norm == pytest.approx(float(h.norm()), rel=0.1)


def test_a_sampler_that_seeks_modes_asks_for_w_above_0_only_if_the_model_is_too_narrow() -> None:
    for variance, expected in ((0.8, "w > 0"), (1.25, "w < 0")):
        report = gaussian_report(0.0, variance)
        assert (report.plain.predicts, report.adam.predicts) == (expected, expected)
    report = gaussian_report(0.0, 1.0, seed=3)
    assert report.plain.predicts == "undecided"


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
        wrong = sum(r.predicts != "undecided" for r in repetitions) / 300
        assert 0.01 < wrong < 0.07, "noise passes two standard errors about once in twenty times"


def test_a_gradient_that_is_hidden_in_noise_has_no_cosine() -> None:
    real = [torch.tensor([1.0, 0.0]), torch.tensor([-1.0, 0.1])]
    synthetic = [torch.tensor([0.0, 1.0]), torch.tensor([0.1, 1.0])]
    found = alignment(real, synthetic)
    assert found.cosine is None and found.real_norm is None
    assert found.synthetic_norm == pytest.approx(1)


def test_the_preconditioner_is_that_of_adam() -> None:
    generator = torch.Generator().manual_seed(2)
    real, synthetic = (list(torch.randn(3, 10, generator=generator)) for _ in range(2))
    for gradient in synthetic:
        gradient[4] = 0  # Adam leaves such a weight where it is
    network = nn.Linear(10, 1, bias=False)
    network.weight.data.zero_()
    network.weight.grad = sum(synthetic)[None] / 3
    # A memory so long that this gradient adds nothing to the mean square that is in it.
    optimizer = torch.optim.Adam(network.parameters(), lr=1.0, betas=(0.0, 1 - 1e-9))
    v = torch.stack(synthetic).square().mean(0)[None]
    optimizer.state[network.weight] = {"step": torch.tensor(1e12), "exp_avg": torch.zeros(1, 10), "exp_avg_sq": v}
    optimizer.step()
    expected = -network.weight.detach()[0]
    found = alignment(real, synthetic, adam_eps=1e-8)
    assert found.inner.value == pytest.approx(float(sum(real) / 3 @ expected), rel=1e-5)
    assert found.cosine is None or math.isfinite(found.cosine.value)


def moved(model: GenerativeModel, size: float) -> dict[str, Tensor]:
    """Weights a step of random direction away from those of `model`, each tensor in proportion to its own."""
    generator = torch.Generator().manual_seed(5)
    return {
        name: tensor - size * tensor.std(unbiased=False).clamp(min=0.1) * torch.randn(tensor.shape, generator=generator)
        if tensor.is_floating_point() and tensor.isfinite().all()
        else tensor
        for name, tensor in model.network.state_dict().items()
    }


def test_slope_and_curvature_are_those_of_the_gaussian() -> None:
    model, real = Gaussian(0.3, 0.7), Points(400, 0)
    state = {"mean": torch.full((DIMENSIONS,), 0.2), "log_variance": torch.full((DIMENSIONS,), math.log(0.6))}
    found = curve(model, real, state, batches=4, batch_size=100, micro_batch=50, seed=0, processes=ALONE, step=0.1)
    a, b = 0.3 - 0.2, math.log(0.7 / 0.6)
    off = real.points.double() - 0.3
    first, second = float(off.mean()), float(off.square().mean())
    slope = DIMENSIONS * (-2 * a * first / 0.7 - b * second / 0.7 + b) / 2
    curvature = DIMENSIONS * (2 * a**2 + 4 * a * b * first + b**2 * second) / 0.7 / 2
    assert found.slope.value == pytest.approx(slope, rel=1e-4)
    assert found.curvature.value == pytest.approx(curvature, rel=1e-4)
    assert found.fitted_slope.value == pytest.approx(slope, rel=1e-2)
    assert found.fitted_curvature.value == pytest.approx(curvature, rel=1e-2)
    assert found.agree


def test_the_loss_optimal_w_is_that_of_the_gaussian_and_has_the_spread_of_repetitions() -> None:
    """The likelihood is best at variance 1, which is w = ln(1 / 0.9) / ln(0.9 / 0.6) by extrapolating its logarithm."""
    state = {"mean": torch.zeros(DIMENSIONS), "log_variance": torch.full((DIMENSIONS,), math.log(0.6))}
    settings = {"batch_size": 100, "micro_batch": 100, "processes": ALONE}
    reports = [
        gradient_report(Gaussian(0.0, 0.9), Points(800, seed), Points(200, 100 + seed, variance=0.8), state, **settings)
        for seed in range(60)
    ]
    assert {report.slope_predicts for report in reports} <= {"w > 0", "undecided"}
    found = [report.loss_optimal_w for report in reports]
    values, errors = torch.tensor([(w.value, w.error) for w in found if w is not None]).T
    assert len(values) == 60
    assert float(values.mean()) == pytest.approx(math.log(1 / 0.9) / math.log(0.9 / 0.6), rel=0.15)
    assert float(errors.square().mean().sqrt() / values.std()) == pytest.approx(1, abs=0.25)


def test_a_loss_that_does_not_curve_upwards_has_no_optimal_w() -> None:
    assert lowest(Estimate(value=-1.0, error=0.1), Estimate(value=-2.0, error=0.1)) is None
    found = lowest(Estimate(value=-1.0, error=0.1), Estimate(value=2.0, error=0.0))
    assert found == Estimate(value=0.5, error=0.05)


MODELS = {
    "edm": (tiny_edm, tiny_images),
    "VAR": (tiny_var, tiny_colour_images),
    "xAR": (tiny_xar, tiny_colour_images),
}


def awake(model: GenerativeModel) -> GenerativeModel:
    """An untrained model whose parts that begin at 0 do not stay there."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        for parameter in model.network.parameters():
            parameter.data.add_(0.05 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("name", MODELS)
def test_derivatives_along_the_step_are_those_of_a_fit(name: str) -> None:
    make, images = MODELS[name]
    model = awake(make())
    found = curve(
        model, images(), moved(model, 0.05), batches=2, batch_size=16, micro_batch=8, seed=0, processes=ALONE, step=0.2
    )
    assert found.fitted_slope.value == pytest.approx(found.slope.value, rel=0.02)
    assert found.fitted_curvature.value == pytest.approx(found.curvature.value, rel=0.05)
    assert found.agree


def test_derivatives_hold_the_target_of_imm_still_as_training_does(monkeypatch: pytest.MonkeyPatch) -> None:
    model, frozen, settings = tiny_imm(), tiny_imm().network, {"seed": 0, "processes": ALONE, "step": 0.1}
    model.use_loss(IMMLoss(k=8))
    arguments = (model, Latents(), moved(model, 0.02))
    found = curve(*arguments, batches=2, batch_size=16, micro_batch=8, **settings)
    jumps = IMMLoss.jumps

    def held(self: IMMLoss, network: Any, *rest: Any) -> tuple[Tensor, Tensor]:
        return jumps(self, network, *rest)[0], jumps(self, frozen, *rest)[1]

    monkeypatch.setattr(IMMLoss, "jumps", held)
    still = curve(*arguments, batches=2, batch_size=16, micro_batch=8, **settings)
    assert still.slope == found.slope and still.curvature == found.curvature
    assert still.fitted_slope.value == pytest.approx(still.slope.value, rel=0.02)
    assert still.fitted_curvature.value == pytest.approx(still.curvature.value, rel=0.05)
    assert found.fitted_slope.value != pytest.approx(found.slope.value, rel=0.2), "the fit moves the target too"


def test_the_slope_is_the_gradient_along_the_step() -> None:
    model = awake(tiny_edm())
    state, settings = moved(model, 0.01), {"batches": 3, "batch_size": 8, "micro_batch": 4, "seed": 0}
    found = curve(model, tiny_images(), state, processes=ALONE, **settings)
    step = torch.cat([(p - state[name]).flatten() for name, p in model.network.named_parameters()])
    slopes = torch.stack([g @ step for g in gradients(model, tiny_images(), processes=ALONE, **settings)])
    assert found.slope.value == pytest.approx(float(slopes.mean()), rel=1e-3)
    assert found.slope.error == pytest.approx(float(slopes.std() / 3**0.5), rel=1e-3)


def test_the_mean_gradient_does_not_depend_on_micro_batches() -> None:
    settings = {"batches": 2, "batch_size": 8, "seed": 0, "processes": ALONE}
    whole, cut = (list(gradients(tiny_edm(), tiny_images(), micro_batch=size, **settings)) for size in (8, 2))
    for a, b in zip(whole, cut, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_more_visits_of_an_image_tell_more_of_it() -> None:
    settings = {"batches": 4, "batch_size": 4, "micro_batch": 4, "seed": 0, "processes": ALONE}
    model, images = tiny_edm(), tiny_images()
    images.images[:], images.labels[:] = images.images[:1], 0  # type: ignore[index]
    once, often = (torch.stack(list(gradients(model, images, visits=v, **settings))).var(0).sum() for v in (1, 16))
    assert 0.02 < float(often / once) < 0.2, "about a sixteenth of the variance: only the noise differs"


def edm_report(**changes: Any):
    """The report on a tiny EDM with two batches of each set."""
    model = awake(tiny_edm())
    keywords = {"real": tiny_images(40), "synthetic": tiny_images(24, seed=1), "self_trained": moved(model, 0.01)}
    keywords |= {"batch_size": 12, "processes": ALONE, **changes}
    return gradient_report(model, **keywords)


def test_equal_seeds_give_equal_reports_and_others_do_not() -> None:
    first = edm_report()
    assert first == edm_report()
    assert first.plain != edm_report(seed=1).plain


def test_a_report_is_json_and_a_table(tmp_path: Path) -> None:
    report = edm_report()
    write_json(tmp_path / "align.json", dataclasses.asdict(report))
    assert json.loads((tmp_path / "align.json").read_text()) == dataclasses.asdict(report)
    assert (report.num_real, report.num_synthetic) == (36, 24)
    table = text_table(report)
    assert report.curve is not None and str(report.slope) in table and str(report.curve.curvature) in table
    assert report.curve.num_images == 36 and report.slope is not None
    assert report.slope.value == pytest.approx(report.curve.slope.value, rel=1e-3)
    assert all(name in table for name in ("cosine", "curvature", "inner product"))
    assert "curvature" not in text_table(edm_report(self_trained=None))


@pytest.mark.parametrize(
    ("value", "error", "expected"),
    [(-2.1, 1.0, "w > 0"), (2.1, 1.0, "w < 0"), (-1.9, 1.0, "undecided"), (0.0, 0.0, "undecided")],
)
def test_a_sign_is_predicted_beyond_two_standard_errors(value: float, error: float, expected: str) -> None:
    assert sign_of(Estimate(value=value, error=error)) == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"real": tiny_images(20)}, r"tiny images: 20 images do not make two batches of 12"),
        ({"num_images": 23}, "23 images do not make two batches of 12"),
        ({"real": tiny_colour_images()}, r"images are \(3, 8, 8\) .* the model makes \(1, 8, 8\)"),
        ({"micro_batch": 5}, "a batch of 12 images in micro-batches of 5"),
        ({"batch_size": 0}, "a batch of 0 images"),
        ({"self_trained": {}}, "do not fit each other"),
        ({"self_trained": dict(awake(tiny_edm()).network.state_dict())}, "weights are equal"),
    ],
)
def test_what_does_not_fit_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        edm_report(**changes)


def test_a_conditional_model_needs_labels() -> None:
    images = tiny_images()
    images.labels = None
    with pytest.raises(RequestError, match="no labels, but the model knows 3 classes"):
        edm_report(synthetic=images)


def test_broken_weights_are_told() -> None:
    model = tiny_edm()
    next(model.parameters()).data.fill_(torch.nan)
    with pytest.raises(WorkError, match="gradient on batch 0 of tiny images is not finite"):
        gradient_report(model, tiny_images(), tiny_images(), batch_size=8, processes=ALONE)


def align_in_a_process(arguments: list[str]) -> int:
    with processes("cpu") as group:
        report = edm_report(processes=group)
        write_json(Path(arguments[0], f"{group.rank}.json"), dataclasses.asdict(report))
    return 0


@pytest.mark.slow
def test_the_report_does_not_depend_on_the_number_of_processes(tmp_path: Path) -> None:
    assert run_in_processes(align_in_a_process, [str(tmp_path)], 2) == 0
    for rank in (0, 1):
        assert json.loads((tmp_path / f"{rank}.json").read_text()) == dataclasses.asdict(edm_report())
