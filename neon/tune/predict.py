"""The w of the lowest Frechet distance, predicted from a few hundred images at each of four w.

Image i, sampled from the same noise and as the same class, changes smoothly with the weights, and so do mean and
variances of the features of N such images. They are measured at K values of w, the nodes; at any other w each of them
is that of the polynomial through the nodes, and the distance is computed from these (`neon.metrics.DirectionTarget`,
which also takes off what few images add to it, with more features than images, too). It is no parabola itself, as it
has the roots of variances in it.

Three nodes tell on which side the lowest distance is, the fourth lies there. All nodes see the same noise, so few
images move the whole curve up and down far more than along w.

The interval of w is where the slope of the curve may be 0: it is within the noise of the images, told by leaving out
groups of them, and within what the last node changed in it, which is the error of an interpolation without that node
and so more than that of one with it.

Letters: K nodes, N images, F features, W values of w.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from neon.errors import DegenerateError, RequestError
from neon.metrics import DirectionTarget, Statistics

Sign = Literal["w > 0", "w < 0", "undecided"]

NODES = (-0.5, 0.0, 0.5)
"""near enough for a polynomial, and far enough for its rounding noise to stay small"""
RANGE = (-1.0, 2.0)
"""of w in which the lowest point is looked for, as far as the nodes reach"""
REACH = 0.5
"""beyond the outermost nodes, as far as a polynomial is trusted"""
_STEP = 0.125
"""between the w at which the curve is computed"""
GROUPS = 10
"""of images, each left out once to tell the noise"""
CERTAIN = 2.26
"""standard errors beyond which a sign is certain by 95%: Student's t of a spread over that many groups"""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A value and its standard error."""

    value: float
    error: float

    def __str__(self) -> str:
        return f"{self.value:.3g} +- {self.error:.2g}"


