"""IMM: the preconditioner against exact paths, the samplers, what the loss compares, and its recipe."""

import dataclasses
from itertools import count
from pathlib import Path

import pytest
import torch
from torch import Tensor

from imm.loss import IMMLoss
from imm.precond import F_TYPES, IMMPrecond
from imm.recipe import IMMRecipe
from imm.sampler import IMMSettings, generate, time_grid
from imm.schedule import SCHEDULES
from neon.errors import RequestError, WorkError
from neon.noise import ImageNoise
from neon.recipe import Recipe
from neon.runtime.distributed import Processes
from neon.selftrain import STATE_FILE, train
from tests.golden.recipe import fill_module
from tests.tiny import tiny_colour_images, tiny_edm, tiny_images, tiny_imm


def network(**keywords: object) -> IMMPrecond:
    """A small DiT of 4 x 8 x 8 latents of three classes, filled, as the published one is preconditioned."""
    config = {
        "img_resolution": 8, "img_channels": 4, "label_dim": 3, "model_type": "DiT", "hidden_size": 16, "depth": 2,
        "num_heads": 2, "num_classes": 3, "temb_type": "stride",
    }  # fmt: skip
    return fill_module(IMMPrecond(**{**config, **keywords}).eval().requires_grad_(False))  # type: ignore


def batch(size: int) -> tuple[Tensor, Tensor, ImageNoise]:
    """Start states, one-hot classes and further noise of the images 0 .. size - 1."""
    noise = ImageNoise(range(size))
    labels = torch.eye(3)[torch.arange(size) % 3]
    return 0.5 * noise.normal(4, 8, 8), labels, noise


