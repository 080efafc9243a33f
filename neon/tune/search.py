"""Choosing w, the guidance scale and the training budget with few evaluations.

A value (a Fréchet distance, lower is better) has one minimum in w, is close to a parabola around it and rises
steeply beyond; the best guidance rises with w; snapshots of one self-training share a direction, so that they
differ mostly in how far along it a given w goes. `search` fits a model that knows this (neon.tune.surrogate) to the
points evaluated so far and evaluates where it promises most. Nothing here samples, scores or reads a file.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar

import numpy as np

from neon.errors import RequestError, WorkError
from neon.metrics import FrechetReference, MomentTarget, Statistics
from neon.tune.surrogate import Array, MomentProcess, Quadratic, Surrogate, UpdateKernel

# How the search walks. The first step in w has half the length of the self-training's update; values often explode
# beyond twice that update, so it never walks much further than it has been: by half with values alone, which say
# little of what lies beyond. Two points of one snapshot are at least `_CLOSEST` apart (w relative to 1 + |w|, guidance
# relative to its range): nearer teaches nothing.
_STEP = 0.5
_REACH, _REACH_OF_MOMENTS = 1.5, 2.5
_CLOSEST = 0.03
# Where the base is tried first, in parts of the range of guidance (its best is low, since w raises it), and by how
# much of its range guidance rises for the second step in w.
_BASE_GUIDANCE = (0.25, 0.6)
_GUIDANCE_SHIFT = 0.25
# Features that the search follows one by one; what others add to the distance is interpolated as a number.
MOST_FEATURES = 64

_CURVE_POINTS = 61


At = TypeVar("At")


class EvaluationFailed(Exception):  # noqa: N818 - an outcome of an evaluation, not a fault of the program
    """Raised by `evaluate` for a point without a value: NaN weights, collapsed images. The search goes on."""


class EvaluationOutcome(NamedTuple):
    """What came of one evaluation."""

    value: float | None
    """None: it failed"""
    note: str = ""
    """why it failed"""
    statistics: Statistics | None = None
    """of the features behind the value, where the search was given them"""


def outcome(
    evaluate: Callable[[At], float | Statistics], at: At, reference: FrechetReference | None
) -> EvaluationOutcome:
    """Evaluate `at`: a value, or statistics whose value is the distance to `reference`; one not finite is a failure."""
    try:
        result = evaluate(at)
    except EvaluationFailed as failure:
        return EvaluationOutcome(None, str(failure))
    if isinstance(result, Statistics):
        assert reference is not None, "statistics have no value without a reference"
        return EvaluationOutcome(reference.distance(result), statistics=result)
    value = float(result)
    return EvaluationOutcome(value) if math.isfinite(value) else EvaluationOutcome(None, f"the value is {value}")


class Point(NamedTuple):
    """What one evaluation is of. The base is spelled (0, guidance, 0): no snapshot enters it."""

    w: float
    guidance: float | None = None
    """the scale in the sampler's settings; None: the sampler has none, or it is not searched"""
    snapshot: int = 0
    """which of the self-trained weights, in ascending order of budget"""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """A point and its value; None if the evaluation failed, with the reason in `note`."""

    point: Point
    value: float | None
    note: str = ""
    statistics: Statistics | None = field(default=None, repr=False, compare=False)
    """of the features behind the value, where the search was given them"""