def sign_of(slope: Estimate) -> Sign:
    """The sign of w that lowers what has this slope at w = 0, if that is certain."""
    if abs(slope.value) <= CERTAIN * slope.error:
        return "undecided"
    return "w > 0" if slope.value < 0 else "w < 0"


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What a curve of predicted distances says; standard errors are those of the images."""

    nodes: tuple[float, ...]
    """the w at which images were sampled"""
    slope: Estimate
    """of the distance in w, at w = 0"""
    w: Estimate
    """where the distance is lowest; an end of `curve` if it falls until there"""
    interval: tuple[float, float]
    """of that w, 95%, images and interpolation; an end of `curve` stands for all that is beyond"""
    gain: Estimate
    """the distance at w = 0 less the lowest; never below 0, so it says something only beyond a few standard errors"""
    curve: dict[float, float]
    """the distance at each w, as of many images"""

    @property
    def sign(self) -> Sign:
        """The sign of the best w, as far as its interval tells."""
        low, high = self.interval
        return "w > 0" if low > 0 else "w < 0" if high < 0 else "undecided"

    def next_node(self) -> float:
        """Where one more node tells most, after `NODES`: beyond them, or between if the lowest distance surely is."""
        low, high = self.interval
        between = NODES[0] < low and high < NODES[-1]
        return math.copysign(0.25 if between else 1.0, self.w.value)


def interpolation(nodes: Sequence[float], w: float) -> Tensor:
    """The factors [K] of values at `nodes` in the polynomial through them at `w` (Lagrange), float64."""
    factors = [math.prod((w - other) / (node - other) for other in nodes if other != node) for node in nodes]
    return torch.tensor(factors, dtype=torch.float64)


def predict(features: Tensor, reference: Statistics, nodes: Sequence[float] = NODES) -> Prediction:
    """The prediction from features [K, N, F] of the same N images at the w of `nodes`, a fourth last if there is one.

    Args:
        reference: of real images, on the same features.

    Raises:
        RequestError: fewer images than two for each of the groups that are left out in turn.
        DegenerateError: a feature is not finite.
    """
    count = features.shape[1]
    if count < 2 * GROUPS:
        raise RequestError(f"{count} images say nothing of the noise; expected at least {2 * GROUPS}, better hundreds")
    if not features.isfinite().all():
        raise DegenerateError("some of the features are not finite; look at the weights and at the images")
    ws = within_reach(nodes)
    whole, without = leave_out(distances_along(reference, nodes, ws, features), count)
    curve, curves = whole[0], without[:, 0]
    slopes, slopes_without = (torch.gradient(x, spacing=_STEP, dim=-1)[0] for x in (whole, without))
    noise = standard_error(slopes_without[:, 0])
    # What the last node changed, as far as it is not noise itself.
    changed = (slopes[0] - slopes[1]).square() - standard_error(slopes_without[:, 0] - slopes_without[:, 1]).square()
    uncertain = ((CERTAIN * noise).square() + changed.clip(min=0)).sqrt()
    at_0 = ws.index(0.0)

    def found(curve: Tensor) -> Tensor:
        """w and gain."""
        w, lowest = lowest_point(ws, curve)
        return torch.stack([w, curve[at_0] - lowest])

    (w, gain), errors = found(curve).tolist(), standard_error(torch.stack([found(one) for one in curves])).tolist()
    return Prediction(
        nodes=tuple(nodes),
        slope=Estimate(value=float(slopes[0, at_0]), error=float(noise[at_0])),
        w=Estimate(value=w, error=errors[0]),
        interval=interval_around(w, ws, slopes[0], uncertain),
        gain=Estimate(value=gain, error=errors[1]),
        curve=dict(zip(ws, curve.tolist(), strict=True)),
    )


def within_reach(nodes: Sequence[float]) -> list[float]:
    """The w at which the curve is computed."""
    first, last = max(RANGE[0], min(nodes) - REACH), min(RANGE[1], max(nodes) + REACH)
    return [step * _STEP for step in range(math.ceil(first / _STEP), math.floor(last / _STEP) + 1)]


def distances_along(
    reference: Statistics, nodes: Sequence[float], ws: Sequence[float], features: Tensor
) -> Callable[[Tensor], Tensor]:
    """The function from indices of images to Frechet distances [2, W]: by all nodes, and without a fourth.

    `features` [K, N, F] are those of all images at `nodes`.
    """
    target = DirectionTarget(reference, features.numpy())
    both = []
    for used in (nodes, nodes[: len(NODES)]):
        factors = torch.zeros(len(ws), len(nodes), dtype=torch.float64)
        factors[:, : len(used)] = torch.stack([interpolation(used, w) for w in ws])
        both.append(factors.numpy())

    def distances(images: Tensor) -> Tensor:
        moments = target.moments(images.numpy())
        return torch.stack([torch.from_numpy(target.distances(moments, factors)) for factors in both])

    return distances


def interval_around(w: float, ws: Sequence[float], slopes: Tensor, uncertain: Tensor) -> tuple[float, float]:
    """From where a curve of these slopes [W] surely falls to where it surely rises; the ends of `ws` if nowhere."""
    after = next(i for i, at in enumerate(ws) if at >= w)
    before = after if ws[after] == w else after - 1
    low = _crossing(ws[after::-1], (slopes + uncertain)[: after + 1].flip(0))
    high = _crossing(ws[before:], (uncertain - slopes)[before:])
    return min(low, w), max(high, w)


def _crossing(ws: Sequence[float], values: Tensor) -> float:
    """Where values first fall below 0, between two of `ws`; the last of `ws` if they do not."""
    below = next((i for i, value in enumerate(values) if value < 0), len(ws))
    if below in (0, len(ws)):
        return ws[max(below - 1, 0)]
    first, second = float(values[below - 1]), float(values[below])
    return ws[below - 1] + first / (first - second) * (ws[below] - ws[below - 1])


def lowest_point(ws: Sequence[float], curve: Tensor) -> tuple[Tensor, Tensor]:
    """Where a curve at evenly spaced `ws` is lowest and how low, by the parabola through its three lowest points."""
    middle = int(curve.argmin())
    if middle in (0, len(ws) - 1):
        return curve.new_tensor(ws[middle]), curve[middle]
    below, at, above = curve[middle - 1 : middle + 2]
    slope, curvature = (above - below) / 2, above - 2 * at + below
    offset = -slope / curvature
    return ws[middle] + offset * (ws[1] - ws[0]), at + slope * offset / 2


def leave_out(find: Callable[[Tensor], Tensor], count: int) -> tuple[Tensor, Tensor]:
    """What `find` finds from `count` images, and from those without each of `GROUPS` groups of them [GROUPS, ...].

    `find` gets the indices of images. Groups are random, so that none is a class of images.
    """
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    groups = torch.arange(count) % GROUPS
    return find(order), torch.stack([find(order[groups != group]) for group in range(GROUPS)])


def standard_error(without: Tensor) -> Tensor:
    """The jackknife's of what was found without each group [GROUPS, ...]."""
    return without.std(0, correction=0) * math.sqrt(GROUPS - 1)


def jackknife(find: Callable[[Tensor], Tensor], count: int) -> tuple[Tensor, Tensor]:
    """What `find` finds from `count` images, and its standard error."""
    whole, without = leave_out(find, count)
    return whole, standard_error(without)
