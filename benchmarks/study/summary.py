"""What rows say together: means, and how far they move with report images, with the seed of S, and with the base.

The three are nested and stated apart: blocks of report images within one row, seeds of S within one base, bases. Each
is small as a sample, so its 95% interval (Student's t) is given beside the deviation.
"""

import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from scipy.special import stdtrit

CONFIDENCE = 0.95
Values = Mapping[tuple[int, int], Sequence[float]]
"""by base and seed of S, one for each block"""
Rows = Iterable[Mapping[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Spread:
    """How far values of one kind lie apart."""

    deviation: float
    """standard deviation, pooled over the groups that they are compared in"""
    half_width: float
    """of the 95% interval of a mean of one group"""
    count: int
    """values in a group, at most"""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A mean, and what it depends on; None: there is one value only."""

    mean: float
    blocks: Spread | None
    seeds: Spread | None
    bases: Spread | None

    def facts(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)


def spread(groups: Iterable[Sequence[float]]) -> Spread | None:
    """Of values within groups."""
    several = [group for group in groups if len(group) > 1]
    if not several:
        return None
    freedom = sum(len(group) - 1 for group in several)
    deviation = (sum(statistics.variance(group) * (len(group) - 1) for group in several) / freedom) ** 0.5
    count = max(map(len, several))
    half = float(stdtrit(freedom, (1 + CONFIDENCE) / 2)) * deviation / count**0.5
    return Spread(deviation=deviation, half_width=half, count=count)


def estimate(values: Values) -> Estimate:
    """The mean over bases of the means over seeds of the means over blocks."""
    by_base: dict[int, list[float]] = defaultdict(list)
    for (base, _), blocks in values.items():
        by_base[base].append(statistics.fmean(blocks))
    bases = [statistics.fmean(seeds) for seeds in by_base.values()]
    return Estimate(
        mean=statistics.fmean(bases),
        blocks=spread(values.values()),
        seeds=spread(by_base.values()),
        bases=spread([bases]),
    )


def values_of(rows: Rows, metric: str | None = None, score: str = "distance") -> Values:
    """A score of the rows of one method, in the first feature space or that called `metric`."""
    return {
        (row["base"], row["seed"] or 0): [
            (block if metric is None else block["beside"][metric])[score] for block in row["blocks"]
        ]
        for row in rows
    }


def fair_row(rows: Rows, row: Mapping[str, Any]) -> Mapping[str, Any]:
    """The base with its best sampler among those of at most as many network calls, that a row is held against.

    The row itself where there is no such base, or calls are not counted.
    """
    candidates = [
        other
        for other in rows
        if other["of_base"]
        and (other["family"], other["base"]) == (row["family"], row["base"])
        and None not in (other["calls"], row["calls"])
        and other["calls"] <= row["calls"]
    ]
    return min(
        candidates, key=lambda other: statistics.fmean(block["distance"] for block in other["blocks"]), default=row
    )


def differences_of(rows: Rows, method: Rows, metric: str | None = None) -> Values:
    """Differences of the rows of one method to their fair rows, on the same report images."""
    found = {}
    for row in method:
        (own,) = values_of([row], metric).values()
        (fair,) = values_of([fair_row(rows, row)], metric).values()
        found[row["base"], row["seed"] or 0] = [a - b for a, b in zip(own, fair, strict=False)]
    return found


def by_method(rows: Rows) -> dict[tuple[str, str], list[Mapping[str, Any]]]:
    """Rows of each (family, method), in the order of the record."""
    found: dict[tuple[str, str], list[Mapping[str, Any]]] = defaultdict(list)
    for row in rows:
        found[row["family"], row["method"]].append(row)
    return dict(found)


def summaries(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Distance and paired difference of each method, with intervals over blocks, seeds and bases each, as JSON."""
    return {
        f"{family}: {method}": {
            "distance": estimate(values_of(own)).facts(),
            "difference": estimate(differences_of(rows, own)).facts(),
        }
        for (family, method), own in by_method(rows).items()
    }
