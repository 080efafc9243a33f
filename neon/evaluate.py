"""From a model to scores: sample, extract features, compare with real statistics.

Features reach every process in the order of image indices, block by block, whatever the number of
processes; so the moments, the scores and every decision taken on them are the same to the last bit.
"""

import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from neon.distributed import Processes
from neon.files import append_json
from neon.metrics import FrechetReference, Manifold, Moments, Statistics
from neon.metrics.features import FeatureExtractor
from neon.model import GenerativeModel
from neon.progress import Progress
from neon.sampling import blocks, rounds, sample_block


@dataclass(frozen=True, kw_only=True)
class Scores:
    """One evaluation of one set of weights."""

    distance: float
    """Frechet distance between features of generated and real images; lower is better"""
    precision: float | None = None
    """share of generated images that lie within the real ones"""
    recall: float | None = None
    """share of real images that lie within the generated ones"""
    density: float | None = None
    coverage: float | None = None
    num_images: int
    seconds: float
    """wall time"""


@dataclass(frozen=True, kw_only=True)
class Reference:
    """Real images, as far as scores need them."""

    frechet: FrechetReference
    manifold: Manifold | None = None
    """for precision and recall; None: not scored"""


def features_in_order(
    model: GenerativeModel,
    seeds: Sequence[int],
    settings: Any,
    extractor: FeatureExtractor,
    *,
    batch_size: int,
    processes: Processes,
    title: str,
) -> Iterator[Tensor]:
    """Features float32 [B, F] of one sampled image per seed, in blocks in order of index, in every process."""
    every = blocks(len(seeds), batch_size)
    with Progress(title, len(seeds), "img", processes) as progress:
        for first, block in zip(range(0, len(every), processes.world_size), rounds(every, processes), strict=True):
            mine = torch.zeros(batch_size, extractor.dim, device=processes.device)
            if block is not None:
                images, _ = sample_block(model, block, seeds, settings, processes)
                mine[: len(block)] = extractor(images)
            for done, features in zip(
                every[first : first + processes.world_size], processes.gather(mine), strict=False
            ):
                yield features[: len(done)]
                progress.advance(len(done))


def evaluate(
    model: GenerativeModel,
    seeds: Sequence[int],
    settings: Any,
    extractor: FeatureExtractor,
    reference: Reference,
    *,
    batch_size: int,
    processes: Processes,
    title: str = "evaluating",
) -> Scores:
    """Scores of `len(seeds)` sampled images against `reference`.

    Raises:
        WorkError: features are not finite (the weights, or the images, are broken).
    """
    started = time.monotonic()
    moments = Moments(extractor.dim, device=processes.device)
    kept: list[Tensor] = []
    for features in features_in_order(
        model, seeds, settings, extractor, batch_size=batch_size, processes=processes, title=title
    ):
        moments.update(features)
        if reference.manifold is not None:
            kept.append(features)
    distance = reference.frechet.distance(Statistics.from_moments(moments, name=title))
    shares: dict[str, Any] = {}
    if reference.manifold is not None:
        manifold = reference.manifold.compare(torch.cat(kept))
        shares = {name: getattr(manifold, name) for name in ("precision", "recall", "density", "coverage")}
    scores = Scores(
        distance=distance,
        num_images=len(seeds),
        seconds=time.monotonic() - started,
        **shares,
    )
    return processes.from_main(scores)


class ScoreLog:
    """Every evaluation of a run, appended to a file as it finishes; a finished one is never computed again."""

    def __init__(self, path: str | os.PathLike[str], processes: Processes) -> None:
        self.path, self.processes = Path(path), processes
        self.entries: dict[str, Scores] = {}
        if self.path.exists():
            for line in self.path.read_text().splitlines():
                try:
                    entry = json.loads(line)
                except ValueError:  # half a line, left by a killed run: that evaluation is made again
                    continue
                name = entry.pop("name")
                self.entries[name] = Scores(**entry)

    def get_or(self, name: str, compute: Callable[[], Scores]) -> Scores:
        """The recorded scores called `name`; if there are none, computed and recorded."""
        known = self.processes.from_main(self.entries.get(name))
        if known is None:
            made = known = compute()
            self.processes.on_main(lambda: append_json(self.path, {"name": name, **asdict(made)}))
        self.entries[name] = known
        return known