@dataclass(frozen=True, kw_only=True)
class Search:
    """What was evaluated, in order, and what it says."""

    evaluations: tuple[Evaluation, ...]
    best: Evaluation
    """the lowest value; the base unless that is beaten by more than twice the noise"""
    base: Evaluation
    """w = 0 at its own best guidance, so that no gain of guidance alone is credited to w"""
    reason: str
    """why the search stopped, and which ranges the best point ends at"""
    space: "_Space" = field(repr=False, compare=False)
    model: Surrogate | None = field(repr=False, compare=False)

    @property
    def gain(self) -> float:
        """How much lower the best value is than the base's."""
        return _value(self.base) - _value(self.best)

    def fitted(self, w: float, guidance: float | None = None, snapshot: int | None = None) -> float | None:
        """The value expected by the model, along the best point's guidance and snapshot unless others are given.

        None where the model does not hold (far above the minimum), and throughout if fewer than three points have
        values.
        """
        if self.model is None or sum(evaluation.value is not None for evaluation in self.evaluations) < 3:
            return None
        best = self.best.point
        guidance = best.guidance if guidance is None else guidance
        point = Point(w, guidance, best.snapshot if snapshot is None else snapshot)
        value = float(self.model.values(self.space.coordinates([point]))[0])
        return None if math.isnan(value) else value

    def curve(self, guidance: float | None = None, snapshot: int | None = None) -> tuple[tuple[float, float], ...]:
        """Points (w, value) of `fitted` between the lowest and the highest w evaluated, where it holds."""
        ends = [evaluation.point.w for evaluation in self.evaluations]
        ws = np.linspace(min(ends), max(ends), _CURVE_POINTS).tolist()
        return tuple((w, value) for w in ws if (value := self.fitted(w, guidance, snapshot)) is not None)


def search(
    evaluate: Callable[[Point], float | Statistics],
    *,
    w: tuple[float, float],
    guidance: tuple[float, float] | None = None,
    snapshots: Sequence[float] = (1.0,),
    reference: FrechetReference | None = None,
    tolerance: float = 0.01,
    noise: float = 0.0,
    limit: int = 12,
) -> Search:
    """Minimise `evaluate` over w, guidance and snapshots; deterministic given the values.

    The base comes first, at up to four scales of guidance; then w at the middle snapshot, with guidance; then, if
    that gained, each other snapshot where its update is as long; then wherever the model promises a gain.

    Args:
        evaluate: the value of a point, lower is better, or with `reference` the statistics of its features; raises
            EvaluationFailed if it has none (as does a value that is not finite).
        w: lowest and highest w; widened to contain 0, which is always evaluated.
        guidance: lowest and highest scale; None if it is not searched.
        snapshots: length of each snapshot's update |theta_s - theta_r|, or its budget: the best w of another
            snapshot is near w times the ratio of lengths.
        reference: real features. The value of a point is the Frechet distance of its features to them, and the search
            needs fewer points, since it sees not only how far from the real features a point is, but where.
        tolerance: the search stops when it expects to gain less than this part of the best value ...
        noise: ... or than twice this, the standard deviation of the difference of two values. With `reference` the
            model estimates it, too, from how far features jump from point to point; the search also stops when it
            expects to gain less than that.
        limit: never evaluate more points than this.

    Raises:
        RequestError: an empty range, a length that is not positive, a limit below 1.
        WorkError: the base itself has no value.
    """
    space = _Space.of(w, guidance, snapshots)
    if limit < 1:
        raise RequestError(f"limit = {limit}: a search needs at least 1 evaluation")
    record = _Record(evaluate, space, noise, reference)
    steps = _Steps(record, tolerance)
    for point in steps.walk():
        if len(record.evaluations) == limit:
            return record.result(f"the limit of {limit} evaluations was reached")
        record.add(point)
    return record.result(f"no other point is expected to gain more than {steps.least_gain:.3g}")


def grid(
    evaluate: Callable[[Point], float],
    w: Sequence[float],
    guidance: Sequence[float | None] = (None,),
    snapshots: Sequence[float] = (1.0,),
    *,
    noise: float = 0.0,
) -> Search:
    """Evaluate every w at every guidance and snapshot, and the base once per guidance, whether `w` holds 0 or not.

    Arguments, results and errors as of `search`.
    """
    scales = [scale for scale in guidance if scale is not None]
    bounds = (min(scales), max(scales)) if len(set(scales)) > 1 else None
    space = _Space.of((min(w, default=0.0), max(w, default=0.0)), bounds, snapshots)
    record = _Record(evaluate, space, noise)
    points = [Point(0.0, scale) for scale in guidance]
    points += [Point(x, scale, i) for i in range(len(snapshots)) for x in w if x != 0 for scale in guidance]
    for point in dict.fromkeys(points):
        record.add(point)
    return record.result(f"the grid of {len(record.evaluations)} points was evaluated")


