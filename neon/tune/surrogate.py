"""What values are expected where nothing has been evaluated: the models behind `search` and `search_sampler`.

They are fitted to points given as rows. Those of a search of w are [n, 2 + S]: the displacement along the update (in
units of the middle snapshot's), guidance in parts of its range, and for each of S snapshots whether the point is of it
(never so for the base and the middle one). Those of a search of settings: `neon.tune.sampler`.

`Quadratic` knows values only, and so does `ValueProcess`, of a sampler's settings. `MomentProcess` knows what a Frechet
distance is made of, too: where each point's features lie. It interpolates those and computes the distance of the
interpolation, as Gauss and Newton did with a sum of squares: two points along a line tell where on it the real features
are nearest, a parabola needs three.
"""

import itertools
import math
from collections.abc import Sequence
from typing import ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

from neon.metrics import MomentTarget, Statistics

Array = NDArray[np.float64]

# Priors: round numbers, set by hand while the search was designed on the small EDM and VAR of benchmarks/tune.py; xAR
# and IMM held them out. None is critical. Each a factor of 3 lower or higher, on the functions of tests/test_tune.py:
# Quadratic (w; w, guidance and snapshots): mean excess over a fine grid 0.30-0.80% instead of 0.32%, 5.5-7.2 points
# instead of 6.1. MomentProcess (w, guidance and snapshots): mean excess from 0.3% less to 1.7% more, 7.4-9.3 points
# instead of 8.5.

# Quadratic. Standard deviations and a mean of its coefficients, in units of the largest excess over the best value.
_COEFFICIENT = 10.0
"""standard deviation of a coefficient: ten times any excess seen, so that data decide"""
_TILT, _TILT_SPREAD = -1.0, 2.0
"""mean and deviation of the product displacement x guidance: below 0, as the best guidance rises with w"""
_SNAPSHOT = 1.0
"""deviation of what a snapshot adds to slope and curvature: about the excess itself, as all share one direction"""
_MISFIT = 0.25
"""relative error of an excess: distances are a parabola near the minimum only, and further up within a quarter"""
_OPTIMISM = 0.5
"""standard deviations below its mean that a point may promise: more spends evaluations, less stops early"""

# MomentProcess. Parts of the kernel, relative to how fast features move along the update. Of each list the likelihood
# of the features chooses one; neighbours are a factor of 3 apart, which the prior counts as one unit of log likelihood.
_CURVATURE = (0.1, 0.3, 1.0)
"""how much features curve along displacement and guidance"""
_STRAY = (0.05, 0.15, 0.5)
"""how far they stray from a quadratic"""
_OWN = (0.1, 0.3)
"""how much of a snapshot's movement is its own"""
_NOISE = (0.003, 0.01, 0.03, 0.1)
"""standard deviation from point to point; points share their images, hence so small"""
_USUAL = (0.3, 0.15, 0.3, 0.01)
"""the most likely of each list before anything is seen: a moderate curve with little noise"""
_STRAY_LENGTH = (1.0, 0.5)
"""over which straying changes: the length of the update, and half the range of guidance"""
_LEVEL = 10.0
"""standard deviation of a level common to all points: wide, as nothing is known of where features lie"""
_EXPLORE = 2.0
"""times the variance of its features that a point may lie below its mean, at most by the mean"""

# The same of a sampler's settings, each in parts of its range: set on the small EDM and VAR from four starts each.
_SETTINGS_CURVATURE = (0.3, 1.0, 3.0)
"""more than along the update: a range is wide"""
_SETTINGS_USUAL = (1.0, 0.15, 0.01)
"""of curvature, straying and noise"""
_SETTINGS_LENGTH = 0.3
"""over which straying changes"""
_SETTINGS_EXPLORE = 1.0
"""less than along the update: in three to five dimensions most of the space is unknown for long"""


