"""What a merge is rounded to, and how: to the nearest value, or to one of its neighbours so that the mean is right.

Stochastic rounding draws by the seed, the name of a tensor and the place of an element in it, so that neither the order
of tensors nor the pieces in which they are read matter.
"""

import hashlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy as np
import torch

from neon.checkpoint import TensorSpec
from neon.errors import DegenerateError, RequestError
from neon.merge.extrapolate import SERIAL_CHUNK

DTypeName = Literal["float32", "bfloat16", "float16"]
Rounding = Literal["nearest", "stochastic"]
HALF = (torch.bfloat16, torch.float16)
PRECISION = ("dtype", "rounding", "rounding_seed")
"""metadata of one merge, which a merge of it does not take over"""
_PER_COUNT = 8  # 32-bit numbers of one count of Philox


@dataclass(frozen=True, kw_only=True)
class Precision:
    """The dtype of what is merged (None: the base's), and how it is rounded to it. What is copied stays as it is.

    A RequestError if a value is unknown, or a seed is given that nothing is drawn with.
    """

    dtype: DTypeName | None = None
    rounding: Rounding = "nearest"
    seed: int | None = None
    """of stochastic rounding; 0 by default"""

    def __post_init__(self) -> None:
        for flag, value, known in (
            ("--dtype", self.dtype, (None, *get_args(DTypeName))),
            ("--rounding", self.rounding, get_args(Rounding)),
        ):
            if value not in known:
                raise RequestError(f"{flag} {value}: expected {', '.join(filter(None, known))}")
        if self.seed is not None and not self.is_stochastic:
            raise RequestError("--seed: is of --rounding stochastic; leave it out")
        if self.is_stochastic and self.dtype == "float32":
            raise RequestError("--rounding stochastic: is of 16 bits, and --dtype is float32; leave one of them out")

    @property
    def is_stochastic(self) -> bool:
        return self.rounding == "stochastic"

    @property
    def advice(self) -> str:
        """What to do where rounding spoils an update, at the end of a sentence."""
        if self.is_stochastic:
            return "--dtype float32 keeps it"
        if self.dtype == "float32":
            return "use a larger w, or train longer"
        return "--dtype float32 keeps it, --rounding stochastic keeps it on average; better, merge float32 weights"

    def layout(self, specs: Mapping[str, TensorSpec], merged: Collection[str]) -> dict[str, TensorSpec]:
        """The specs of the output of a merge of these, of which `merged` are; a RequestError if none is rounded so."""
        dtype = None if self.dtype is None else getattr(torch, self.dtype)
        changed = {
            name: replace(spec, dtype=dtype) if dtype and name in merged and not spec.dtype.is_complex else spec
            for name, spec in specs.items()
        }
        if self.is_stochastic and not any(changed[name].dtype in HALF for name in merged):
            raise RequestError(
                "--rounding stochastic: is of 16 bits, and no merged tensor of the base has them; name a --dtype"
            )
        return changed

    def provenance(self) -> dict[str, str]:
        """What an output says of it: nothing by default."""
        told = {"dtype": self.dtype} if self.dtype else {}
        return told | ({"rounding": self.rounding, "rounding_seed": str(self.seed or 0)} if self.is_stochastic else {})


AS_THE_BASE = Precision()


def round_stochastically(values: torch.Tensor, out: torch.Tensor, name: str, start: int, seed: int) -> None:
    """Round elements `start` .. of tensor `name`, 1-D on the CPU, to bfloat16 or float16 into `out`.

    A value between two neighbours becomes the upper one with the probability (value - lower) / (upper - lower), in
    steps of 2^-24; one that `out` can hold stays. Beyond the largest value, it is rounded to the nearest.

    Raises:
        DegenerateError: a finite value overflows.
    """
    for at in range(0, len(values), SERIAL_CHUNK):
        part = slice(at, at + SERIAL_CHUNK)
        _round(values[part], out[part], name, start + at, seed)
    if overflowed := int((torch.isfinite(values) & ~torch.isfinite(out)).sum()):
        raise DegenerateError(f"{name}: {overflowed} elements overflow {out.dtype}; use a w nearer to 0")


def _round(values: torch.Tensor, out: torch.Tensor, name: str, start: int, seed: int) -> None:
    out.copy_(values)
    error = values - out.to(values.dtype)
    # The neighbour on the side of the value: one code away, since codes of one sign are in the order of magnitudes.
    codes, away = out.view(torch.int16), (error < 0) == torch.signbit(out)
    neighbour = torch.where(away, codes + 1, codes - 1).view(out.dtype)
    chance = error / (neighbour.to(values.dtype) - out.to(values.dtype))
    taken = (error != 0) & torch.isfinite(neighbour) & (_uniform(name, start, len(values), seed) < chance)
    out.copy_(torch.where(taken, neighbour, out))


def _uniform(name: str, start: int, count: int, seed: int) -> torch.Tensor:
    """float32 in [0, 1) for elements `start` .. of a tensor, by a generator that counts (Philox)."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = np.random.Philox(key=int.from_bytes(digest[:16], "little"), counter=start // _PER_COUNT)
    skipped = start % _PER_COUNT
    words = generator.random_raw((skipped + count + 1) // 2).view(np.uint32)[skipped : skipped + count]
    return torch.from_numpy((words >> 8).astype(np.float32)) * 2**-24
