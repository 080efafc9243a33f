"""Sampling N images: each is determined by its seed, label and settings, whoever computes it.

The images of a set are cut into blocks of consecutive indices; a block is one batch, computed whole by
one process. So batches, hence images, are the same for any number of processes and after any restart.
"""

import contextlib
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from neon import __version__
from neon.data.images import LABELS_FILE, has_image, pack_set, write_images, write_labels, write_texts
from neon.data.sampler import sampler_record
from neon.data.shards import write_image_shards
from neon.errors import RequestError
from neon.model import GenerativeModel
from neon.noise import ImageNoise, Noise
from neon.runtime.background import Job, on_host
from neon.runtime.blocks import blocks, write_blocks
from neon.runtime.distributed import Processes
from neon.runtime.files import check_writable
from neon.runtime.run_folder import run_folder

SetForm = Literal["png", "shards"]
"""how the images of a set are kept: one file each, or many in one, not to be decoded"""
IMAGES_PER_JOB = 8
"""that one thread writes; the rest of a batch is written by others at the same time"""

Label = int | Tensor | None
"""which classes to sample: one for all images, one for each image of the set (int64 [N]), or the model's rule (None)"""


def check_label(model: GenerativeModel, label: Label) -> None:
    """Raise a RequestError unless the model can sample images of class, or prompt, `label`."""
    if model.prompts is not None:
        model.asked_prompts()
    if isinstance(label, Tensor) and model.num_classes:
        check_classes(label, model.num_classes, "labels")
    if not isinstance(label, int):
        return
    if model.num_classes == 0:
        raise RequestError(f"--class {label}: the network is unconditional, it knows no classes; leave it out")
    if not 0 <= label < model.num_classes:
        raise RequestError(f"--class {label}: out of range; the network knows classes 0 to {model.num_classes - 1}")


def check_classes(labels: Tensor, num_classes: int, what: str) -> None:
    """Raise a RequestError, in which they are called `what`, unless `labels` int64 [N] are classes of the model."""
    lowest, highest = (int(label) for label in labels.aminmax())
    if lowest < 0 or highest >= num_classes:
        raise RequestError(f"{what} run from {lowest} to {highest}; the model knows classes 0 to {num_classes - 1}")


def one_hot(labels: Tensor | None, num_classes: int, device: torch.device) -> Tensor | None:
    """int64 [B] -> float32 [B, num_classes] on `device`; None for no labels or an unconditional network.

    Labels that are on a GPU already are not looked at: it would be waited for. They come from there, or from a set
    that was checked (`check_label`, `neon.selftrain.check_trainable`).

    Raises:
        RequestError: a label on the CPU is not a class of the network.
    """
    if num_classes == 0 or labels is None:
        return None
    if labels.device.type == "cpu":
        check_classes(labels, num_classes, "labels")
    return F.one_hot(labels.to(device, non_blocking=True), num_classes).to(torch.float32)


def set_identity(
    network_sha256: str,
    numbered: Mapping[str, Any],
    label: int | None,
    batch_size: int,
    settings: Any,
    facts: Mapping[str, Any],
) -> dict[str, Any]:
    """What determines a set of images, as JSON: network, which they are (`numbered`), sampler and other `facts`."""
    return {
        "neon": __version__,
        "network_sha256": network_sha256,
        **numbered,
        "class": label,
        "batch_size": batch_size,
        "settings": asdict(settings),
        **facts,
    }


def check_enough(num_images: int, processes: Processes) -> None:
    """Raise a RequestError if there are more processes than images."""
    if num_images < processes.world_size:
        raise RequestError(
            f"{processes.world_size} processes for {num_images} images; expected at least one image for each, "
            "start fewer processes (--nproc_per_node) or ask for more images"
        )


def block_labels(model: GenerativeModel, block: range, noise: Noise, label: Label = None) -> Tensor | None:
    """int64 [B] or None (unconditional): the classes of the images of `block`."""
    if label is None or model.num_classes == 0:
        return model.labels(block, noise)
    return torch.full((len(block),), label) if isinstance(label, int) else label[block.start : block.stop]


def sample_block(
    model: GenerativeModel,
    block: range,
    seeds: Sequence[int],
    settings: Any,
    processes: Processes,
    label: Label = None,
) -> tuple[Tensor, Tensor | None]:
    """(uint8 [B, C, H, W], int64 [B] or None): the images of `block` and their classes.

    `seeds[i]` is the seed of image i of the whole set.
    """
    noise = ImageNoise([seeds[i] for i in block], processes.device)
    labels = block_labels(model, block, noise, label)
    with model.precision.allowed_on(processes.device):
        return model.sample(noise, labels, settings), labels


