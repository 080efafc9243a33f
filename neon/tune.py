"""Choosing w with few evaluations.

The distance as a function of w has one minimum, is close to a parabola around it and rises steeply
beyond, so three points and the vertex of the parabola through them come close to a fine grid.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

NODES = (0.0, 0.5, 1.0)
HIGHEST_W = 1.5
CLOSEST = 0.08
"""a check nearer than this to an evaluated w would teach nothing"""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The result of a search: the best evaluated w, and every point that led to it."""

    w: float
    distance: float
    points: dict[float, float]
    """w -> distance, in order of evaluation"""


def vertex(points: dict[float, float], lowest: float, highest: float) -> float:
    """Where the parabola through the three points around the best one is lowest, within [lowest, highest].

    Points that do not curve upwards have no vertex: the end of the interval on their falling side is
    returned then.
    """
    ordered = sorted(points)
    best = min(ordered, key=lambda w: points[w])
    middle = min(max(ordered.index(best), 1), len(ordered) - 2)
    a, b, c = ordered[middle - 1 : middle + 2]
    left = (points[b] - points[a]) / (b - a)
    right = (points[c] - points[b]) / (c - b)
    curvature = (right - left) / (c - a)
    if curvature <= 0:
        return highest if points[c] < points[a] else lowest
    return min(max((a + b) / 2 - left / (2 * curvature), lowest), highest)


def search_w(
    distance: Callable[[float], float],
    *,
    nodes: Sequence[float] = NODES,
    lowest: float = 0.0,
    highest: float = HIGHEST_W,
    checks: int = 2,
) -> Choice:
    """Minimise `distance(w)` over [lowest, highest]: the nodes, then the vertex, up to `checks` times.

    The best evaluated point is kept, never a predicted one.
    """
    points = {w: distance(w) for w in nodes}
    for _ in range(checks):
        w = round(vertex(points, lowest, highest), 3)
        if min(abs(w - known) for known in points) < CLOSEST:
            break
        points[w] = distance(w)
    best = min(points, key=lambda w: points[w])
    return Choice(w=best, distance=points[best], points=points)
