"""The networks that are measured: published ones with random weights, tiny ones for a dry run, small trained ones."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

import edm.published
import imm.published
import VAR.published
import xAR.published
from edm.model import EDM
from imm.model import IMM
from imm.vae import Codec
from neon.demo.assets import BASE
from neon.model import GenerativeModel, load_model
from neon.precision import BF16, FP32, Precision
from VAR.model import VARModel
from VAR.vqvae import VQVAE
from xAR.model import XARModel
from xAR.vae import AutoencoderKL

ASSETS = Path(__file__).parent.parent / "assets"
PEAKS: dict[str, dict[str, float]] = {
    "H100": {"fp32": 67, "tf32": 495, "bf16": 989, "fp16": 989},
    "H200": {"fp32": 67, "tf32": 495, "bf16": 989, "fp16": 989},
    "A100": {"fp32": 19.5, "tf32": 156, "bf16": 312, "fp16": 312},
}
"""dense peaks in TFLOP/s by the maker's data sheets, of the card whose name holds the key"""


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A network as it is measured."""

    build: Callable[[Precision], GenerativeModel]
    """with random weights and its autoencoder, on the default device"""
    tflop: float
    """an image costs, the decoder included, by the multiplications of matrices and convolutions; 0: not counted"""
    short: dict[str, Any]
    """settings of a short sampling, for the warm-up and the search for a batch"""
    batches: tuple[int, ...]
    """tried by that search, ascending"""
    training_batch: int = 0
    """published images per GPU and step; 0: not measured"""
    training_precision: Precision = FP32
    """as published"""

    def on(self, device: torch.device, precision: Precision) -> GenerativeModel:
        """The model in eval mode on `device`."""
        torch.manual_seed(0)
        with device:
            model = self.build(precision)
        return model.to(device).eval().requires_grad_(False)


def _edm(name: str) -> Callable[[Precision], GenerativeModel]:
    return lambda precision: EDM({"network": edm.published.PUBLISHED[name].network}, precision=precision)


def _var(name: str) -> Callable[[Precision], GenerativeModel]:
    def build(precision: Precision) -> GenerativeModel:
        row = VAR.published.PUBLISHED[name]
        model = VARModel({"transformer": row.network}, precision=precision)
        model.set_tokenizer(VQVAE(**VAR.published.TOKENIZER, patch_nums=row.network["patch_nums"]))
        return model

    return build


def _xar(name: str) -> Callable[[Precision], GenerativeModel]:
    def build(precision: Precision) -> GenerativeModel:
        model = XARModel({"transformer": xAR.published.PUBLISHED[name].network}, precision=precision)
        model.set_vae(AutoencoderKL())
        return model

    return build


def _imm(precision: Precision) -> GenerativeModel:
    from diffusers.models import AutoencoderKL as StableDiffusionVAE  # an extra of the project, and slow to import

    model = IMM({"network": imm.published.PUBLISHED["imagenet256_ts_a2"].network}, precision=precision)
    vae = StableDiffusionVAE(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        sample_size=256,
    )
    on_gpu = next(model.network.parameters()).is_cuda
    model.set_codec(Codec(vae.to(torch.float16 if on_gpu else torch.float32)))  # as `load_codec` does
    return model


PUBLISHED = {
    "var_d16": Subject(
        build=_var("var_d16"), tflop=0.60 + 0.39, short={}, batches=(32, 128),
        training_batch=96, training_precision=VARModel.training_precision,
    ),
    "xar_base": Subject(
        build=_xar("xar_base"), tflop=4.80 + 0.25, short={"num_steps": 3}, batches=(32, 128),
        training_batch=32, training_precision=XARModel.training_precision,
    ),
    "edm-cifar10": Subject(
        build=_edm("edm-cifar10-32x32-cond-vp"), tflop=1.48, short={"num_steps": 2}, batches=(128, 512),
        training_batch=64, training_precision=EDM.training_precision,
    ),
    "imm-dit-xl": Subject(
        build=_imm, tflop=3.79 + 0.6, short={"num_steps": 1}, batches=(32, 128),
        training_batch=64, training_precision=IMM.training_precision,
    ),
    "edm-ffhq": Subject(
        build=_edm("edm-ffhq-64x64-uncond-vp"), tflop=6.61, short={"num_steps": 2}, batches=(64, 256),
    ),
    "xar_large": Subject(build=_xar("xar_large"), tflop=21.1 + 0.25, short={"num_steps": 3}, batches=(16, 64)),
    "var_d36": Subject(build=_var("var_d36"), tflop=22.8 + 1.58, short={}, batches=(8, 32)),
}  # fmt: skip
"""the most telling first; TFLOP counted by torch's FlopCounterMode, network + decoder"""


def _tiny(name: str) -> Callable[[Precision], GenerativeModel]:
    def build(precision: Precision) -> GenerativeModel:
        from tests import tiny

        if name == "imm":
            model = tiny.tiny_imm(precision=precision)
            model.set_codec(tiny.tiny_sd_vae())
            return model
        others: dict[str, Callable[..., GenerativeModel]] = {
            "edm": tiny.tiny_edm,
            "VAR": tiny.tiny_var,
            "xAR": tiny.tiny_xar,
        }
        return others[name](precision=precision)

    return build


TINY = {
    f"tiny-{name}": Subject(
        build=_tiny(name), tflop=0.0, short=short, batches=(2, 4), training_batch=4, training_precision=precision
    )
    for name, short, precision in (
        ("edm", {"num_steps": 2}, FP32),
        ("VAR", {}, BF16),
        ("xAR", {"num_steps": 3}, BF16),
        ("imm", {"num_steps": 1}, BF16),
    )
}
"""for a dry run; half precision is bfloat16, which CPUs train in"""


def subjects(tiny: bool) -> dict[str, Subject]:
    """The networks of a run."""
    return TINY if tiny else PUBLISHED


def trained(name: str, device: torch.device, precision: str = "fp32") -> GenerativeModel:
    """The small trained model of an architecture, which travels with the project: its images mean something."""
    path = BASE if name == "edm" else ASSETS / f"small_{name.lower()}_base.safetensors"
    model = load_model(path, device=device, precision=precision)
    if name == "VAR":
        model.use_autoencoder(ASSETS / "small_var_tokenizer.safetensors")
    return model


def changed(model: GenerativeModel, settings: dict[str, Any]) -> Any:
    """The published settings of `model` with `settings` in their place."""
    return replace(model.default_settings, **settings)


def peak_tflops(device: torch.device, precision: str) -> float | None:
    """The dense peak of the card by its name; None: not known."""
    if device.type != "cuda":
        return None
    card = torch.cuda.get_device_name(device)
    return next((peaks[precision] for name, peaks in PEAKS.items() if name in card), None)
