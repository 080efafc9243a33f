"""What models say of their samplers is so: network calls an image, converged settings, and what may be searched."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from edm.model import EDM
from edm.settings import AblationSettings, EDMSettings
from imm.model import IMM
from imm.settings import IMMSettings
from neon.noise import ImageNoise
from neon.tunable import Choice, Range, Tunable, at_calls
from tests.tiny import tiny_edm, tiny_imm, tiny_sd_vae, tiny_var, tiny_xar
from VAR.model import VARModel
from VAR.settings import VARSettings
from xAR.model import XARModel
from xAR.settings import XARSettings

IMAGES = 3


def latent_imm(seed: int = 0) -> IMM:
    model = tiny_imm(seed)
    model.set_codec(tiny_sd_vae())
    return model


def tiny_faces() -> EDM:
    return tiny_edm(label_dim=0)


Case = tuple[Callable[[], Any], Any]
SAMPLED: dict[str, Case] = {
    "EDM, Heun": (tiny_edm, EDMSettings(num_steps=4)),
    "EDM, Euler": (tiny_edm, EDMSettings(num_steps=4, solver="euler")),
    "EDM, Heun, guided": (tiny_edm, EDMSettings(num_steps=3, guidance=0.5)),
    "EDM, without a class": (tiny_edm, EDMSettings(num_steps=3, guidance=-1)),
    "EDM, unconditional, churn": (tiny_faces, EDMSettings(num_steps=3, S_churn=1)),
    "EDM, ablation": (tiny_edm, AblationSettings(num_steps=4, schedule="vp", scaling="vp", alpha=0.5)),
    "IMM": (latent_imm, IMMSettings(num_steps=3)),
    "IMM, not guided, restart": (latent_imm, IMMSettings(num_steps=3, guidance=1, restart=True)),
    "IMM, ratios": (latent_imm, IMMSettings(num_steps=2, mid_nt=(0.7,))),
    "xAR": (tiny_xar, XARSettings(num_steps=3)),
    "xAR, not guided": (tiny_xar, XARSettings(num_steps=4, guidance=1, stochastic=False)),
    "VAR": (tiny_var, VARSettings()),
    "VAR, not guided": (tiny_var, VARSettings(guidance=0)),
}
MODELS: dict[str, Callable[[], Any]] = {
    "EDM": tiny_edm,
    "EDM, unconditional": tiny_faces,
    "IMM": latent_imm,
    "xAR": tiny_xar,
    "VAR": tiny_var,
}
EVERY_MODEL = pytest.mark.parametrize("name", MODELS)


def sampled(model: Any, settings: Any) -> torch.Tensor:
    return model.sample(ImageNoise(range(IMAGES)), torch.arange(IMAGES) if model.num_classes else None, settings)


def counted(model: Any, network: Any, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list that grows by the rows of each evaluation of `network`."""
    rows: list[int] = []

    def count(module: Any, method: str, of: Callable[..., int]) -> None:
        original = getattr(module, method)

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            found = original(*args, **kwargs)
            rows.append(of(found, *args))
            return found

        monkeypatch.setattr(module, method, wrapped)

    if isinstance(model, EDM | IMM):  # the raw network
        count(network.model, "forward", lambda found, *_: len(found))
    elif isinstance(model, XARModel):
        count(network, "velocity", lambda found, *_: len(found))
        count(network, "remember", lambda _, generation, cell: -len(cell))  # which asks for a velocity
    else:
        assert isinstance(model, VARModel)
        count(network, "next_logits", lambda found, *_: len(found))
    return rows