def _value(evaluation: Evaluation) -> float:
    """The value, infinite if the evaluation failed."""
    return math.inf if evaluation.value is None else evaluation.value


def _lowest(evaluations: Sequence[Evaluation]) -> Evaluation:
    """The lowest of evaluations that include the base.

    Raises:
        WorkError: all failed, hence the base did.
    """
    lowest = min(evaluations, key=_value)
    if lowest.value is None:
        raise WorkError(f"w = 0: the base itself could not be scored ({lowest.note}); mend that before choosing w")
    return lowest


@dataclass(frozen=True, kw_only=True)
class _Space:
    """The ranges searched, and the coordinates in which snapshots resemble each other."""

    w: tuple[float, float]
    guidance: tuple[float, float] | None
    lengths: tuple[float, ...]

    @classmethod
    def of(cls, w: tuple[float, float], guidance: tuple[float, float] | None, lengths: Sequence[float]) -> "_Space":
        """The space with 0 in the range of w."""
        for name, bounds in (("w", w), ("guidance", guidance)):
            if bounds and not (all(map(math.isfinite, bounds)) and bounds[0] <= bounds[1]):
                raise RequestError(f"{name}: {bounds[0]:g} to {bounds[1]:g} is no range; expected lowest, then highest")
        if guidance and guidance[0] == guidance[1]:
            raise RequestError(f"guidance: the range is the single value {guidance[0]:g}; fix it instead of searching")
        if not lengths or not all(0 < length < math.inf for length in lengths):
            raise RequestError(f"snapshots: expected the positive length of each update, found {list(lengths)}")
        return cls(
            w=(min(float(w[0]), 0.0), max(float(w[1]), 0.0)),
            guidance=guidance and (float(guidance[0]), float(guidance[1])),
            lengths=tuple(lengths),
        )

    @property
    def middle(self) -> int:
        """The snapshot searched first, so that w carries over to shorter and longer ones."""
        return len(self.lengths) // 2

    def length_ratio(self, snapshot: int) -> float:
        """How much longer the snapshot's update is than the middle one's."""
        return self.lengths[snapshot] / self.lengths[self.middle]

    def coordinates(self, points: Sequence[Point]) -> Array:
        """One row per point: displacement w |update| / |middle update|, guidance in parts of its range, and for
        each snapshot whether the point is of it (never so for the base and the middle)."""
        low, high = self.guidance or (0.0, 1.0)
        rows = np.zeros((len(points), 2 + len(self.lengths)))
        for row, (w, guidance, snapshot) in zip(rows, points, strict=True):
            row[0] = w * self.length_ratio(snapshot)
            row[1] = 0.0 if guidance is None or self.guidance is None else (guidance - low) / (high - low)
            row[2 + snapshot] = w != 0 and snapshot != self.middle
        return rows

    def guidances(self) -> list[float | None]:
        """Every guidance considered."""
        if self.guidance is None:
            return [None]
        return [*sorted({*self.guidance, *_round_numbers(*self.guidance, 20)})]

    def merge_weights(self, snapshot: int, low: float, high: float) -> list[float]:
        """Every w but 0 considered for displacements between `low` and `high`."""
        ratio = self.length_ratio(snapshot)
        low, high = max(self.w[0], low / ratio), min(self.w[1], high / ratio)
        ends = {end for end in self.w if low <= end <= high}
        return sorted({*ends, *_round_numbers(low, high, 60)} - {0.0})


def _round_numbers(low: float, high: float, steps: int) -> list[float]:
    """The multiples of 1, 2 or 5 times a power of ten from low to high that make at least so many steps."""
    if low >= high:
        return []
    largest = (high - low) * (1 + 1e-9) / steps
    power = 10.0 ** math.floor(math.log10(largest))
    step = max(step for step in (power, 2 * power, 5 * power) if step <= largest)
    between = np.arange(math.ceil(low / step), math.floor(high / step) + 1) * step
    return [float(number) for number in np.round(between, 9)]


