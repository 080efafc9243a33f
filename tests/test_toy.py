"""The toy's claims, from the numbers that its notebook computes; the cells that are run here are the committed ones."""

import numpy as np
import pytest
import torch

from neon.errors import RequestError
from neon.metrics import Statistics
from neon.toy.models import Autoregressive, Diffusion, ToyModel
from neon.toy.study import (
    ADAM_EPS,
    AUTOREGRESSIVE,
    DIFFUSION,
    SETTINGS,
    Study,
    cosine,
    gradient,
    real_points,
    study,
    walk,
)
from neon.tune.gradients import alignment
from tests.notebooks import TOY, code_cells

CELLS = code_cells(TOY)
SAMPLERS = ("mode-seeking", "diversity-seeking")


@pytest.fixture(scope="module")
def scope() -> dict:
    """The names that the notebook's cells leave behind, run in the fast setting."""
    source = "\n".join("".join(cell["source"]) for cell in CELLS)
    assert source.count('SETTINGS["default"]') == 1
    found: dict = {}
    exec(compile(source.replace('SETTINGS["default"]', 'SETTINGS["fast"]'), TOY.name, "exec"), found)
    return found


def both(scope: dict, start: str) -> list[Study]:
    diffusion, autoregressive = scope[start]
    assert (diffusion.toy, autoregressive.toy) == (DIFFUSION, AUTOREGRESSIVE)
    assert {diffusion.start, autoregressive.start} == {start}
    return [diffusion, autoregressive]


def test_a_base_that_is_too_narrow_wants_w_above_0_for_a_mode_seeking_set_and_below_for_the_other(scope: dict) -> None:
    for found in both(scope, "narrow"):
        assert (found.spreads < 0).all()
        for budget in range(2):
            assert (found.best_ws("mode-seeking", budget) > 0).all()
            assert (found.best_ws("diversity-seeking", budget) < 0).all()


def test_the_cosine_of_gradients_tells_the_sign_of_w(scope: dict) -> None:
    """Negative: anti-aligned, w > 0. For every base that is clearly too narrow or too wide, and both samplers."""
    for found in both(scope, "narrow") + both(scope, "wide"):
        for sampler in SAMPLERS:
            assert (np.sign(found.cosine(sampler)) == -np.sign(found.best_ws(sampler))).all()


def test_the_cosine_is_that_of_neon_align_up_to_its_noise() -> None:
    """There it comes from products of different batches, with a standard error."""
    generator = torch.Generator().manual_seed(0)
    model = AUTOREGRESSIVE.build(0.5)
    for knob, sign in ((0.5, -1), (1.6, 1)):
        synthetic, real = model.sample(16_000, knob, generator), real_points(16_000, generator)
        on_real, on_synthetic = (
            torch.stack([gradient(model, batch, generator) for batch in points.chunk(32)])
            for points in (real, synthetic)
        )
        root = (1 / (on_synthetic.square().mean(0).sqrt() + ADAM_EPS)).sqrt()  # twice in each product: Adam's metric
        unbiased = alignment([*(on_real * root)], [*(on_synthetic * root)]).cosine
        assert unbiased is not None and sign * unbiased.value > 2 * unbiased.error
        plain = cosine(model, knob, 500, 16_000, generator)
        assert plain == pytest.approx(unbiased.value, abs=4 * unbiased.error + 0.02)


def test_a_base_that_is_too_wide_turns_every_sign(scope: dict) -> None:
    for found in both(scope, "wide"):
        assert (found.spreads > 0).all()
        assert (found.best_ws("mode-seeking") < 0).all() and (found.best_ws("diversity-seeking") > 0).all()
        assert (found.cosine("mode-seeking") > 0).all() and (found.cosine("diversity-seeking") < 0).all()


def test_self_training_harms_and_the_merge_helps(scope: dict) -> None:
    """By a quarter of the distance at least, at the larger budget."""
    for found in both(scope, "narrow"):
        mean = found.plain["mode-seeking"][:, -1].mean(0)
        assert (found.ws[0], found.ws[found.zero]) == (-1, 0)
        assert mean[0] > 1.5 * mean[found.zero]
        for sampler in SAMPLERS:
            mean = found.plain[sampler][:, -1].mean(0)
            assert mean.min() < 0.75 * mean[found.zero]


