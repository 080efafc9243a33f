"""What EDM published: its nine networks, how they are sampled, and the samplers and augmentation around them."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from edm.loss import EDMLoss, VELoss, VPLoss, loss_of
from edm.precond import PRECONDS, EDMPrecond, Precond
from edm.published import ARCHITECTURES, PUBLISHED, recognised, warn_if_unusual
from edm.sampler import integrate, solver_steps
from edm.settings import AblationSettings, EDMSettings
from neon.data.augment import AUGMENT_DIM, AugmentPipe, affine, edm_augment, rotation, warp
from neon.errors import RequestError
from neon.noise import ImageNoise
from tests.tiny import CONFIG, tiny_edm

MANIFESTS = {
    path.stem.removeprefix("manifest_"): json.loads(path.read_text())
    for path in (Path(__file__).parent / "golden" / "edm").glob("manifest_*.json")
}


def on_meta(name: str) -> EDMPrecond:
    with torch.device("meta"):
        return EDMPrecond(**PUBLISHED[name].network)


def test_every_published_network_has_a_row_with_the_keywords_of_its_file() -> None:
    assert len(MANIFESTS) == 9
    assert {row.name: row.network for row in PUBLISHED.values()} == {
        name: manifest["_meta"]["config"] for name, manifest in MANIFESTS.items()
    }


@pytest.mark.parametrize("name", sorted(MANIFESTS))
def test_a_published_network_is_built_with_the_tensors_of_its_file_in_order(name: str) -> None:
    manifest = dict(MANIFESTS[name])
    meta = manifest.pop("_meta")
    network = on_meta(name)
    built = [(entry, list(tensor.shape), str(tensor.dtype)) for entry, tensor in network.state_dict().items()]
    assert built == [(entry, shape, f"torch.{dtype}") for entry, (shape, dtype) in manifest.items()]
    assert sum(parameter.numel() for parameter in network.parameters()) == meta["parameters"]
    assert [entry for entry, _ in network.named_buffers()] == meta["buffer_names"]


def test_a_network_is_recognised_by_its_keywords_whatever_its_dropout_and_spelling() -> None:
    for row in PUBLISHED.values():
        assert recognised(row.network) is row
    ffhq = PUBLISHED["edm-ffhq-64x64-uncond-vp"]
    respelled = {**ffhq.network, "dropout": 0.9, "num_blocks": 4, "channel_mult": (1, 2, 2, 2), "label_dropout": 0}
    del respelled["label_dim"]
    found = recognised(respelled)
    assert found is not None
    assert found.settings == ffhq.settings


def test_a_network_of_another_size_or_preconditioning_is_not_taken_for_a_published_one() -> None:
    network = PUBLISHED["edm-cifar10-32x32-cond-vp"].network
    assert recognised({**network, "model_channels": 64}) is None
    assert recognised(network, "VPPrecond") is None
    assert recognised(CONFIG["network"]) is None


def test_sampling_a_published_network_in_another_way_warns(capsys: pytest.CaptureFixture[str]) -> None:
    class Model:
        config = {"network": PUBLISHED["edm-ffhq-64x64-uncond-vp"].network}  # noqa: RUF012

    for settings, warned in (
        (EDMSettings(num_steps=40), ""),
        (EDMSettings(), "num_steps 18 and not 40"),
        (AblationSettings(num_steps=40), "another sampler"),
    ):
        warn_if_unusual(Model(), settings)  # type: ignore[arg-type]
        printed = capsys.readouterr().err
        assert warned in printed and bool(warned) == bool(printed)


def test_the_architectures_by_name_are_those_of_the_published_networks() -> None:
    for arch, name in (("ddpmpp", "cifar10-32x32-cond-vp"), ("ncsnpp", "cifar10-32x32-cond-ve")):
        assert ARCHITECTURES[arch].items() <= PUBLISHED[f"edm-{name}"].network.items()
    assert ARCHITECTURES["adm"].items() <= PUBLISHED["edm-imagenet-64x64-cond-adm"].network.items()


def network_of(precond: str) -> Precond:
    return PRECONDS[precond](**CONFIG["network"])


def test_each_preconditioning_trains_with_its_own_loss() -> None:
    assert loss_of(network_of("EDMPrecond")) == EDMLoss()
    assert loss_of(network_of("VPPrecond")) == VPLoss()
    assert loss_of(network_of("VEPrecond")) == VELoss()
    assert loss_of(network_of("iDDPMPrecond")) == EDMLoss()


def gaussian(x: Tensor, sigma: Tensor) -> Tensor:
    """The ideal denoiser of N(0, 1/4)."""
    return x * 0.25 / (0.25 + sigma**2)


def test_the_ablations_default_choices_are_edms_sampler() -> None:
    latents = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    chosen = {"num_steps": 7, "S_churn": 3.0, "S_noise": 1.1}
    noise = [ImageNoise([1, 2]) for _ in range(2)]
    ours, ablation = (
        integrate(gaussian, latents, settings, draw_noise=lambda n=source: n.normal(1, 4, 4))
        for settings, source in zip((EDMSettings(**chosen), AblationSettings(**chosen)), noise, strict=True)
    )
    torch.testing.assert_close(ours, ablation, rtol=0, atol=0)


@pytest.mark.parametrize("scaling", ["vp", "none"])
@pytest.mark.parametrize("schedule", ["vp", "ve", "linear"])
@pytest.mark.parametrize("discretization", ["vp", "ve", "iddpm", "edm"])
def test_every_combination_leads_to_the_same_images(discretization: str, schedule: str, scaling: str) -> None:
    settings = AblationSettings(num_steps=300, discretization=discretization, schedule=schedule, scaling=scaling)
    images = integrate(gaussian, torch.ones(1, 1, 1, 1), settings, sigma_limits=(0.002, 80))
    # One standard deviation of noise ends at one of the data. The low levels of iddpm lie far apart.
    tolerance = 0.05 if discretization == "iddpm" else 0.002
    torch.testing.assert_close(images, torch.full_like(images, 0.5), rtol=tolerance, atol=0)


def test_the_midpoint_rule_differs_from_heun_and_agrees_in_the_limit() -> None:
    def solved(num_steps: int, alpha: float) -> float:
        return float(integrate(gaussian, torch.ones(1, 1, 1, 1), AblationSettings(num_steps=num_steps, alpha=alpha)))

    assert abs(solved(200, 0.5) - solved(200, 1.0)) < 1e-3 < abs(solved(8, 0.5) - solved(8, 1.0))


@pytest.mark.parametrize(
    "wrong",
    [{"discretization": "ddim"}, {"schedule": "cosine"}, {"scaling": "ve"}, {"alpha": 0.0}, {"alpha": 1.5},
     {"epsilon_s": 2.0}, {"M": 0}, {"sigma_min": 90.0}, {"num_steps": 1}],
)  # fmt: skip
def test_ablations_out_of_range_are_refused_by_name(wrong: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        AblationSettings(**wrong)


def test_noise_levels_that_the_network_does_not_know_are_refused() -> None:
    with pytest.raises(RequestError, match="sigma_min is 20"):
        integrate(gaussian, torch.ones(1, 1, 1, 1), EDMSettings(sigma_min=20), sigma_limits=(0.02, 10))


def test_a_sampler_that_draws_only_where_a_step_churns_leaves_the_stream_alone_elsewhere() -> None:
    settings = EDMSettings(num_steps=6, S_churn=1, S_min=1.0, S_max=30.0)
    drawn: list[Tensor] = []
    integrate(
        gaussian,
        torch.ones(1, 1, 1, 1),
        settings,
        draw_noise=lambda: drawn.append(torch.zeros(1, 1, 1, 1)) or drawn[-1],
        draw_at_rest=False,
    )
    churning = sum(step.noise > 0 for step in solver_steps(settings, (0, 100), torch.as_tensor))
    assert len(drawn) == churning < settings.num_steps


def smooth_images(count: int, size: int) -> Tensor:
    """Bumps off the centre, wide enough for the low-pass filters to leave them alone."""
    position = torch.arange(size) - (size - 1) / 2
    bump = torch.exp(-(position**2) / (size / 4) ** 2)
    return (torch.outer(bump, bump.roll(size // 8)) * 2 - 1).expand(count, 1, size, size).clone()


def test_warping_by_a_half_turn_is_two_flips() -> None:
    images = smooth_images(2, 16)
    turned = warp(images, rotation(torch.full((2,), torch.pi)))
    # The filter is not symmetric: a small part of a pixel's width remains.
    torch.testing.assert_close(turned, images.flip(2, 3), rtol=0, atol=0.1)
    assert (turned - images).abs().max() > 0.5


def test_warping_by_a_shift_moves_pixels() -> None:
    images = smooth_images(2, 16)
    # The map leads from an output position to its source: 2 to the right moves the image 2 to the left.
    shifted = warp(images, affine(images, x0=2.0, y0=-1.0))
    torch.testing.assert_close(shifted[:, :, 1:, :-2], images[:, :, :-1, 2:], rtol=0, atol=0.01)


def test_augmentation_zero_is_none_and_an_impossible_probability_is_refused() -> None:
    assert edm_augment(0) is None
    with pytest.raises(ValueError, match="p is 0"):
        AugmentPipe(p=0)
    with pytest.raises(ValueError, match="p is 12"):
        AugmentPipe(p=12)


def test_an_augmented_image_depends_on_its_own_seed_and_half_of_them_are_mirrored_even_at_small_p() -> None:
    augment = edm_augment(0.01)
    assert augment is not None
    images = smooth_images(200, 8)
    together, labels = augment(images, ImageNoise(range(200)))
    alone, own = augment(images[7:8], ImageNoise([7]))
    torch.testing.assert_close(together[7:8], alone, rtol=0, atol=1e-4)
    assert torch.equal(labels[7:8], own)
    assert labels.shape == (200, AUGMENT_DIM)
    assert 0.4 < labels[:, 0].mean() < 0.6
    assert (labels[:, 1:] == 0).all(dim=1).double().mean() > 0.9


def test_an_augmented_network_takes_the_labels_into_account() -> None:
    network = tiny_edm(augment_dim=AUGMENT_DIM).network
    images = smooth_images(3, 8)
    augment = edm_augment(0.5)
    with_labels = EDMLoss()(network, images, None, ImageNoise(range(3)), augment)
    without = EDMLoss()(network, images, None, ImageNoise(range(3)), lambda y, n: (augment(y, n)[0], None))
    assert not torch.equal(with_labels, without)
