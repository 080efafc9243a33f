"""The factors of one layer, and how their product lies on the base's weight."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from neon.checkpoint import Checkpoint, TensorSpec
from neon.errors import RequestError
from neon.merge.adapters.low_rank import Product, Sum
from neon.merge.adapters.names import Layer


@dataclass(frozen=True)
class LoRA:
    """The factors of one layer, as names of tensors in the adapter, and how they lie on the base's weight."""

    layer: Layer
    parts: Mapping[str, str]
    scale: float
    rank: int
    by_columns: bool
    """the weight is stored [in, out], as in GPT-2's Conv1D and in embeddings"""

    @property
    def is_embedding(self) -> bool:
        return "embedding_down" in self.parts

    @property
    def has_magnitude(self) -> bool:
        """DoRA: what it adds is not proportional to its factors."""
        return "magnitude" in self.parts

    def factors(self, file: Checkpoint) -> tuple[Tensor, Tensor]:
        """up [out, r], with the scale in it, and down [r, in ...], float64; a RequestError if they are not finite."""
        kind = "embedding_" if self.is_embedding else ""
        up, down = (file.tensor(self.parts[kind + part]).double() for part in ("up", "down"))
        if "mid" in self.parts:
            down = torch.einsum("pq...,qi->pi...", file.tensor(self.parts["mid"]).double(), down.flatten(1))
        if not math.isfinite(float(up.sum() + down.sum())):
            raise RequestError(
                f"{file.path}: the factors of {self.layer} are not all finite; the training has diverged"
            )
        return self.scale * up.flatten(1), down

    def changed(self, file: Checkpoint) -> Product:
        """The weight with the factors' product on it."""
        up, down = self.factors(file)
        down = down.flatten(1)
        magnitude = file.tensor(self.parts["magnitude"]).double().flatten() if self.has_magnitude else None
        left, right = (down.T, up.T) if self.by_columns else (up, down)
        return Product(left, right, magnitude, self.by_columns)


@dataclass(frozen=True)
class Dense:
    """A tensor of the adapter that replaces one of the base, or, with a scale, is added to it."""

    name: str
    """in the adapter"""
    scale: float | None = None

    def changed(self, file: Checkpoint) -> Sum:
        """The tensor with the other one added to it."""
        values = (self.scale or 0.0) * file.tensor(self.name).double()
        return Sum(values.reshape(len(values), -1))


Change = LoRA | Dense


def conv1d_words(specs: Mapping[str, TensorSpec]) -> frozenset[str]:
    """The last words of layers whose weights are stored [in, out], as their biases tell where they are not square."""
    found = set()
    for name, spec in specs.items():
        bias = specs.get(f"{name.removesuffix('.weight')}.bias")
        if name.endswith(".weight") and bias is not None and len(spec.shape) == 2 and len(bias.shape) == 1:
            rows, columns = spec.shape
            if rows != columns and bias.shape[0] == columns:
                found.add(word_of(name))
    return frozenset(found)


def word_of(name: str) -> str:
    """The last word of the layer whose weight `name` is: `c_attn` of `h.0.attn.c_attn.weight`."""
    return name.removesuffix(".weight").rpartition(".")[2]


def layouts(parts: Mapping[str, TensorSpec], shape: tuple[int, ...]) -> list[bool]:
    """How the product of factors can lie on a weight of a shape: by rows (False), by columns (True), or neither."""
    if "embedding_down" in parts:
        down, up = parts["embedding_down"].shape, parts.get("embedding_up", parts["embedding_down"]).shape
        return [True] if len(down) == 2 and shape == (down[1], up[0]) and up[1:] == (down[0],) else []
    down, up = parts["down"].shape, parts["up"].shape
    if len(down) < 2 or len(up) < 2 or len(shape) < 2 or math.prod(up[1:]) != up[1]:
        return []
    rank, inputs = down[0], down[1:]
    if "mid" in parts:
        mid = parts["mid"].shape
        if math.prod(inputs) != inputs[0] or mid[:2] != (up[1], rank):
            return []
        inputs = (inputs[0], *mid[2:])
    elif up[1] != rank:
        return []
    by_rows = shape[0] == up[0] and shape[1] == inputs[0] and math.prod(shape[1:]) == math.prod(inputs)
    by_columns = len(shape) == 2 and shape == (math.prod(inputs), up[0])
    return [layout for layout, fits in ((False, by_rows), (True, by_columns)) if fits]