def test_more_self_training_wants_a_smaller_w(scope: dict) -> None:
    for found in both(scope, "narrow"):
        assert abs(found.best_w("mode-seeking", 1)) < abs(found.best_w("mode-seeking", 0))


def test_judged_by_the_sampler_of_the_set_w_above_0_helps_whatever_the_sampler(scope: dict) -> None:
    for found in both(scope, "converged"):
        for sampler in SAMPLERS:
            assert (found.best_ws(sampler, same=True) > 0).all()


def test_a_walk_goes_from_the_self_trained_model_over_the_base_past_the_best_merge(scope: dict) -> None:
    """As the strip shows it: the first base, sampled as S was, the same noise at every w."""
    for found in both(scope, "converged"):
        for sampler in SAMPLERS:
            stops = walk(found, sampler, found.ws.tolist(), 10)
            distances = [stop.distance for stop in stops]
            np.testing.assert_allclose(distances, found.same[sampler][0, -1], rtol=1e-3, atol=1e-6)
            assert distances[0] > distances[found.zero] > min(distances) < distances[-1]
            moves = np.diff([stop.points.numpy() for stop in stops], axis=0)
            assert 0 < np.abs(moves).max() < 2


def test_a_converged_base_gains_next_to_nothing(scope: dict) -> None:
    for converged, narrow in zip(both(scope, "converged"), both(scope, "narrow"), strict=True):
        for sampler in SAMPLERS:
            gains = [one.plain[sampler][:, -1].mean(0) for one in (converged, narrow)]
            lost, won = (curve[converged.zero] - curve.min() for curve in gains)
            assert lost < won / 2


@pytest.fixture(params=[Diffusion, Autoregressive])
def model(request: pytest.FixtureRequest) -> ToyModel:
    """Neither centred nor isotropic."""
    made: ToyModel = request.param(1.2)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter += 0.3 * torch.arange(1, parameter.numel() + 1).reshape(parameter.shape)
    return made


def test_the_moments_are_those_of_samples(model: ToyModel) -> None:
    for knob in (0.9, 1.0, 1.1):
        points = model.sample(50_000, knob, torch.Generator().manual_seed(0))
        measured, exact = Statistics.from_features(points), model.moments(knob)
        np.testing.assert_allclose(measured.mu, exact.mu, atol=0.03)
        np.testing.assert_allclose(measured.sigma, exact.sigma, rtol=0.03, atol=0.03)


def test_a_larger_score_scale_and_a_lower_temperature_seek_modes() -> None:
    for toy in (DIFFUSION, AUTOREGRESSIVE):
        widths = [np.linalg.det(toy.build(1.0).moments(knob).sigma) for knob in (toy.mode_seeking, 1.0)]
        assert widths[0] < 0.9 * widths[1]


def test_the_plain_samplers_draw_what_the_weights_say() -> None:
    """Of the isotropic Gaussian before training; 200 steps of diffusion leave it a little too narrow."""
    for build, tolerance in ((Diffusion, 0.05), (Autoregressive, 1e-6)):
        np.testing.assert_allclose(build(1.5).moments().sigma, 1.5**2 * np.eye(2), atol=1.5**2 * tolerance)


def test_the_same_arguments_give_the_same_numbers(scope: dict) -> None:
    twice = [both(scope, "narrow")[1], study(AUTOREGRESSIVE, "narrow", SETTINGS["fast"])]
    assert (twice[0].cosines == twice[1].cosines).all()
    for sampler in SAMPLERS:
        assert (twice[0].plain[sampler] == twice[1].plain[sampler]).all()


def test_an_unknown_start_is_refused() -> None:
    with pytest.raises(RequestError, match=r"'broad'.*narrow, wide, converged"):
        study(DIFFUSION, "broad", SETTINGS["fast"])
