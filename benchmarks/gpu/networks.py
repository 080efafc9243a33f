"""The networks that are measured: published ones with random weights, tiny ones for a dry run, small trained ones."""

import contextlib
from collections.abc import Callable, Iterator
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
from VAR.model import VARModel
from VAR.vqvae import VQVAE
from xAR.model import XARModel
from xAR.vae import AutoencoderKL

ASSETS = Path(__file__).parent.parent / "assets"
DTYPES: dict[str, torch.dtype | None] = {"fp32": None, "tf32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
"""what `--precision` computes in under autocast; None: float32. tf32: its products are rounded by the GPU"""
PEAKS: dict[str, dict[str, float]] = {
    "H100": {"fp32": 67, "tf32": 495, "bf16": 989, "fp16": 989},
    "H200": {"fp32": 67, "tf32": 495, "bf16": 989, "fp16": 989},
    "A100": {"fp32": 19.5, "tf32": 156, "bf16": 312, "fp16": 312},
}
"""dense peaks in TFLOP/s by the maker's data sheets, of the card whose name holds the key"""


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A network as it is measured."""

    build: Callable[[], GenerativeModel]
    """with random weights and its autoencoder, on the default device"""
    tflop: float
    """an image costs, the decoder included, by the multiplications of matrices and convolutions; 0: not counted"""
    short: dict[str, Any]
    """settings of a short sampling, for the warm-up and the search for a batch"""
    batches: tuple[int, ...]
    """tried by that search, ascending"""
    training_batch: int = 0
    """published images per GPU and step; 0: not measured"""
    training_precision: str = "fp32"
    """as published"""

    def on(self, device: torch.device) -> GenerativeModel:
        """The model in eval mode on `device`."""
        torch.manual_seed(0)
        with device:
            model = self.build()
        return model.to(device).eval().requires_grad_(False)


def _edm(name: str) -> Callable[[], GenerativeModel]:
    return lambda: EDM({"network": edm.published.PUBLISHED[name].network})


def _var(name: str) -> Callable[[], GenerativeModel]:
    def build() -> GenerativeModel:
        row = VAR.published.PUBLISHED[name]
        model = VARModel({"transformer": row.transformer})
        model.set_tokenizer(VQVAE(**VAR.published.TOKENIZER, patch_nums=row.transformer["patch_nums"]))
        return model

    return build


def _xar(name: str) -> Callable[[], GenerativeModel]:
    def build() -> GenerativeModel:
        model = XARModel({"transformer": xAR.published.PUBLISHED[name].transformer})
        model.set_vae(AutoencoderKL())
        return model

    return build


def _imm() -> GenerativeModel:
    from diffusers.models import AutoencoderKL as StableDiffusionVAE  # an extra of the project, and slow to import

    model = IMM({"network": imm.published.PUBLISHED["imagenet256_ts_a2"].network})
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
        training_batch=96, training_precision="fp16",
    ),
    "xar_base": Subject(
        build=_xar("xar_base"), tflop=4.80 + 0.25, short={"num_steps": 3}, batches=(32, 128),
        training_batch=32, training_precision="fp16",
    ),
    "edm-cifar10": Subject(
        build=_edm("edm-cifar10-32x32-cond-vp"), tflop=1.48, short={"num_steps": 2}, batches=(128, 512),
        training_batch=64, training_precision="fp32",
    ),
    "imm-dit-xl": Subject(
        build=_imm, tflop=3.79 + 0.6, short={"num_steps": 1}, batches=(32, 128),
        training_batch=64, training_precision="fp16",
    ),
    "edm-ffhq": Subject(
        build=_edm("edm-ffhq-64x64-uncond-vp"), tflop=6.61, short={"num_steps": 2}, batches=(64, 256),
    ),
    "xar_large": Subject(build=_xar("xar_large"), tflop=21.1 + 0.25, short={"num_steps": 3}, batches=(16, 64)),
    "var_d36": Subject(build=_var("var_d36"), tflop=22.8 + 1.58, short={}, batches=(8, 32)),
}  # fmt: skip
"""the most telling first; TFLOP counted by torch's FlopCounterMode, network + decoder"""


def _tiny(name: str) -> Callable[[], GenerativeModel]:
    def build() -> GenerativeModel:
        from tests import tiny

        if name == "imm":
            model = tiny.tiny_imm()
            model.set_codec(tiny.tiny_sd_vae())
            return model
        others: dict[str, Callable[[], GenerativeModel]] = {
            "edm": tiny.tiny_edm,
            "VAR": tiny.tiny_var,
            "xAR": tiny.tiny_xar,
        }
        return others[name]()

    return build


TINY = {
    f"tiny-{name}": Subject(
        build=_tiny(name), tflop=0.0, short=short, batches=(2, 4), training_batch=4, training_precision=precision
    )
    for name, short, precision in (
        ("edm", {"num_steps": 2}, "fp32"),
        ("VAR", {}, "bf16"),
        ("xAR", {"num_steps": 3}, "bf16"),
        ("imm", {"num_steps": 1}, "bf16"),
    )
}
"""for a dry run; half precision is bfloat16, which CPUs train in"""


def subjects(tiny: bool) -> dict[str, Subject]:
    """The networks of a run."""
    return TINY if tiny else PUBLISHED


def trained(device: torch.device) -> dict[str, GenerativeModel]:
    """The small trained models that travel with the project, whose images mean something; Fashion-MNIST."""
    found = {"edm": load_model(BASE, device=device)}
    for name in ("VAR", "xAR", "imm"):
        found[name] = load_model(ASSETS / f"small_{name.lower()}_base.safetensors", device=device)
    found["VAR"].use_autoencoder(ASSETS / "small_var_tokenizer.safetensors")
    return found


def changed(model: GenerativeModel, settings: dict[str, Any]) -> Any:
    """The published settings of `model` with `settings` in their place."""
    return replace(model.default_settings, **settings)


@contextlib.contextmanager
def computing_in(model: GenerativeModel, precision: str) -> Iterator[None]:
    """Let `model` compute in a precision: a key of DTYPES; fp32 without TF32, every other with it."""
    tf32, dtype = precision != "fp32", DTYPES[precision]
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
    autocast: contextlib.AbstractContextManager[object] = contextlib.nullcontext()
    if isinstance(model, EDM):
        kind = next(model.network.parameters()).device.type
        autocast = torch.autocast(kind, dtype=dtype or torch.bfloat16, enabled=dtype is not None)
    elif isinstance(model, IMM):
        model.network.mixed_precision = dtype
    elif isinstance(model, (VARModel, XARModel)):
        model.precision = dtype
    with autocast:
        yield


def peak_tflops(device: torch.device, precision: str) -> float | None:
    """The dense peak of the card by its name; None: not known."""
    if device.type != "cuda":
        return None
    card = torch.cuda.get_device_name(device)
    return next((peaks[precision] for name, peaks in PEAKS.items() if name in card), None)
