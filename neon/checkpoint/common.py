"""What every checkpoint format offers its readers."""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any, ClassVar

import torch

from neon.errors import RequestError, WorkError, reason


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


def specs_of(state: Mapping[str, torch.Tensor]) -> dict[str, TensorSpec]:
    return {name: TensorSpec.of(tensor) for name, tensor in state.items()}


@dataclass(frozen=True)
class Constructor:
    """How a file says its network is built: the publisher's name of the class, and the keywords as JSON values."""

    class_name: str
    keywords: dict[str, Any]


class Checkpoint(ABC):
    """An open checkpoint: names, shapes and dtypes are known, values are read when asked for.

    Attributes:
        path: the file, or the index or folder of its shards.
        format: "safetensors", "torch", "pickle" or "shards".
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

    @property
    def constructor(self) -> Constructor | None:
        """What the file says of how its network is built; None where the format says nothing.

        Raises:
            RequestError: it says something that no keywords can express.
        """
        return None

    @property
    def has_constructor(self) -> bool:
        """Whether the file says how its network is built, in keywords or otherwise."""
        return False

    @property
    def files(self) -> tuple[Path, ...]:
        """Every file that it is read from."""
        return (self.path,)

    def file_of(self, name: str) -> Path:
        """The file that a tensor lies in."""
        return self.path

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


def bytes_of(values: torch.Tensor) -> memoryview:
    """The memory of a contiguous 1-D CPU tensor, writable."""
    return values.view(torch.uint8).numpy().data


def read_values(file: IO[bytes], offset: int, out: torch.Tensor, path: Path, name: str) -> None:
    """Fill `out` with the raw values of tensor `name` that lie at `offset`; a WorkError if the disk fails."""
    view = bytes_of(out)
    try:
        file.seek(offset)
        while view:
            count = file.readinto(view)  # type: ignore[attr-defined]  # of every file opened in binary mode
            if not count:
                break
            view = view[count:]
    except OSError as error:
        raise WorkError(f"{path}: reading {name} failed ({reason(error)})") from error
    if view:
        raise WorkError(f"{path}: the file ended while {name} was being read; was it replaced meanwhile?")


def listing(names: Iterable[str], first: int = 4) -> str:
    """The first few names and how many follow: `a, b, c, d (+12 more)`."""
    names = list(names)
    more = f" (+{len(names) - first} more)" if len(names) > first else ""
    return (", ".join(names[:first]) or "nothing") + more
