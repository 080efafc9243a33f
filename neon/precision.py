"""What a model computes in: decided once, when it is built, and the same through every door.

TF32, by which a GPU rounds the inputs of products of float32, is a part of it: published scores were sampled, and
published networks trained, with it or without, and that is the default of each architecture. `--tf32` says otherwise.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from neon.errors import RequestError


@dataclass(frozen=True, kw_only=True)
class Precision:
    """Arithmetic of networks; weights, sums that decide scores, and what a network keeps in float32 are not touched."""

    name: str = "fp32"
    """fp32, tf32, bf16 or fp16; recorded with every score"""
    autocast: torch.dtype | None = None
    """what matrix products and convolutions are computed in; None: float32"""
    tf32: bool = False
    """whether a GPU may round the inputs of float32 matrix products to TF32"""
    tf32_convolutions: bool = False
    """the same of convolutions"""
    reduced_sums: bool = True
    """whether a GPU may add up products of half precision in half precision, as torch does by default"""
    reason: str = "float32"
    """why this one, for people"""
    says_tf32: bool = False
    """whether half precision has TF32 beside it, or not, because it was asked for and not by default"""

    @property
    def recorded(self) -> dict[str, Any]:
        """What records of images and trainings tell of it, as JSON."""
        return {"precision": self.name, **({"tf32": self.tf32} if self.says_tf32 else {})}

    def with_tf32(self, rounds: bool) -> "Precision":
        """The same with TF32 of all products that are left to float32, or without; float32 is then called so."""
        if rounds == self.tf32 == self.tf32_convolutions:
            return self
        if self.autocast is None:
            return replace(TF32 if rounds else FP32, reduced_sums=self.reduced_sums)
        reason = f"{self.reason}, {'with' if rounds else 'without'} TF32"
        return replace(self, tf32=rounds, tf32_convolutions=rounds, reason=reason, says_tf32=True)

    @contextlib.contextmanager
    def allowed_on(self, device: torch.device) -> Iterator[None]:
        """Let float32 products on `device` be rounded as far as this precision says, and put the switches back.

        The switches are the process's; a CPU has none. Autocast is entered by the models themselves, for parts of them
        stay outside it.
        """
        if device.type != "cuda":
            yield
            return
        matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
        sums = "allow_fp16_reduced_precision_reduction", "allow_bf16_reduced_precision_reduction"
        before = matmul.allow_tf32, cudnn.allow_tf32, *(getattr(matmul, name) for name in sums)
        matmul.allow_tf32, cudnn.allow_tf32 = self.tf32, self.tf32_convolutions
        for name in sums:
            setattr(matmul, name, self.reduced_sums)
        try:
            yield
        finally:
            matmul.allow_tf32, cudnn.allow_tf32, *of_sums = before
            for name, value in zip(sums, of_sums, strict=True):
                setattr(matmul, name, value)

    def autocast_on(self, device: torch.device) -> contextlib.AbstractContextManager[object]:
        """The context of autocast, which does nothing for float32."""
        if self.autocast is None:
            return contextlib.nullcontext()
        return torch.autocast(device.type, dtype=self.autocast)


FP32 = Precision()
TF32 = Precision(name="tf32", tf32=True, tf32_convolutions=True, reason="TF32")
FP16 = Precision(name="fp16", autocast=torch.float16, tf32=True, tf32_convolutions=True, reason="float16 autocast")
BF16 = Precision(name="bf16", autocast=torch.bfloat16, tf32=True, tf32_convolutions=True, reason="bfloat16 autocast")
ENCODING = Precision(name="tf32", tf32_convolutions=True, reason="TF32 convolutions, torch's default")
"""of programs that encode images once and for all on a GPU"""
NAMED = {precision.name: precision for precision in (FP32, TF32, BF16, FP16)}


def decide(asked: str | None, published: Precision, device: torch.device, tf32: bool | None = None) -> Precision:
    """The precision of a model: what is `asked` for by name; else on a GPU the published one, on a CPU float32.

    `tf32` says whether a GPU may round the inputs of float32 products; None: as usual for that precision. Nothing on
    others, which know none.

    Raises:
        RequestError: none is called so, or the two contradict each other.
    """
    if asked is not None and asked not in NAMED:
        raise RequestError(f"--precision {asked}: expected one of {', '.join(NAMED)}")
    if tf32 is False and asked == TF32.name:
        raise RequestError("--precision tf32 and --tf32 0: they contradict each other; leave one of them out")
    on_gpu = device.type == "cuda"
    precision = NAMED[asked] if asked is not None else published if on_gpu else FP32
    return precision if tf32 is None or not on_gpu else precision.with_tf32(tf32)
