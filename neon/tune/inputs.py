"""What a choice of w is made with: a model, its sampler and real images, read from files and found to go together."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from neon.data.fingerprint import fingerprints
from neon.data.shards import open_images
from neon.errors import RequestError
from neon.evaluate import Reference, is_statistics, real_features, references_at
from neon.metrics.features import FeatureExtractor
from neon.metrics.reference import NamedFeatures
from neon.model import GenerativeModel
from neon.runtime.distributed import Processes
from neon.runtime.files import hashes
from neon.runtime.threads import use_threads
from neon.tune.pictures import RealPictures


@dataclass(frozen=True, kw_only=True)
class RealImages:
    """Where the real images lie that a choice is made and reported against, and how they are compared."""

    features: NamedFeatures
    """the first is what the choice is made by; all are reported"""
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
    selection: Reference
    reporting: tuple[Reference, ...]
    """in each feature space; the first is that of the selection"""
    facts: dict[str, Any]
    """what beside plan, model and settings the scores depend on, as JSON"""
    pictures: RealPictures | None = None
    """the real images that are compared one by one, else others, to look at; None: statistics only were given"""

    @property
    def extractor(self) -> FeatureExtractor:
        """The feature network that the choice is made by."""
        return self.selection.extractor


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
    extractors = real.features.load(processes.device)
    use_threads(processes.device, model, *extractors)
    compared = real_features(
        real.manifold,
        extractors,
        nearest_k=real.nearest_k,
        kernel=False,  # a choice scores too many sets for its hundred subsets
        batch_size=batch_size,
        processes=processes,
    )
    # The choice is made in one feature space, and reported in all.
    number = {real.select: 1, real.report: len(extractors)}
    references = {
        path: references_at(
            path, compared[:count], model, extractors[:count], batch_size=batch_size, processes=processes
        )
        for path, count in number.items()
    }  # fmt: skip
    images = {
        "real_images_fingerprint": real.manifold,
        **{f"{name}_images_fingerprint": path for name, path in _named(real) if not is_statistics(path)},
    }
    named = {**{f"{name}_stats_sha256": path for name, path in _named(real) if is_statistics(path)}, **files}
    facts: dict[str, Any] = {
        **processes.on_main(
            lambda: {
                **hashes(named),
                **fingerprints(images),
                **real.features.facts(extractors),
            }
        ),
        "real_images": None if real.manifold is None else str(real.manifold),
        "nearest_k": None if real.manifold is None else real.nearest_k,
    }
    return Inputs(
        model=model,
        settings=settings,
        selection=references[real.select][0],
        reporting=tuple(references[real.report]),
        facts=facts,
        pictures=_pictures(real, model.image_shape),
    )


def _named(real: RealImages) -> tuple[tuple[str, Path], ...]:
    return ("select", real.select), ("report", real.report)


def _pictures(real: RealImages, shape: tuple[int, int, int]) -> RealPictures | None:
    """The real images, where images are given: those that are compared one by one, if there are such."""
    path = real.manifold or next((path for _, path in _named(real) if not is_statistics(path)), None)
    if path is None:
        return None
    dataset = open_images(path)
    return RealPictures(read=dataset.images, count=len(dataset), shape=shape)


def check_counts(extractor: FeatureExtractor, **counts: int) -> None:
    """A RequestError for the first flag, named as its keyword, that asks for as few images as there are features."""
    for name, count in counts.items():
        if count <= extractor.dim:
            raise RequestError(
                f"--{name} {count}: a distance on {extractor.dim:,} features of as few images says little of the "
                f"network; expected more than {extractor.dim:,}, better twice as many, or a smaller feature network "
                "(--features)"
            )
