"""The update -w (theta_self_trained - theta_base) as factors of low rank, layer by layer, and what they keep of it."""

import math
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from neon.checkpoint import Checkpoint, TensorSpec
from neon.merge.adapters.layers import Dense, LoRA, conv1d_words, word_of
from neon.merge.adapters.low_rank import truncated
from neon.merge.adapters.over import AdaptedCheckpoint
from neon.merge.entries import Roles

# Last words of tables that rows are looked up in, which adapters of linear layers cannot hold.
_TABLE = re.compile(
    r"(.*_)?(emb|embed|embeds|embedding|embeddings|embed_tokens|embed_positions)|wte|wpe|shared|relative_attention_bias"
)


@dataclass(frozen=True)
class Factors:
    """up down is what is added to a weight [out, in, ...]; to its transpose if that lies by columns."""

    up: Tensor
    """float32 [out, r]"""
    down: Tensor
    """float32 [r, in, ...]"""
    by_columns: bool = False
    is_embedding: bool = False

    @property
    def rank(self) -> int:
        return len(self.down)


@dataclass(frozen=True)
class LayerUpdate:
    """What of one tensor's update is kept."""

    name: str
    """of the tensor in the base"""
    norm: float
    """of the update"""
    kept: float
    """norm of what the factors keep of it"""
    factors: Factors | None
    """None: the tensor is kept whole or not at all"""


def updates(
    base: Checkpoint, self_trained: Checkpoint, adapter: AdaptedCheckpoint | None, roles: Roles, w: float, rank: int
) -> Iterator[LayerUpdate]:
    """The update of each tensor that changes, one at a time in memory.

    Exact factors where the self-trained side is an adapter, which are its own times -w; else the best ones of `rank`.

    Args:
        self_trained: under the names of the base.
        adapter: the same, where it is one.
    """
    conv1d = conv1d_words(base.specs)
    for number, (name, spec) in enumerate(base.specs.items()):
        if name not in roles.merged:
            continue
        change = None if adapter is None else adapter.changes.get(name)
        if adapter is not None and change is None:
            continue
        if adapter is not None and isinstance(change, LoRA) and not change.has_magnitude:
            yield _of_adapter(name, change, adapter, w)
            continue
        update = -w * difference(base, self_trained, name)
        norm = float(torch.linalg.vector_norm(update))
        if norm == 0:
            continue
        if isinstance(change, Dense) or not _is_layer(name, spec, base.specs):  # what was trained whole stays so
            yield LayerUpdate(name, norm, 0.0, None)
            continue
        by_columns = len(spec.shape) == 2 and word_of(name) in conv1d
        matrix = update.T if by_columns else update.flatten(1)
        up, down = truncated(matrix, min(rank, *matrix.shape), seed=number)
        factors = Factors(*_padded(up, down.unflatten(1, _inputs(spec.shape, by_columns)), rank), by_columns)
        yield LayerUpdate(name, norm, min(norm, _norm(up, down)), factors)


def difference(base: Checkpoint, self_trained: Checkpoint, name: str) -> Tensor:
    """theta_self_trained - theta_base of one tensor, in float32 or as wide as they are; 0 where one is not finite."""
    b, s = base.tensor(name), self_trained.tensor(name)
    work = torch.promote_types(torch.promote_types(b.dtype, s.dtype), torch.float32)
    found = s.to(work).sub_(b.to(work))
    return torch.nan_to_num_(found, nan=0.0, posinf=0.0, neginf=0.0)


def _of_adapter(name: str, change: LoRA, adapter: AdaptedCheckpoint, w: float) -> LayerUpdate:
    up, down = change.factors(adapter.adapter)
    up = -w * up
    norm = _norm(up, down.flatten(1))
    is_embedding = change.is_embedding
    return LayerUpdate(name, norm, norm, Factors(up.float(), down.float(), change.by_columns, is_embedding))


def _norm(up: Tensor, down: Tensor) -> float:
    """Of the product of two factors, without making it."""
    return math.sqrt(max(0.0, float(((up.T @ up) * (down @ down.T)).sum())))


def _is_layer(name: str, spec: TensorSpec, specs: Mapping[str, TensorSpec]) -> bool:
    """Whether a tensor is the weight of a linear layer or a convolution, by its name and dimensions."""
    if not name.endswith(".weight") or len(spec.shape) < 2 or spec.dtype.is_complex or spec.numel == 0:
        return False
    if len(spec.shape) > 2 and spec.shape[1] == 1 < spec.shape[0]:  # each channel by itself, which adapters have not
        return False
    return len(spec.shape) <= 5 and not is_table(name, specs)


def is_table(name: str, names: Collection[str]) -> bool:
    """Whether a tensor is that of an embedding, by its name and as that has no bias among `names`."""
    return bool(_TABLE.fullmatch(word_of(name))) and f"{name.removesuffix('.weight')}.bias" not in names


def _inputs(shape: tuple[int, ...], by_columns: bool) -> tuple[int, ...]:
    return shape[:1] if by_columns else shape[1:]


def _padded(up: Tensor, down: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Factors of exactly `rank`, with zeros where a layer has fewer: readers expect one for all layers."""
    more = rank - len(down)
    if more > 0:
        up = torch.cat([up, up.new_zeros(len(up), more)], 1)
        down = torch.cat([down, down.new_zeros(more, *down.shape[1:])])
    return up.float().contiguous(), down.float().contiguous()
