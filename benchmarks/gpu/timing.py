"""Seconds on a device, which works behind the host's back."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from neon.model import GenerativeModel
from neon.precision import Precision
from neon.runtime.distributed import Processes
from neon.sampling import sample_block

MATMUL_SIDE = {"cuda": 8192, "cpu": 1024}


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(program: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call, until the device has finished."""
    synchronize(device)
    start = time.perf_counter()
    program()
    synchronize(device)
    return time.perf_counter() - start


def matmul_tflops(device: torch.device, precision: Precision) -> float:
    """Square matrix multiplication in TFLOP/s; best of five."""
    side, dtype = MATMUL_SIDE[device.type], precision.autocast or torch.float32
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    with precision.allowed_on(device):
        return 2 * side**3 / min(timed(lambda: a @ b, device) for _ in range(5)) / 1e12


@dataclass(frozen=True)
class Sampled:
    """One batch of images."""

    images: torch.Tensor
    """uint8 on the host"""
    network: float
    """seconds until the decoder begins; in all, if there is none"""
    total: float
    """seconds from seeds to bytes on the host"""


def sample(model: GenerativeModel, batch: int, settings: Any, device: torch.device) -> Sampled:
    """Sample as the programs do, less the files; the host waits once, where the decoder begins."""
    begun: list[float] = []

    def begin(*_: object) -> None:
        if not begun:  # autoencoders may decode in several passes
            synchronize(device)
            begun.append(time.perf_counter())

    entry = next((m for name, m in model.named_modules() if name.endswith("post_quant_conv")), None)
    hook = None if entry is None else entry.register_forward_pre_hook(begin)
    synchronize(device)
    start = time.perf_counter()
    images, _ = sample_block(model, range(batch), range(batch), settings, Processes(device=device))
    images = images.cpu()
    end = time.perf_counter()
    if hook is not None:
        hook.remove()
    return Sampled(images, (begun[0] if begun else end) - start, end - start)
