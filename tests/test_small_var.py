"""The small VAR of Fashion-MNIST in benchmarks/assets: a trained model, and what it must be able to do."""

import dataclasses
from pathlib import Path

import torch

from neon.metrics.features import load_features
from neon.model import load_model
from neon.noise import ImageNoise
from VAR.model import VARModel

ASSETS = Path(__file__).parent.parent / "benchmarks" / "assets"


def test_a_trained_transformer_draws_images_of_the_class_it_is_asked_for() -> None:
    """Judged by a classifier of the real images; without the class a tenth would be right."""
    model = load_model(ASSETS / "small_var_base.safetensors")
    assert isinstance(model, VARModel)
    model.use_tokenizer(ASSETS / "small_var_tokenizer.safetensors")
    noise, labels = ImageNoise(range(100)), torch.arange(100) % 10
    classifier = load_features(ASSETS / "fashion_rgb64.safetensors")
    right = {}
    for guidance in (0.0, 1.5):
        settings = dataclasses.replace(model.default_settings, guidance=guidance, top_k=0, top_p=0.0)
        images = model.sample(noise.restarted(), labels, settings)
        right[guidance] = (classifier.classify(images).argmax(1) == labels).double().mean().item()
    assert right[0.0] > 0.6
    assert right[1.5] > right[0.0], "guidance makes the class plainer"
