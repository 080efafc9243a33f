"""The figures of docs/study.md."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from study.summary import estimate, values_of
from study.tiers import METHODS_OF_SIZES, METHODS_OF_STEPS

Rows = Sequence[Mapping[str, Any]]
COLOURS = {"base": "#888888", "best": "#222222", "neon": "#c1272d", "sims": "#0072b2"}


def _mean(rows: Rows, method: str, score: str = "distance") -> float | None:
    own = [row for row in rows if row["method"] == method and row["base"] == 0 and row["seed"] in (None, 0)]
    return estimate(values_of(own, score=score)).mean if own else None


def _save(figure: Any, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, dpi=90, metadata={"Software": None})
    plt.close(figure)


def _plain_log(axis: Any) -> None:
    """A logarithmic scale with plain numbers."""
    axis.set_yscale("log")
    low, high = axis.get_ylim()
    ticks = [tick for tick in (2, 3, 5, 10, 20, 40, 80, 160) if low <= tick <= high]
    axis.set_yticks(ticks, list(map(str, ticks)))
    axis.minorticks_off()


def frontier(rows: Rows, path: Path) -> None:
    """Distance, precision and recall against network calls."""
    lines = {
        "base": ("base", [("base", 5), ("base, 10 Euler", 10), ("base, 10 Heun", 19), ("base, 18 Heun", 35)]),
        "base, best levels": ("best", [("base, best levels", 5), ("base, 10 calls, best levels", 10)]),
        "Neon": ("neon", [("Neon", 5), ("Neon, 10 Heun", 19), ("Neon, 18 Heun", 35)]),
        "Neon, best levels": ("neon", [("Neon, best levels", 5)]),
        "SIMS, best levels": ("sims", [("SIMS, best levels", 10)]),
    }
    figure, axes = plt.subplots(1, 3, figsize=(10, 3.2))
    for axis, score in zip(axes, ("distance", "precision", "recall"), strict=True):
        for name, (colour, points) in lines.items():
            found = [(calls, value) for method, calls in points if (value := _mean(rows, method, score)) is not None]
            if found:
                marker = "*" if name.startswith("Neon, ") else "o-" if len(found) > 1 else "D"
                size = 12 if marker == "*" else 6
                axis.plot(*zip(*found, strict=True), marker, color=COLOURS[colour], markersize=size, label=name)
        axis.set_xlabel("network calls an image")
        axis.set_title(score, fontsize=10)
        axis.set_xscale("log")
        axis.set_xticks([5, 10, 19, 35], ["5", "10", "19", "35"])
        axis.minorticks_off()
    _plain_log(axes[0])
    axes[0].legend(fontsize=7)
    _save(figure, path)


def budget_and_size(rows: Rows, path: Path) -> None:
    """Distance against the steps of self-training, and against the size of S; w chosen at each."""
    figure, axes = plt.subplots(1, 2, figsize=(7, 3), sharey=True)
    for axis, points, label in (
        (axes[0], METHODS_OF_STEPS, "steps of self-training (S of 1,000)"),
        (axes[1], METHODS_OF_SIZES, "images in S (50 steps)"),
    ):
        found = [(x, value) for x, method in points.items() if (value := _mean(rows, method)) is not None]
        if found:
            axis.plot(*zip(*found, strict=True), "o-", color=COLOURS["neon"])
        axis.set_xscale("log")
        axis.set_xticks(list(points), [f"{x:,}" for x in points])
        axis.minorticks_off()
        axis.set_xlabel(label)
    axes[0].set_ylabel("distance")
    axes[0].set_ylim(bottom=0)
    _save(figure, path)


def along_w(rows: Rows, path: Path) -> None:
    """Distance, precision and recall against w, at 5 Euler steps."""
    own = sorted(
        (row["w"], row["method"])
        for row in rows
        if row["base"] == 0
        and row["seed"] in (0, None)
        and row["method"].startswith(("Neon at w", "self-trained", "average", "Neon"))
        and (row["method"] in ("Neon", "self-trained (w = -1)", "average (w = -0.5)") or "Neon at w" in row["method"])
        and "18 Heun" not in row["method"]
    )
    own = sorted([*own, (0.0, "base")])
    figure, axes = plt.subplots(1, 2, figsize=(7, 3))
    for score, axis in (("distance", axes[0]), ("precision", axes[1]), ("recall", axes[1])):
        found = [(w, value) for w, method in own if (value := _mean(rows, method, score)) is not None]
        if found:
            axis.plot(*zip(*found, strict=True), "o-", label=score)
        axis.set_xlabel("w")
    _plain_log(axes[0])
    axes[0].set_ylabel("distance")
    axes[1].legend(fontsize=8)
    _save(figure, path)
