"""What the benchmarks of generators in two stages share: a network that makes latents or tokens, then a decoder."""

import shlex
import statistics
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from machine import machine
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from neon.files import write_json

Precision = Literal["fp32", "tf32", "bf16", "fp16"]
Mode = Literal["eager", "compiled", "graphs"]
DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""what is computed in; tf32: float32, with matrix products of GPUs rounded"""


def timed(program: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call, until the device has finished."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    program()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def allow_tf32(precision: str) -> None:
    """Let matrix products be rounded to TF32, or not."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision == "tf32"


def matmul_tflops(device: torch.device, precision: str) -> float:
    """Matrix multiplication in TFLOP/s, best of five: 8192 square on a GPU, 2048 on a CPU."""
    allow_tf32(precision)
    size = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(size, size, device=device, dtype=DTYPES[precision]) for _ in range(2))
    return 2 * size**3 / min(timed(lambda: a @ b, device) for _ in range(5)) / 1e12


class Variant(ABC):
    """One network with its decoder, in one mode and precision."""

    def __init__(self, precision: str, device: torch.device, batch: int) -> None:
        self.precision, self.dtype, self.device, self.batch = precision, DTYPES[precision], device, batch
        self.seconds: tuple[list[float], list[float]] = ([], [])

    @abstractmethod
    def sample(self) -> None:
        """The network's part."""

    @abstractmethod
    def decode(self) -> None:
        """The decoder's part: pixels."""

    def measure(self) -> None:
        """Time both once."""
        allow_tf32(self.precision)
        for program, seconds in zip((self.sample, self.decode), self.seconds, strict=True):
            seconds.append(timed(program, self.device))

    def cast(self) -> torch.autocast:
        """Computing in the precision of this variant."""
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32)


def compile_parts(parts: list[nn.Module], mode: str) -> None:
    """Compile in place, unless `mode` is eager."""
    if mode != "eager":
        for part in parts:
            part.compile(mode="reduce-overhead" if mode == "graphs" else "default", dynamic=False)


def compare(config: str, variants: Mapping[str, Variant], *, repeats: int, threads: int, json_file: Path) -> None:
    """Time `variants` in turn, `repeats` times after a warm-up; print medians and write them to `json_file`."""
    first = next(iter(variants.values()))
    flops = []
    for program in (first.sample, first.decode):
        with FlopCounterMode(display=False) as counter:
            program()
        flops.append(counter.get_total_flops() / first.batch / 1e12)
    for repeat in range(repeats + 1):
        for variant in variants.values():
            variant.measure()
            if repeat == 0:  # the warm-up
                for seconds in variant.seconds:
                    seconds.clear()
    cuda, batch = first.device.type == "cuda", first.batch
    record: dict[str, Any] = {
        "command": shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
        "machine": machine(),
        "device": torch.cuda.get_device_name(first.device) if cuda else "cpu",
        "config": config, "batch": batch, "threads": threads,
        "tflop_per_image": {"network": flops[0], "decoder": flops[1]},
        "variants": {},
    }  # fmt: skip
    print(f"{config} on {record['device']}, batch {batch}: {flops[0]:.2f} + {flops[1]:.2f} TFLOP an image")
    for name, variant in variants.items():
        medians = [statistics.median(seconds) for seconds in variant.seconds]
        peak = matmul_tflops(variant.device, variant.precision)
        shares = [flop * batch / second / peak for flop, second in zip(flops, medians, strict=True)]
        both = sum(flops) * batch / sum(medians) / peak
        record["variants"][name] = {
            "network_seconds": medians[0], "decoder_seconds": medians[1],
            "images_per_second": batch / sum(medians), "matmul_tflops": peak,
            "share_of_matmul": {"network": shares[0], "decoder": shares[1], "both": both},
        }  # fmt: skip
        print(
            f"{name:<16} network {medians[0]:7.2f} s ({shares[0]:.0%}), decoder {medians[1]:7.2f} s "
            f"({shares[1]:.0%}), {batch / sum(medians):8.3f} images/s ({both:.0%} of {peak:.3f} TFLOP/s)"
        )
    write_json(json_file, record)
