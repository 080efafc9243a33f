"""The rows of a tier in their file: written one by one, never computed twice, compared when repeated."""

import json
import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from machine import machine

from neon.runtime.files import as_json, write_json
from study.bench import Bench
from study.families import FAMILIES
from study.plan import Row

Plan = tuple[str, Row]
"""the name of a family, and a row of it"""


def title(plan: Plan) -> str:
    """By which a row is found in its tier."""
    return f"{plan[0]}: {plan[1].name}"


class Record:
    """The file of a tier."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows = self._read()

    def _read(self) -> dict[str, dict[str, Any]]:
        return json.loads(self.path.read_text())["rows"] if self.path.exists() else {}

    def fill(self, plans: Iterable[Plan], run: Path, tier: str) -> None:
        """Compute the rows that are not there yet, or were of another specification, below the folder `run`."""
        benches: dict[tuple[str, int], Bench] = {}
        for plan in plans:
            name, row = plan
            family = FAMILIES[name]()
            if self.rows.get(title(plan), {}).get("specification") == repr(row) or not family.bases[row.base].exists():
                continue
            if (name, row.base) not in benches:
                benches[name, row.base] = Bench(family, family.bases[row.base], run / name / f"base{row.base}")
            found = benches[name, row.base].record(row)
            command = shlex.join(["python", "benchmarks/run_study.py", tier, "--only", title(plan), "--repeat"])
            self.put(title(plan), {**found, "family": name, "command": command, "specification": repr(row)})

    def put(self, name: str, row: dict[str, Any]) -> None:
        """Add a row to the file, to those that other processes may have put there meanwhile."""
        self.rows = {**self._read(), name: as_json(row)}
        write_json(self.path, {"machine": machine(), "rows": self.rows})
        scores = ", ".join(f"{block['distance']:.2f}" for block in row["blocks"])
        print(f"{name}: w {row['w']:g}, {row['calls']} calls: {scores}", flush=True)


def differences(record: Record, again: Record) -> list[str]:
    """In what rows that were computed again differ from the record, a line each."""
    return [
        f"{name}: {key} was {record.rows.get(name, {}).get(key)}, is {value}"
        for name, row in again.rows.items()
        for key, value in row.items()
        if record.rows.get(name, {}).get(key) != value
    ]
