"""What every checkpoint format offers its readers."""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import ClassVar

import torch

from neon.errors import RequestError


@dataclass(frozen=True)
class TensorSpec:
    """Shape and dtype of one tensor, known without reading it."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize

    @classmethod
    def of(cls, tensor: torch.Tensor) -> "TensorSpec":
        return cls(tuple(tensor.shape), tensor.dtype)


class Checkpoint(ABC):
    """An open checkpoint: names, shapes and dtypes are known, values are read when asked for.

    Attributes:
        path: the file.
        format: "safetensors" or "torch".
        key: dotted name of the nesting the state dict was found in; "" is the file itself.
        candidates: every nesting of the file that holds tensors, `key` included.
        metadata: the file's own text entries (safetensors `__metadata__`), else empty.
        specs: shape and dtype by name, in the order of the file.
    """

    format: ClassVar[str]

    def __init__(
        self,
        path: Path,
        specs: Mapping[str, TensorSpec],
        *,
        key: str = "",
        candidates: tuple[str, ...] = ("",),
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        self.path = path
        self.key = key
        self.candidates = candidates
        self.metadata = dict(metadata or {})
        self.specs = dict(specs)

    def names(self) -> list[str]:
        """Tensor names, in the order of the file."""
        return list(self.specs)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._spec(name).shape

    def dtype(self, name: str) -> torch.dtype:
        return self._spec(name).dtype

    def tensor(self, name: str) -> torch.Tensor:
        """A tensor read from the file, on the CPU; it shares memory with nothing.

        Raises:
            RequestError: the file holds no tensor of this name.
        """
        spec = self._spec(name)
        values = torch.empty(spec.shape, dtype=spec.dtype)
        self.read(name, 0, values.view(-1))
        return values

    @abstractmethod
    def read(self, name: str, start: int, out: torch.Tensor) -> None:
        """Fill `out` (1-D, contiguous, dtype of the tensor) with the flattened tensor's elements from `start` on."""

    def close(self) -> None:  # noqa: B027 - a format without an open file has nothing to close
        """Release the file; reading afterwards is an error."""

    def _spec(self, name: str) -> TensorSpec:
        try:
            return self.specs[name]
        except KeyError:
            raise RequestError(f"{self.path}: no tensor {name!r}; it holds {listing(self.specs)}") from None

    def __enter__(self) -> "Checkpoint":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def listing(names: Mapping[str, object] | list[str] | tuple[str, ...], first: int = 4) -> str:
    """The first few names and how many follow: `a, b, c, d (+12 more)`."""
    shown = list(names)
    more = f" (+{len(shown) - first} more)" if len(shown) > first else ""
    return (", ".join(shown[:first]) or "nothing") + more
