"""Time sampling with VAR scale by scale beside computing all coarser scales again at every scale.

    python benchmarks/var_cache.py                    # tokens of 256-pixel images, a narrow network, one thread
    python benchmarks/var_cache.py --depth 16 --width 1024 --heads 16 --batch 1

Random weights: speed does not depend on them. Both get the same draws and run alternately in one process, after one
warm-up each; times are medians. Guidance is on, so every image is computed twice; images are not decoded.
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

from neon.noise import ImageNoise
from neon.runtime.files import write_json
from VAR.published import PATCH_NUMS
from VAR.sampler import VARSettings, draw_tokens, filter_logits, generate_tokens
from VAR.transformer import VAR
from VAR.vqvae import VQVAE


def main() -> None:
    parser = argparse.ArgumentParser(description="VAR: cached sampling beside computing coarser scales again.")
    parser.add_argument(
        "--side", type=int, choices=PATCH_NUMS, default=256, help="of the images (default: %(default)s)"
    )
    parser.add_argument("--depth", type=int, default=8, help="(default: %(default)s)")
    parser.add_argument("--width", type=int, default=256, help="(default: %(default)s)")
    parser.add_argument("--heads", type=int, default=4, help="(default: %(default)s)")
    parser.add_argument("--batch", type=int, default=2, help="images (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="(default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="timed runs of each (default: %(default)s)")
    parser.add_argument(
        "--json", type=Path, default=Path("benchmarks/results/var_cache.json"), help="(default: %(default)s)"
    )
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    record = {
        "command": shlex.join(["python", *sys.argv]),
        "machine": machine(),
        **{name: getattr(args, name) for name in ("threads", "side", "depth", "width", "heads", "batch", "repeats")},
        **measure(args),
    }
    print_table(record)
    write_json(args.json, record)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Times in seconds, and the share of tokens on which both agree."""
    torch.manual_seed(0)
    sides = PATCH_NUMS[args.side]
    transformer = VAR(depth=args.depth, width=args.width, heads=args.heads, patch_nums=sides)
    for parameter in transformer.parameters():  # initial blocks do next to nothing: tokens would not depend on them
        parameter.data.normal_(std=0.02 if parameter.ndim > 1 else 0.0)
    transformer.eval().requires_grad_(False)
    vqvae = VQVAE(base_channels=32, patch_nums=sides).eval().requires_grad_(False)
    labels, settings = torch.arange(args.batch), VARSettings()

    def cached() -> Tensor:
        return generate_tokens(transformer, vqvae, labels, ImageNoise(range(args.batch)), settings)

    @torch.no_grad()
    def again() -> Tensor:
        quantize, noise = vqvae.quantize, ImageNoise(range(args.batch))
        both = torch.cat([labels, torch.full_like(labels, transformer.classes)])
        feature_map, known, found = quantize.empty_map(args.batch), torch.empty(2 * args.batch, 0, 32), []
        for k, positions in enumerate(transformer.slices):
            logits = transformer(both, known)[:, positions]
            extra = settings.guidance * k / (len(sides) - 1)
            logits = (1 + extra) * logits[: args.batch] - extra * logits[args.batch :]
            draws = noise.exponential(sides[k] ** 2, transformer.vocab)
            found.append(draw_tokens(filter_logits(logits, settings.top_k, settings.top_p), draws))
            feature_map = quantize.accumulate(feature_map, quantize.embedding(found[-1]), k)
            if k < len(sides) - 1:
                known = torch.cat([known, quantize.next_input(feature_map, k).repeat(2, 1, 1)], dim=1)
        return torch.cat(found, dim=1)

    methods: dict[str, Callable[[], Tensor]] = {"all again": again, "cached": cached}
    tokens = {name: function() for name, function in methods.items()}  # the warm-up
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    cpu_seconds: dict[str, list[float]] = {name: [] for name in methods}  # tells how busy the machine was
    for _ in range(args.repeats):
        for name, function in methods.items():
            start, cpu_start = time.perf_counter(), time.process_time()
            function()
            seconds[name].append(time.perf_counter() - start)
            cpu_seconds[name].append(time.process_time() - cpu_start)
    baseline = statistics.median(seconds["all again"])
    return {
        "tokens_per_image": transformer.length,
        "equal_tokens": float((tokens["all again"] == tokens["cached"]).double().mean()),
        "methods": [
            {
                "method": name,
                "median_seconds": statistics.median(seconds[name]),
                "median_cpu_seconds": statistics.median(cpu_seconds[name]),
                "seconds": seconds[name],
                "images_per_second": args.batch / statistics.median(seconds[name]),
                "times_faster": baseline / statistics.median(seconds[name]),
            }
            for name in methods
        ],
    }


def print_table(record: dict[str, Any]) -> None:
    print(", ".join(f"{key} {value}" for key, value in record["machine"].items()))
    print(
        f"depth {record['depth']}, width {record['width']}, {record['tokens_per_image']} tokens, "
        f"batch {record['batch']}, {record['threads']} thread(s), median of {record['repeats']}; "
        f"{record['equal_tokens']:.2%} of tokens equal\n"
    )
    print(f"{'':12}{'seconds':>9}{'CPU':>9}{'images/s':>10}{'faster':>9}")
    for row in record["methods"]:
        print(
            f"{row['method']:12}{row['median_seconds']:9.3f}{row['median_cpu_seconds']:9.3f}"
            f"{row['images_per_second']:10.3f}{row['times_faster']:8.1f}x"
        )


if __name__ == "__main__":
    main()
