"""EDM: the sampler against closed forms, guidance, labels, and what its loss draws."""

import dataclasses
import math

import pytest
import torch
from torch import Tensor

from edm.networks import SongUNet
from edm.sampler import integrate
from edm.settings import EDMSettings
from neon.errors import RequestError
from neon.nn.unet import GroupNorm
from neon.noise import ImageNoise
from tests.tiny import CONFIG, tiny_edm


def gaussian_denoiser(variance: float):
    """The ideal denoiser of N(0, variance): E[y | x] = x variance / (variance + sigma^2)."""

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        return x * variance / (variance + sigma**2)

    return denoise


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("heun", 2)])
def test_the_solver_converges_to_the_closed_form_solution_at_its_order(solver: str, order: int) -> None:
    latents = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    # dx/dsigma = x sigma / (v + sigma^2) from sigma_max to 0: x(0) = x(sigma_max) sqrt(v / (v + sigma_max^2)).
    exact = 80 * math.sqrt(0.25 / (0.25 + 80**2))
    errors = [
        abs(float(integrate(gaussian_denoiser(0.25), latents, EDMSettings(num_steps=n, solver=solver))) - exact)
        for n in (64, 128)
    ]
    assert errors[1] < errors[0] / 2 ** (order - 0.3)


def test_few_euler_steps_contract_a_gaussian_which_is_the_bias_neon_undoes() -> None:
    latents = torch.randn(4000, 1, 1, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    spread = [
        float(integrate(gaussian_denoiser(0.25), latents, EDMSettings(num_steps=n, solver="euler")).std())
        for n in (5, 50)
    ]
    assert spread[0] < 0.8 * spread[1] < 0.5


def test_euler_calls_the_network_once_per_step_and_heun_twice_but_for_the_last() -> None:
    for solver, calls in (("euler", 6), ("heun", 11)):
        seen: list[float] = []

        def denoise(x: Tensor, sigma: Tensor, seen: list[float] = seen) -> Tensor:
            seen.append(float(sigma))
            return x

        integrate(denoise, torch.zeros(1, 1, 1, 1), EDMSettings(num_steps=6, solver=solver))
        assert len(seen) == calls


def test_noise_is_drawn_only_under_churn() -> None:
    def refuse() -> Tensor:
        raise AssertionError("drew noise without churn")

    integrate(gaussian_denoiser(1.0), torch.ones(1, 1, 1, 1), EDMSettings(num_steps=4), draw_noise=refuse)
    drawn: list[Tensor] = []
    integrate(
        gaussian_denoiser(1.0),
        torch.ones(1, 1, 1, 1),
        EDMSettings(num_steps=4, S_churn=1, S_min=1.0),
        draw_noise=lambda: drawn.append(torch.zeros(1, 1, 1, 1)) or drawn[-1],
    )
    assert len(drawn) == 4, "one draw per step, whether that step churns or not"


@pytest.mark.parametrize(
    "wrong",
    [{"num_steps": 1}, {"sigma_min": 0.0}, {"sigma_min": 90.0}, {"rho": 0.0}, {"S_churn": -1.0}, {"solver": "rk4"}],
)
def test_settings_out_of_range_are_refused_by_name(wrong: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        EDMSettings(**wrong)


def test_an_image_does_not_depend_on_the_batch_it_is_sampled_in() -> None:
    model = tiny_edm()
    settings = dataclasses.replace(model.default_settings, num_steps=4, S_churn=2.0)
    seeds = [11, 12, 13, 14, 15]

    def images(chosen: list[int]) -> Tensor:
        noise = ImageNoise(chosen)
        return model.sample(noise, model.labels(chosen, noise), settings).int()

    together = images(seeds)
    apart = torch.cat([images([seed]) for seed in seeds])
    assert (together - apart).abs().max() <= 1, "another batch size may flip a rounding, no more"
    assert len(together.unique(dim=0)) == len(seeds)


def test_guidance_zero_changes_nothing_and_more_guidance_moves_further() -> None:
    model = tiny_edm()
    settings = dataclasses.replace(model.default_settings, num_steps=3)

    def images(guidance: float) -> Tensor:
        noise = ImageNoise(range(8))
        labels = model.labels(range(8), noise)
        return model.sample(noise, labels, dataclasses.replace(settings, guidance=guidance)).float()

    plain = images(0.0)
    assert torch.equal(plain, images(0.0))
    assert 0 < (images(0.5) - plain).norm() < (images(2.0) - plain).norm()


def test_guidance_of_an_unconditional_model_is_refused() -> None:
    model = tiny_edm(label_dim=0)
    settings = dataclasses.replace(model.default_settings, guidance=1.0)
    with pytest.raises(RequestError, match="guidance"):
        model.sample(ImageNoise([0]), None, settings)


def test_labels_are_drawn_after_the_latents_without_disturbing_them() -> None:
    model = tiny_edm()
    noise = ImageNoise([5, 6])
    labels = model.labels([0, 1], noise)
    stream = ImageNoise([5, 6])
    stream.normal(*model.image_shape)
    assert torch.equal(labels, stream.integers(model.num_classes))
    assert torch.equal(noise.normal(*model.image_shape), ImageNoise([5, 6]).normal(*model.image_shape))


def test_a_label_that_is_no_class_is_refused() -> None:
    model = tiny_edm()
    with pytest.raises(RequestError, match="classes 0 to 2"):
        model.sample(ImageNoise([0]), torch.tensor([3]), model.default_settings)


def test_label_dropout_hides_the_class_from_the_loss_at_its_rate() -> None:
    model = tiny_edm()
    images = torch.zeros(400, 1, 8, 8)
    losses = [model.training_loss(images, torch.full((400,), label), ImageNoise(range(400))) for label in (0, 1)]
    same = (losses[0] == losses[1]).double().mean()
    assert abs(same - 0.2) < 0.06, "where the label is dropped, the class makes no difference"


def test_a_loss_term_depends_on_its_own_image_and_seed_only() -> None:
    model = tiny_edm()
    images = torch.rand(6, 1, 8, 8) * 2 - 1
    labels = torch.tensor([0, 1, 2, 0, 1, 2])
    together = model.training_loss(images, labels, ImageNoise(range(6)))
    alone = model.training_loss(images[4:5], labels[4:5], ImageNoise([4]))
    torch.testing.assert_close(together[4:5], alone, rtol=1e-4, atol=1e-4)


def test_unknown_variants_and_impossible_channels_are_refused() -> None:
    with pytest.raises(ValueError, match="encoder_type"):
        SongUNet(8, 1, 1, encoder_type="deep")
    with pytest.raises(ValueError, match="channels"):
        GroupNorm(2)
    with pytest.raises(ValueError, match="model_type"):
        tiny_edm(model_type="UNet")


def test_the_model_is_rebuilt_from_its_config() -> None:
    model = tiny_edm()
    again = type(model)(model.config)
    assert model.config == CONFIG
    again.network.load_state_dict(model.network.state_dict())
    noise = ImageNoise(range(3))
    settings = dataclasses.replace(model.default_settings, num_steps=2)
    labels = model.labels(range(3), noise)
    again.eval()
    assert torch.equal(model.sample(noise, labels, settings), again.sample(noise.restarted(), labels, settings))
