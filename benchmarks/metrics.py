"""What scoring adds to Inception's forward pass, in time and in memory.

    python benchmarks/metrics.py                       # 1,000 images of 32 x 32, one thread, some minutes
    python benchmarks/metrics.py --images 200 --size 64

Each block of images goes through the network twice: once alone, once followed by the moments of the features (for
FID) and by the sums of the Inception Score; which comes first alternates. The weights are random, which changes no
time. Blocks are made as they are needed, so the memory is that of the network and of the sums.
"""

import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import tyro
from machine import machine

sys.path.insert(0, str(Path(__file__).parent.parent))  # for the random weights of the tests

from neon.metrics import InceptionScore, Moments
from neon.metrics.inception import InceptionFeatures
from neon.runtime.files import write_json
from tests.inception import random_inception, varied_images

FORWARD, SCORED, SUMS = "forward alone", "forward, moments, Inception Score", "moments and Inception Score alone"


def memory_mb(field: str) -> float:
    """`VmRSS` (now) or `VmHWM` (the most so far) of this process."""
    return int(Path("/proc/self/status").read_text().split(f"{field}:")[1].split()[0]) / 1024


def random_network() -> InceptionFeatures:
    with tempfile.TemporaryDirectory() as folder:
        torch.save(random_inception(), Path(folder, "inception.pth"))
        return InceptionFeatures.load(Path(folder, "inception.pth"))


def main(
    images: int = 1000,
    size: int = 32,
    batch: int = 50,
    threads: int = 1,
    json_file: Path = Path(__file__).parent / "results" / "metrics.json",
) -> None:
    """Measure time and memory of scoring.

    Args:
        images: Number of images.
        size: Their height and width.
        batch: Images in a block.
        threads: CPU threads.
        json_file: Where the figures go.
    """
    torch.set_num_threads(threads)
    host, inception = machine(), random_network()
    moments, score = Moments(inception.dim), InceptionScore(images)
    seconds: dict[str, list[float]] = {FORWARD: [], SCORED: [], SUMS: []}
    memory: dict[str, dict[str, float]] = {}

    def timed(side: str, program: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        result = program()
        seconds[side].append(time.perf_counter() - start)
        return result

    def scored(block: torch.Tensor) -> None:
        features = inception(block)

        def add() -> None:
            moments.update(features)
            score.update(inception.logits(features))

        timed(SUMS, add)

    inception(varied_images(batch, size))  # the warm-up
    sizes = [min(batch, images - start) for start in range(0, images, batch)]
    for index, count in enumerate(sizes):
        block = varied_images(count, size, seed=index)
        sides = [(FORWARD, lambda block=block: inception(block)), (SCORED, lambda block=block: scored(block))]
        for side, program in sides if index % 2 else reversed(sides):
            timed(side, program)
        if index + 1 in (max(1, len(sizes) // 4), len(sizes)):
            memory[f"after {moments.count} images"] = {"resident": memory_mb("VmRSS"), "peak": memory_mb("VmHWM")}

    median = {side: statistics.median(times) for side, times in seconds.items()}
    pairs = [scored / forward - 1 for scored, forward in zip(seconds[SCORED], seconds[FORWARD], strict=True)]
    record = {
        "command": shlex.join(["python", "benchmarks/metrics.py", *sys.argv[1:]]),
        "machine": host,
        "threads": threads,
        "images": images,
        "size": size,
        "batch": batch,
        "median_seconds_per_block": median,
        "images_per_second": batch / median[SCORED],
        "added_by_scoring": median[SUMS] / median[FORWARD],
        "added_by_scoring_pair_by_pair": statistics.median(pairs),
        "memory_mb": memory,
        "inception_score": score.score(),
        "seconds": seconds,
    }
    print(record["machine"])
    print(f"{images} images of {size} x {size} in blocks of {batch}, {threads} thread(s), medians over {len(sizes)}")
    for side, value in median.items():
        print(f"{side:36}{1000 * value:9.1f} ms a block")
    print(f"added by scoring: {median[SUMS] / median[FORWARD]:.1%} ({statistics.median(pairs):+.1%} pair by pair)")
    for moment, figures in memory.items():
        print(f"memory {moment}: {figures['resident']:.0f} MB resident, {figures['peak']:.0f} MB at most")
    write_json(json_file, record)
    print(f"written to {json_file}")


if __name__ == "__main__":
    tyro.cli(main)
