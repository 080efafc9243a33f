"""Two networks at inference: (1 + g) of what the one says, - g of what the other does, for every architecture."""

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from edm.settings import EDMSettings
from imm.model import IMM
from imm.sampler import generate
from imm.settings import IMMSettings
from neon.errors import RequestError
from neon.merge import LiveMerge
from neon.model import GenerativeModel, of_both
from neon.noise import ImageNoise, Noise
from tests.tiny import tiny_edm, tiny_imm, tiny_sd_vae, tiny_var, tiny_xar
from VAR.sampler import guided_logits
from VAR.settings import VARSettings
from xAR.sampler import guided_velocity
from xAR.settings import XARSettings


def latent_imm(seed: int = 0) -> IMM:
    model = tiny_imm(seed)
    model.set_codec(tiny_sd_vae())
    return model


MODELS: dict[str, tuple[Callable[[int], GenerativeModel], Any]] = {
    "EDM": (tiny_edm, EDMSettings(num_steps=4)),
    "EDM, guided": (tiny_edm, EDMSettings(num_steps=4, solver="euler", guidance=0.5)),
    "VAR": (tiny_var, VARSettings(guidance=1.5, top_k=12)),
    "VAR, not guided": (tiny_var, VARSettings(guidance=0, temperature=1.2)),
    "xAR": (tiny_xar, XARSettings(num_steps=3)),
    "xAR, not guided": (tiny_xar, XARSettings(num_steps=3, guidance=1, stochastic=False)),
    "IMM": (latent_imm, IMMSettings(num_steps=3)),
    "IMM, restart, not guided": (latent_imm, IMMSettings(num_steps=3, restart=True, guidance=1)),
}
EVERY = pytest.mark.parametrize("name", MODELS)


def models(name: str) -> tuple[Any, Any, Any]:
    """A base, a model whose network lies near it, as a self-trained one does, and settings."""
    make, settings = MODELS[name]
    base, other = make(0), make(0)
    apart = make(1).network.state_dict()
    for name, value in other.network.state_dict().items():
        if value.is_floating_point() and value.isfinite().all():
            value.lerp_(apart[name], 0.3)
    return base, other, settings


def images(model: GenerativeModel, settings: Any, seeds: list[int] | None = None) -> Tensor:
    noise = ImageNoise(seeds or [3, 4, 5])
    return model.sample(noise, torch.tensor([seed % 3 for seed in seeds or [3, 4, 5]]), settings)


def apart(a: Tensor, b: Tensor) -> int:
    """The greatest difference of any pixel."""
    return int((a.int() - b.int()).abs().max())


@EVERY
def test_scale_0_is_the_base_and_scale_minus_1_the_second_network(name: str) -> None:
    base, other, settings = models(name)
    rounding = 1 if name.startswith("EDM") else 0  # its sampler is float64 for one network, float32 for two
    for scale, alone in ((0.0, base), (-1.0, other)):
        both = base.combine(other.network, scale)
        assert apart(images(both, settings), images(alone, settings)) <= rounding
        assert both.calls(settings) == base.calls(settings)
    half = base.combine(other.network, 0.5)
    assert apart(images(half, settings), images(base, settings)) > 1
    assert half.calls(settings) == 2 * base.calls(settings)


@EVERY
def test_a_network_beside_itself_is_that_network(name: str) -> None:
    base, _, settings = models(name)
    both = base.combine(copy.deepcopy(base.network), 1.5)
    assert apart(images(both, settings), images(base, settings)) <= (1 if name.startswith("EDM") else 0)


@EVERY
def test_an_image_of_two_networks_is_its_seeds_whatever_the_others_are(name: str) -> None:
    base, other, settings = models(name)
    both = base.combine(other.network, 1.0)
    together = images(both, settings, [3, 4, 5])
    assert apart(images(both, settings, [5]), together[2:]) <= 1, "batches differ by rounding"


@EVERY
def test_what_is_merged_into_the_network_later_is_sampled_with(name: str) -> None:
    base, other, settings = models(name)
    first = copy.deepcopy(base.network.state_dict())
    both = base.combine(copy.deepcopy(base.network), -0.5)
    merge = LiveMerge(base.network, first, other.network.state_dict())
    merge.set(-1)
    halfway = images(both, settings)
    merge.set(0)
    assert apart(halfway, images(base, settings)) > 1
    swapped = other.combine(base.network, -0.5)
    assert apart(halfway, images(swapped, settings)) <= 1, "the self-trained network and, beside it, the base"


@EVERY
def test_the_second_network_is_neither_trained_nor_saved(name: str) -> None:
    base, other, _ = models(name)
    both = base.combine(other.network, 1.0)
    assert list(both.state_dict()) == list(base.state_dict())
    own = {id(parameter) for parameter in base.parameters()}
    assert {id(parameter) for parameter in both.parameters()} == own
    assert base.second is None and both.network is base.network


