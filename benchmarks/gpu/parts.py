"""The parts of the measurement, and the process that measures one."""

import time
from pathlib import Path
from typing import Literal

import torch

from gpu import correct, drift, profile, speed, train
from gpu.rows import Rows

Part = Literal["correct", "drift", "speed", "train", "profile"]
SHARES: dict[Part, float] = {"correct": 0.25, "drift": 0.1, "speed": 0.4, "train": 0.15, "profile": 0.1}
"""of the time, in the order in which they run"""


def measure_part(
    part: Part, device: str, tiny: bool, only: tuple[str, ...], seconds: float, record: Path, file: Path
) -> None:
    """Measure a part in this process; its rows go to `file`."""
    if device == "cpu":
        torch.set_num_threads(1)
    if tiny:
        torch.compiler.set_stance("force_eager")  # a compilation takes longer than all the rest
    place = torch.device(device, 0) if device == "cuda" else torch.device("cpu")
    rows = Rows(file, place, tiny, time.monotonic() + seconds, only)
    if part == "profile":
        profile.measure(rows, record)
    else:
        {"correct": correct, "drift": drift, "speed": speed, "train": train}[part].measure(rows)
