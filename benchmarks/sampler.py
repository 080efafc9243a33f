"""Images per second of a published EDM network (random weights), by memory layout and compilation.

    python benchmarks/sampler.py                                  # CIFAR-10, one thread of a CPU
    python benchmarks/sampler.py --device cuda --batch 256        # one GPU

The variants are timed in turn within one run, in network calls; images per second follow from the calls of
the published sampler. The share of the machine's matrix multiplication speed is measured beside them.
"""

import shlex
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from machine import machine
from torch.utils.flop_counter import FlopCounterMode

from edm.model import EDM
from edm.published import PUBLISHED
from neon.files import write_json
from neon.noise import ImageNoise


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(program: Callable[[], object], device: torch.device) -> float:
    synchronize(device)
    start = time.perf_counter()
    program()
    synchronize(device)
    return time.perf_counter() - start


def matmul_tflops(device: torch.device) -> float:
    """float32 matrix multiplication of 2048 x 2048 in TFLOP/s, in the mode the network computes in; best of five."""
    a, b = (torch.randn(2048, 2048, device=device) for _ in range(2))
    return 2 * 2048**3 / min(timed(lambda: a @ b, device) for _ in range(5)) / 1e12


def variants(config: dict[str, Any], device: torch.device, compile_too: bool) -> dict[str, EDM]:
    """The same network in every variant."""
    found: dict[str, EDM] = {}
    for compiled in (False, True) if compile_too else (False,):
        for layout in (torch.contiguous_format, torch.channels_last):
            torch.manual_seed(0)
            model = EDM(config).to(device).eval().requires_grad_(False)
            model.network.to(memory_format=layout)  # type: ignore[call-overload]  # torch documents it
            if compiled:
                model.network.compile()
            name = "channels last" if layout is torch.channels_last else "as is"
            found[f"{name}, compiled" if compiled else name] = model
    return found


def main(
    config: str = "edm-cifar10-32x32-cond-vp",
    device: Literal["cpu", "cuda"] = "cpu",
    batch: int = 4,
    threads: int = 1,
    repeats: int = 3,
    compile: bool = True,
    json_file: Path = Path(__file__).parent / "results" / "sampler_edm.json",
) -> None:
    """Measure the network calls of sampling.

    Args:
        config: Name of a published network.
        device: Where to compute.
        batch: Images per call.
        threads: CPU threads.
        repeats: Timed repeats of each variant after one warm-up, in turn; medians are reported.
        compile: Also measure torch.compile; needs a C++ compiler on a CPU.
        json_file: Where the figures go.
    """
    torch.set_num_threads(threads)
    place, row = torch.device(device), PUBLISHED[config]
    settings = replace(row.settings, num_steps=2)
    measured_calls, published_calls = 3, 2 * row.settings.num_steps - 1
    record: dict[str, Any] = {
        "command": shlex.join(["python", "benchmarks/sampler.py", *sys.argv[1:]]),
        "machine": machine(),
        "device": torch.cuda.get_device_name(place) if device == "cuda" else "cpu",
        "config": config,
        "threads": threads,
        "batch": batch,
        "matmul_tflops": matmul_tflops(place),
    }
    models = variants({"network": row.network}, place, compile)

    def sample(model: EDM) -> torch.Tensor:
        noise = ImageNoise(range(batch), place)
        return model.sample(noise, model.labels(range(batch), noise), settings)

    with FlopCounterMode(display=False) as counter:
        expected = sample(models["as is"])
    tflop_per_call = counter.get_total_flops() / measured_calls / 1e12
    seconds: dict[str, list[float]] = {name: [] for name in models}
    off = {name: int((sample(model).int() - expected.int()).abs().max()) for name, model in models.items()}
    for _ in range(repeats):
        for name, model in models.items():
            seconds[name].append(timed(lambda model=model: sample(model), place))  # type: ignore[misc]
    print(
        f"{config} on {record['device']}, {threads} threads, batch {batch}; matrix multiplication "
        f"{record['matmul_tflops']:.3f} TFLOP/s, network {1000 * tflop_per_call / batch:.1f} GFLOP an image and call"
    )
    record["variants"] = {}
    for name, times in seconds.items():
        call = statistics.median(times) / measured_calls
        share = tflop_per_call / call / record["matmul_tflops"]
        record["variants"][name] = {
            "seconds_per_call": call,
            "images_per_second": batch / (call * published_calls),
            "share_of_matmul": share,
            "largest_difference": off[name],
        }
        print(
            f"{name:<26} {call:7.3f} s a call, {batch / (call * published_calls):7.3f} images/s at "
            f"{row.settings.num_steps} steps, {share:.0%} of matrix multiplication, "
            f"images differ by at most {off[name]} of 255"
        )
    write_json(json_file, record)


if __name__ == "__main__":
    tyro.cli(main)
