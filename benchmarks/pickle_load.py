"""Time loading an NVIDIA-style pickle beside reading its bytes and copying its tensors.

    python benchmarks/pickle_load.py                      # 220 MB, the size of the published CIFAR-10 networks
    python benchmarks/pickle_load.py --megabytes 1200 --repeats 3

Three ways run alternately in one process on a file in the page cache, after one warm-up each; times are medians.
"reading and copying" is the floor of any loader that reads the whole file: its bytes into one buffer and every tensor
out of it. "opening" locates the tensors only; "loading" opens the file and reads all of them.
"""

import argparse
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from machine import machine

sys.path.insert(0, str(Path(__file__).parents[1]))  # the writer of such files belongs to the tests

from edm.precond import EDMPrecond
from neon.checkpoint import load_state, open_checkpoint
from neon.runtime.files import write_json
from tests.pickles import dumps, snapshot

KEYWORDS: dict[str, Any] = {
    "img_resolution": 32, "img_channels": 3, "label_dim": 10, "model_type": "SongUNet", "channel_mult": [2, 2, 2],
    "augment_dim": 9, "dropout": 0.13,
}  # fmt: skip
MEGABYTES = 222.9  # of the weights of that network with 128 channels; they grow with their square


def main() -> None:
    parser = argparse.ArgumentParser(description="Loading a pickle beside reading its bytes and copying its tensors.")
    parser.add_argument("--megabytes", type=float, default=MEGABYTES, help="size, roughly (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=15, help="timed runs of each (default: %(default)s)")
    parser.add_argument(
        "--json", type=Path, default=Path("benchmarks/results/pickle_load.json"), help="(default: %(default)s)"
    )
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        record = {
            "command": shlex.join(["python", *sys.argv]),
            "machine": machine(),
            "threads": args.threads,
            "repeats": args.repeats,
            **measure(Path(folder) / "network.pkl", args.megabytes, args.repeats),
        }
    print_table(record)
    write_json(args.json, record)


def measure(path: Path, megabytes: float, repeats: int) -> dict[str, Any]:
    """Times in seconds for a network of about that many megabytes, and the times over the floor."""
    channels = max(32, round(128 * (megabytes / MEGABYTES) ** 0.5 / 32) * 32)
    keywords = {**KEYWORDS, "model_channels": channels}
    path.write_bytes(dumps(snapshot(EDMPrecond(**keywords).eval().requires_grad_(False), keywords)))
    sizes = [spec.nbytes for spec in open_checkpoint(path).specs.values()]

    def read_and_copy() -> object:
        content = torch.empty(path.stat().st_size, dtype=torch.uint8)
        with open(path, "rb", buffering=0) as file:
            file.readinto(content.numpy().data)
        return [part.clone() for part in content[: sum(sizes)].split(sizes)]

    def opening() -> object:
        with open_checkpoint(path) as checkpoint:
            return checkpoint.names()

    methods: dict[str, Callable[[], object]] = {
        "reading and copying": read_and_copy,
        "opening": opening,
        "loading": lambda: load_state(path),
    }
    seconds: dict[str, list[float]] = {method: [] for method in methods}
    for repeat in range(-1, repeats):
        for method, function in methods.items():
            start = time.perf_counter()
            result = function()
            if repeat >= 0:  # the first is the warm-up
                seconds[method].append(time.perf_counter() - start)
            del result
    floor = statistics.median(seconds["reading and copying"])
    return {
        "file_bytes": path.stat().st_size,
        "tensors": len(sizes),
        "tensor_bytes": sum(sizes),
        "methods": [
            {
                "method": method,
                "median_seconds": statistics.median(times),
                "seconds": times,
                "times_the_floor": statistics.median(times) / floor,
            }
            for method, times in seconds.items()
        ],
    }


def print_table(record: dict[str, Any]) -> None:
    print(", ".join(f"{key} {value}" for key, value in record["machine"].items()))
    print(f"{record['file_bytes'] / 1e6:.0f} MB, {record['tensors']} tensors, median of {record['repeats']}\n")
    print(f"{'':22}{'seconds':>9}{'floors':>9}")
    for row in record["methods"]:
        print(f"{row['method']:22}{row['median_seconds']:9.3f}{row['times_the_floor']:9.2f}")


if __name__ == "__main__":
    main()