class Surrogate(Protocol):
    """A model of the value at points given as rows."""

    noise: float
    """standard deviation of the difference of two values, as far as the model cannot follow it"""

    def values(self, rows: Array) -> Array:
        """Expected values [n]; NaN where the model does not hold."""

    def promise(self, rows: Array) -> Array:
        """How far below the lowest value each row may lie [n]."""


class Quadratic:
    """The quadratic in (displacement, guidance) that fits the values, with the uncertainty of its coefficients.

    Each snapshot but the middle one adds its own slope and curvature along the displacement, nothing at w = 0,
    where all are the base. Bayesian linear regression with a normal prior (Rasmussen and Williams 2006, eq. 2.8)
    on the excess over the best value. An excess beyond the range that matters (three times the gain, or the best
    value itself) enters by its logarithm, and a failed point as the worst one seen, so that a wall says
    "not here" without bending the fit where it counts.

    Args:
        rows: the points.
        values: [n]; infinite where the evaluation failed.
        base: the value of the base.
        noise: standard deviation of the difference of two values.
    """

    def __init__(self, rows: Array, values: Array, base: float, noise: float) -> None:
        self.noise = noise
        self.best = float(values.min())
        self.lowest = rows[[values.argmin()]]
        self.range = max(3 * (base - self.best), abs(self.best)) or 1.0
        excess = values - self.best
        worst = max(excess[np.isfinite(excess)].max(), 2 * self.range)
        excess = np.where(np.isfinite(excess), excess, worst)
        excess = np.where(excess > self.range, self.range * (1 + np.log(np.maximum(excess / self.range, 1.0))), excess)
        self.unit = float(np.abs(rows[:, 0]).max()) or 1.0
        least = max(noise, 0.01 * abs(self.best), 1e-6 * self.range)
        scale = max(excess.max(), least)
        snapshots = rows.shape[1] - 2
        prior_deviation = np.array([_COEFFICIENT] * 5 + [_TILT_SPREAD] + [_SNAPSHOT] * 2 * snapshots) * scale
        prior_mean = np.array([0.0] * 5 + [_TILT] + [0.0] * 2 * snapshots) * scale
        error = least + _MISFIT * excess * np.maximum(excess / self.range, 1.0)
        design = self._terms(rows) / error[:, None]
        self.covariance = np.linalg.inv(design.T @ design + np.diag(prior_deviation**-2))
        self.coefficients = prior_mean + self.covariance @ design.T @ (excess / error - design @ prior_mean)

    def _terms(self, rows: Array) -> Array:
        """The monomials that the coefficients belong to, [n, 6 + 2 S]."""
        v, h, of_snapshot = rows[:, :1] / self.unit, rows[:, 1:2], rows[:, 2:]
        return np.hstack([np.ones_like(v), v, v * v, h, h * h, v * h, v * of_snapshot, v * v * of_snapshot])

    def values(self, rows: Array) -> Array:
        """Expected values, NaN beyond the range in which values were fitted as they are."""
        excess = self._terms(rows) @ self.coefficients
        return np.where(excess <= self.range, self.best + excess, np.nan)

    def promise(self, rows: Array) -> Array:
        """Expected gain over the lowest point, and a part of the standard deviation of that difference."""
        difference = self._terms(self.lowest) - self._terms(rows)
        variance = np.einsum("ni,ij,nj->n", difference, self.covariance, difference)
        return difference @ self.coefficients + _OPTIMISM * np.sqrt(variance)


class Kernel(Protocol):
    """How much the features of two points have in common, in units of how fast features move."""

    choices: ClassVar[Sequence[tuple[float, ...]]]
    """hyperparameters that the likelihood chooses among; the last is the noise, a deviation from point to point"""
    usual: ClassVar[tuple[float, ...]]
    """the most likely ones before anything is seen"""
    explore: ClassVar[float]
    """how far below its mean a point may lie: times the variance of its features, or the deviation of its value"""

    def between(self, a: Array, b: Array, chosen: tuple[float, ...]) -> Array:
        """Covariances [n, m] of rows a [n, ...] and b [m, ...], without noise."""

    def alone(self, rows: Array, chosen: tuple[float, ...]) -> Array:
        """Variances [n], the diagonal of `between` of the rows among each other."""