class _Record:
    """The evaluations made so far."""

    def __init__(
        self,
        evaluate: Callable[[Point], float | Statistics],
        space: _Space,
        noise: float,
        reference: FrechetReference | None = None,
    ) -> None:
        self.evaluate, self.space, self.noise, self.reference = evaluate, space, noise, reference
        self.target = None if reference is None else MomentTarget(reference.statistics, MOST_FEATURES)
        self.evaluations: list[Evaluation] = []

    def add(self, point: Point) -> None:
        """Evaluate a point; a value that is not finite is a failure."""
        self.evaluations.append(Evaluation(point=point, **outcome(self.evaluate, point, self.reference)._asdict()))

    @property
    def base(self) -> Evaluation:
        """w = 0 at its best guidance so far."""
        return _lowest([evaluation for evaluation in self.evaluations if evaluation.point.w == 0])

    @property
    def lowest(self) -> Evaluation:
        """The lowest value so far."""
        return _lowest(self.evaluations)

    def surrogate(self) -> Surrogate:
        """The fit to all evaluations, of which the base's has a value."""
        if self.target is None:
            rows = self.space.coordinates([evaluation.point for evaluation in self.evaluations])
            values = np.array([_value(evaluation) for evaluation in self.evaluations])
            return Quadratic(rows, values, _value(self.base), self.noise)
        scored = [evaluation for evaluation in self.evaluations if evaluation.value is not None]
        rows = self.space.coordinates([evaluation.point for evaluation in scored])
        statistics = [evaluation.statistics for evaluation in scored if evaluation.statistics is not None]
        values = np.array([_value(evaluation) for evaluation in scored])
        return MomentProcess(rows, statistics, values, self.target, self.noise, UpdateKernel())

    def result(self, reason: str) -> Search:
        """The search as it stands; the base wins unless it is beaten by more than twice the noise."""
        base, best = self.base, self.lowest
        model = self.surrogate() if len(self.evaluations) > 1 else None
        if _value(base) - _value(best) <= 2 * (self.noise if model is None else model.noise):
            best = base
        edges = [
            f"the best {name} is the edge of its range, {at:g}: the optimum may lie beyond"
            for name, at, bounds in (
                ("w", best.point.w, self.space.w),
                ("guidance", best.point.guidance, self.space.guidance),
            )
            if bounds and at in bounds and (name, at) != ("w", 0.0)
        ]
        return Search(
            evaluations=tuple(self.evaluations),
            best=best,
            base=base,
            reason="; ".join([reason, *edges]),
            space=self.space,
            model=model,
        )