def on_the_line(both: Tensor, first: Tensor, second: Tensor, scale: float) -> bool:
    """Whether `both` is (1 + scale) first - scale second, and neither of them."""
    line = (1 + scale) * first - scale * second
    return torch.allclose(both, line, rtol=1e-4, atol=1e-5) and not torch.allclose(both, first, rtol=1e-2)


@pytest.mark.parametrize("guidance", [0.0, 0.5])
def test_edm_mixes_what_each_network_guided_by_itself_denoises(
    guidance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Denoisers that see the same image everywhere: it is what comes out in the end."""
    base, other = tiny_edm(), tiny_edm()
    seen = {base.network: (0.2, 0.1), other.network: (0.1, 0.3)}  # with a class, and without
    for network, values in seen.items():
        monkeypatch.setattr(
            network, "forward", lambda x, sigma, classes, of=values: torch.full_like(x, of[classes is None])
        )
    first, second = (with_class + guidance * (with_class - without) for with_class, without in seen.values())
    both = images(base.combine(other.network, 1.5), EDMSettings(num_steps=3, guidance=guidance))
    assert both.float().sub(127.5 * (2.5 * first - 1.5 * second) + 128).abs().max() <= 1


@pytest.mark.parametrize("guidance", [1.0, 1.5])
def test_imm_mixes_the_steps_of_both_networks(guidance: float) -> None:
    (base, other, _), labels = models("IMM"), torch.eye(3)
    x = torch.randn(3, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    settings = IMMSettings(num_steps=1, guidance=guidance)
    first, second = (generate(model.network, x, labels, settings) for model in (base, other))
    both = generate(base.network, x, labels, settings, second=(other.network, 1.5))
    assert on_the_line(both, first, second, 1.5)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_xar_mixes_guided_velocities_and_each_network_remembers_the_cells(guidance: float) -> None:
    base, other, _ = models("xAR")
    cells = torch.randn(4, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 1, 2])

    def velocity(network: Any) -> Any:
        return guided_velocity(network, labels, guidance)

    with torch.no_grad():
        alone = velocity(base.network), velocity(other.network)
        both = of_both(velocity, base.network, (other.network, 1.5))
        for i in range(4):
            finished = list(cells[:i])
            first, second, mixed = (v(finished, cells[i], 500) for v in (*alone, both))
            assert on_the_line(mixed, first, second, 1.5), i


@pytest.mark.parametrize("guidance", [0.0, 2.0])
def test_var_mixes_guided_logits_and_each_network_remembers_the_scales(guidance: float) -> None:
    base, other, _ = models("VAR")
    draws = torch.Generator().manual_seed(0)
    codes = [None, *(torch.randn(3, side**2, 4, generator=draws) for side in (2, 4))]

    def logits(network: Any) -> Any:
        return guided_logits(network, torch.tensor([0, 1, 2]), guidance)

    with torch.no_grad():
        alone = logits(base.network), logits(other.network)
        both = of_both(logits, base.network, (other.network, 1.5))
        for k, scale in enumerate(codes):
            first, second, mixed = (of(scale, k / 2) for of in (*alone, both))
            assert on_the_line(mixed, first, second, 1.5), k


class Own(GenerativeModel):
    """A model of one's own, as the document has it: images that its network says, whatever the noise."""

    combines = True

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.network = nn.Linear(1, 4)

    def sample(self, noise: Noise, labels: Tensor | None, settings: Any) -> Tensor:
        said = of_both(lambda network: network, self.network, self.second)
        return said(torch.ones(1, 1)).clamp(0, 255).to(torch.uint8).view(1, 1, 2, 2)

    encode = training_loss = sample


def test_a_model_of_ones_own_combines_if_its_sampler_heeds_the_second_network() -> None:
    base, other = Own({}), Own({})
    for model, value in ((base, 60.0), (other, 40.0)):
        nn.init.zeros_(model.network.weight)
        nn.init.constant_(model.network.bias, value)
    assert [base.combine(other.network, g).sample(None, None, None).unique().tolist() for g in (0, -1, 0.5)] == [
        [60], [40], [70],
    ]  # fmt: skip


def test_a_model_that_does_not_combine_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    own = Own({})
    monkeypatch.setattr(Own, "combines", False)
    with pytest.raises(RequestError, match=r"Own: it does not sample with two networks.*set combines = True"):
        own.combine(own.network, 1.0)


@pytest.mark.parametrize("scale", [math.nan, math.inf])
def test_a_scale_that_is_no_number_is_refused(scale: float) -> None:
    base = tiny_edm()
    with pytest.raises(RequestError, match=r"scale of the second network is .*; expected a finite number"):
        base.combine(base.network, scale)
