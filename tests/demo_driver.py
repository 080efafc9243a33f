"""The demo with a plan that takes seconds, for the tests that kill it or start it under torchrun."""

import sys
from dataclasses import replace
from pathlib import Path

import torch

from neon.demo.run import PLAN, run_demo
from neon.runtime.distributed import processes

SMALL = replace(
    PLAN,
    num_synthetic=48,
    training_images=64,
    batch=16,
    batch_gpu=4,
    lr=1e-3,
    select_images=40,
    batch_size=8,
    sampler_scores=5,
)


def main() -> None:
    torch.set_num_threads(1)
    with processes("cpu") as group:
        run_demo(SMALL, Path(sys.argv[1]), group)


if __name__ == "__main__":
    main()
