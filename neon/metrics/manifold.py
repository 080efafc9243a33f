"""Precision, recall, density and coverage of generated against real features.

A set's manifold is the union of balls around its points, each reaching to the point's k-th nearest neighbour in
its own set (Kynkäänniemi et al. 2019 for precision and recall, Naeem et al. 2020 for density and coverage).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from neon.errors import DegenerateError, RequestError

# Rows of a distance matrix held at once, and the points that they are compared with at a time: memory is the rows times
# the number of points, and what of it is worked on stays in a cache of the processor.
BLOCK_ROWS = 128
BLOCK_POINTS = 4096
_MODERATE = 1e-250, 1e250
"""squared lengths that neither vanish nor overflow on their way to a distance"""


@dataclass(frozen=True, kw_only=True)
class ManifoldScores:
    """How generated features lie on the manifold of real ones, and the other way round."""

    precision: float
    """Share of generated points inside some real point's ball."""
    recall: float
    """Share of real points inside some generated point's ball."""
    density: float
    """Mean number of real balls a generated point is inside of, divided by k; may exceed 1."""
    coverage: float
    """Share of real points with a generated point inside their ball."""
    k: int
    """Which nearest neighbour gives the radius."""
    num_real: int
    """Number of real points."""
    num_generated: int
    """Number of generated points."""


class Manifold:
    """Real features and their radii, to compare several generated sets with.

    Distances are Euclidean, in float64, summed from squared differences and not from inner products: a pair of
    points then has the same distance wherever it is computed and identical points have distance 0, so "inside"
    (strictly nearer than the radius) is exact under ties. Most pairs are told apart by inner products, a matrix
    product, whose error is bounded; those of a point that this cannot tell are summed. N_real² + N_real N_generated +
    N_generated² pairs cost about 2 F FLOP and 5 ns each on one CPU thread.
    """

    @torch.no_grad()
    def __init__(self, real_features: Tensor, k: int) -> None:
        """Find the radii of `real_features` [N, F], any float dtype, on their device; they are kept as they are.

        Raises:
            RequestError: not floats of shape [N, F], or k is not in 1..N-1.
            DegenerateError: a feature is not finite.
        """
        self.k = k
        self._real = _checked(real_features, "real", k)
        self._squares = _squares(self._real)
        self._radii = _radii(self._real, self._squares, k)

    @property
    def device(self) -> torch.device:
        """Where the real features are."""
        return self._real.device

    @torch.no_grad()
    def nearest(self, features: Tensor, count: int) -> Tensor:
        """The places of the real points nearest to each of `features` [N, F], nearest first: int64 [N, count or fewer].

        Raises:
            RequestError: not floats of as many features as the real ones.
            DegenerateError: a feature is not finite.
        """
        points = _checked(features, "given", None).to(self.device)
        self._check_fits(points)
        count = min(count, len(self._real))
        blocks = [_distances(rows, self._real).topk(count, largest=False).indices for rows in points.split(BLOCK_ROWS)]
        return torch.cat(blocks)

    @torch.no_grad()
    def compare(self, generated_features: Tensor) -> ManifoldScores:
        """Scores of `generated_features` [N, F]; raises what the constructor does, and for another F."""
        real, generated = self._real, _checked(generated_features, "generated", self.k).to(self.device)
        self._check_fits(generated)
        squares = _squares(generated)
        error = _error(real.shape[1], self._squares, squares)
        inside_real = torch.zeros((), dtype=torch.int64, device=real.device)  # generated points inside a real ball
        memberships = torch.zeros_like(inside_real)  # pairs (generated point, real ball it is inside of)
        recalled = torch.zeros(len(real), dtype=torch.bool, device=real.device)
        covered = torch.zeros_like(recalled)
        blocks = zip(
            generated.split(BLOCK_ROWS), _radii(generated, squares, self.k).split(BLOCK_ROWS), strict=True
        )  # fmt: skip
        for rows, radii in blocks:
            inside, holds = _nearer(rows, real, self._squares, (self._radii, radii[:, None]), error)  # [rows, N_real]
            inside_real += inside.any(1).sum()
            memberships += inside.sum()
            recalled |= holds.any(0)
            covered |= inside.any(0)
        return ManifoldScores(
            precision=int(inside_real) / len(generated),
            recall=int(recalled.sum()) / len(real),
            density=int(memberships) / (self.k * len(generated)),
            coverage=int(covered.sum()) / len(real),
            k=self.k,
            num_real=len(real),
            num_generated=len(generated),
        )

    def _check_fits(self, points: Tensor) -> None:
        if self._real.shape[1] != points.shape[1]:
            raise RequestError(
                f"real points have {self._real.shape[1]} features and generated ones {points.shape[1]}; "
                "use the same features on both sides"
            )