class UpdateKernel:
    """For points of a search of w: a quadratic in displacement and guidance, a smooth departure from it, and what
    each snapshot adds."""

    choices: ClassVar[Sequence[tuple[float, ...]]] = tuple(itertools.product(_CURVATURE, _STRAY, _OWN, _NOISE))
    usual: ClassVar[tuple[float, ...]] = _USUAL
    explore: ClassVar[float] = _EXPLORE

    def between(self, a: Array, b: Array, chosen: tuple[float, ...]) -> Array:
        curvature, stray, own, _ = chosen
        along = np.outer(a[:, 0], b[:, 0])
        linear = along + np.outer(a[:, 1], b[:, 1])
        away = np.subtract.outer(a[:, 0], b[:, 0]) / _STRAY_LENGTH[0], np.subtract.outer(a[:, 1], b[:, 1])
        smooth = np.exp(-0.5 * (away[0] ** 2 + (away[1] / _STRAY_LENGTH[1]) ** 2))
        of_snapshot = (a[:, 2:] @ b[:, 2:].T) * own**2 * (along + curvature**2 * along**2)
        return np.asarray(_LEVEL**2 + linear + curvature**2 * linear**2 + stray**2 * smooth + of_snapshot)

    def alone(self, rows: Array, chosen: tuple[float, ...]) -> Array:
        curvature, stray, own, _ = chosen
        along = rows[:, 0] ** 2
        linear = along + rows[:, 1] ** 2
        of_snapshot = rows[:, 2:].sum(axis=1) * own**2 * (along + curvature**2 * along**2)
        return np.asarray(_LEVEL**2 + linear + curvature**2 * linear**2 + stray**2 + of_snapshot)


class SettingsKernel:
    """For points of a search of a sampler's settings, as differences from the given ones in parts of their ranges: a
    quadratic, and a smooth departure from it."""

    choices: ClassVar[Sequence[tuple[float, ...]]] = tuple(itertools.product(_SETTINGS_CURVATURE, _STRAY, _NOISE))
    usual: ClassVar[tuple[float, ...]] = _SETTINGS_USUAL
    explore: ClassVar[float] = _SETTINGS_EXPLORE

    def between(self, a: Array, b: Array, chosen: tuple[float, ...]) -> Array:
        curvature, stray, _ = chosen
        linear = a @ b.T
        smooth = np.exp(-0.5 * np.square((a[:, None] - b[None]) / _SETTINGS_LENGTH).sum(axis=-1))
        return np.asarray(_LEVEL**2 + linear + curvature**2 * linear**2 + stray**2 * smooth)

    def alone(self, rows: Array, chosen: tuple[float, ...]) -> Array:
        curvature, stray, _ = chosen
        linear = np.square(rows).sum(axis=1)
        return np.asarray(_LEVEL**2 + linear + curvature**2 * linear**2 + stray**2)


class _Process:
    """A Gaussian process of several outputs that share one kernel (Rasmussen and Williams 2006, ch. 2).

    The likelihood of all outputs together chooses the hyperparameters. So a prediction is one combination of what was
    evaluated, with the same weights for every output.

    Args:
        rows: the points.
        outputs: [n, k].
    """

    def __init__(self, kernel: Kernel, rows: Array, outputs: Array) -> None:
        self.kernel, self.rows = kernel, rows
        centred = outputs - outputs.mean(axis=0)
        self.chosen = max(kernel.choices, key=lambda chosen: self._likelihood(chosen, centred))
        self.inverse = np.linalg.inv(self._noisy(self.chosen))
        self.scale = float((centred * (self.inverse @ centred)).sum()) / len(rows)

    def _noisy(self, chosen: tuple[float, ...]) -> Array:
        return self.kernel.between(self.rows, self.rows, chosen) + chosen[-1] ** 2 * np.eye(len(self.rows))

    def _likelihood(self, chosen: tuple[float, ...], centred: Array) -> float:
        """Log likelihood of the outputs at the scale that fits best, per output and times two, and a weak prior."""
        covariance = self._noisy(chosen)
        scale = (centred * np.linalg.solve(covariance, centred)).sum() / len(centred) + 1e-300
        steps = sum(math.log(one / usual, 3) ** 2 for one, usual in zip(chosen, self.kernel.usual, strict=True))
        return float(-len(centred) * np.log(scale) - np.linalg.slogdet(covariance)[1] - steps)

    def weights(self, rows: Array) -> tuple[Array, Array]:
        """How much of each evaluated point is in each row [m, n], and the variance of the row, summed over outputs."""
        across = self.kernel.between(rows, self.rows, self.chosen)
        weights = across @ self.inverse
        alone = self.kernel.alone(rows, self.chosen)
        return weights, self.scale * np.maximum(alone - (weights * across).sum(axis=1), 0)