@pytest.mark.parametrize("name", SAMPLED)
def test_an_image_takes_as_many_network_calls_as_the_model_says(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make, settings = SAMPLED[name]
    model = make()
    rows = counted(model, model.network, monkeypatch)
    sampled(model, settings)
    assert sum(rows) == IMAGES * model.calls(settings)


@pytest.mark.parametrize(("scale", "first", "second"), [(0.0, 1, 0), (-1.0, 0, 1), (0.5, 1, 1)])
@EVERY_MODEL
def test_two_networks_take_twice_the_calls_and_one_without_weight_none(
    name: str, scale: float, first: int, second: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, other = MODELS[name](), MODELS[name]()
    settings = few_steps(base)
    both = base.combine(other.network, scale)
    rows = [counted(base, model.network, monkeypatch) for model in (base, other)]
    sampled(both, settings)
    alone = IMAGES * base.calls(settings)
    assert [sum(each) for each in rows] == [first * alone, second * alone]
    assert both.calls(settings) == (first + second) * base.calls(settings)


def few_steps(model: Any) -> Any:
    """The usual settings of a model, with few steps."""
    settings = model.default_settings
    return replace(settings, num_steps=3) if hasattr(settings, "num_steps") else settings


@pytest.mark.parametrize("name", [name for name in MODELS if name != "VAR"])
def test_converged_settings_take_more_calls_and_the_same_guidance(name: str) -> None:
    model = MODELS[name]()
    usual = replace(few_steps(model), guidance=0 if name == "EDM, unconditional" else 1.75)
    converged = model.converged(usual)
    assert converged.guidance == usual.guidance
    assert model.calls(converged) > 2 * model.calls(usual)
    assert model.calls(converged) >= model.calls(replace(model.default_settings, guidance=usual.guidance))
    assert model.converged(converged) == converged


def test_larger_edm_networks_converge_in_more_steps() -> None:
    assert tiny_edm(img_resolution=64).converged(EDMSettings()).num_steps == 40


def test_var_has_one_number_of_steps() -> None:
    assert tiny_var().converged(VARSettings()) is None


def ends_and_middle(tunable: Tunable) -> list[Any]:
    if isinstance(tunable, Choice):
        return list(tunable.values)
    assert isinstance(tunable, Range) and tunable.low < tunable.high
    assert tunable.low > 0 or tunable.scale == "linear"
    middle = (tunable.low * tunable.high) ** 0.5 if tunable.scale == "log" else (tunable.low + tunable.high) / 2
    return [round(value) if tunable.integer else value for value in (tunable.low, middle, tunable.high)]


@EVERY_MODEL
def test_every_value_that_may_be_searched_can_be_sampled_with(name: str) -> None:
    model = MODELS[name]()
    usual = few_steps(model)
    assert model.tunable
    for setting, tunable in model.tunable.items():
        assert hasattr(usual, setting), setting
        for value in ends_and_middle(tunable):
            assert sampled(model, replace(usual, **{setting: value})).dtype == torch.uint8


def test_guidance_is_searched_where_a_network_can_be_guided() -> None:
    assert {name for name, make in MODELS.items() if "guidance" in make().tunable} == {"EDM", "IMM", "xAR", "VAR"}
    never_without_class = EDM({**tiny_edm().config, "label_dropout": 0})
    assert "guidance" not in never_without_class.tunable


@pytest.mark.parametrize("name", SAMPLED)
def test_settings_at_a_number_of_calls_take_no_more_and_as_many_steps_as_fit(name: str) -> None:
    make, settings = SAMPLED[name]
    model = make()
    for calls in (*range(1, 12), 40):
        found = at_calls(model.calls, settings, calls)
        if not hasattr(settings, "num_steps") or name == "IMM, ratios":
            assert found == (settings if model.calls(settings) <= calls else None)
        elif found is None:
            fewest = 3 if name.startswith("xAR") else 2 if name.startswith("EDM") else 1
            assert model.calls(replace(settings, num_steps=fewest)) > calls
        else:
            assert replace(found, num_steps=settings.num_steps) == settings
            assert model.calls(found) <= calls < model.calls(replace(found, num_steps=found.num_steps + 1))


def test_nothing_is_said_of_a_sampler_that_does_not_count_its_calls() -> None:
    assert at_calls(lambda settings: None, EDMSettings(), 100) is None
