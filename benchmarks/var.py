"""Images per second of a published VAR (random weights): transformer and decoder apart, by precision and compilation.

    python benchmarks/var.py                                                      # d16 at 256 px, one thread, one image
    python benchmarks/var.py --config var_d16 --device cuda --batch 64            # one GPU
    python benchmarks/var.py --config var_d36 --device cuda --batch 16

Guidance is on, as published: every image is computed twice. Each variant is timed alternately with the others;
the share of the device's matrix multiplication speed, in the same precision, is measured beside it.
"""

import shlex
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from machine import machine
from torch.utils.flop_counter import FlopCounterMode

from neon.files import write_json
from neon.noise import ImageNoise
from VAR.published import PUBLISHED, TOKENIZER, Published
from VAR.sampler import generate_tokens
from VAR.transformer import VAR
from VAR.vqvae import VQVAE

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def timed(program: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    program()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def matmul_tflops(device: torch.device, dtype: torch.dtype) -> float:
    """Matrix multiplication in TFLOP/s, best of five: 8192 square on a GPU, 2048 on a CPU."""
    size = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return 2 * size**3 / min(timed(lambda: a @ b, device) for _ in range(5)) / 1e12


class Variant:
    """One network in one mode and precision."""

    def __init__(self, row: Published, mode: str, precision: str, device: torch.device, batch: int) -> None:
        torch.manual_seed(0)
        self.dtype, self.device, self.batch, self.settings = DTYPES[precision], device, batch, row.settings
        with device:
            self.transformer = VAR(**row.transformer).eval().requires_grad_(False)
            self.tokenizer = VQVAE(**TOKENIZER, patch_nums=row.transformer["patch_nums"]).eval().requires_grad_(False)
        self.tokenizer.decoder.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if mode != "eager":
            torch._dynamo.config.recompile_limit = 64  # every scale has its own size
            for part in (*self.transformer.blocks, self.tokenizer.decoder):
                part.compile(mode="reduce-overhead" if mode == "graphs" else "default", dynamic=False)
        self.feature_map = torch.randn_like(self.tokenizer.quantize.empty_map(batch))
        self.seconds: tuple[list[float], list[float]] = ([], [])

    def sample(self) -> None:
        """The transformer's part: tokens."""
        with self._cast():
            noise = ImageNoise(range(self.batch), self.device)
            labels = torch.arange(self.batch, device=self.device)
            generate_tokens(self.transformer, self.tokenizer, labels, noise, self.settings)

    def decode(self) -> None:
        """The tokenizer's part: pixels."""
        with self._cast(), torch.no_grad():
            self.tokenizer.decode(self.feature_map)

    def measure(self) -> None:
        """Time both once."""
        for program, seconds in zip((self.sample, self.decode), self.seconds, strict=True):
            seconds.append(timed(program, self.device))

    def _cast(self) -> torch.autocast:
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32)


def main(
    config: str = "var_d16",
    device: Literal["cpu", "cuda"] = "cpu",
    batch: int = 1,
    precisions: tuple[Literal["fp32", "bf16", "fp16"], ...] = ("fp32",),
    modes: tuple[Literal["eager", "compiled", "graphs"], ...] = ("eager",),
    repeats: int = 3,
    threads: int = 1,
    json_file: Path | None = None,
) -> None:
    """Measure sampling.

    Args:
        config: Name of a published transformer.
        device: Where to compute.
        batch: Images at once.
        precisions: What to compute in.
        modes: eager; compiled blocks and decoder; compiled with CUDA graphs.
        repeats: Timed repeats of each variant after one warm-up, in turn; medians are reported.
        threads: CPU threads.
        json_file: Where the figures go; by default benchmarks/results/<config>_<device>.json.
    """
    torch.set_num_threads(threads)
    place, row = torch.device(device), PUBLISHED[config]
    variants = {f"{m}, {p}": Variant(row, m, p, place, batch) for m in modes for p in precisions}
    flops = []
    first = next(iter(variants.values()))
    for program in (first.sample, first.decode):
        with FlopCounterMode(display=False) as counter:
            program()
        flops.append(counter.get_total_flops() / batch / 1e12)
    for repeat in range(repeats + 1):
        for variant in variants.values():
            variant.measure()
            if repeat == 0:  # the warm-up
                for seconds in variant.seconds:
                    seconds.clear()
    record: dict[str, Any] = {
        "command": shlex.join(["python", "benchmarks/var.py", *sys.argv[1:]]),
        "machine": machine(),
        "device": torch.cuda.get_device_name(place) if device == "cuda" else "cpu",
        "config": config, "batch": batch, "threads": threads,
        "tflop_per_image": {"transformer": flops[0], "decoder": flops[1]},
        "variants": {},
    }  # fmt: skip
    print(f"{config} on {record['device']}, batch {batch}: {flops[0]:.2f} + {flops[1]:.2f} TFLOP an image")
    for name, variant in variants.items():
        medians = [statistics.median(seconds) for seconds in variant.seconds]
        peak = matmul_tflops(place, variant.dtype)
        shares = [flop * batch / second / peak for flop, second in zip(flops, medians, strict=True)]
        both = sum(flops) * batch / sum(medians) / peak
        record["variants"][name] = {
            "transformer_seconds": medians[0], "decoder_seconds": medians[1],
            "images_per_second": batch / sum(medians), "matmul_tflops": peak,
            "share_of_matmul": {"transformer": shares[0], "decoder": shares[1], "both": both},
        }  # fmt: skip
        print(
            f"{name:<16} transformer {medians[0]:7.2f} s ({shares[0]:.0%}), decoder {medians[1]:7.2f} s "
            f"({shares[1]:.0%}), {batch / sum(medians):8.3f} images/s ({both:.0%} of {peak:.3f} TFLOP/s)"
        )
    write_json(json_file or Path(__file__).parent / "results" / f"{config}_{device}.json", record)


if __name__ == "__main__":
    tyro.cli(main)
