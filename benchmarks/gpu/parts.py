"""The parts of the measurement, and the process that measures one."""

import time
from pathlib import Path
from typing import Literal

import torch

from gpu import correct, drift, profile, ratios, speed, train
from gpu.rows import Rows

Part = Literal["correct", "drift", "speed", "train", "ratios", "profile"]
SHARES: dict[Part, float] = {
    "correct": 0.2, "drift": 0.1, "speed": 0.3, "train": 0.1, "ratios": 0.22, "profile": 0.08,
}  # fmt: skip
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
        {"correct": correct, "drift": drift, "speed": speed, "train": train, "ratios": ratios}[part].measure(rows)
