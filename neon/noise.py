"""Random draws that belong to images: one generator per image, never to a batch, a rank or a process.

Image i of a run is determined by its seed; the batch it is computed in and the process that computes it
do not matter. Seeds are 32-bit (torch's CPU generator ignores higher bits).
"""

from collections.abc import Callable, Sequence
from enum import IntEnum
from typing import Protocol

import torch
from torch import Tensor

from neon.errors import RequestError

SEEDS_PER_PURPOSE = 2**30
SEEDS_PER_RUN = 2**20
RUNS = SEEDS_PER_PURPOSE // SEEDS_PER_RUN


class Purpose(IntEnum):
    """What an image is drawn for. Each purpose owns a quarter of the 32-bit seeds, so none overlaps another."""

    SYNTHETIC = 0
    """the synthetic set S that the model is fine-tuned on"""
    SELECTION = 1
    """images that choose w, guidance or budget"""
    REPORT = 2
    """images behind reported scores"""
    TRAINING = 3
    """noise added to training images, one seed per visit of an image"""


def image_seeds(purpose: Purpose, run_seed: int, num_images: int, start: int = 0) -> list[int]:
    """The seeds of images start .. start + num_images - 1 of run `run_seed`, for one purpose.

    Runs 0 .. 1023 are disjoint as long as no run asks for more than 2^20 images of a purpose; longer
    runs walk on into the seeds of the next run.

    Raises:
        RequestError: there is no such run: `run_seed` is negative, or the images would be those of another run.
    """
    if not 0 <= run_seed < RUNS:
        raise RequestError(f"--seed is {run_seed}; expected 0 to {RUNS - 1}, the runs whose images all differ")
    first = run_seed * SEEDS_PER_RUN + start
    return [purpose * SEEDS_PER_PURPOSE + (first + i) % SEEDS_PER_PURPOSE for i in range(num_images)]


class Noise(Protocol):
    """What samplers and losses draw from; one row per image of the batch, in a documented order.

    Tests replay recorded draws through the same door.
    """

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Unit normal [B, *shape]."""
        ...

    def uniform(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Uniform in [0, 1), [B, *shape]."""
        ...

    def exponential(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Exponential of rate 1, above 0, [B, *shape]."""
        ...

    def integers(self, high: int, *shape: int) -> Tensor:
        """int64 in [0, high), [B, *shape]."""
        ...

    @property
    def generators(self) -> Sequence[torch.Generator]:
        """The streams themselves, one per image, for libraries that draw on their own."""
        ...

    def restarted(self) -> "Noise":
        """The same streams from their first draw."""
        ...


class ImageNoise:
    """Draws from one torch generator per image, on `device` (CPU and CUDA streams differ)."""

    def __init__(self, seeds: Sequence[int], device: torch.device | str = "cpu") -> None:
        self.seeds = [int(seed) % 2**32 for seed in seeds]
        self.device = torch.device(device)
        self.generators = [torch.Generator(self.device).manual_seed(seed) for seed in self.seeds]

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return self._fill(Tensor.normal_, shape, dtype)

    def uniform(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return self._fill(Tensor.uniform_, shape, dtype)

    def exponential(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return self._fill(Tensor.exponential_, shape, dtype)

    def integers(self, high: int, *shape: int) -> Tensor:
        return self._fill(Tensor.random_, shape, torch.int64, 0, high)

    def restarted(self) -> "ImageNoise":
        return ImageNoise(self.seeds, self.device)

    def state(self) -> Tensor:
        """How far each stream has come, uint8 [B, S]: `go_on_from` it continues in another process."""
        return torch.stack([generator.get_state() for generator in self.generators])

    def go_on_from(self, state: Tensor) -> None:
        """Continue the streams from what `state` gave of the same ones."""
        for generator, of_it in zip(self.generators, state, strict=True):
            generator.set_state(of_it.clone())  # torch forgets the offset of a view, and crashes

    def _fill(self, draw: Callable[..., Tensor], shape: Sequence[int], dtype: torch.dtype, *bounds: int) -> Tensor:
        """[B, *shape] with each row from its own generator; `draw` fills a row in place."""
        out = torch.empty(len(self.seeds), *shape, dtype=dtype, device=self.device)
        for row, generator in zip(out, self.generators, strict=True):
            draw(row, *bounds, generator=generator)
        return out
