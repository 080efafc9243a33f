"""What a model computes in: decided once, when it is built, and the same through every door."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

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
NAMED = {precision.name: precision for precision in (FP32, TF32, BF16, FP16)}


def decide(asked: str | None, published: Precision, device: torch.device) -> Precision:
    """The precision of a model: what is `asked` for by name; else on a GPU the published one, on a CPU float32.

    Raises:
        RequestError: none is called so.
    """
    if asked is not None:
        if asked not in NAMED:
            raise RequestError(f"--precision {asked}: expected one of {', '.join(NAMED)}")
        return NAMED[asked]
    return published if device.type == "cuda" else FP32
