"""The demo with a plan and a base that take seconds, for the tests that kill it or run it in several processes."""

from dataclasses import replace
from pathlib import Path

import torch

from neon.demo.run import PLAN, run_demo
from neon.model import save_model
from neon.runtime.distributed import processes
from tests.tiny import tiny_edm

# The images do not divide by the blocks, nor the blocks of the scores by 2.
SMALL = replace(
    PLAN,
    num_synthetic=14,
    training_images=64,
    batch=16,
    batch_gpu=4,
    lr=1e-3,
    select_images=10,
    batch_size=4,
    sampler_scores=5,
)


def write_base(path: Path) -> None:
    """Write a base of the images that the demo compares with."""
    save_model(path, tiny_edm(img_resolution=14, label_dim=10, attn_resolutions=[7]))


def main(base: Path, out: Path) -> None:
    torch.set_num_threads(1)
    with processes("cpu") as group:
        run_demo(SMALL, out, group, base=base)
