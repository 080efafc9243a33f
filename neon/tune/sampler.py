"""Choosing a sampler's settings with few evaluations, at an equal number of network calls.

A better sampler that takes more calls is no better one: every candidate gets as many steps as the calls of the given
settings allow. `search_sampler` moves one setting after another, then goes where a model of the features' moments
(neon.tune.surrogate) promises most. Nothing here samples, scores or reads a file.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
from scipy.stats import qmc

from neon.errors import RequestError, WorkError
from neon.metrics import FrechetReference, MomentTarget, Statistics
from neon.tunable import Range, Tunables, at_calls
from neon.tune.search import MOST_FEATURES, outcome
from neon.tune.surrogate import Array, MomentProcess, SettingsKernel, Surrogate, ValueProcess

_STEP = 0.4
"""of the way to the farther end of its range that each setting goes first"""
_REACH = 0.3
"""how far from the lowest point each setting goes in one step, in parts of its range"""
_CLOSEST = 0.03
"""between two evaluated points, in parts of the ranges: nearer teaches nothing"""
_BEFORE_STEPS = 8
"""evaluations that come before moves that cost steps; of those beyond, half do"""
_CANDIDATES = 512
"""a power of 2, as Sobol's sequence asks for"""


@dataclass(frozen=True, kw_only=True)
class SamplerPoint:
    """Settings and their value; None if the evaluation failed, with the reason in `note`."""

    settings: Any
    value: float | None
    note: str = ""
    statistics: Statistics | None = field(default=None, repr=False, compare=False)
    """of the features behind the value, where the search was given them"""


@dataclass(frozen=True, kw_only=True)
class SamplerSearch:
    """What was evaluated, in order, and what it says."""

    evaluations: tuple[SamplerPoint, ...]
    """the given settings first"""
    given: SamplerPoint
    best: SamplerPoint
    """the lowest value; the given settings unless they are beaten by more than twice the noise"""
    reason: str
    """why the search stopped, and which ranges the best settings are at an end of"""


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
    """Minimise `evaluate` over the settings named in `tunable`; deterministic given the values.

    Args:
        evaluate: the value of settings, lower is better, or with `reference` the statistics of their features; raises
            EvaluationFailed if they have none (as does a value that is not finite).
        given: settings, a dataclass; evaluated first.
        tunable: the fields searched. None: only the given settings are evaluated.
        calls_of: network calls of settings. Others get the most steps that take no more calls than the given ones; if
            that is not told, steps are left as they are.
        reference: real features. The value of settings is the Frechet distance of their features to them.
        limit: never evaluate more settings than this.
        tolerance: the search stops when it expects to gain less than this part of the best value.

    Raises:
        RequestError: a limit below 1.
        WorkError: the given settings have no value.
    """
    if limit < 1:
        raise RequestError(f"limit = {limit}: a search needs at least 1 evaluation")
    search = _Search(evaluate, _Space(given, tunable, calls_of), reference, tolerance)
    for settings in search.walk(limit):
        if len(search.points) == limit:
            return search.result(f"the limit of {limit} evaluations was reached")
        search.add(settings)
    if not tunable:
        return search.result("the sampler has no settings to search")
    return search.result(f"no other settings are expected to gain more than {search.least_gain:.3g}")


def _value(point: SamplerPoint) -> float:
    """The value, infinite if the evaluation failed."""
    return math.inf if point.value is None else point.value


class _Space:
    """The settings that take as many calls as the given ones, and the coordinates in which they resemble each other."""

    def __init__(self, given: Any, tunable: Tunables, calls_of: Callable[[Any], int | None]) -> None:
        self.given, self.tunable, self.calls_of = given, tunable, calls_of
        self.calls = calls_of(given)

    def settings(self, origin: Any, **values: Any) -> Any | None:
        """`origin` with other values, at an equal number of calls; None: there are no such settings."""
        try:
            changed = replace(origin, **values)
        except ValueError:
            return None
        return changed if self.calls is None else at_calls(self.calls_of, changed, self.calls)

    def coordinates(self, settings: Sequence[Any]) -> Array:
        """One row for each: differences from the given settings."""
        columns = []
        for name, tunable in self.tunable.items():
            values = [getattr(one, name) for one in settings]
            own = getattr(self.given, name)
            if isinstance(tunable, Range):
                columns.append([tunable.part_of(value) - tunable.part_of(own) for value in values])
            else:
                columns += [[float(value == other) for value in values] for other in tunable.values if other != own]
        columns.append([math.log2(steps_of(one) / steps_of(self.given)) for one in settings])
        return np.array(columns).T.reshape(len(settings), -1)

    def moves(self) -> Iterator[list[dict[str, Any]]]:
        """What to try of each setting, first to last: a number on either side of the given one, or another choice."""
        for name, tunable in self.tunable.items():
            own = getattr(self.given, name)
            if isinstance(tunable, Range):
                part = tunable.part_of(own)
                ends = sorted((0.0, 1.0), key=lambda end: -abs(end - part))
                yield [{name: tunable.value_at(part + _STEP * (end - part))} for end in ends]
            else:
                yield from ([{name: value}] for value in tunable.values if value != own)

    @cached_property
    def _lattice(self) -> Array:
        """Points of the unit cube [_CANDIDATES, 2 d]: a place for each setting, and whether to keep it."""
        return np.asarray(qmc.Sobol(2 * len(self.tunable), scramble=False).random(_CANDIDATES))

    def around(self, origin: Any) -> list[Any]:
        """Settings that differ from `origin` in some of the searched ones, each by no more than `_REACH`."""
        found = []
        for places in self._lattice.reshape(_CANDIDATES, 2, -1):
            values: dict[str, Any] = {}
            for (name, tunable), place, keep in zip(self.tunable.items(), *places, strict=True):
                if keep < 0.5:
                    continue
                if isinstance(tunable, Range):
                    part = tunable.part_of(getattr(origin, name)) + _REACH * (2 * place - 1)
                    values[name] = tunable.value_at(part)
                else:
                    values[name] = tunable.values[int(place * len(tunable.values))]
            if (settings := self.settings(origin, **values)) is not None:
                found.append(settings)
        return found


