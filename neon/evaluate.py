"""From a model, or from images, to scores: features block by block, compared with real statistics.

Features reach the main process in the order of image indices, whatever the number of processes; so the
moments, the scores and every decision taken on them are the same to the last bit.
"""

import json
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from neon.checkpoint import open_checkpoint, save_safetensors
from neon.data.images import ImageDataset, TrainingImages
from neon.errors import DegenerateError, warn
from neon.metrics import FrechetReference, InceptionScore, Manifold, Moments, Statistics
from neon.metrics.features import FeatureExtractor
from neon.model import GenerativeModel
from neon.runtime.blocks import rows_in_order
from neon.runtime.distributed import Processes
from neon.runtime.files import append_json, from_json
from neon.runtime.run_folder import STATE_VERSION, VERSION_KEY, check_version, reading_state
from neon.runtime.signals import Stopped
from neon.sampling import Label, sample_block

LOG_FILE, STATE_FILE = "evaluations.jsonl", "evaluation.safetensors"
"""in the folder of a run: the evaluations that are done, and the one in progress"""
SAVE_EVERY_SECONDS = 60.0
INCEPTION_SCORE_SPLITS = 10
_BEGINS_ANEW = "delete it, and the evaluation that it is of begins anew"


@dataclass(frozen=True, kw_only=True)
class Scores:
    """One evaluation of one set of weights."""

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
    num_images: int | None
    """None: the statistics scored do not say"""
    seconds: float | None = None
    """wall time, without what was lost when a run was killed; None: not timed"""


@dataclass(frozen=True, kw_only=True)
class Reference:
    """Real images, as far as scores need them."""

    frechet: FrechetReference
    manifold: Manifold | None = None
    """for precision and recall; None: not scored"""


class Tally:
    """What scores are made of, gathered image by image: moments, Inception Score sums and, if asked for, features.

    Memory does not grow with the number of images unless `keep_features` is set (precision and recall
    need all of them).
    """

    def __init__(self, extractor: FeatureExtractor, num_images: int, *, keep_features: bool, device: torch.device):
        self._extractor, self._num_images, self._device = extractor, num_images, device
        self.moments = Moments(extractor.dim, device=device)
        self.inception_score: InceptionScore | None = None
        self._kept: list[Tensor] | None = [] if keep_features else None
        self.seconds: float | None = None
        scored = extractor.logits(torch.zeros(1, extractor.dim, device=device)) is not None
        if scored and num_images >= INCEPTION_SCORE_SPLITS:
            self.inception_score = InceptionScore(num_images, INCEPTION_SCORE_SPLITS, device=device)

    @property
    def done(self) -> int:
        """Images seen."""
        return self.moments.count

    def update(self, features: Tensor) -> None:
        """Add the features [B, F] of the next B images."""
        self.moments.update(features)
        if self._kept is not None:
            self._kept.append(features)
        if self.inception_score is not None:
            logits = self._extractor.logits(features)
            assert logits is not None
            self.inception_score.update(logits)

    @property
    def features(self) -> Tensor:
        """The features kept, float32 [N, F]."""
        assert self._kept is not None, "features were not kept"
        return torch.cat(self._kept)

    def scores(self, reference: Reference, name: str) -> Scores:
        """Scores against `reference`.

        Raises:
            DegenerateError: features are not finite (weights or images are broken), or those of all images alike.
        """
        if self.done > 1 and not self.moments.covariance.any():
            raise DegenerateError(f"{name}: all {self.done} images look the same")
        distance = reference.frechet.distance(Statistics.from_moments(self.moments, name=name))
        found: dict[str, Any] = {}
        if self.inception_score is not None:
            found["is_mean"], found["is_std"] = self.inception_score.score()
        if reference.manifold is not None:
            shares = reference.manifold.compare(self.features)
            found |= {key: getattr(shares, key) for key in ("precision", "recall", "density", "coverage")}
        return Scores(distance=distance, num_images=self.done, seconds=self.seconds, **found)

    def save(self, path: Path, identity: str) -> None:
        """Write all it takes to go on, atomically; `identity` says what the images are."""
        state = {f"moments.{key}": value for key, value in self.moments.state().items()}
        if self.inception_score is not None:
            state |= {f"inception_score.{key}": value for key, value in self.inception_score.state().items()}
        if self._kept:
            self._kept = [self.features]
            state["features"] = self._kept[0]
        cpu = {name: value.cpu() for name, value in state.items()}
        facts = {"identity": identity, "seconds": repr(self.seconds), VERSION_KEY: str(STATE_VERSION)}
        save_safetensors(path, cpu, facts)

    def resume(self, path: Path, identity: str) -> None:
        """Go on from the file `path`, if there is one of these images, to the same bits as never having stopped.

        Raises:
            RequestError: the file is damaged, or of a later version of neon.
        """
        if unfinished(path) != identity:
            return
        with reading_state(path, _BEGINS_ANEW):
            with open_checkpoint(path) as saved:
                state = {name: saved.tensor(name) for name in saved.names()}
                seconds = float(saved.metadata["seconds"])
            self._take_up(state)
        self.seconds = seconds

    def _take_up(self, state: dict[str, Tensor]) -> None:
        """Become the tally that was saved as `state`; an exception of any kind if it is not of one like this."""
        moments = Moments.from_state(_below("moments", state), self._device)
        if len(moments.mean) != self._extractor.dim or not 0 < moments.count <= self._num_images:
            raise ValueError(f"{moments.count} images of {len(moments.mean)} features")
        if self.inception_score is not None:
            sums = _below("inception_score", state)
            if (int(sums["num_images"]), int(sums["seen"])) != (self._num_images, moments.count):
                raise ValueError(f"an Inception Score that has not seen {moments.count} images of {self._num_images}")
            self.inception_score = InceptionScore.from_state(sums, self._device)
        if self._kept is not None:
            kept = state["features"].to(self._device)
            if kept.shape != (moments.count, self._extractor.dim):
                raise ValueError(f"features of shape {list(kept.shape)} of {moments.count} images")
            self._kept = [kept]
        self.moments = moments


