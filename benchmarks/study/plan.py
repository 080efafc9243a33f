"""What a study computes, as values: samplers, ways to move weights, and rows. Nothing here computes."""

import hashlib
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """A sampler of a family: its default settings with some changes, or the base's best one of as many calls."""

    changes: tuple[tuple[str, Any], ...] = ()
    scores: int = 0
    """evaluations of the search for the best settings, `changes` among them; 0: they are taken as they are"""


def at(*, scores: int = 0, **changes: Any) -> Sampler:
    """The sampler with these settings, or the best of as many calls."""
    return Sampler(changes=tuple(sorted(changes.items())), scores=scores)


@dataclass(frozen=True, kw_only=True)
class SelfTrained:
    """The base after training on a synthetic set S."""

    sampler: Sampler
    """that S is drawn with"""
    num: int = 0
    """images in S; 0: as many as the family says"""
    steps: int = 0
    """optimiser steps; 0: as many as the family says"""
    seed: int = 0
    """of S and the training"""
    source: str = ""
    """another family whose first base draws S; empty: the base that is trained"""


@dataclass(frozen=True, kw_only=True)
class RealTrained:
    """The base after as many steps on real training images."""

    steps: int = 0
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class RandomStep:
    """The base moved as far as a self-training moves it, in a random direction."""

    like: SelfTrained
    per_tensor: bool
    """as far in every tensor, or only over all weights, the same noise on each"""
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Contrasted:
    """The base after a round of direct discriminative optimisation: real images up, its own samples down."""

    sampler: Sampler
    """that the samples are drawn with"""
    num: int = 1000
    steps: int = 40
    alpha: float = 1.0
    beta: float = 0.3
    lr: float = 1e-4
    seed: int = 0


Direction = SelfTrained | RealTrained | RandomStep | Contrasted
"""weights beside the base: a merge goes away from them (w > 0), or towards them (w < 0)"""


@dataclass(frozen=True, kw_only=True)
class Round:
    """A first application of Neon, whose result takes the place of the base."""

    direction: Direction
    w: tuple[float, float]
    """range that w is chosen from"""
    share: float = 1.0
    """of the chosen w that is gone"""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of a table: weights and a sampler, scored on blocks of report images."""

    method: str
    """its name in tables; with base and seed it tells a row from all others of a tier"""
    sampler: Sampler
    base: int = 0
    """seed of the base"""
    direction: Direction | None = None
    """None: the base itself"""
    w: float | tuple[float, float] = 0.0
    """as it is, or the range that it is chosen from on selection images"""
    both: bool = False
    """base and self-trained network sample together, at scale w (SIMS)"""
    start: Round | None = None
    """what takes the place of the base"""
    blocks: int = 3

    @property
    def seed(self) -> int | None:
        """Of S; None: there is none."""
        return None if self.direction is None else self.direction.seed

    @property
    def name(self) -> str:
        """By which `--only` finds it."""
        return f"{self.method}, base {self.base}" + ("" if self.seed is None else f", seed {self.seed}")


def slug(spec: Any) -> str:
    """A short name of a value for files: what it is, and a digest of all it holds."""
    return f"{type(spec).__name__.lower()}-{hashlib.sha256(repr(spec).encode()).hexdigest()[:10]}"
