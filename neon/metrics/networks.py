"""Feature networks of published weights, which users call by name: what all of them do.

One more is a subclass here and its line in `NETWORKS` (`neon.metrics.reference`).
"""

import contextlib
from abc import abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from neon.errors import RequestError
from neon.metrics.features import FeatureExtractor, Images

SomeNetwork = TypeVar("SomeNetwork", bound="PublishedNetwork")


class PublishedNetwork(FeatureExtractor):
    """A network that resizes images of any size, grey or coloured, to the one that it was published for."""

    modes: ClassVar[tuple[str, ...]] = ()
    """of resizing (`RESIZERS`), where a user may choose one"""
    chunk: ClassVar[int] = 32
    """images that go through the network at once"""

    @classmethod
    @abstractmethod
    def weights_file(cls, named: Path | None = None) -> Path:
        """Where the weights lie: in the file `named`, or in their usual place.

        Raises:
            RequestError: there is no usual place, or nothing in it and so no name.
        """

    @classmethod
    @abstractmethod
    def load(cls: type[SomeNetwork], weights: Path | None, device: torch.device, resize: str | None) -> SomeNetwork:
        """The network with the weights of a file, or from their usual place; nothing is downloaded.

        Args:
            resize: One of `modes`; None: as usual.

        Raises:
            RequestError: there is no such file (the message says how to fetch it), or it holds something else.
        """

    @abstractmethod
    def resized(self, images: Tensor) -> Tensor:
        """uint8 [B, 3, H, W] -> float32 [B, 3, side, side], values in 0..255."""

    @abstractmethod
    def features(self, images: Tensor) -> Tensor:
        """What `resized` gives -> float32 [B, F]."""

    @torch.no_grad()
    def __call__(self, images: Images) -> Tensor:
        """uint8 [B, C, H, W] with C 1 or 3, or B images [C, H, W] -> float32 [B, F]; row b depends on image b only.

        Grey is repeated to three channels; any H and W.

        Raises:
            RequestError: another dtype or number of channels.
        """
        with full_float32():
            chunks = range(0, len(images) or 1, self.chunk)
            return torch.cat([self.features(self._input(images[first : first + self.chunk])) for first in chunks])

    def _input(self, images: Images) -> Tensor:
        if not isinstance(images, Tensor):
            return torch.cat([self._input(image[None]) for image in images])
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3):
            found = f"{images.dtype} {list(images.shape)}"
            raise RequestError(f"{self.name} features need uint8 images [B, 1 or 3, H, W], found {found}")
        return self.resized(images.expand(-1, 3, -1, -1))


@contextlib.contextmanager
def full_float32() -> Iterator[None]:
    """float32 without shortcuts (TF32, bfloat16) inside; what the program chose is in force again outside."""
    backends: Any = torch.backends
    operations = [backends.cudnn.conv, backends.cuda.matmul, backends.mkldnn.conv, backends.mkldnn.matmul]
    chosen = [operation.fp32_precision for operation in operations]
    try:
        for operation in operations:
            operation.fp32_precision = "ieee"
        yield
    finally:
        for operation, precision in zip(operations, chosen, strict=True):
            operation.fp32_precision = precision
