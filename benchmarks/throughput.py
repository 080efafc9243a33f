"""Images per second of sampling and of self-training the demo's model, and where the time goes.

    python benchmarks/throughput.py

One thread; the share of the machine's matrix multiplication speed is measured beside it, on the same thread.
"""

import shlex
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import tyro
from machine import machine
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from neon.demo.assets import BASE, real_images
from neon.model import load_model
from neon.noise import ImageNoise
from neon.runtime.files import write_json

SAMPLING_BATCH, TRAINING_BATCH = 100, 32


def median_seconds(program: Callable[[], object], repeats: int) -> float:
    """Median wall time after one warm-up."""
    program()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        program()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def matmul_gflops(repeats: int) -> float:
    """float32 matrix multiplication of 1024 x 1024, GFLOP/s."""
    a, b = torch.randn(1024, 1024), torch.randn(1024, 1024)
    return 2 * 1024**3 / median_seconds(lambda: a @ b, repeats) / 1e9


def costliest(program: Callable[[], object], count: int = 5) -> dict[str, float]:
    """Share of the time of the operators that cost most."""
    with profile(activities=[ProfilerActivity.CPU], acc_events=True) as trace:
        program()
    times = {event.key: event.self_cpu_time_total for event in trace.key_averages()}
    total = sum(times.values())
    return {name: times[name] / total for name in sorted(times, key=lambda name: -times[name])[:count]}


def main(repeats: int = 9, json_file: Path = Path(__file__).parent / "results" / "throughput_edm.json") -> None:
    """Measure sampling and self-training.

    Args:
        repeats: Timed repeats of each after one warm-up; medians are reported.
        json_file: Where the figures go.
    """
    torch.set_num_threads(1)
    model = load_model(BASE)
    settings = replace(model.default_settings, solver="euler", num_steps=5)

    def sample() -> None:
        noise = ImageNoise(range(SAMPLING_BATCH))
        model.sample(noise, model.labels(range(SAMPLING_BATCH), noise), settings)

    trained = load_model(BASE)
    trained.network.train().requires_grad_(True)
    images, labels = real_images()[:TRAINING_BATCH], torch.arange(TRAINING_BATCH) % 10

    def train() -> None:
        noise = ImageNoise(range(TRAINING_BATCH))
        trained.training_loss(trained.encode(images, noise), labels, noise).mean().backward()
        trained.network.zero_grad(set_to_none=True)

    record: dict[str, Any] = {
        "command": shlex.join(["python", "benchmarks/throughput.py", *sys.argv[1:]]),
        "machine": machine(),
        "threads": 1,
        "matmul_gflops": matmul_gflops(repeats),
    }
    print(record["machine"])
    print(f"matrix multiplication, one thread: {record['matmul_gflops']:.0f} GFLOP/s")
    for name, program, batch in (("sampling", sample, SAMPLING_BATCH), ("self-training", train, TRAINING_BATCH)):
        seconds = median_seconds(program, repeats)
        with FlopCounterMode(display=False) as counter:
            program()
        gflops = counter.get_total_flops() / seconds / 1e9
        share = gflops / record["matmul_gflops"]
        shares = costliest(program)
        record[name] = {
            "batch": batch,
            "images_per_second": batch / seconds,
            "gflops": gflops,
            "share_of_matmul": share,
            "time": shares,
        }
        print(f"{name}: {batch / seconds:.0f} images/s, {gflops:.0f} GFLOP/s ({share:.0%} of matrix multiplication)")
        print("    " + ", ".join(f"{key.removeprefix('aten::')} {value:.0%}" for key, value in shares.items()))
    write_json(json_file, record)
    print(f"written to {json_file}")


if __name__ == "__main__":
    tyro.cli(main)
