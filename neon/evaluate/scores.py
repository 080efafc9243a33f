"""Scores of one set of weights, and the log of a run that never computes one twice."""

import json
import math
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from neon.errors import DegenerateError
from neon.runtime.distributed import Processes
from neon.runtime.files import append_json, from_json
from neon.runtime.run_folder import reading_state

LOG_FILE = "evaluations.jsonl"
"""in the folder of a run: the evaluations that are done"""
SHARES = ("precision", "recall", "density", "coverage")
"""scores of single images on manifolds of nearest neighbours"""


@dataclass(frozen=True, kw_only=True)
class Scores:
    """One evaluation of one set of weights, in one feature space; `beside` has those in others."""

    distance: float
    """Frechet distance between features of generated and real images; lower is better"""
    is_mean: float | None = None
    """Inception Score, mean over splits; higher is better; None: not scored"""
    is_std: float | None = None
    """its standard deviation over splits"""
    precision: float | None = None
    """share of generated images that lie within the real ones"""
    recall: float | None = None
    """share of real images that lie within the generated ones"""
    density: float | None = None
    coverage: float | None = None
    kernel: float | None = None
    """kernel distance, of Inception's features the KID: mean over subsets, without bias; lower is better"""
    kernel_std: float | None = None
    """its standard deviation over subsets"""
    clip_score: float | None = None
    """how well images fit their prompts by CLIP, mean in 0..100; higher is better; None: not scored"""
    num_images: int | None
    """None: the statistics scored do not say"""
    seconds: float | None = None
    """wall time, without what was lost when a run was killed; None: not timed"""
    beside: dict[str, "Scores"] = field(default_factory=dict)
    """of the same images in other feature spaces, by the name of the distance there"""


def scores_from(entry: Any) -> Scores:
    """Scores from their fields as JSON; a ValueError if they are none."""
    if not isinstance(entry, dict) or not isinstance(entry.get("beside", {}), dict):
        raise ValueError(f"{type(entry).__name__} instead of scores")
    beside = {name: scores_from(one) for name, one in entry.get("beside", {}).items()}
    scores = from_json(Scores, {**entry, "beside": beside})
    if not math.isfinite(scores.distance):
        raise ValueError(f"distance is {scores.distance}")
    return scores


def scores_json(scores: Scores) -> dict[str, Any]:
    """Scores as JSON; as in records of earlier runs where there is no kernel distance, and one feature space."""
    newer = ("kernel", "kernel_std", "clip_score", "beside")
    entry = {name: value for name, value in asdict(scores).items() if name not in newer or value not in (None, {})}
    return entry | (
        {"beside": {name: scores_json(one) for name, one in scores.beside.items()}} if scores.beside else {}
    )


class ScoreLog:
    """Every evaluation of a run, appended to a file as it finishes; a finished one is never computed again.

    So are those that failed for their weights or images (`DegenerateError`): they would fail again.

    Raises:
        RequestError: the file is damaged. Half a line, which a killed run leaves, is passed over: it is made again.
    """

    def __init__(self, path: str | os.PathLike[str], processes: Processes) -> None:
        self.path, self.processes = Path(path), processes
        self.entries: dict[str, Scores | str] = processes.on_main(self._read)
        """scores, or why there are none, by the name of the evaluation"""

    def _read(self) -> dict[str, Scores | str]:
        entries: dict[str, Scores | str] = {}
        lines = self.path.read_bytes().splitlines() if self.path.exists() else []
        for number, line in enumerate(lines, 1):
            with reading_state(self.path, f"delete line {number}, whose evaluation is then made again"):
                try:
                    entry = json.loads(line.decode("ascii"))
                except json.JSONDecodeError:
                    continue
                if not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
                    raise ValueError(f"line {number} is not of an evaluation")
                failure = entry.get("failure")
                rest = {key: value for key, value in entry.items() if key != "name"}
                entries[entry["name"]] = failure if isinstance(failure, str) else scores_from(rest)
        return entries

    def get_or(self, name: str, compute: Callable[[], Scores]) -> Scores:
        """The recorded scores called `name`; if there are none, computed and recorded.

        Raises:
            DegenerateError: the evaluation fails, or failed, for its weights or images.
        """
        known = self.processes.from_main(self.entries.get(name))
        if known is None:
            try:
                made = known = compute()
                record = {"name": name, **scores_json(made)}
            except DegenerateError as error:
                known = str(error)
                record = {"name": name, "failure": known}
            self.processes.on_main(lambda: append_json(self.path, record))
        self.entries[name] = known
        if isinstance(known, str):
            raise DegenerateError(known)
        return known
