"""The small trained models of Fashion-MNIST and of digits in benchmarks/assets, and what they must be able to do."""

import dataclasses
from pathlib import Path

import pytest
import torch

from imm.model import IMM
from neon.demo.assets import FEATURES as DEMO_FEATURES
from neon.errors import RequestError
from neon.metrics.small import load_features
from neon.model import GenerativeModel, load_model
from neon.noise import ImageNoise
from VAR.model import VARModel
from xAR.flags import XARFlags
from xAR.model import XARModel

ASSETS = Path(__file__).parent.parent / "benchmarks" / "assets"
FEATURES = ASSETS / "fashion_rgb64.safetensors"
LABELS = torch.arange(100) % 10


def right(model: GenerativeModel, features: Path = FEATURES, **settings: object) -> float:
    """The share of 100 images that a classifier of the real ones puts into the class asked for; by chance 0.1."""
    images = model.sample(ImageNoise(range(100)), LABELS, dataclasses.replace(model.default_settings, **settings))
    classifier = load_features(features)
    return (classifier.classify(images).argmax(1) == LABELS).double().mean().item()


def test_var_draws_images_of_the_class_it_is_asked_for() -> None:
    model = load_model(ASSETS / "small_var_base.safetensors")
    assert isinstance(model, VARModel)
    model.use_autoencoder(ASSETS / "small_var_tokenizer.safetensors")
    plain = right(model, guidance=0.0, top_k=0, top_p=0.0)
    assert plain > 0.6
    assert right(model, guidance=1.5, top_k=0, top_p=0.0) > plain, "guidance makes the class plainer"


def test_xar_draws_images_of_the_class_it_is_asked_for() -> None:
    model = load_model(ASSETS / "small_xar_base.safetensors")
    assert isinstance(model, XARModel)
    assert right(model, guidance=1.0, num_steps=8) > 0.5


def test_imm_draws_images_of_the_class_it_is_asked_for_even_in_one_step() -> None:
    model = load_model(ASSETS / "small_imm_base.safetensors")
    assert isinstance(model, IMM)
    plain = right(model, guidance=1.0, num_steps=1)
    assert plain > 0.5
    assert right(model, guidance=2.0, num_steps=2) > plain, "guidance makes the class plainer"


def test_the_edm_of_digits_draws_the_digit_it_is_asked_for() -> None:
    model = load_model(ASSETS / "small_digits_base.safetensors")
    assert right(model, ASSETS / "digits64.safetensors", num_steps=5, solver="euler") > 0.9


def test_the_pipeline_of_diffusers_draws_images_of_the_class_it_is_asked_for() -> None:
    pytest.importorskip("diffusers", reason="needs Python 3.11 and the extra diffusers")
    assert right(load_model(ASSETS / "small_diffusers"), DEMO_FEATURES, num_steps=5) > 0.7


def test_the_small_xar_is_known_by_name() -> None:
    path = ASSETS / "small_xar_base.safetensors"
    model = load_model(path)
    assert isinstance(model, XARModel)
    XARFlags(model_ckpt=str(path), model="xar_small").check_model(path, model)
    with pytest.raises(RequestError, match=r"--model xar_base: .* is xar_small"):
        XARFlags(model_ckpt=str(path), model="xar_base").check_model(path, model)