def unfinished(path: Path) -> str | None:
    """The identity of the images whose evaluation was killed and left the file `path`; None: there is none.

    Raises:
        RequestError: the file is damaged, or of a later version of neon.
    """
    if not path.exists():
        return None
    with reading_state(path, _BEGINS_ANEW), open_checkpoint(path) as saved:
        identity, version = saved.metadata["identity"], saved.metadata.get(VERSION_KEY)
        number = None if version is None else int(version)
    check_version(path, number)
    return identity


def _below(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(f"{prefix}."): value for name, value in state.items() if name.startswith(f"{prefix}.")}


def features_in_order(
    compute: Callable[[range], Tensor],
    num_images: int,
    extractor: FeatureExtractor,
    *,
    batch_size: int,
    processes: Processes,
    title: str,
    done: int = 0,
) -> Iterator[Tensor]:
    """Features float32 [B, F] of images `done` .. num_images - 1, block by block in order, in every process.

    `compute` gives the images of a block, uint8 [B, C, H, W]; each process calls it for its own blocks. `done` is
    a multiple of `batch_size`. A RequestError or WorkError of one process is raised in all.
    """
    yield from rows_in_order(
        lambda block: extractor(compute(block)),
        num_images,
        extractor.dim,
        batch_size=batch_size,
        processes=processes,
        title=title,
        done=done,
    )


def sampled_images(
    model: GenerativeModel, seeds: Sequence[int], settings: Any, processes: Processes, label: Label = None
) -> Callable[[range], Tensor]:
    """The images of a block, sampled: what `features_in_order` computes from for a model."""
    return lambda block: sample_block(model, block, seeds, settings, processes, label)[0]


def stored_images(dataset: TrainingImages, processes: Processes) -> Callable[[range], Tensor]:
    """The images of a block, read: what `features_in_order` computes from for a set of images."""
    return lambda block: dataset.examples(block).to(processes.device)


def tally_images(
    dataset: TrainingImages,
    extractor: FeatureExtractor,
    *,
    batch_size: int,
    processes: Processes,
    keep_features: bool = False,
) -> Tally:
    """The tally of all images of `dataset`, in every process.

    Raises:
        RequestError: an image cannot be read or has another size than the first.
    """
    tally = Tally(extractor, len(dataset), keep_features=keep_features, device=processes.device)
    for features in features_in_order(
        stored_images(dataset, processes),
        len(dataset),
        extractor,
        batch_size=batch_size,
        processes=processes,
        title=f"reading {dataset.path.name}",
    ):
        tally.update(features)
    return tally


