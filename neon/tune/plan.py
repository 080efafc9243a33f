"""What `neon tune` searches and reports; imports nothing heavy, so that the command line can state its flags by it."""

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from neon.errors import RequestError
from neon.runtime.parallel import MOST_WORKERS, Parallel

Metric = Literal["distance", "is", "precision", "recall"]
_OF_SAMPLER = ("sampler_scores", "sampler_images", "resample", "synthetic_images", "training_images")
"""fields of the search for the best sampler"""


@dataclass(frozen=True, kw_only=True)
class TunePlan:
    """Search: the points, and the images that they are compared and reported on.

    Raises:
        RequestError: a range is empty or runs backwards, a number is too small, or there is no snapshot.
    """

    base: Path
    """base weights, of a network that is recognised or written by neon"""
    self_trained: tuple[Path, ...]
    """snapshots of one self-training, in order of budget"""
    key: str | None = None
    """nesting of the state dict in the base's file, such as model_ema; chosen if not given"""
    self_trained_key: str | None = None
    """the same for the snapshots"""
    w: tuple[float, float] = (-0.5, 2.0)
    """range of merge weights; 0, the base, is always in it"""
    guidance: tuple[float, float] | None = None
    """range of guidance; without it, that of the sampler's settings"""
    grid: tuple[float, ...] | None = None
    """score all of these w for every snapshot, instead of a search"""
    guidance_grid: tuple[float, ...] | None = None
    """with --grid: for each of these guidances"""
    metric: Metric = "distance"
    """what is best: the lowest distance, or the highest of another score"""
    num_images: int = 10_000
    """selection images behind each point"""
    report_images: int = 10_000
    """report images in each block"""
    blocks: int = 3
    """of report images, at least 3"""
    batch_size: int = 64
    """images per forward pass of one process"""
    seed: int = 0
    """of the images"""
    tolerance: float = 0.01
    """relative gain below which the search ends"""
    limit: int = 16
    """evaluations of the search at most"""
    tune_sampler: bool = True
    """search of the base's best sampler of as many network calls, where w is chosen, too; gains are held against it"""
    sampler_scores: int = 12
    """evaluations of that search, the settings that were asked for among them"""
    sampler_images: int | None = None
    """selection images behind each of these; by default --num_images"""
    resample: bool = True
    """a synthetic set drawn by that sampler, and a self-training on it as that of the last snapshot; without it the
    given snapshots are used there, too"""
    synthetic_images: int | None = None
    """images of that set; by default as many as the last snapshot was trained on"""
    training_images: int | None = None
    """images of that self-training, repeated ones included; by default as of the last snapshot"""
    parallel: Parallel | None = None
    """how several processes train there: ordered, ddp or fsdp, as in self-training"""
    workers: int | None = None
    """processes that read images ahead there, for each that trains; by default none on a CPU, up to 8 on a GPU"""
    baselines: bool = True
    """rows of the base at twice the network calls and with a converged sampler, and of both networks at inference"""

    def __post_init__(self) -> None:
        for name, span in (("w", self.w), ("guidance", self.guidance)):
            if span is not None and not (math.isfinite(span[0]) and math.isfinite(span[1]) and span[0] < span[1]):
                raise RequestError(f"--{name} {span[0]:g} {span[1]:g}: expected a range, the lower end first")
        for name, values in (("grid", self.grid), ("guidance_grid", self.guidance_grid)):
            if values is not None and not (values and all(map(math.isfinite, values))):
                raise RequestError(f"--{name} {' '.join(map(str, values))}: expected one or several finite numbers")
        if not 0 <= self.tolerance < math.inf:
            raise RequestError(f"--tolerance {self.tolerance:g}: expected 0 or more, such as 0.01")
        for name in ("w", "guidance", "tolerance", "limit"):
            if self.grid is not None and getattr(self, name) != getattr(TunePlan, name):
                other = "give --guidance_grid" if name == "guidance" else "leave it out"
                raise RequestError(f"--{name}: is of a search, and --grid scores all of its points; {other}")
        if self.guidance_grid is not None and self.grid is None:
            raise RequestError("--guidance_grid: goes with --grid; for a search give --guidance LOW HIGH")
        if self.metric not in get_args(Metric):
            raise RequestError(f"--metric {self.metric}: unknown; expected one of {', '.join(get_args(Metric))}")
        for name in (
            "num_images", "report_images", "blocks", "batch_size", "limit", "sampler_scores", "sampler_images",
            "synthetic_images", "training_images",
        ):  # fmt: skip
            if (number := getattr(self, name)) is not None and number < 1:
                raise RequestError(f"--{name} {number}: expected at least 1")
        if self.workers is not None and not 0 <= self.workers <= MOST_WORKERS:
            raise RequestError(f"--workers {self.workers}: expected 0 to {MOST_WORKERS}")
        for name in _OF_SAMPLER:
            if not self.tune_sampler and getattr(self, name) != getattr(TunePlan, name):
                raise RequestError(
                    f"--{name}: is of the search for the best sampler, which was to be left out; leave the flag out"
                )
        if self.blocks < 3:
            raise RequestError(f"--blocks {self.blocks}: expected at least 3, to estimate the noise")
        if not self.self_trained:
            raise RequestError("--self_trained: expected one or several snapshots")
        if len({path.resolve() for path in self.self_trained}) < len(self.self_trained):
            raise RequestError(f"--self_trained {' '.join(map(str, self.self_trained))}: a file is given twice")

    @property
    def searches_sampler(self) -> bool:
        """Whether there is a search for the base's best sampler; a grid scores its own points only."""
        return self.tune_sampler and self.sampler_scores > 1 and self.grid is None

    def facts(self) -> dict[str, Any]:
        """What a run is determined by, as JSON; without what is not searched, as in records of earlier runs."""
        left_out = () if self.searches_sampler else ("tune_sampler", *_OF_SAMPLER)
        left_out = left_out if self.baselines else (*left_out, "baselines")
        left_out = (*left_out, "parallel", "workers")  # which move results by rounding, or not at all
        return {name: value for name, value in asdict(self).items() if name not in left_out}

    @property
    def guidances(self) -> tuple[float, ...]:
        """The ends of the range of guidance, or all of the grid; empty: the settings decide."""
        return (self.guidance if self.grid is None else self.guidance_grid) or ()
