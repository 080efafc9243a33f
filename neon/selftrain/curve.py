"""The curve of a training, read from its folder."""

import csv
import math
import statistics
from pathlib import Path

from neon.selftrain.folder import CURVE_FILE

MOST_PLACES = 200
"""of a curve that is drawn"""


def training_curve(folder: Path) -> list[tuple[float, float]]:
    """Images seen and mean loss since the place before, at `MOST_PLACES` places at most; empty where none is told.

    Weights may come from anywhere, so a table of that name that is no such curve is none.
    """
    try:
        with open(folder / CURVE_FILE, newline="", encoding="utf-8") as file:
            steps = [(float(line["images_seen"]), float(line["loss"])) for line in csv.DictReader(file)]
    except (OSError, ValueError, KeyError, TypeError, csv.Error):
        return []
    steps = [step for step in steps if all(map(math.isfinite, step))]
    each = -(-len(steps) // MOST_PLACES) or 1
    parts = [steps[start : start + each] for start in range(0, len(steps), each)]
    return [(part[-1][0], statistics.fmean(loss for _, loss in part)) for part in parts]
