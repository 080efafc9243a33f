"""Distance against network calls: base and Neon at one sampler's numbers of steps, as record, table and sentence.

It is kept as `frontier.json`, with `frontier.csv` for other programs; a page shows the one that lies beside its report.
"""

import csv
import io
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from neon.evaluate import Scores, scores_from
from neon.report.record import Gain, Row, paired_gain
from neon.report.words import distance_text, gain_text, noise_explained, score_text, text_table
from neon.runtime.files import atomic_write, from_json, write_json
from neon.runtime.run_folder import reading_state

FRONTIER_FILE, TABLE_FILE = "frontier.json", "frontier.csv"
SHARES = ("precision", "recall")


@dataclass(frozen=True, kw_only=True)
class FrontierPoint:
    """Base and Neon with one sampler, on the same report images."""

    calls: int
    """network calls an image"""
    settings: dict[str, Any]
    """of the sampler, as JSON"""
    w: float
    """chosen with that sampler on selection images; 0: no merge did better than the base"""
    self_trained: str | None = None
    """the snapshot chosen; None: w is 0"""
    base: Row
    neon: Row

    @property
    def gain(self) -> Gain:
        """Of Neon over the base."""
        return paired_gain(self.base, self.neon)

    @property
    def gains(self) -> bool:
        """Whether Neon is better beyond the noise."""
        return self.w != 0 and self.gain.certain


@dataclass(frozen=True, kw_only=True)
class Frontier:
    """What base and Neon reach for so many network calls."""

    metric: str
    points: tuple[FrontierPoint, ...]
    """from few calls to many"""
    resampled: bool = False
    """whether each point has self-trained weights of its own, of a set drawn with its sampler"""
    provenance: dict[str, Any] = field(default_factory=dict)
    """what it takes to make the figures again, as JSON"""


def frontier_table(frontier: Frontier) -> list[list[str]]:
    """The points as text, the header first; a column that no point has figures for is left out."""
    points = frontier.points
    columns = [
        ["calls", *(str(point.calls) for point in points)],
        ["w", *(f"{point.w:g}" for point in points)],
        [f"{frontier.metric}, base", *(score_text(point.base) for point in points)],
        ["Neon", *(score_text(point.neon) for point in points)],
        ["difference", *(gain_text(point.gain) if point.w else "" for point in points)],
        *([share, *(_change(point, share) for point in points)] for share in SHARES),
    ]
    return [list(line) for line in zip(*(column for column in columns if any(column[1:])), strict=True)]


def _change(point: FrontierPoint, share: str) -> str:
    before, after = point.base.mean(share), point.neon.mean(share)
    return "" if before is None or after is None else f"{before:.2f} → {after:.2f}"


def frontier_conclusion(frontier: Frontier) -> str:
    """What calls Neon saves at the fewest at which it gains, and where there is no gain."""
    points = frontier.points
    gaining = [point for point in points if point.gains]
    idle = [str(point.calls) for point in points if not point.gains]
    if not gaining:
        return "Neon gains nothing beyond the noise at any of these numbers of network calls."
    text = _saving(gaining[0], points)
    if idle:
        listed = idle[0] if len(idle) == 1 else f"{', '.join(idle[:-1])} and {idle[-1]}"
        text += f" At {listed} calls there is no gain beyond the noise."
    return text


def _saving(point: FrontierPoint, points: Sequence[FrontierPoint]) -> str:
    """With how many calls the base is as good as Neon at `point`: no longer worse beyond the noise."""
    neon = f"With {point.calls} network calls Neon ({distance_text(point.neon.distance)})"
    dearer = [other for other in points if other.calls > point.calls]
    if not dearer:
        return f"{neon} does better than the base with as many ({distance_text(point.base.distance)})."
    worse = point
    for other in dearer:
        if not paired_gain(other.base, point.neon).certain:
            return f"{neon} gives what the base needs {worse.calls} to {other.calls} calls for."
        worse = other
    return f"{neon} does better than the base with {worse.calls} ({distance_text(worse.base.distance)})."