def evaluate(
    model: GenerativeModel,
    seeds: Sequence[int],
    settings: Any,
    extractor: FeatureExtractor,
    reference: Reference,
    *,
    batch_size: int,
    processes: Processes,
    label: Label = None,
    title: str = "evaluating",
    state: Path | None = None,
    identity: str = "",
    statistics: Path | None = None,
) -> Scores:
    """Scores of `len(seeds)` sampled images against `reference`, in every process.

    Args:
        label: which classes to sample.
        state: file in which the evaluation keeps what it has, so that a killed one goes on; removed at the end.
        identity: what the images are; a `state` of other images is not gone on from.
        statistics: file in which the mean and covariance of the features are kept.

    Raises:
        DegenerateError: features are not finite (the weights, or the images, are broken), or all alike.
    """
    tally = Tally(extractor, len(seeds), keep_features=reference.manifold is not None, device=processes.device)
    if state is not None:
        processes.on_main(lambda: tally.resume(state, identity))
    saved = time.monotonic()
    started = saved - (tally.seconds or 0.0)
    try:
        for features in features_in_order(
            sampled_images(model, seeds, settings, processes, label),
            len(seeds),
            extractor,
            batch_size=batch_size,
            processes=processes,
            title=title,
            done=processes.from_main(tally.done),
        ):
            if not processes.is_main:
                continue
            tally.update(features)
            now = time.monotonic()
            tally.seconds = now - started
            if state is not None and now - saved > SAVE_EVERY_SECONDS:
                tally.save(state, identity)
                saved = time.monotonic()
    except Stopped as stop:
        if state is not None and processes.is_main and tally.done:
            tally.save(state, identity)
            stop.kept = f"image {tally.done:,} of {len(seeds):,} ({title})"
        raise
    if processes.is_main and processes.device.type == "cuda":  # which has not yet done all that it was asked for
        torch.cuda.synchronize(processes.device)
        tally.seconds = time.monotonic() - started

    def score() -> Scores:
        try:
            scores = tally.scores(reference, title)
            if statistics is not None:
                Statistics.from_moments(tally.moments, name=title).save(statistics)
            return scores
        finally:
            if state is not None:
                state.unlink(missing_ok=True)

    return processes.on_main(score)


def are_few(num_images: int | None, dim: int) -> bool:
    """Whether the covariance of `dim` features of so many images is singular; None: their number is not known."""
    return num_images is not None and num_images <= dim


def warn_of_few(num_images: int | None, dim: int, name: str = "") -> None:
    """Warn if `are_few`; `name` says of what."""
    if are_few(num_images, dim):
        warn(
            f"{name}{num_images} images for {dim} features: the covariance is singular and the score biased; compare "
            "it with scores of as many images only"
        )


def scores_from(entry: Any) -> Scores:
    """Scores from their fields as JSON; a ValueError if they are none."""
    scores = from_json(Scores, entry)
    if not math.isfinite(scores.distance):
        raise ValueError(f"distance is {scores.distance}")
    return scores


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
                record = {"name": name, **asdict(made)}
            except DegenerateError as error:
                known = str(error)
                record = {"name": name, "failure": known}
            self.processes.on_main(lambda: append_json(self.path, record))
        self.entries[name] = known
        if isinstance(known, str):
            raise DegenerateError(known)
        return known


def load_manifold(
    path: Path | None, extractor: FeatureExtractor, *, nearest_k: int, batch_size: int, processes: Processes
) -> Manifold | None:
    """The manifold of the real images in `path`, in the main process, which compares features.

    None in the others, and where there are no real images to compare with.
    """
    if path is None:
        return None
    real = tally_images(
        ImageDataset(path), extractor, batch_size=batch_size, processes=processes, keep_features=True
    )  # fmt: skip
    manifold: Manifold | None = None

    def build() -> None:
        nonlocal manifold
        manifold = Manifold(real.features, k=nearest_k)

    processes.on_main(build)
    return manifold
