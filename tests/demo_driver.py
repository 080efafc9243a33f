"""The demo with a plan that takes seconds, for the tests that kill it or start it under torchrun."""

import sys
from pathlib import Path

import torch

from neon.demo.run import DemoPlan, run_demo
from neon.recipe import Recipe
from neon.runtime.distributed import processes

SMALL = DemoPlan(
    num_synthetic=48,
    training_steps=4,
    recipe=Recipe(batch_size=16, lr=1e-3),
    micro_batch=4,
    num_images=40,
    num_blocks=3,
    batch_size=8,
    nearest_k=3,
    sampler_scores=5,
    picture_w=(-1.0,),
)


def main() -> None:
    torch.set_num_threads(1)
    with processes("cpu") as group:
        run_demo(SMALL, Path(sys.argv[1]), group)


if __name__ == "__main__":
    main()
