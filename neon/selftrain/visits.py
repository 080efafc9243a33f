"""The visits of a training: which images a process sees, in which order and with which noise; read ahead of it."""

import math
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor

from neon.data.images import TrainingImages
from neon.data.loading import ReadAhead, usual_workers
from neon.errors import RequestError
from neon.model import GenerativeModel
from neon.noise import ImageNoise, Purpose, image_seeds
from neon.recipe import Recipe
from neon.runtime.distributed import Processes

Inputs = tuple[Tensor, Tensor | None, ImageNoise]
"""what a loss takes of some images: examples, classes int64 [B] or None, and their noise"""


class Visits(NamedTuple):
    """Images that are seen together: which of the set, and the seed of the noise of each visit."""

    indices: Sequence[int]
    seeds: Sequence[int]


class Read(NamedTuple):
    """What is read of visits, on the CPU."""

    visits: Visits
    examples: Tensor
    """encoded, or as `GenerativeModel.prepare` leaves images"""
    labels: Tensor | None
    noise_state: Tensor | None
    """of `ImageNoise`, where preparing may have drawn from the noise that goes on being drawn from"""


def prepares(model: GenerativeModel) -> bool:
    """Whether the model does anything to images before it encodes them."""
    return type(model).prepare is not GenerativeModel.prepare


def read(model: GenerativeModel, dataset: TrainingImages, device: torch.device, visits: Visits) -> Read:
    """Read images, and prepare them; needs no device, so that any process can."""
    labels: Tensor | None = None
    try:
        if model.num_classes:
            examples, labels = dataset.load(visits.indices)
        else:
            examples = dataset.examples(visits.indices)
    except RequestError as error:
        error.shared = False  # of images that no other process reads
        raise
    if dataset.encoded or not prepares(model):
        return Read(visits, examples, labels, None)
    noise = ImageNoise(visits.seeds)
    examples = model.prepare(examples, noise)
    # A GPU's streams are others than those of the same seeds here: there they begin at their beginning.
    return Read(visits, examples, labels, noise.state() if device.type == "cpu" else None)


def inputs(model: GenerativeModel, dataset: TrainingImages, device: torch.device, found: Read) -> Inputs:
    """What the loss takes of what was read, on the device of the model."""
    noise = ImageNoise(found.visits.seeds, device)
    if found.noise_state is not None:
        noise.go_on_from(found.noise_state)
    examples = found.examples.to(device, non_blocking=True)
    if not dataset.encoded:
        examples = model.encode(examples, noise)
    return examples, None if found.labels is None else found.labels.to(device, non_blocking=True), noise


def visit(
    model: GenerativeModel,
    dataset: TrainingImages,
    indices: Sequence[int],
    noise_seeds: Sequence[int],
    device: torch.device,
) -> Inputs:
    """What the loss of a model takes of some images."""
    return inputs(model, dataset, device, read(model, dataset, device, Visits(indices, noise_seeds)))


class TrainingInputs:
    """What the loss takes of each micro-batch of a training, read ahead by `workers`; results do not depend on them.

    By default as many as are usual. Without any, images are read when they are asked for.
    """

    def __init__(
        self,
        model: GenerativeModel,
        dataset: TrainingImages,
        recipe: Recipe,
        seed: int,
        processes: Processes,
        micro_batch: int,
        workers: int | None = None,
    ) -> None:
        self.model, self.dataset, self.recipe, self.seed = model, dataset, recipe, seed
        self.processes, self.micro_batch = processes, micro_batch
        if workers is None:
            workers = usual_workers(processes, micro_batch * math.prod(dataset.image_shape))
        self._first_step = 0
        self._read: ReadAhead[Visits, Read] = ReadAhead(
            partial(read, model, dataset, processes.device),
            lambda: self.planned(self._first_step),
            workers=workers,
            device=processes.device,
        )

    def __call__(self, visits: Visits, step: int) -> Inputs:
        """Those of the micro-batch `visits` of step `step`: one of `planned`, in their order, or any other.

        Raises:
            RequestError, WorkError: an image cannot be read, or a worker was killed.
        """
        self._first_step = step
        return inputs(self.model, self.dataset, self.processes.device, self._read(visits))

    def planned(self, first_step: int) -> Iterator[Visits]:
        """The micro-batches of this process from a step on: processes take those of a batch in turn."""
        size, seen = self.recipe.batch_size, first_step * self.recipe.batch_size
        order = islice(self.recipe.visits(len(self.dataset), self.seed), seen, None)
        while len(indices := list(islice(order, size))) == size:
            seeds = image_seeds(Purpose.TRAINING, self.seed, size, start=seen)
            for first in range(0, size, self.micro_batch)[self.processes.rank :: self.processes.world_size]:
                part = slice(first, first + self.micro_batch)
                yield Visits(indices[part], seeds[part])
            seen += size

    def close(self) -> None:
        """End the workers."""
        self._read.close()