def steps_of(settings: Any) -> int:
    """Its steps; 1 where a sampler has none to choose."""
    return int(getattr(settings, "num_steps", 1))


class _Search:
    """The points evaluated so far, and which to evaluate next."""

    def __init__(
        self,
        evaluate: Callable[[Any], float | Statistics],
        space: _Space,
        reference: FrechetReference | None,
        tolerance: float,
    ) -> None:
        self.evaluate, self.space, self.reference, self.tolerance = evaluate, space, reference, tolerance
        self.target = None if reference is None else MomentTarget(reference.statistics, MOST_FEATURES)
        self.points: list[SamplerPoint] = []
        self.least_gain = 0.0
        """that was worth an evaluation at the last step"""

    def add(self, settings: Any) -> None:
        """Evaluate settings; a value that is not finite is a failure.

        Raises:
            WorkError: the given settings, which are the first, have no value.
        """
        point = SamplerPoint(settings=settings, **outcome(self.evaluate, settings, self.reference)._asdict())
        self.points.append(point)
        if len(self.points) == 1 and point.value is None:
            raise WorkError(
                f"the given sampler could not be scored ({point.note}); mend that before choosing other settings"
            )

    @property
    def lowest(self) -> SamplerPoint:
        """The lowest value so far."""
        return min(self.points, key=_value)

    def walk(self, limit: int) -> Iterator[Any]:
        """All settings worth evaluating: the given, each setting moved, then the most promising.

        Moves that cost steps, as guidance and solvers of a higher order do, pay only with other settings at their best:
        they wait until nothing else promises a gain, or the last scores of a long search.
        """
        yield self.space.given
        yield from self.moves(costing_steps=False)
        for settings in self.descend():
            if len(self.points) >= limit - max(0, limit - _BEFORE_STEPS) // 2:
                break
            yield settings
        for settings in self.moves(costing_steps=True):
            yield settings
            yield from self.descend()
        yield from self.descend()

    def moves(self, *, costing_steps: bool) -> Iterator[Any]:
        """The lowest point with one setting moved, for each setting; the other way where the first one failed."""
        for alternatives in self.space.moves():
            for values in alternatives:
                settings = self.space.settings(self.lowest.settings, **values)
                if (
                    settings is not None
                    and (steps_of(settings) < steps_of(self.space.given)) == costing_steps
                    and self.fresh([settings])[0]
                ):
                    yield settings
                    if self.points[-1].value is not None:
                        break

    @property
    def fewest_steps(self) -> int:
        """Of the points evaluated."""
        return min(steps_of(point.settings) for point in self.points)

    def descend(self) -> Iterator[Any]:
        """The settings that may gain most, as long as that is not too little."""
        while self.space.tunable:
            candidates = [
                settings
                for settings in self.space.around(self.lowest.settings)
                if steps_of(settings) >= self.fewest_steps
            ]
            candidates = [one for one, fresh in zip(candidates, self.fresh(candidates), strict=True) if fresh]
            model = self.surrogate()
            promise = model.promise(self.space.coordinates(candidates)) if candidates else np.zeros(1)
            self.least_gain = max(self.tolerance * abs(_value(self.lowest)), 2 * model.noise)
            if promise.max() <= self.least_gain:
                return
            yield candidates[promise.argmax()]

    def fresh(self, candidates: Sequence[Any]) -> Array:
        """Which candidates are neither evaluated nor too near to such, nor nearest to one that failed."""
        if not candidates:
            return np.zeros(0, bool)
        rows = self.space.coordinates(candidates)
        evaluated = self.space.coordinates([point.settings for point in self.points])
        away = np.linalg.norm(rows[:, None] - evaluated, axis=-1)
        failed = np.array([point.value is None for point in self.points])
        return np.asarray((away.min(axis=1) > _CLOSEST) & ~failed[away.argmin(axis=1)])

    def surrogate(self) -> Surrogate:
        """The fit to all points that have values."""
        scored = [point for point in self.points if point.value is not None]
        rows = self.space.coordinates([point.settings for point in scored])
        values = np.array([_value(point) for point in scored])
        if self.target is None:
            return ValueProcess(rows, values, SettingsKernel())
        statistics = [point.statistics for point in scored if point.statistics is not None]
        return MomentProcess(rows, statistics, values, self.target, 0.0, SettingsKernel())

    def result(self, reason: str) -> SamplerSearch:
        """The search as it stands."""
        given, best = self.points[0], self.lowest
        if _value(given) - _value(best) <= 2 * self.surrogate().noise:
            best = given
        ends = [
            f"the best {name} is an end of its range, {value:g}: the optimum may lie beyond"
            for name, numbers in self.space.tunable.items()
            if isinstance(numbers, Range)
            and (value := getattr(best.settings, name)) in (numbers.low, numbers.high)
            and value != getattr(given.settings, name)
        ]
        return SamplerSearch(evaluations=tuple(self.points), given=given, best=best, reason="; ".join([reason, *ends]))
