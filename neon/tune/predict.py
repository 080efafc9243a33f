"""The w of the lowest Frechet distance, predicted from a few hundred images at each of a few w.

Image i, sampled from the same noise and as the same class, changes smoothly with the weights, and so do mean and
covariance of the features of N such images. They are measured at K values of w, the nodes; at any other w each of their
elements is that of the polynomial through the nodes. If features are linear in w the mean is so too and the covariance
a parabola, which three nodes give exactly.

The distance itself is no parabola, as it has the root of a covariance in it; it is computed from the interpolated
moments. All nodes see the same noise, so few images move the whole curve up and down far more than along w. What they
add to the distance depends on w, though, and is taken off as far as it falls as 1 / N: that needs twice as many images
as features (of 2,048 features 300 images predict a w far too low, with small errors).

Standard errors are those of the images. What interpolation in w adds is not in them: nothing measured tells it.

Letters: K nodes, N images, F features.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from neon.errors import DegenerateError, RequestError
from neon.metrics import MomentTarget, Statistics

Sign = Literal["w > 0", "w < 0", "undecided"]

NODES = (-0.5, 0.0, 0.5)
"""near enough for a polynomial, and far enough for its rounding noise to stay small; no evaluation beyond w = 0.5"""
RANGE = (-1.0, 2.0)
"""of w in which the lowest point is looked for"""
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
    """What a curve of predicted distances says."""

    slope: Estimate
    """of the distance in w, at w = 0"""
    w: Estimate
    """where the distance is lowest; an end of `RANGE` if it falls until there"""
    gain: Estimate
    """the distance at w = 0 less the lowest; never below 0, so it says something only beyond a few standard errors"""
    curve: dict[float, float]
    """the distance at each w, as of many images: less the bias that distances of few images have"""

    @property
    def sign(self) -> Sign:
        """The sign of the best w, as far as the slope tells."""
        return sign_of(self.slope)


def interpolation(nodes: Sequence[float], w: float) -> Tensor:
    """The factors [K] of values at `nodes` in the polynomial through them at `w` (Lagrange), float64."""
    factors = [math.prod((w - other) / (node - other) for other in nodes if other != node) for node in nodes]
    return torch.tensor(factors, dtype=torch.float64)


def predict(features: Tensor, reference: Statistics, nodes: Sequence[float] = NODES) -> Prediction:
    """The prediction from features [K, N, F] of the same N images at the w of `nodes`.

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
    steps = range(round(RANGE[0] / _STEP), round(RANGE[1] / _STEP) + 1)
    ws = [step * _STEP for step in steps]
    distance_of = distances_along(reference, nodes, ws)
    whole, without = leave_out(lambda rows: distance_of(features[:, rows].double()), count)
    # Distances of few images are too high, and the more so the more images vary, which moves the lowest point: with 300
    # images of 256 features from w = 0.78 to 0.66. The part of the bias that falls as 1 / N is told by the groups.
    bias = (GROUPS - 1) * (without.mean(0) - whole)
    curve, curves = whole - bias, without - bias * GROUPS / (GROUPS - 1)
    at_0 = ws.index(0.0)

    def found(curve: Tensor) -> Tensor:
        """Slope, w and gain."""
        w, lowest = lowest_point(ws, curve)
        slope = (curve[at_0 + 1] - curve[at_0 - 1]) / (2 * _STEP)
        return torch.stack([slope, w, curve[at_0] - lowest])

    values, errors = found(curve), standard_error(torch.stack([found(one) for one in curves]))
    slope, w, gain = (
        Estimate(value=value, error=error) for value, error in zip(values.tolist(), errors.tolist(), strict=True)
    )
    return Prediction(slope=slope, w=w, gain=gain, curve=dict(zip(ws, curve.tolist(), strict=True)))


def distances_along(reference: Statistics, nodes: Sequence[float], ws: Sequence[float]) -> Callable[[Tensor], Tensor]:
    """The function from features [K, N, F] at `nodes` to Frechet distances [len(ws)]."""
    target = MomentTarget(reference)
    factors = torch.stack([interpolation(nodes, w) for w in ws]).numpy()

    def distances(features: Tensor) -> Tensor:
        moments = target.moments([Statistics.from_features(at_node) for at_node in features])
        return torch.from_numpy(target.distances(moments, factors))

    return distances


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
