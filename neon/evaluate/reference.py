"""Real images in a feature space, as far as scores need them, from the files that a user names."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from neon.data.shards import open_images
from neon.errors import DegenerateError, RequestError, warn
from neon.evaluate.features import take_any_size, tally_images
from neon.evaluate.scores import SHARES, Scores
from neon.evaluate.tally import Tally
from neon.metrics import FrechetReference, Manifold, Statistics, kernel_distance
from neon.metrics.features import FeatureExtractor
from neon.metrics.reference import load_statistics
from neon.model import GenerativeModel
from neon.runtime.distributed import Processes

# The demo's w chosen against n test images, 64 features, eight times each: up to 37% above the lowest distance at
# n = 70, 10% at 150, 4% at 200, 2% from 400 on. Chosen against the 1,300 digits that its base was trained on, a w was
# 28 to 50% above, so those count as few; the 50,000 of CIFAR-10 for Inception's 2,048 do not.
FEW_IMAGES = 22
"""real images for each feature below which a choice against them may be off"""


@dataclass(frozen=True, kw_only=True)
class RealFeatures:
    """Features of single real images: for precision and recall, and the kernel distance."""

    manifold: Manifold | None
    """None: another process compares"""
    kernel: Tensor | None = None
    """float32 [N, F]; None: the kernel distance is not scored"""


@dataclass(frozen=True, kw_only=True)
class Reference:
    """Real images in a feature space, to score generated ones against."""

    extractor: FeatureExtractor
    frechet: FrechetReference
    real: RealFeatures | None = None
    """None: single images are not compared"""

    @property
    def metric(self) -> str:
        """The name of the distance: `fid`, or `fd_<features>`."""
        return self.extractor.score_name

    def scores(self, tally: Tally, name: str) -> Scores:
        """Scores of what was tallied in this feature space.

        Raises:
            DegenerateError: features are not finite (weights or images are broken), or those of all images alike.
        """
        if tally.done > 1 and not tally.moments.covariance.any():
            raise DegenerateError(f"{name}: all {tally.done} images look the same")
        distance = self.frechet.distance(Statistics.from_moments(tally.moments, name=name))
        found: dict[str, Any] = {}
        if tally.inception_score is not None:
            found["is_mean"], found["is_std"] = tally.inception_score.score()
        if self.real is not None and self.real.manifold is not None:
            shares = self.real.manifold.compare(tally.features)
            found |= {key: getattr(shares, key) for key in SHARES}
        if self.real is not None and self.real.kernel is not None:
            kernel = kernel_distance(self.real.kernel, tally.features)
            found["kernel"], found["kernel_std"] = kernel.mean, kernel.std
        return Scores(distance=distance, num_images=tally.done, clip_score=tally.clip_score, **found)


def scores_in(
    references: Sequence[Reference], tallies: Sequence[Tally], name: str, seconds: float | None = None
) -> Scores:
    """What was tallied, scored in each feature space; `seconds` are those of all. Errors as of `Reference.scores`."""
    found = [reference.scores(tally, name) for reference, tally in zip(references, tallies, strict=True)]
    return replace(side_by_side(references, found), seconds=seconds)


def side_by_side(references: Sequence[Reference], scores: Sequence[Scores]) -> Scores:
    """The scores in the first feature space, with those in the others beside them."""
    first, *others = scores
    return replace(first, beside={one.metric: of_it for one, of_it in zip(references[1:], others, strict=True)})


def real_features(
    path: Path | None,
    extractors: Sequence[FeatureExtractor],
    *,
    nearest_k: int,
    kernel: bool,
    batch_size: int,
    processes: Processes,
) -> list[RealFeatures | None]:
    """Features of the real images in `path` in each feature space, where generated ones are compared with them.

    Of the main process only: it compares. None where there is no `path`.

    Args:
        nearest_k: which nearest neighbour gives the radius in precision and recall.
        kernel: whether the kernel distance is scored, too.

    Raises:
        RequestError: an image cannot be read, or there are no more than `nearest_k`.
    """
    if path is None:
        return [None] * len(extractors)
    tallies = tally_images(
        open_images(path), extractors, batch_size=batch_size, processes=processes, keep_features=True
    )  # fmt: skip
    manifolds: list[Manifold | None] = [None] * len(extractors)

    def build() -> None:
        manifolds[:] = [Manifold(tally.features, k=nearest_k) for tally in tallies]

    processes.on_main(build)
    return [
        RealFeatures(manifold=manifold, kernel=tally.features if kernel and processes.is_main else None)
        for manifold, tally in zip(manifolds, tallies, strict=True)
    ]


def is_statistics(path: Path) -> bool:
    """Whether a path names statistics, by its suffix; else it names images."""
    return path.suffix == ".npz"


def references_at(
    path: Path,
    real: Sequence[RealFeatures | None],
    model: GenerativeModel,
    extractors: Sequence[FeatureExtractor],
    *,
    batch_size: int,
    processes: Processes,
) -> list[Reference]:
    """The real images, or the statistics of some, at `path` in each feature space, in every process.

    Raises:
        RequestError: they do not fit the model or the features, or are too few for these.
    """
    if is_statistics(path):
        found = load_statistics(path, model, extractors)
    else:
        dataset = open_images(path)
        if tuple(dataset.image_shape) != tuple(model.image_shape):
            misfit = f"{path}: images are {dataset.image_shape} (C, H, W), but the model makes {model.image_shape}"
            if not take_any_size(extractors):
                raise RequestError(f"{misfit}; give real images of its size")
            warn(f"{misfit}; each is resized by itself")
        for extractor in extractors:
            if len(dataset) <= extractor.dim:
                raise RequestError(
                    f"{path}: {len(dataset):,} images are too few for {extractor.dim:,} features; expected more than "
                    f"as many, better {FEW_IMAGES * extractor.dim:,}, or a smaller feature network (--features)"
                )
        tallies = tally_images(dataset, extractors, batch_size=batch_size, processes=processes)
        found = [Statistics.from_moments(tally.moments, name=str(path)) for tally in tallies]
    return [
        Reference(extractor=extractor, frechet=FrechetReference(statistics), real=features)
        for extractor, statistics, features in zip(extractors, found, real, strict=True)
    ]


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
