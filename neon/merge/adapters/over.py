"""A LoRA adapter over its base as a checkpoint: theta_base + scale up down, read piece by piece."""

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from neon.checkpoint import Checkpoint, TensorSpec
from neon.merge.adapters.layers import Change, Dense
from neon.merge.adapters.low_rank import Changed, columns
from neon.merge.adapters.matching import match
from neon.merge.adapters.names import Contents, is_adapter, read_contents


class AdaptedCheckpoint(Checkpoint):
    """The base with an adapter merged into it; tensors that it changes are float32, or float64 as the base's.

    The base is not closed with it.

    Attributes:
        adapter: the file with the tensors of the adapter.
        contents: what it says of itself.
        changes: what it changes, by name in the base.
        notes: what a user should know, in sentences.
    """

    format = "adapter"

    def __init__(self, path: Path, adapter: Checkpoint, contents: Contents, base: Checkpoint) -> None:
        self.adapter, self.contents, self._base = adapter, contents, base
        found = match(path, adapter, contents, base)
        self.changes, self.notes = found.changes, tuple(found.notes)
        specs = dict(base.specs)
        for name, change in self.changes.items():
            specs[name] = _spec_over(specs[name], adapter, change)
        super().__init__(path, specs, metadata=adapter.metadata)
        self._block: tuple[str, int, Tensor] | None = None
        self._changed: tuple[str, Changed] | None = None

    @property
    def files(self) -> tuple[Path, ...]:
        config = self.contents.config_file
        return (*self.adapter.files, *((config,) if config else ()))

    def read(self, name: str, start: int, out: Tensor) -> None:
        change = self.changes.get(name)
        if change is None:
            self._base.read(name, start, out)
        elif isinstance(change, Dense) and change.scale is None:
            values = torch.empty(len(out), dtype=self.adapter.dtype(change.name))
            self.adapter.read(change.name, start, values)
            out.copy_(values)
        else:
            self._read_changed(name, change, start, out)

    def _read_changed(self, name: str, change: Change, start: int, out: Tensor) -> None:
        if self._changed is None or self._changed[0] != name:  # the factors of one layer are kept
            self._changed = (name, change.changed(self.adapter))
        size = self._changed[1].rows_at_once(self.specs[name]) * columns(self.specs[name])
        done = 0
        while done < len(out):
            number, skipped = divmod(start + done, size)
            part = self._block_of(name, number)[skipped : skipped + len(out) - done]
            out[done : done + len(part)] = part
            done += len(part)

    def _block_of(self, name: str, number: int) -> Tensor:
        """Some whole rows of a changed tensor, flattened, in its dtype; the last ones asked for are kept."""
        assert self._changed is not None
        if self._block is None or self._block[:2] != (name, number):
            spec, (_, changed) = self.specs[name], self._changed
            rows = changed.rows_at_once(spec)
            count = spec.shape[0] if spec.shape else 1
            values = changed.rows(
                lambda a, b: self._base_rows(name, a, b), number * rows, min(count, (number + 1) * rows)
            )
            self._block = (name, number, values.to(spec.dtype).flatten())
        return self._block[2]

    def _base_rows(self, name: str, start: int, stop: int) -> Tensor:
        width = columns(self.specs[name])
        values = torch.empty((stop - start) * width, dtype=self._base.dtype(name))
        self._base.read(name, start * width, values)
        return values.double().view(stop - start, width)

    def close(self) -> None:
        self.adapter.close()


def is_over(file: Checkpoint, base: Checkpoint) -> bool:
    """Whether a file holds an adapter for `base`; not where both are whole states of a network with one in it."""
    return is_adapter(file.specs) and not is_adapter(base.specs)


def adapted(file: Checkpoint, path: Path, base: Checkpoint) -> AdaptedCheckpoint:
    """The adapter `file`, which the user named as `path`, over `base`.

    Raises:
        RequestError: it is another kind of adapter than LoRA, or of another base; the file is closed.
    """
    try:
        return AdaptedCheckpoint(path, file, read_contents(file, path), base)
    except BaseException:
        file.close()
        raise


def _spec_over(spec: TensorSpec, adapter: Checkpoint, change: Change) -> TensorSpec:
    """Of a changed tensor: wide enough that no more is lost than float32 does."""
    if isinstance(change, Dense) and change.scale is None:
        theirs = adapter.dtype(change.name)
        if not (spec.dtype.is_floating_point and theirs.is_floating_point):
            return replace(spec, dtype=theirs)
        is_wide = torch.float64 in (spec.dtype, theirs)
    else:
        is_wide = spec.dtype == torch.float64
    return replace(spec, dtype=torch.float64 if is_wide else torch.float32)
