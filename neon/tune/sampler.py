"""Stub until the search lands."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from neon.metrics import FrechetReference, Statistics
from neon.tunable import Choice, Tunables, at_calls


@dataclass(frozen=True, kw_only=True)
class SamplerPoint:
    settings: Any
    value: float | None
    note: str = ""
    statistics: Statistics | None = field(default=None, repr=False, compare=False)


@dataclass(frozen=True, kw_only=True)
class SamplerSearch:
    evaluations: tuple[SamplerPoint, ...]
    given: SamplerPoint
    best: SamplerPoint
    reason: str


def search_sampler(
    evaluate: Callable[[Any], float | Statistics],
    given: Any,
    tunable: Tunables,
    calls_of: Callable[[Any], int | None],
    *,
    reference: FrechetReference | None,
    limit: int = 12,
    tolerance: float = 0.01,
) -> SamplerSearch:
    import numpy as np

    rng = np.random.default_rng(0)
    points = []
    candidate = given
    while len(points) < limit:
        r = evaluate(candidate)
        v = reference.distance(r) if isinstance(r, Statistics) else r
        points.append(SamplerPoint(settings=candidate, value=v))
        values = {}
        for name, t in tunable.items():
            if isinstance(t, Choice):
                values[name] = t.values[int(rng.integers(len(t.values)))]
            else:
                u = rng.uniform()
                x = t.low * (t.high / t.low) ** u if t.scale == "log" else t.low + u * (t.high - t.low)
                values[name] = int(x) if t.integer else float(x)
        candidate = at_calls(calls_of, replace(given, **values), calls_of(given)) or given
    best = min(points, key=lambda p: p.value)
    return SamplerSearch(evaluations=tuple(points), given=points[0], best=best, reason="stub")
