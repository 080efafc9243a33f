"""Sampling N images: each is determined by its seed, label and settings, whoever computes it.

The images of a set are cut into blocks of consecutive indices; a block is one batch, computed whole by
one process. So batches, hence images, are the same for any number of processes and after any restart.
"""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from neon.dataset import LABELS_FILE, image_name, write_images, write_labels
from neon.distributed import Processes
from neon.model import GenerativeModel
from neon.noise import ImageNoise
from neon.progress import Progress


def blocks(num_images: int, batch_size: int) -> list[range]:
    """Indices 0 .. num_images - 1 in consecutive blocks; only the last may be shorter than `batch_size`."""
    return [range(first, min(first + batch_size, num_images)) for first in range(0, num_images, batch_size)]


def rounds(all_blocks: Sequence[range], processes: Processes) -> Iterator[range | None]:
    """This process's block of each round; every process sees equally many rounds, the last may hold None."""
    for first in range(0, len(all_blocks), processes.world_size):
        mine = first + processes.rank
        yield all_blocks[mine] if mine < len(all_blocks) else None


def sample_block(
    model: GenerativeModel, block: range, seeds: Sequence[int], settings: Any, processes: Processes
) -> tuple[Tensor, Tensor | None]:
    """(uint8 [B, C, H, W], int64 [B] or None): the images of `block` and their classes.

    `seeds[i]` is the seed of image i of the whole set.
    """
    noise = ImageNoise([seeds[i] for i in block], processes.device)
    labels = model.labels(block, noise)
    return model.sample(noise, labels, settings), labels


def block_labels(model: GenerativeModel, block: range, seeds: Sequence[int], processes: Processes) -> Tensor | None:
    """The classes of the images of `block`, without sampling them."""
    return model.labels(block, ImageNoise([seeds[i] for i in block], processes.device))


def write_samples(
    model: GenerativeModel,
    seeds: Sequence[int],
    settings: Any,
    folder: str | os.PathLike[str],
    *,
    batch_size: int,
    processes: Processes,
) -> Path:
    """Sample one image per seed into `folder` as PNG files with `dataset.json`, over all processes.

    Blocks that are on the disk already are not sampled again, so a killed run goes on where it was.
    """
    folder = Path(folder)
    if processes.from_main((folder / LABELS_FILE).exists()):
        return folder
    every = blocks(len(seeds), batch_size)
    with Progress("sampling S", len(seeds), "img", processes) as progress:
        for block in rounds(every, processes):
            if block is not None and not all((folder / image_name(i)).exists() for i in block):
                images, _ = sample_block(model, block, seeds, settings, processes)
                write_images(folder, block, images)
            progress.advance(min(batch_size * processes.world_size, len(seeds) - progress.done))
    processes.barrier()
    found = [block_labels(model, block, seeds, processes) for block in every]
    labels = [int(label) for part in found if part is not None for label in part]
    processes.on_main(lambda: write_labels(folder, labels or None, len(seeds)))
    return folder
