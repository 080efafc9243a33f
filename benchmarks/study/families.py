"""The small models that are studied: how each is loaded, trained and scored."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

from small_study import ASSETS, ROOT

from neon.demo.assets import BASE as DEMO_BASE
from neon.demo.run import PLAN
from neon.model import GenerativeModel, load_model
from neon.recipe import Recipe
from study.data import Data, colour_data, demo_data, digits_data


@dataclass(frozen=True, kw_only=True)
class Family:
    """One kind of small model, with a base for each seed."""

    name: str
    bases: tuple[Path, ...]
    data: Callable[[], Data]
    recipe: Callable[[GenerativeModel], Recipe]
    """of self-training"""
    micro_batch: int = 64
    num_synthetic: int = 2000
    """images in S, unless a row says otherwise"""
    steps: int = 100
    """of self-training, likewise"""
    select_images: int = 1000
    """behind each score that something is chosen by"""
    report_images: int = 2000
    """in each block of a row"""
    batch_size: int = 100
    kind: str | None = None
    """`path/to/file.py:NAME` of a class that is not installed"""
    training: Mapping[str, Any] = field(default_factory=dict)
    """arguments of the model that is trained"""
    autoencoder: Path | None = None

    def load(self, path: Path, for_training: bool) -> GenerativeModel:
        """The model of a file, on one CPU."""
        arguments = self.training if for_training else {}
        model = load_model(path, kind=self.kind, for_training=for_training, **arguments)
        if self.autoencoder is not None:
            model.use_autoencoder(self.autoencoder)
        return model


def edm() -> Family:
    """The demo's EDM of Fashion-MNIST, trained as there, and one of another seed."""
    return Family(
        name="edm",
        bases=(DEMO_BASE, ASSETS / "study_edm_base1.safetensors"),
        data=cache(demo_data),
        recipe=PLAN.recipe,
        micro_batch=PLAN.batch_gpu or 32,
        num_synthetic=PLAN.num_synthetic,
        steps=50,
    )


def large() -> Family:
    """EDMs of Fashion-MNIST with four times the channels, without and with augmentation (`study.gpu_bases`)."""
    folder = ROOT / "runs" / "study" / "gpu"
    bases = folder / "base-128.safetensors", folder / "base-128-augmented.safetensors"
    return replace(edm(), name="large", bases=bases)


def digits() -> Family:
    """The EDM of scikit-learn's digits: few real images, of which half are kept from training."""
    base = ASSETS / "small_digits_base.safetensors"
    return replace(edm(), name="digits", bases=(base,), data=cache(digits_data), report_images=900)


def flow() -> Family:
    """The flow of docs/examples on digits; unconditional."""
    return replace(
        digits(),
        name="flow",
        bases=(ASSETS / "study_flow_digits_base.safetensors",),
        kind=f"{ROOT}/docs/examples/flow.py:Flow",
        recipe=lambda model: replace(model.recipe, batch_size=128, lr=1e-4),
        num_synthetic=2000,
        steps=100,
    )


def var() -> Family:
    """The small VAR of Fashion-MNIST in colour."""
    return Family(
        name="VAR",
        bases=(ASSETS / "small_var_base.safetensors", ASSETS / "study_var_base1.safetensors"),
        data=cache(colour_data),
        recipe=lambda model: replace(model.recipe, batch_size=64, lr=1e-4).with_rampup(0),
        training={"enlargement": 1.0},
        autoencoder=ASSETS / "small_var_tokenizer.safetensors",
    )


def xar() -> Family:
    """The small xAR of Fashion-MNIST in colour; slow, so that fewer images are drawn."""
    return Family(
        name="xAR",
        bases=(ASSETS / "small_xar_base.safetensors",),
        data=cache(colour_data),
        recipe=lambda model: replace(model.recipe, batch_size=64, lr=1e-4).with_rampup(0).with_halflife(None),
        num_synthetic=1000,
        steps=50,
        select_images=500,
        report_images=500,
        training={"mirrors": False, "dropout": (0.0, 0.0)},
    )


def imm() -> Family:
    """The small IMM of Fashion-MNIST in colour."""
    return Family(
        name="imm",
        bases=(ASSETS / "small_imm_base.safetensors",),
        data=cache(colour_data),
        recipe=lambda model: replace(model.recipe, batch_size=64, lr=1e-4).with_halflife(None),
        num_synthetic=1000,
        steps=50,
        report_images=1000,
    )


FAMILIES: dict[str, Callable[[], Family]] = {
    "edm": edm, "large": large, "VAR": var, "xAR": xar, "imm": imm, "digits": digits, "flow": flow
}  # fmt: skip