def sample_set(
    model: GenerativeModel,
    seeds: Sequence[int],
    settings: Any,
    output: str | os.PathLike[str],
    *,
    batch_size: int,
    processes: Processes,
    identity: dict[str, Any],
    label: Label = None,
    fresh: bool = False,
    form: SetForm = "png",
) -> None:
    """Sample one image per seed into a folder, or into a zip if `output` ends in .zip; a killed run goes on.

    In the form of shards (`neon.data.shards`) there are no files to decode, and no zip.

    `identity` is what the images are determined by: a folder with other images is refused, or emptied if `fresh`.

    Raises:
        RequestError: `output` holds something else, or cannot be written.
        WorkError: the disk is full; the images written so far are whole, and stay for the next run.
    """
    output = Path(output)
    is_zip = output.suffix == ".zip"
    if is_zip and form == "shards":
        raise RequestError(f"{output}: shards are kept in a folder; leave .zip off")
    folder = output.with_name(f"{output.name}.unfinished") if is_zip else output

    def open_folder() -> None:
        if is_zip:
            check_writable(output, overwrite=fresh, flag="--fresh")
        stack.enter_context(run_folder(folder, identity, fresh=fresh, threads=processes.threads))

    def pack() -> None:
        pack_set(folder, output)
        shutil.rmtree(folder)

    with contextlib.ExitStack() as stack:
        processes.on_main(open_folder)
        (write_sample_shards if form == "shards" else write_samples)(
            model,
            seeds,
            settings,
            folder,
            batch_size=batch_size,
            processes=processes,
            label=label,
            network_sha256=identity.get("network_sha256"),
        )
        if is_zip:
            processes.on_main(pack)


def write_samples(
    model: GenerativeModel,
    seeds: Sequence[int],
    settings: Any,
    folder: str | os.PathLike[str],
    *,
    batch_size: int,
    processes: Processes,
    label: Label = None,
    network_sha256: str | None = None,
) -> Path:
    """Sample one image per seed into `folder` as PNG files with `dataset.json`, over all processes.

    That tells, beside the classes, what drew the set: the architecture, the settings and, if given, the hash of the
    network's file. Prompts stand in `metadata.jsonl`, in words.

    Files are written in the background, while the next block is sampled (`neon.runtime.background`). Blocks that are on
    the disk already are not sampled again, so a killed run goes on where it was; one of which images
    were lost since is made again.

    Raises:
        WorkError: the disk is full, or images vanish while others are made.
    """
    folder = Path(folder)

    def is_written(block: range) -> bool:
        return all(has_image(folder, index) for index in block)

    every = blocks(len(seeds), batch_size)
    if processes.from_main((folder / LABELS_FILE).exists() and all(is_written(block) for block in every)):
        return folder

    def compute(block: range) -> list[Job]:
        images = on_host(sample_block(model, block, seeds, settings, processes, label)[0])

        def write(part: slice) -> None:
            write_images(folder, block[part], images()[part])

        return [partial(write, slice(i, i + IMAGES_PER_JOB)) for i in range(0, len(block), IMAGES_PER_JOB)]

    write_blocks(
        compute,
        len(seeds),
        batch_size=batch_size,
        processes=processes,
        title="sampling",
        is_written=is_written,
        folder=folder,
    )

    def finish() -> None:
        labels = labels_of(model, every, seeds, processes, label)
        if model.prompts:
            write_texts(folder, prompts_of(model, labels))
        sampler = sampler_record(model.architecture, settings, network_sha256)
        write_labels(folder, labels or None, len(seeds), sampler)

    processes.on_main(finish)
    return folder


def write_sample_shards(
    model: GenerativeModel,
    seeds: Sequence[int],
    settings: Any,
    folder: str | os.PathLike[str],
    *,
    batch_size: int,
    processes: Processes,
    label: Label = None,
    network_sha256: str | None = None,
) -> None:
    """`write_samples` in shards of `batch_size` images, whose index says what drew them."""
    texts = None
    if model.prompts:
        texts = prompts_of(model, labels_of(model, blocks(len(seeds), batch_size), seeds, processes, label))
    write_image_shards(
        lambda block: sample_block(model, block, seeds, settings, processes, label),
        len(seeds),
        folder,
        texts=texts,
        image_shape=model.image_shape,
        batch_size=batch_size,
        processes=processes,
        title="sampling",
        sampler=sampler_record(model.architecture, settings, network_sha256),
    )


def labels_of(
    model: GenerativeModel, every: Sequence[range], seeds: Sequence[int], processes: Processes, label: Label = None
) -> list[int]:
    """The classes of the images of these blocks; none: it is unconditional."""
    noise = ((block, ImageNoise([seeds[i] for i in block], processes.device)) for block in every)
    found = [block_labels(model, block, source, label) for block, source in noise]
    return [value for part in found if part is not None for value in part.tolist()]


def prompts_of(model: GenerativeModel, labels: Sequence[int]) -> list[str]:
    """The prompts that `labels` are the numbers of, for a model that is asked by such."""
    prompts = model.asked_prompts()
    return [prompts[label] for label in labels]
