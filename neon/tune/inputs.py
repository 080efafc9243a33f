"""What a choice of w is made with: a model, its sampler and real images, read from files and found to go together."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from neon.data.fingerprint import fingerprints
from neon.data.images import ImageDataset
from neon.errors import RequestError
from neon.evaluate import Reference, load_manifold, tally_images
from neon.metrics import FrechetReference, Manifold, Statistics
from neon.metrics.features import FeatureExtractor
from neon.metrics.reference import INCEPTION, features_file, load_extractor, load_statistics
from neon.model import GenerativeModel
from neon.runtime.distributed import Processes
from neon.runtime.files import hashes
from neon.runtime.threads import use_threads
from neon.tune.cautions import FEW_IMAGES


@dataclass(frozen=True, kw_only=True)
class RealImages:
    """Where the real images lie that a choice is made and reported against, and how they are compared."""

    features: str
    """`inception`, or a file of a feature network"""
    inception_weights: Path | None = None
    """of Inception; by default those in torch-fidelity's cache"""
    select: Path
    """statistics (.npz) or images that the choice is made against"""
    report: Path
    """the same that it is reported against"""
    manifold: Path | None = None
    """images for precision and recall; None: these are not scored"""
    nearest_k: int = 5


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """A model, its sampler, and real images to compare with."""

    model: GenerativeModel
    settings: Any
    """of the sampler that w is chosen for"""
    extractor: FeatureExtractor
    selection: Reference
    reporting: Reference
    facts: dict[str, Any]
    """what beside plan, model and settings the scores depend on, as JSON"""
    pictures: Tensor | None = None
    """some real images, uint8 [M, C, H, W]; None: statistics only were given"""


def open_real_images(
    real: RealImages,
    model: GenerativeModel,
    settings: Any,
    *,
    batch_size: int,
    processes: Processes,
    files: dict[str, Path | None],
) -> Inputs:
    """All that is scored against, read and checked; `files` are further ones whose hashes belong to the facts.

    Raises:
        RequestError: a file is not readable or does not fit the others.
    """
    extractor = load_extractor(real.features, real.inception_weights, processes.device)
    use_threads(processes.device, model, extractor)
    manifold = load_manifold(
        real.manifold, extractor, nearest_k=real.nearest_k, batch_size=batch_size, processes=processes
    )  # fmt: skip
    references = {}
    for path in (real.select, real.report):
        if path not in references:
            references[path] = reference_at(path, manifold, model, extractor, batch_size, processes)
    own_network = real.features != INCEPTION
    inputs = {
        "features_fingerprint": features_file(real.features, real.inception_weights),
        "real_images_fingerprint": real.manifold,
        **{f"{name}_images_fingerprint": path for name, path in _images(real)},
    }
    named = {
        **{f"{name}_stats_sha256": path for name, path in _statistics(real)},
        "feature_weights_sha256": Path(real.features) if own_network else real.inception_weights,
        **files,
    }
    facts: dict[str, Any] = {
        **processes.on_main(lambda: hashes(named) | fingerprints(inputs)),
        "features": extractor.name,
        "real_images": None if real.manifold is None else str(real.manifold),
        "nearest_k": None if real.manifold is None else real.nearest_k,
    }
    return Inputs(
        model=model,
        settings=settings,
        extractor=extractor,
        selection=references[real.select],
        reporting=references[real.report],
        facts=facts,
        pictures=_pictures(real),
    )


def is_statistics(path: Path) -> bool:
    """Whether a path names statistics, by its suffix; else it names images."""
    return path.suffix == ".npz"


def _statistics(real: RealImages) -> list[tuple[str, Path]]:
    return [(name, path) for name, path in _named(real) if is_statistics(path)]


def _images(real: RealImages) -> list[tuple[str, Path]]:
    return [(name, path) for name, path in _named(real) if not is_statistics(path)]


def _named(real: RealImages) -> tuple[tuple[str, Path], ...]:
    return ("select", real.select), ("report", real.report)


def reference_at(
    path: Path,
    manifold: Manifold | None,
    model: GenerativeModel,
    extractor: FeatureExtractor,
    batch_size: int,
    processes: Processes,
) -> Reference:
    """The real images, or the statistics of some, at `path`, in every process.

    Raises:
        RequestError: they do not fit the model or the features, or are too few for these.
    """
    if is_statistics(path):
        return Reference(frechet=FrechetReference(load_statistics(path, model, extractor)), manifold=manifold)
    dataset = ImageDataset(path)
    if tuple(dataset.image_shape) != tuple(model.image_shape):
        raise RequestError(
            f"{path}: images are {dataset.image_shape} (C, H, W), but the model makes {model.image_shape}; give real "
            "images of its size"
        )
    if len(dataset) <= extractor.dim:
        raise RequestError(
            f"{path}: {len(dataset):,} images are too few for {extractor.dim:,} features; expected more than as many, "
            f"better {FEW_IMAGES * extractor.dim:,}, or a smaller feature network (--features)"
        )
    tally = tally_images(dataset, extractor, batch_size=batch_size, processes=processes)
    return Reference(
        frechet=FrechetReference(Statistics.from_moments(tally.moments, name=str(path))), manifold=manifold
    )  # fmt: skip


def _pictures(real: RealImages, count: int = 50) -> Tensor | None:
    """The first real images, where images are given."""
    images = real.manifold or next((path for _, path in _images(real)), None)
    if images is None:
        return None
    dataset = ImageDataset(images)
    return dataset.examples(range(min(count, len(dataset))))


def check_counts(extractor: FeatureExtractor, **counts: int) -> None:
    """A RequestError for the first flag, named as its keyword, that asks for as few images as there are features."""
    for name, count in counts.items():
        if count <= extractor.dim:
            raise RequestError(
                f"--{name} {count}: a distance on {extractor.dim:,} features of as few images says little of the "
                f"network; expected more than {extractor.dim:,}, better twice as many, or a smaller feature network "
                "(--features)"
            )