def frontier_explained(frontier: Frontier) -> str:
    """What the columns of the table are."""
    own = "with self-trained weights of its own, of a set that it drew"
    weights = own if frontier.resampled else "with the same self-trained weights, whatever sampler drew their set"
    return (
        f"{frontier.metric}: distance to real images, lower is better. Each line is the sampler with the most steps "
        f"that fit in so many network calls an image; w was chosen for it on selection images, {weights}. "
        + noise_explained(len(frontier.points[0].base.blocks))
    )


def frontier_text(frontier: Frontier) -> str:
    """The table and what it says, for a terminal."""
    table = text_table(frontier_table(frontier))
    return "\n".join([table, "", frontier_explained(frontier), "", frontier_conclusion(frontier)])


def save_frontier(frontier: Frontier, folder: str | os.PathLike[str]) -> None:
    """Write `frontier.json` and `frontier.csv` into `folder`."""
    folder = Path(folder)
    record = {
        "metric": frontier.metric,
        "resampled": frontier.resampled,
        "summary": frontier_conclusion(frontier),
        "points": [_point_json(point) for point in frontier.points],
        "provenance": frontier.provenance,
    }
    write_json(folder / FRONTIER_FILE, record)
    with atomic_write(folder / TABLE_FILE) as file:
        file.write(_csv(frontier).encode())


def load_frontier(folder: str | os.PathLike[str]) -> Frontier | None:
    """What was saved in `folder`; None: nothing.

    Raises:
        RequestError: the file is not readable.
    """
    path = Path(folder) / FRONTIER_FILE
    if not path.exists():
        return None
    with reading_state(path, "run `neon frontier` again, or delete it to have a page without it"):
        record = json.loads(path.read_bytes())
        known = {name: record[name] for name in ("metric", "resampled", "provenance")}
        return from_json(Frontier, {**known, "points": tuple(_parsed(entry) for entry in record["points"])})


def _point_json(point: FrontierPoint) -> dict[str, Any]:
    gain = point.gain
    return {
        "calls": point.calls,
        "settings": point.settings,
        "w": point.w,
        "self_trained": point.self_trained,
        "difference": gain.difference,
        "interval": gain.difference_interval,
        "base": _row_json(point.base),
        "neon": _row_json(point.neon),
    }


def _row_json(row: Row) -> dict[str, Any]:
    return {
        "distance": row.distance,
        "spread": row.spread,
        **{share: row.mean(share) for share in SHARES},
        "blocks": [_block_json(block) for block in row.blocks],
    }


def _block_json(block: Scores) -> dict[str, Any]:
    """Without the seconds, so that a run that was killed leaves the same file."""
    return {name: value for name, value in asdict(block).items() if value is not None and name != "seconds"}


def _parsed(entry: Any) -> FrontierPoint:
    """The point that was saved as `entry`; or any exception."""
    known = {name: entry[name] for name in ("calls", "settings", "w", "self_trained")}
    rows = {
        name: Row(key=name, name=title, blocks=tuple(scores_from(block) for block in entry[name]["blocks"]))
        for name, title in (("base", "base"), ("neon", "Neon"))
    }
    if not rows["base"].blocks or len(rows["base"].blocks) != len(rows["neon"].blocks):
        raise ValueError("rows without blocks of scores, or not of as many")
    return from_json(FrontierPoint, {**known, **rows})


def _csv(frontier: Frontier) -> str:
    """A line for each point, figures in full."""
    lines = io.StringIO()
    writer = csv.writer(lines, lineterminator="\n")
    of_rows = ("distance", "spread", *SHARES)
    names = ("base", "neon")
    writer.writerow(
        ["calls", "w", *(f"{name}_{figure}" for name in names for figure in of_rows), "difference", "low", "high"]
    )  # fmt: skip
    for point in frontier.points:
        entry = _point_json(point)
        figures = (entry[name][figure] for name in names for figure in of_rows)
        writer.writerow([point.calls, point.w, *figures, entry["difference"], *(entry["interval"] or ("", ""))])
    return lines.getvalue()
