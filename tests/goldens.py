"""What the golden tests of every architecture share: their files, and training through the project's own loop."""

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from neon.checkpoint import load_state
from neon.dataset import TrainingImages
from neon.distributed import Processes
from neon.examples import ExampleSet, write_index, write_shard
from neon.model import GenerativeModel
from neon.noise import Noise
from neon.recipe import Recipe
from neon.selftrain import LOG_FILE, train
from tests.replay import RecordedNoise

GOLDEN_DIR = Path(os.environ.get("NEON_GOLDEN_DIR", Path(__file__).parent / "golden"))


def load_golden(folder: Path) -> dict[str, Any]:
    """What golden.json says, its cases among it."""
    return json.loads((folder / "golden.json").read_text())


def load_arrays(path: Path, *prefixes: str) -> Iterator[dict[str, np.ndarray]]:
    """For each of `prefixes`, the arrays of a case that begin with it, by the rest of their names."""
    with np.load(path) as arrays:
        for prefix in prefixes:
            yield {name.removeprefix(prefix): arrays[name] for name in arrays if name.startswith(prefix)}


def handler(kind: str, handlers: Mapping[str, Callable]) -> Callable:
    """The function that compares cases of a kind."""
    assert kind in handlers, f"no handler for cases of kind {kind!r}"
    return handlers[kind]


class Replayed(GenerativeModel):
    """The network of a case, which is only trained: on examples and labels, with the recorded draws of each batch."""

    architecture = "replayed"

    def __init__(
        self,
        network: torch.nn.Module,
        image_shape: tuple[int, int, int],
        num_classes: int,
        loss: Callable[[Tensor, Tensor, RecordedNoise], Tensor],
        draws: Iterable[RecordedNoise],
    ) -> None:
        super().__init__()
        self.config = {}
        self.network, self.image_shape, self.num_classes = network, image_shape, num_classes
        self.loss, self.draws = loss, iter(draws)

    def training_loss(self, examples: Tensor, labels: Tensor | None, noise: Noise) -> Tensor:
        assert labels is not None
        return self.loss(examples, labels, next(self.draws))

    def labels(self, indices: Sequence[int], noise: Noise) -> Tensor | None:
        raise NotImplementedError

    def sample(self, noise: Noise, labels: Tensor | None, settings: Any) -> Tensor:
        raise NotImplementedError

    def encode(self, images: Tensor, noise: Noise) -> Tensor:
        raise NotImplementedError


@dataclass(frozen=True)
class Trained:
    """What a run of the project's own loop logged and came to."""

    log: list[dict[str, Any]]
    """of each step"""
    grad_norms: np.ndarray
    """of all gradients of a step together, before the recipe repairs them"""
    weights: dict[str, Tensor]
    """of the last snapshot: averages where the recipe averages"""


def train_in_order(
    model: GenerativeModel,
    dataset: TrainingImages,
    recipe: Recipe,
    order: Iterable[int],
    *,
    seed: int = 0,
    micro_batch: int | None = None,
) -> Trained:
    """Train on the images of a set in a recorded order, once."""
    indices, norms = list(order), []
    repair = type(recipe).repair_gradients

    def repair_watched(self: Recipe, parameters: Iterable[torch.nn.Parameter]) -> None:
        parameters = list(parameters)
        norms.append(torch.cat([p.grad.flatten() for p in parameters if p.grad is not None]).double().norm())
        repair(self, parameters)

    with (
        TemporaryDirectory() as folder,
        mock.patch.multiple(type(recipe), visits=lambda *_: iter(indices), repair_gradients=repair_watched),
    ):
        snapshots = train(
            model, dataset, folder, num_steps=len(indices) // recipe.batch_size, snapshot_steps=[], recipe=recipe,
            seed=seed, processes=Processes(), micro_batch=micro_batch,
        )  # fmt: skip
        log = [json.loads(line) for line in Path(folder, LOG_FILE).read_text().splitlines()]
        return Trained(log, np.array(norms), load_state(snapshots[-1].path))


def train_on(model: GenerativeModel, recipe: Recipe, kind: str, examples: Tensor, labels: Tensor) -> Trained:
    """Train on recorded examples of a kind as they come, kept as a set of the project's own."""
    with TemporaryDirectory() as folder:
        write_shard(folder, 0, examples, labels)
        write_index(folder, [range(len(labels))], model.image_shape, kind)
        return train_in_order(model, ExampleSet(folder, kind), recipe, range(len(labels)))
