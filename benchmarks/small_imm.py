"""Neon on a small IMM of Fashion-MNIST in pixels, from training to scores at 1, 2, 4 and 8 steps over three seed blocks.

    python benchmarks/small_imm.py prepare          # data, features, base: an hour, resumable
    python benchmarks/small_imm.py study --cfg 1.5  # S, self-training, every w at every number of steps
    python benchmarks/small_imm.py precision        # how far bfloat16 moves images and scores

Every step is one of the project's programs. `study` writes benchmarks/results/small_imm.json, one entry per guidance
and number of steps, beside the floor: real training images scored against the test images.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from machine import machine
from small_study import ASSETS, DATA, METRIC, ROOT, last_snapshot, prepare_data, program, record_study, scoring_flags
from small_study import BLOCKS as BLOCKS

from neon.dataset import ImageDataset
from neon.demo.fashion import DEBIAN_FOLDER
from neon.files import write_json

RUN = ROOT / "runs" / "small_imm"
BASE = ASSETS / "small_imm_base.safetensors"
RESULTS = Path(__file__).parent / "results"
STEPS = (1, 2, 4, 8)