def _checked(features: Tensor, side: str, k: int | None) -> Tensor:
    """`features` [N, F], without gradients, if they can have a manifold with this k; None: they need not."""
    if features.ndim != 2 or not features.is_floating_point():
        found = f"{features.dtype} {list(features.shape)}"
        raise RequestError(f"{side} features must be floats of shape [N, F], found {found}")
    if k is not None and not 1 <= k < len(features):
        raise RequestError(f"k must be in 1..N-1, found k={k} with N={len(features)} {side} points")
    if not features.isfinite().all():
        raise DegenerateError(f"some of the {len(features)} {side} features are not finite")
    return features.detach()


def _squares(points: Tensor) -> Tensor:
    """The squared length of each point, float64 [N]."""
    return torch.cat([part.double().square().sum(1) for part in points.split(BLOCK_POINTS)])


def _error(dim: int, *squares: Tensor) -> float:
    """How far `_estimates` may lie from the squares of `_distances`; infinite where rounding has no such bound.

    With S the sum of the squared lengths of two points, and u half of eps: rounding moves each squared length and twice
    the inner product by at most F u S, joining them by 8 u S, and the square of a distance, which is at most 2 S, by
    2 (F + 4) u S. Twice that, S at its largest, leaves room for the rounding of what it is compared with.
    """
    largest = max(float(each.max()) for each in squares)
    if not _MODERATE[0] < largest < _MODERATE[1]:
        return math.inf
    return 4 * (dim + 4) * torch.finfo(torch.float64).eps * 2 * largest


def _estimates(rows: Tensor, points: Tensor, squares: Tensor) -> Tensor:
    """Squared distances of `rows` [R, F] to `points` by inner products, float64 [R, N]; `squares` are of `points`."""
    wide = rows.double()
    found = torch.empty(len(rows), len(points), dtype=torch.float64, device=points.device)
    parts = zip(*(each.split(BLOCK_POINTS) for each in (points, squares)), found.split(BLOCK_POINTS, 1), strict=True)
    for some, of_some, out in parts:
        torch.addmm(of_some, wide, some.double().T, alpha=-2, out=out)
    return found.add_(wide.square().sum(1, keepdim=True))


def _distances(rows: Tensor, points: Tensor) -> Tensor:
    """Distances of `rows` [..., R, F] to `points` [..., N, F], float64 [..., R, N]."""
    parts = [
        torch.cdist(rows.double(), part.double(), compute_mode="donot_use_mm_for_euclid_dist")
        for part in points.split(BLOCK_POINTS, -2)
    ]
    return torch.cat(parts, -1)


def _nearer(rows: Tensor, points: Tensor, squares: Tensor, limits: Sequence[Tensor], error: float) -> list[Tensor]:
    """Which distances of `rows` to `points` are below each of `limits` (that broadcast to [R, N]): bool [R, N] each."""
    estimates = _estimates(rows, points, squares)
    found, told = [], []
    for limit in limits:
        below = estimates < limit.square() - error
        found.append(below)
        told.append((below | (estimates > limit.square() + error)).all(1))
    sure = torch.stack(told).all(0)  # [R]
    if not sure.all():
        distances = _distances(rows[~sure], points)
        for below, limit in zip(found, limits, strict=True):
            below[~sure] = distances < limit.expand_as(below)[~sure]
    return found


def _radii(points: Tensor, squares: Tensor, k: int) -> Tensor:
    """Distance of each point to its k-th nearest neighbour among the others, float64 [N]."""
    error, found = _error(points.shape[1], squares), []
    for rows in points.split(BLOCK_ROWS):
        # The nearest of all is the point itself, at exactly 0, hence k + 1; one more tells whether others may be near.
        candidates = _estimates(rows, points, squares).topk(min(k + 2, len(points)), largest=False)
        distances = _distances(rows[:, None], points[candidates.indices])[:, 0]  # [R, k + 2]
        radii = distances.kthvalue(k + 1).values
        sure = candidates.values[:, -1] - error > radii.square()
        if not sure.all():
            radii[~sure] = _distances(rows[~sure], points).kthvalue(k + 1).values
        found.append(radii)
    return torch.cat(found)
