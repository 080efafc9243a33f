"""NVIDIA-style pickles (.pkl, and networks in a training-state .pt): written as copies with other tensor bytes."""

import contextlib
import mmap
import os
from collections.abc import Iterator, Mapping
from typing import IO, Any, ClassVar

import torch

from neon.checkpoint.common import TensorSpec, bytes_of, listing
from neon.checkpoint.located import LocatedCheckpoint
from neon.checkpoint.stand_ins import stand_in
from neon.checkpoint.unpickler import Blob, Budget, Corrupt, Machine
from neon.errors import RequestError
from neon.runtime.files import atomic_write

_COPY_BYTES = 1 << 22


def is_pickle(head: bytes) -> bool:
    # Safetensors with a header of 640 bytes, for one, begin alike: four bytes of its length, four zeros, its bracket.
    return len(head) > 1 and head[0] == 0x80 and 2 <= head[1] <= 5 and head[4:9] != b"\0\0\0\0{"


class PickleCheckpoint(LocatedCheckpoint):
    """A plain pickle, as the networks are published."""

    format = "pickle"
    can_be_copied: ClassVar[bool] = True

    @staticmethod
    def _content_of(file: IO[bytes], data: mmap.mmap, budget: Budget) -> Any:
        return content_of_pickle(Machine(Blob(data, 0, len(data)), budget, stand_in))

    @property
    def layout(self) -> dict[str, TensorSpec]:
        """The specs in the order of the values in the file, in which a copy is written."""
        return dict(sorted(self.specs.items(), key=lambda item: self._tensors[item[0]].blob.start))

    def check_copyable(self) -> None:
        """Raise a RequestError unless every tensor has bytes of its own in the file that a copy can replace."""
        what = f"{self.path}: cannot be copied with other weights"
        instead = "write .safetensors or .pth instead"
        if not self.can_be_copied:
            raise RequestError(f"{what}, it is a training state; {instead}")
        end, last = 0, ""
        for name, spec in self.layout.items():
            tensor = self._tensors[name]
            if isinstance(tensor.blob.data, bytes) or not tensor.is_contiguous:
                raise RequestError(f"{what}, {name} does not lie in it as plain bytes in order; {instead}")
            if spec.nbytes and tensor.blob.start < end:
                raise RequestError(f"{what}, {last} and {name} share their values; {instead}")
            end, last = max(end, tensor.blob.stop), name

    @contextlib.contextmanager
    def stream_copy(self, path: str | os.PathLike[str], *, overwrite: bool = True) -> Iterator["PickleWriter"]:
        """A writer of a copy of this file that differs in the values of the chosen state dict only.

        Values are to be written in the order of `layout`. `path` appears when the block ends well.

        Raises:
            RequestError: as `check_copyable` and `atomic_write`.
            WorkError: as `atomic_write`.
        """
        self.check_copyable()
        blobs = [self._tensors[name].blob for name, spec in self.layout.items() if spec.nbytes]
        with atomic_write(path, overwrite=overwrite) as file:
            writer = PickleWriter(file, self._file, blobs)
            yield writer
            writer.finish()

    def save_with(
        self, path: str | os.PathLike[str], tensors: Mapping[str, torch.Tensor], *, overwrite: bool = True
    ) -> None:
        """Write a copy of this file with `tensors` as the values of the state dict, rounded to its dtypes.

        Raises:
            RequestError: names or shapes differ from the file's, or as `stream_copy`.
            WorkError: as `stream_copy`.
        """
        odd = [name for name in {**self.specs, **tensors} if not self._fits(name, tensors.get(name))]
        if odd:
            raise RequestError(
                f"{path}: a copy of {self.path} takes its names and shapes; these differ: {listing(odd)}"
            )
        with self.stream_copy(path, overwrite=overwrite) as writer:
            for name, spec in self.layout.items():
                writer.write(tensors[name].detach().to("cpu", spec.dtype).reshape(-1))

    def _fits(self, name: str, tensor: torch.Tensor | None) -> bool:
        return tensor is not None and name in self.specs and tuple(tensor.shape) == self.specs[name].shape


class PickleWriter:
    """Copies a pickle and puts other values where the tensors' lie; takes them in that order, in chunks of any size."""

    def __init__(self, file: IO[bytes], source: IO[bytes], blobs: list[Blob]) -> None:
        self._file = file
        self._source = source
        self._blobs = iter(blobs)
        self._end = 0  # of the last tensor begun
        self._left = 0  # bytes of it still to be written

    def write(self, values: torch.Tensor) -> None:
        """Append `values` (1-D, contiguous, CPU) of the tensor whose turn it is."""
        view = bytes_of(values)
        if view and not self._left:
            blob = next(self._blobs)
            self._copy(blob.start - self._end)
            self._end, self._left = blob.stop, blob.size
        assert len(view) <= self._left, "more values than the tensor has"
        self._left -= len(view)
        self._file.write(view)

    def finish(self) -> None:
        """Copy what follows the last tensor."""
        assert not self._left and next(self._blobs, None) is None, "not all tensors were written"
        self._copy(None)

    def _copy(self, count: int | None) -> None:
        """Copy `count` bytes of the source from the end of the last tensor on, or all that is left."""
        self._source.seek(self._end)
        while count is None or count > 0:
            part = self._source.read(_COPY_BYTES if count is None else min(count, _COPY_BYTES))
            if not part:
                break
            self._file.write(part)
            count = None if count is None else count - len(part)


def content_of_pickle(machine: Machine) -> Any:
    """The content of the one pickle that `machine` is to run; Corrupt if more follows."""
    content = machine.run()
    if machine.rest.size:
        raise Corrupt(f"{machine.rest.size} bytes follow its end")
    return content
