"""Time sampling with xAR cell by cell beside computing all finished cells again in every step.

    python benchmarks/xar_cache.py                    # 256 positions in 4 cells, a narrow network, one thread
    python benchmarks/xar_cache.py --depth 8 --width 768 --heads 12 --batch 1 --repeats 1

Random weights: speed does not depend on them. All get the same draws and run in turn in one process, after one
warm-up each; times are medians. "both halves" keeps finished cells but computes the first cell without a class too,
where there is no guidance yet, as the published program does. Latents are not decoded.
"""

import argparse
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from machine import machine
from torch import Tensor

from neon.nn.transformer import Generation
from neon.noise import ImageNoise
from neon.runtime.files import write_json
from xAR.sampler import XARSettings, generate_latents
from xAR.transformer import CLEAN, XAR

COUNTED = ("threads", "depth", "width", "heads", "steps", "guidance", "batch", "repeats")


def main() -> None:
    parser = argparse.ArgumentParser(description="xAR: cached sampling beside computing finished cells again.")
    parser.add_argument("--depth", type=int, default=4, help="blocks in each half (default: %(default)s)")
    parser.add_argument("--width", type=int, default=256, help="(default: %(default)s)")
    parser.add_argument("--heads", type=int, default=4, help="(default: %(default)s)")
    parser.add_argument("--steps", type=int, default=10, help="per cell; published: 40 or 50 (default: %(default)s)")
    parser.add_argument("--guidance", type=float, default=2.7, help="1: none (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=2, help="images (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="(default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="timed runs of each (default: %(default)s)")
    parser.add_argument(
        "--json", type=Path, default=Path("benchmarks/results/xar_cache.json"), help="(default: %(default)s)"
    )
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    record = {
        "command": shlex.join(["python", *sys.argv]),
        "machine": machine(),
        **{name: getattr(args, name) for name in COUNTED},
        **measure(args),
    }
    print_table(record)
    write_json(args.json, record)


class Recomputing(XAR):
    """Holds the finished cells themselves and computes them again for every velocity."""

    def start(self, labels: Tensor) -> Generation[Tensor]:
        self.clean: list[Tensor] = []
        return super().start(labels)

    def velocity(self, generation: Generation[Tensor], cell: Tensor, time: int) -> Tensor:
        cells = torch.stack([*(clean[: len(cell)] for clean in self.clean), cell], dim=1)
        times = torch.full(cells.shape[:2], CLEAN)
        times[:, -1] = time
        return self(cells, times, generation.given[: len(cell)])[:, -1]

    def remember(self, generation: Generation[Tensor], cell: Tensor) -> None:
        self.clean.append(cell)


class BothHalves(XAR):
    """Computes every row of the batch for every velocity, also where fewer are asked for."""

    def velocity(self, generation: Generation[Tensor], cell: Tensor, time: int) -> Tensor:
        rows = cell.repeat(len(generation.given) // len(cell), 1, 1)
        return super().velocity(generation, rows, time)[: len(cell)]


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Times in seconds, and how far the latents lie apart."""
    torch.manual_seed(0)
    keywords = {"width": args.width, "heads": args.heads, "encoder_depth": args.depth, "decoder_depth": args.depth}
    networks: dict[str, XAR] = {
        "all again": Recomputing(**keywords), "both halves": BothHalves(**keywords), "cached": XAR(**keywords),
    }  # fmt: skip
    for network in networks.values():
        network.load_state_dict(networks["cached"].state_dict())
        network.eval().requires_grad_(False)
    labels, settings = torch.arange(args.batch), XARSettings(num_steps=args.steps, guidance=args.guidance)

    def sampling(network: XAR) -> Callable[[], Tensor]:
        return lambda: generate_latents(network, labels, ImageNoise(range(args.batch)), settings)

    methods = {name: sampling(network) for name, network in networks.items()}
    latents = {name: function() for name, function in methods.items()}  # the warm-up
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    cpu_seconds: dict[str, list[float]] = {name: [] for name in methods}  # tells how busy the machine was
    for _ in range(args.repeats):
        for name, function in methods.items():
            start, cpu_start = time.perf_counter(), time.process_time()
            function()
            seconds[name].append(time.perf_counter() - start)
            cpu_seconds[name].append(time.process_time() - cpu_start)
    baseline = statistics.median(cpu_seconds["all again"])
    return {
        "positions": networks["cached"].length,
        "largest_entry": float(latents["cached"].abs().max()),
        "methods": [
            {
                "method": name,
                "median_seconds": statistics.median(seconds[name]),
                "median_cpu_seconds": statistics.median(cpu_seconds[name]),
                "seconds": seconds[name],
                "images_per_second": args.batch / statistics.median(seconds[name]),
                "times_less_cpu": baseline / statistics.median(cpu_seconds[name]),
                "largest_difference": float((latents[name] - latents["all again"]).abs().max()),
            }
            for name in methods
        ],
    }


def print_table(record: dict[str, Any]) -> None:
    print(", ".join(f"{key} {value}" for key, value in record["machine"].items()))
    print(
        f"{record['depth']} + {record['depth']} blocks of width {record['width']}, {record['positions']} positions, "
        f"{record['steps']} steps a cell, guidance {record['guidance']}, batch {record['batch']}, "
        f"{record['threads']} thread(s), median of {record['repeats']}; largest entry {record['largest_entry']:.1f}\n"
    )
    print(f"{'':12}{'seconds':>9}{'CPU':>9}{'images/s':>10}{'less CPU':>10}{'difference':>12}")
    for row in record["methods"]:
        print(
            f"{row['method']:12}{row['median_seconds']:9.3f}{row['median_cpu_seconds']:9.3f}"
            f"{row['images_per_second']:10.3f}{row['times_less_cpu']:9.2f}x{row['largest_difference']:12.1e}"
        )


if __name__ == "__main__":
    main()
