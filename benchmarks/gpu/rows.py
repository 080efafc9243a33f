"""The rows of a part: each is measured, fails or is left out by itself, and is on the disk as soon as it is known."""

import gc
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from neon.runtime.files import append_json

Figures = Mapping[str, Any]


class LeftOutError(Exception):
    """A row cannot be measured here; says why."""


@dataclass
class Rows:
    """Where a part puts its rows, and what it is told about the run."""

    file: Path
    """one row a line, JSON"""
    device: torch.device
    tiny: bool
    """networks of a dry run instead of the published ones"""
    deadline: float
    """of time.monotonic(): rows that have not begun by then are left out"""
    only: Sequence[str] = ()
    """rows whose name holds one of these; (): all"""
    done: dict[str, Figures] = field(default_factory=dict)

    def add(self, name: str, measure: Callable[[], Figures]) -> Figures | None:
        """Measure row `name`, unless it is not asked for or time is up; its figures if it could be measured."""
        if self.only and not any(part in name for part in self.only):
            return None
        start, status = time.monotonic(), "ok"
        figures: Figures = {}
        try:
            if start > self.deadline:
                raise LeftOutError("no time left; run this part alone")
            figures = measure()
        except LeftOutError as reason:
            status, figures = "left out", {"note": str(reason)}
        except torch.OutOfMemoryError:
            status, figures = "left out", {"note": "too little memory on this device"}
        except Exception as error:  # whatever a row does wrong, the others are measured
            traceback.print_exc()
            message = " ".join(str(error).split())[:200]
            status, figures = "failed", {"note": f"{type(error).__name__}: {message}"}
        seconds = round(time.monotonic() - start, 1)
        append_json(self.file, {"row": name, "status": status, "took": seconds, **figures})
        print(f"  {name}: {status}, {seconds} s {describe(figures)}", file=sys.stderr, flush=True)
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        if status != "ok":
            return None
        self.done[name] = figures
        return figures


def describe(figures: Figures) -> str:
    """Figures on one line."""
    return ", ".join(f"{key} {shown(value)}" for key, value in figures.items())


def shown(value: Any) -> str:
    """A figure as a table shows it: three digits of a number."""
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as text, a column for each figure that any of them has; notes last."""
    columns = ["row", "status"]
    columns += dict.fromkeys(key for row in rows for key in row if key not in (*columns, "note", "took"))
    columns += ["note"] if any("note" in row for row in rows) else []
    cells = [columns, *([shown(row.get(key, "")) for key in columns] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells
    )