class MomentProcess:
    """A Gaussian process of the features' mean and covariance; the value is the Frechet distance of its mean.

    The part of the value that the followed features do not explain is combined as they are.

    Args:
        rows: the points, of evaluations that did not fail.
        statistics: of the features of each.
        values: Frechet distances to the real features [n], computed from all features.
        target: the real features.
        noise: least standard deviation of the difference of two values; that from the model counts if it is larger.
        kernel: how much the features of two points have in common.
    """

    def __init__(
        self,
        rows: Array,
        statistics: Sequence[Statistics],
        values: Array,
        target: MomentTarget,
        noise: float,
        kernel: Kernel,
    ) -> None:
        self.target = target
        self.best = float(values.min())
        self.moments = target.moments(statistics)
        self.process = _Process(kernel, rows, self.moments.mean)
        self.unexplained = values - target.distances(self.moments, np.eye(len(rows)))
        # A squared length L moves by 2 sqrt(L) times what the vector moves along itself, here its share of all noise.
        along = self.process.scale * self.process.chosen[-1] ** 2 / self.moments.mean.shape[1]
        self.noise = max(noise, math.sqrt(2 * 4 * self.best * along))

    def _distances(self, weights: Array) -> Array:
        return self.target.distances(self.moments, weights) + weights @ self.unexplained

    def values(self, rows: Array) -> Array:
        """Expected values."""
        return self._distances(self.process.weights(rows)[0])

    def promise(self, rows: Array) -> Array:
        """Gain over the lowest value, if the real features lie where the uncertain ones turn out to be."""
        weights, variance = self.process.weights(rows)
        expected = self._distances(weights)
        return self.best - expected + self.process.kernel.explore * np.minimum(variance, np.abs(expected))


class ValueProcess:
    """A Gaussian process of the logarithm of how far values lie above the lowest, for points without moments.

    In units of that value: the logarithm of their ratio, which also holds for negative ones.

    Args:
        rows: the points, of evaluations that did not fail.
        values: [n].
        kernel: how much two points have in common.
    """

    def __init__(self, rows: Array, values: Array, kernel: Kernel) -> None:
        self.best = float(values.min())
        self.unit = abs(self.best) or float(np.ptp(values)) or 1.0
        self.logarithms = np.log1p((values - self.best) / self.unit)
        self.process = _Process(kernel, rows, self.logarithms[:, None])
        self.noise = self.unit * math.sqrt(2 * self.process.scale) * self.process.chosen[-1]

    def values(self, rows: Array) -> Array:
        """Expected values: medians, as logarithms are averaged."""
        return self.best - self._gain(self.process.weights(rows)[0] @ self.logarithms)

    def promise(self, rows: Array) -> Array:
        """Gain over the lowest value at a standard deviation below the expected logarithm, times `explore`."""
        weights, variance = self.process.weights(rows)
        return self._gain(weights @ self.logarithms - self.process.kernel.explore * np.sqrt(variance))

    def _gain(self, logarithms: Array) -> Array:
        return np.asarray(-self.unit * np.expm1(logarithms))
