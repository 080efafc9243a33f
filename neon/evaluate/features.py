"""Features of images, sampled or read, in the order of their indices, in every process.

So the moments, the scores and every decision taken on them are the same to the last bit, whatever the number of
processes.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from neon.data.images import ImageDataset, TrainingImages
from neon.data.loading import ReadAhead, usual_workers
from neon.data.shards import ImageShards
from neon.evaluate.tally import Tally
from neon.metrics.features import FeatureExtractor, Images
from neon.model import GenerativeModel
from neon.runtime.blocks import own_blocks, rows_in_order
from neon.runtime.distributed import Processes
from neon.sampling import Label, sample_block


def features_in_order(
    compute: Callable[[range], Images],
    num_images: int,
    extractors: Sequence[FeatureExtractor],
    *,
    batch_size: int,
    processes: Processes,
    title: str,
    done: int = 0,
) -> Iterator[tuple[Tensor, ...]]:
    """Features float32 [B, F] by each of the extractors, of images `done` .. num_images - 1, block by block in order.

    `compute` gives the images of a block; each process calls it for its own blocks. `done` is
    a multiple of `batch_size`. A RequestError or WorkError of one process is raised in all.
    """
    dims = [extractor.dim for extractor in extractors]

    def beside(block: range) -> Tensor:
        images = compute(block)
        return torch.cat([extractor(images) for extractor in extractors], dim=1)

    rows = rows_in_order(
        beside, num_images, sum(dims), batch_size=batch_size, processes=processes, title=title, done=done
    )  # fmt: skip
    for features in rows:
        yield features.split(dims, dim=1)


def sampled_images(
    model: GenerativeModel, seeds: Sequence[int], settings: Any, processes: Processes, label: Label = None
) -> Callable[[range], Tensor]:
    """The images of a block, sampled: what `features_in_order` computes from for a model."""
    return lambda block: sample_block(model, block, seeds, settings, processes, label)[0]


def stored_images(
    dataset: TrainingImages, extractors: Sequence[FeatureExtractor], batch_size: int, processes: Processes
) -> ReadAhead[range, Images]:
    """The images of a block, on the CPU, read ahead of a GPU that computes features of them."""
    load: Callable[[range], Images] = dataset.examples
    if isinstance(dataset, ImageDataset | ImageShards) and take_any_size(extractors):
        load = dataset.images
    return ReadAhead(
        load,
        lambda: own_blocks(len(dataset), batch_size, processes),
        workers=usual_workers(processes, batch_size * math.prod(dataset.image_shape)),
        device=processes.device,
    )


def _on_device(images: Images, device: torch.device) -> Images:
    if isinstance(images, Tensor):
        return images.to(device, non_blocking=True)
    return [image.to(device, non_blocking=True) for image in images]


def take_any_size(extractors: Sequence[FeatureExtractor]) -> bool:
    """Whether each resizes each image by itself, so that those of a set may differ in size."""
    return all(extractor.any_size for extractor in extractors)


def tally_images(
    dataset: TrainingImages,
    extractors: Sequence[FeatureExtractor],
    *,
    batch_size: int,
    processes: Processes,
    keep_features: bool = False,
) -> list[Tally]:
    """The tally of all images of `dataset` in each feature space, in every process; the images are read once.

    With `keep_features` the main process keeps them, too.

    Raises:
        RequestError: an image cannot be read, or has another size than the first and one of `extractors` minds.
    """
    texts = dataset.texts if any(extractor.reads_prompts for extractor in extractors) else None
    tallies = [
        Tally(
            extractor,
            len(dataset),
            keep_features=keep_features and processes.is_main,
            device=processes.device,
            prompted=texts is not None,
        )
        for extractor in extractors
    ]
    with contextlib.closing(stored_images(dataset, extractors, batch_size, processes)) as read:
        for parts in features_in_order(
            lambda block: _on_device(read(block), processes.device),
            len(dataset),
            extractors,
            batch_size=batch_size,
            processes=processes,
            title=f"reading {dataset.path.name}",
        ):
            for tally, features in zip(tallies, parts, strict=True):
                block = slice(tally.done, tally.done + len(features))
                tally.update(features, texts and texts[block])
    return tallies
