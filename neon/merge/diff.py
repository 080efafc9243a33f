"""`neon diff`: how far two sets of weights lie apart, tensor by tensor, and what low precision would lose of it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from neon.checkpoint import Checkpoint
from neon.errors import DegenerateError
from neon.merge.components import opposite
from neon.merge.entries import buffers_by_name
from neon.merge.extrapolate import Change, UpdateStats, is_merged
from neon.merge.pair import PathLike, new_buffer, open_both, read_pieces, values_differ
from neon.model import buffers_of

LOW_PRECISION = (torch.bfloat16, torch.float16)


@dataclass(frozen=True, kw_only=True)
class KeptIn:
    """What is left of a change, a step of w = 1 away from it, if weights are kept in `dtype`."""

    dtype: str
    overflows: bool
    share_lost: float
    """of the elements that should move, those that do not"""
    relative_error: float
    """norm of the error over that of the change"""


@dataclass(frozen=True, kw_only=True)
class TensorDiff:
    """How one tensor differs."""

    name: str
    dtypes: tuple[str, str]
    shape: tuple[int, ...]
    change: float
    """norm of b - a"""
    relative: float | None
    """the same over the norm of a; None if that is 0"""
    largest_change: float
    """of one element, and `largest_weight` of a"""
    largest_weight: float
    kept: tuple[KeptIn, ...]


@dataclass(frozen=True, kw_only=True)
class Diff:
    """How two models differ; names of a pipeline's tensors begin with their component."""

    a: str
    b: str
    change: float
    relative: float | None
    tensors: tuple[TensorDiff, ...]
    """floats that are weights and differ, the largest change first"""
    equal: int
    """how many do not"""
    kept: tuple[KeptIn, ...]
    """of all of them"""
    other: tuple[str, ...]
    """integers, booleans and buffers that differ"""
    shapes: tuple[str, ...]
    """names whose shapes differ, with both"""
    only_a: tuple[str, ...]
    only_b: tuple[str, ...]
    notes: tuple[str, ...]
    """what a user should know, in sentences"""


def diff(
    a: PathLike,
    b: PathLike,
    *,
    key: str | None = None,
    self_trained_key: str | None = None,
    components: Sequence[str] = (),
    variant: str | None = None,
) -> Diff:
    """Compare two files, folders or pipelines, or a model `a` and an adapter of it `b`, in pieces.

    Args:
        key: nesting of the state dict of `a`, and of `b` if it has it; `self_trained_key`: of `b`.
        components: of pipelines, those to compare; by default all that both have.
        variant: of folders, such as "fp16".

    Raises:
        RequestError: a side cannot be read, or nothing of the two stands opposite.
    """
    both, only_a, only_b = opposite(Path(a), Path(b), components, variant)
    found = _Found()
    found.only_a += [f"{name}/" for name in only_a]
    found.only_b += [f"{name}/" for name in only_b]
    for component, (ours, theirs) in both.items():
        with open_both(ours, theirs, key, self_trained_key) as (first, _, second, notes):
            found.notes += notes
            found.compare(f"{component}/" if component else "", first, second)
    return Diff(
        a=str(a),
        b=str(b),
        change=found.change.moved**0.5,
        relative=_finite(found.change.relative),
        tensors=tuple(sorted(found.tensors, key=lambda one: -one.change)),
        equal=found.equal,
        kept=tuple(one.found() for one in found.kept),
        other=tuple(found.other),
        shapes=tuple(found.shapes),
        only_a=tuple(found.only_a),
        only_b=tuple(found.only_b),
        notes=tuple(dict.fromkeys(found.notes)),
    )


class _Kept:
    """`KeptIn` while it is counted."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype, self.stats, self.overflows = dtype, UpdateStats(), False

    def add(self, a: torch.Tensor, b: torch.Tensor) -> None:
        try:
            if not self.overflows:
                self.stats.add_kept_in(self.dtype, a, b)
        except DegenerateError:
            self.overflows = True

    def found(self) -> KeptIn:
        return KeptIn(
            dtype=str(self.dtype).removeprefix("torch."),
            overflows=self.overflows,
            share_lost=self.stats.share_lost,
            relative_error=self.stats.relative_error,
        )


class _Found:
    """A `Diff` while it is counted."""

    def __init__(self) -> None:
        self.change, self.kept, self.equal = Change(), [_Kept(dtype) for dtype in LOW_PRECISION], 0
        self.tensors = list[TensorDiff]()
        self.other, self.shapes, self.only_a, self.only_b, self.notes = (list[str]() for _ in range(5))
        self._buffers = [new_buffer(), new_buffer()]

    def compare(self, front: str, first: Checkpoint, second: Checkpoint) -> None:
        """Count two models, whose names begin with `front` in what is found."""
        self.only_a += [front + name for name in first.specs if name not in second.specs]
        self.only_b += [front + name for name in second.specs if name not in first.specs]
        known = buffers_of(first)
        buffers = buffers_by_name(first.specs) if known is None else known
        for name in (name for name in first.specs if name in second.specs):
            one, other = first.specs[name], second.specs[name]
            if one.shape != other.shape:
                self.shapes.append(f"{front}{name} {list(one.shape)} / {list(other.shape)}")
            elif name not in buffers and is_merged(one.dtype) and is_merged(other.dtype):
                self._add(front, name, first, second)
            elif values_differ(first, second, name):
                self.other.append(front + name)

    def _add(self, front: str, name: str, first: Checkpoint, second: Checkpoint) -> None:
        """Count one tensor, read in pieces."""
        change, kept, largest = Change(), [_Kept(dtype) for dtype in LOW_PRECISION], [0.0, 0.0]
        for _, (a, b) in read_pieces(name, (first, second), self._buffers):
            change.add(a, b)
            wide = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
            a, b = a.to(wide), b.to(wide)
            largest = [max(pair) for pair in zip(largest, map(_largest, (b - a, a)), strict=True)]
            for one in (*kept, *self.kept) if not wide.is_complex else ():
                one.add(a, b)
        self.change.moved += change.moved
        self.change.norm += change.norm
        if not largest[0]:
            self.equal += 1
            return
        dtypes = tuple(str(file.specs[name].dtype).removeprefix("torch.") for file in (first, second))
        self.tensors.append(
            TensorDiff(
                name=front + name,
                dtypes=(dtypes[0], dtypes[1]),
                shape=first.specs[name].shape,
                change=change.moved**0.5,
                relative=_finite(change.relative),
                largest_change=largest[0],
                largest_weight=largest[1],
                kept=tuple(one.found() for one in kept),
            )
        )


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _largest(values: torch.Tensor) -> float:
    """The largest finite magnitude."""
    sizes = values.abs()
    return float(torch.where(torch.isfinite(sizes), sizes, 0).max())