class _Steps:
    """The order in which points are evaluated: each step looks at the record of those before it."""

    def __init__(self, record: _Record, tolerance: float) -> None:
        self.record, self.space, self.tolerance = record, record.space, tolerance
        self.least_gain = 0.0
        """that was worth an evaluation at the last step"""

    def walk(self) -> Iterator[Point]:
        """Every point worth evaluating, the most telling first."""
        yield from self.base()
        yield from self.bracket(self.record.base.point.guidance)
        middle = self.space.middle
        yield from self.descend([middle])
        others = [snapshot for snapshot in range(len(self.space.lengths)) if snapshot != middle]
        for snapshot in others:
            w, guidance, best = self.record.lowest.point
            if w != 0:
                w *= self.space.lengths[best] / self.space.lengths[snapshot]
                yield Point(round(min(max(w, self.space.w[0]), self.space.w[1]), 3), guidance, snapshot)
        if others:
            yield from self.descend([middle, *others])

    def base(self) -> Iterator[Point]:
        """w = 0, where guidance is best: two scales, a third beyond the better one, and the vertex."""
        if self.space.guidance is None:
            yield Point(0.0)
            return
        low, high = self.space.guidance
        left, right = (self.nearest_guidance(low + part * (high - low)) for part in _BASE_GUIDANCE)
        yield Point(0.0, left)
        yield Point(0.0, right)
        if self.record.target is None:
            first, second = map(_value, self.record.evaluations)
            yield Point(0.0, low if first <= second else high)
        vertex = self.most_promising([Point(0.0, scale) for scale in self.space.guidances()])
        if vertex:
            yield vertex

    def bracket(self, guidance: float | None) -> Iterator[Point]:
        """A step in w. With values alone a second one, too: onwards if the first one gains; else with more guidance,
        or to the other side, or back."""
        low, high = self.space.w
        middle = self.space.middle
        first = min(_STEP, high) or max(-_STEP, low)
        if first == 0:
            return
        yield Point(first, guidance, middle)
        if self.record.target is not None:
            return
        further = min(max(2 * first, low), high)
        other_side = max(-_STEP, low) if first > 0 else 0.0
        if self.record.lowest.point.w == first and further != first:
            yield Point(further, self.shifted_guidance(guidance, further), middle)
        elif self.record.lowest.point.w == first:
            yield Point(first / 2, guidance, middle)
        elif guidance is not None:
            yield Point(first, self.shifted_guidance(guidance, first), middle)
        else:
            yield Point(other_side or first / 2, guidance, middle)

    def descend(self, snapshots: Sequence[int]) -> Iterator[Point]:
        """The most promising point of these snapshots, as long as there is one."""
        while True:
            low, high = self.displacements()
            point = self.most_promising(
                [
                    Point(w, scale, snapshot)
                    for snapshot in snapshots
                    for w in self.space.merge_weights(snapshot, low, high)
                    for scale in self.space.guidances()
                ]
            )
            if point is None:
                return
            yield point

    def most_promising(self, candidates: Sequence[Point]) -> Point | None:
        """The candidate that may gain most; None if that is too little, or too close to what was evaluated."""
        evaluated = self.space.coordinates([evaluation.point for evaluation in self.record.evaluations])
        rows = self.space.coordinates(candidates)
        fresh = np.ones(len(rows), bool)
        for row in evaluated:
            away = np.hypot((rows[:, 0] - row[0]) / (1 + abs(row[0])), rows[:, 1] - row[1])
            fresh &= (away > _CLOSEST) | ((rows[:, 2:] != row[2:]).any(axis=1) & (row[0] != 0))
        if not fresh.any():
            return None
        model = self.record.surrogate()
        promise = model.promise(rows[fresh])
        self.least_gain = max(self.tolerance * abs(_value(self.record.lowest)), 2 * self.record.noise, model.noise)
        return candidates[np.flatnonzero(fresh)[promise.argmax()]] if promise.max() > self.least_gain else None

    def displacements(self) -> tuple[float, float]:
        """Lowest and highest one within reach of those that have values, and short of those that failed."""
        evaluations = self.record.evaluations
        at = self.space.coordinates([evaluation.point for evaluation in evaluations])[:, 0]
        failed = np.array([evaluation.value is None for evaluation in evaluations])
        low = min(at[~failed].min(), 0.0) - _STEP
        high = max((_REACH if self.record.target is None else _REACH_OF_MOMENTS) * at[~failed].max(), _STEP)
        hair = 1e-6
        return (
            float(max([low, *(at[failed & (at < 0)] + hair)])),
            float(min([high, *(at[failed & (at > 0)] - hair)])),
        )

    def nearest_guidance(self, guidance: float) -> float | None:
        """The considered guidance nearest to a given one."""
        return min(self.space.guidances(), key=lambda scale: abs((scale or 0.0) - guidance))

    def shifted_guidance(self, guidance: float | None, w: float) -> float | None:
        """Guidance moved the way its best moves with w: up for w > 0."""
        if guidance is None or self.space.guidance is None:
            return None
        low, high = self.space.guidance
        return self.nearest_guidance(guidance + math.copysign(_GUIDANCE_SHIFT * (high - low), w))