@pytest.mark.parametrize(
    ("f_type", "name"),
    [
        ("identity", "fm"),
        ("identity", "vp_cosine"),
        ("simple_edm", "fm"),
        ("simple_edm", "vp_cosine"),
        ("euler_fm", "fm"),
    ],
)
def test_the_exact_f_takes_an_image_along_its_path(f_type: str, name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    data, noise = torch.randn(2, 50, generator=generator, dtype=torch.float64)
    s, t = torch.rand(2, 50, generator=generator, dtype=torch.float64).sort(dim=0).values
    path = SCHEDULES[name]
    alpha, sigma = path.alpha(t), path.sigma(t)
    exact = {
        "identity": data,
        "simple_edm": (alpha * noise - sigma * data) / (alpha**2 + sigma**2).sqrt() / 0.5,
        "euler_fm": (noise - data) / 0.5,
    }[f_type]
    skip, out = F_TYPES[f_type](path, t, s, 0.5)
    torch.testing.assert_close(skip * path.mix(data, noise, t) + out * exact, path.mix(data, noise, s))


@pytest.mark.parametrize("restart", [False, True])
@pytest.mark.parametrize("guidance", [1.0, 1.5])
def test_an_image_does_not_depend_on_the_batch_it_is_sampled_in(guidance: float, restart: bool) -> None:
    dit, settings = network(), IMMSettings(num_steps=4, guidance=guidance, restart=restart)

    def sample(size: int) -> Tensor:
        latents, labels, noise = batch(size)
        return generate(dit, latents, labels, settings, draw_noise=lambda: noise.normal(4, 8, 8))

    many, one = sample(5), sample(1)
    torch.testing.assert_close(many[:1], one, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(many[:1], many[3:4], atol=0.1), "the same class, another image"


def test_guidance_leads_away_from_no_class() -> None:
    dit = network()
    latents, labels, _ = batch(3)
    with_class, doubled, without = (
        generate(dit, latents, one_hot, IMMSettings(num_steps=1, guidance=guidance))
        for one_hot, guidance in ((labels, 1.0), (labels, 2.0), (None, 1.0))
    )
    torch.testing.assert_close(doubled, with_class + (with_class - without))
    assert (with_class - without).abs().max() > 1e-3


def test_the_grid_of_either_spacing_is_the_same_in_float32() -> None:
    dit = network(eps=0.006)
    for settings in (IMMSettings(), IMMSettings(discretization="edm"), IMMSettings(num_steps=3, mid_nt=(3.0, 0.7))):
        single, double = (time_grid(dit, settings, dtype) for dtype in (torch.float32, torch.float64))
        assert single.dtype == torch.float32
        torch.testing.assert_close(single.double(), double, rtol=1e-5, atol=1e-7)
        assert (double.diff() < 0).all()
        torch.testing.assert_close(double[[0, -1]], torch.tensor([0.994, 0.006], dtype=torch.float64))


def test_half_precision_is_autocast_unless_float32_is_forced() -> None:
    x, labels, _ = batch(6)
    dit, half = network(), network(mixed_precision="bf16")
    t, s = torch.tensor(0.8), torch.tensor(0.3)
    exact, rounded = dit(x, t, s, labels), half(x, t, s, labels)
    assert rounded.dtype == torch.float32
    moved = (rounded - exact).norm() / (exact - x).norm()
    assert 1e-3 < moved < 0.05
    assert torch.equal(half(x, t, s, labels, force_fp32=True), exact)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(dit(x, t, s, labels), exact), "float32 whatever surrounds it"
    dit.mixed_precision = torch.bfloat16
    assert torch.equal(dit(x, t, s, labels), rounded)


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"mixed_precision": "fp8"}, "mixed_precision is 'fp8'; expected one of None, bf16, fp16"),
        ({"noise_schedule": "vp_cosine"}, "f_type 'euler_fm' with noise_schedule 'vp_cosine'"),
        ({"noise_schedule": "linear"}, "noise_schedule is 'linear'"),
        ({"model_type": "Transformer"}, "model_type is 'Transformer'"),
        ({"f_type": "velocity"}, "f_type is 'velocity'"),
        ({"temb_type": "both"}, "temb_type is 'both'"),
        ({"eps": 0.995}, r"eps is 0.995 and T 0.994"),
    ],
)
def test_a_preconditioner_that_cannot_be_is_refused(keywords: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        network(**keywords)


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"num_steps": 0}, "num_steps is 0"),
        ({"guidance": float("nan")}, "guidance is nan"),
        ({"discretization": "cosine"}, "discretization is 'cosine'"),
        ({"mid_nt": (1.4,)}, r"num_steps is 8 with 1 ratios in mid_nt; expected 2"),
        ({"mid_nt": (0.7, 3.0), "num_steps": 3}, "falling positive"),
        ({"mid_nt": (0.0,), "num_steps": 2}, "falling positive"),
    ],
)
def test_settings_that_make_no_sense_are_refused(keywords: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        IMMSettings(**keywords)


def test_what_a_network_does_not_know_is_refused() -> None:
    latents, labels, _ = batch(1)
    with pytest.raises(RequestError, match="knows no classes"):
        generate(network(label_dim=0), latents, None, IMMSettings())
    for ratio in (200.0, 0.001):
        settings = IMMSettings(num_steps=2, mid_nt=(ratio,))
        with pytest.raises(RequestError, match=r"mid_nt .*from 0\.00603622 to 165\.667"):
            generate(network(eps=0.006), latents, labels, settings)


CLOSE = IMMLoss(k=60, min_tr_gap=None, label_dropout=0.0)
"""compares jumps from the same time, so that they differ by what student and target are told and draw only"""


def test_student_and_target_see_the_same_dropout_and_every_step_another() -> None:
    dit = network(dropout=0.5).train()
    latents, labels, _ = batch(8)
    reached: list[Tensor] = []
    dit.model.register_forward_hook(lambda *args: reached.append(args[2]))
    for _ in range(2):
        loss = CLOSE(dit, latents, labels, ImageNoise(range(8)))
        assert loss.shape == (2,) and loss.abs().max() < 1e-9
    assert torch.equal(reached[0], reached[1]) and torch.equal(reached[2], reached[3])
    assert not torch.allclose(reached[0], reached[2], atol=1e-3)


def test_only_the_student_is_not_told_the_class() -> None:
    dit = network()
    latents, labels, _ = batch(4)
    told: list[Tensor] = []
    dit.model.register_forward_hook(lambda module, args, out: told.append(args[3]))
    loss = dataclasses.replace(CLOSE, label_dropout=1.0)(dit, latents, labels, ImageNoise(range(4)))
    assert loss > 1e-6
    assert sorted(float(rows.sum()) for rows in told) == [0, 4]


def test_the_target_has_no_gradient_and_is_float32() -> None:
    dit = network(mixed_precision="bf16").requires_grad_(True)
    latents, labels, _ = batch(4)
    seen: list[tuple[bool, bool]] = []
    dit.model.blocks[0].register_forward_hook(
        lambda *args: seen.append((args[2].requires_grad, torch.is_autocast_enabled("cpu")))
    )
    IMMLoss()(dit, latents, labels, ImageNoise(range(4)))
    assert sorted(seen) == [(False, False), (True, True)]


def test_groups_share_their_times_and_r_lies_between() -> None:
    dit = network()
    for mode in ("uniform", "lognormal"):
        formula = IMMLoss(sample_t_mode=mode)  # type: ignore[arg-type]
        u_t, u_s = torch.rand(2, 1000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        t, r, s = formula.times(dit, u_t, u_s)
        assert (dit.eps <= s).all() and (s <= r).all() and (r <= t).all() and (t <= dit.T).all()
        apart = t - s > 1e-4
        assert (t - r)[apart].min() >= 1e-4 - 1e-12
    latents, labels, _ = batch(8)
    times: list[Tensor] = []
    dit.model.register_forward_hook(lambda module, args, out: times.append(args[1]))
    IMMLoss()(dit, latents, labels, ImageNoise(range(8)))
    for labels_of_time in times:
        groups = labels_of_time.view(2, 4)
        assert (groups == groups[:, :1]).all() and groups[0, 0] != groups[1, 0]


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"matrix_size": 0}, "matrix_size is 0"),
        ({"sample_t_mode": "normal"}, "sample_t_mode is 'normal'"),
        ({"sigma": 0.0}, "sigma is 0.0"),
        ({"label_dropout": 1.5}, "label_dropout is 1.5"),
    ],
)
def test_a_loss_that_makes_no_sense_is_refused(keywords: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        IMMLoss(**keywords)


def test_losses_are_scaled_as_torch_scales_them_by_default() -> None:
    scaler, recipe = torch.amp.GradScaler("cpu"), IMMRecipe()
    assert recipe.first_scale == scaler.get_scale()
    assert recipe.scale_steps == scaler.get_growth_interval()
    assert recipe.largest_scale is None


@pytest.mark.parametrize(("limit", "expected"), [(None, 64.0), (16.0, 16.0)])
def test_the_scale_of_losses_grows_to_its_limit(tmp_path: Path, limit: float | None, expected: float) -> None:
    recipe = Recipe(batch_size=2, scale_losses=True, first_scale=4.0, largest_scale=limit, scale_steps=1)
    train(
        tiny_edm(), tiny_images(), tmp_path, num_steps=4, snapshot_steps=[], recipe=recipe, seed=0,
        processes=Processes(),
    )  # fmt: skip
    assert torch.load(tmp_path / STATE_FILE, weights_only=True)["scaler"]["scale"] == expected


def test_pushforward_draws_nothing_and_restart_once_between_steps() -> None:
    dit = network()
    latents, labels, _ = batch(2)
    for restart, expected in ((False, 0), (True, 3)):
        draws = count()

        def draw_noise(draws: count = draws) -> Tensor:
            next(draws)
            return torch.zeros(2, 4, 8, 8)

        generate(dit, latents, labels, IMMSettings(num_steps=4, restart=restart), draw_noise=draw_noise)
        assert next(draws) == expected


def test_training_that_broke_the_weights_leaves_no_snapshot(tmp_path: Path) -> None:
    model = tiny_imm(img_resolution=8, img_channels=3, patch_size=4)
    next(model.network.parameters()).data.fill_(torch.nan)
    images, few = tiny_colour_images(), IMMRecipe(batch_size=8)
    with pytest.raises(WorkError, match="not finite after step 1"):
        train(
            model, images, tmp_path, num_steps=1, snapshot_steps=[], recipe=few, seed=0, processes=Processes()
        )  # fmt: skip
    assert not list(tmp_path.glob("*.safetensors"))
