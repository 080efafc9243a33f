"""Measure a GPU part by part, each in a process of its own that may die; print tables, keep them in one file.

The parts share the time that is allowed; what one leaves goes to the next. What is measured again replaces its own
figures in the file only, row by row.
"""

import json
import multiprocessing
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from machine import machine

from gpu.parts import SHARES, Part, measure_part
from gpu.rows import table
from neon.runtime.files import write_json

GRACE = 20.0
"""seconds that the last row of a part may take beyond the part's time before it is killed"""
RESULTS = Path(__file__).parent.parent / "results"


@dataclass(frozen=True, kw_only=True)
class Measure:
    """Measure a GPU: correctness, drift of precisions, images per second, self-training, a profile."""

    parts: Annotated[tuple[Part, ...], tyro.conf.Positional] = tuple(SHARES)
    """what to measure; by default all"""
    device: Literal["cuda", "cpu"] = "cuda"
    """where"""
    tiny: bool = False
    """a dry run on tiny networks; its figures mean nothing"""
    minutes: float = 8.0
    """for all parts together"""
    only: tuple[str, ...] = ()
    """rows whose name holds one of these words"""
    output: Path | None = None
    """figures; those of other parts in it stay. By default benchmarks/results/gpu_<card>.json"""

    def __call__(self) -> int:
        if self.device == "cuda" and not torch.cuda.is_available():
            print("gpu.sh: no GPU on this machine; for a dry run: gpu.sh --device cpu --tiny", file=sys.stderr)
            return 2
        if self.tiny and self.output is None:
            print("gpu.sh: --tiny is a dry run; name another file than the record with --output", file=sys.stderr)
            return 2
        card = "_".join(device_name(self.device).lower().split())
        output = self.output or RESULTS / f"gpu_{card}.json"
        record = self.opened(output)
        end, failed = time.monotonic() + 60 * self.minutes, False
        left = [part for part in SHARES if part in self.parts]
        while left:
            allowed = (end - time.monotonic()) * SHARES[left[0]] / sum(SHARES[part] for part in left)
            part = left.pop(0)
            found = self.run_part(part, max(allowed, 1.0), output)
            record["parts"][part] = with_rows_before(found, record["parts"].get(part))
            write_json(output, record)
            failed = failed or found["status"] != "ok" or any(row["status"] == "failed" for row in found["rows"])
            print(f"\n{part}: {found['status']}, {found['took']} s\n")
            show(found["rows"])
        print(f"\n{output}", "with failures" if failed else "")
        return int(failed)

    def opened(self, output: Path) -> dict[str, Any]:
        """The record so far in `output`, if it is of this device, else a new one."""
        here = {"device": device_name(self.device), "tiny": self.tiny, **versions(self.device)}
        if output.exists():
            record = json.loads(output.read_text())
            if all(record.get(key) == value for key, value in here.items()):
                return record
            print(f"{output}: of another device or version, begun anew", file=sys.stderr)
        return {**here, "machine": machine(), "parts": {}}

    def run_part(self, part: Part, seconds: float, output: Path) -> dict[str, Any]:
        """Measure a part in its own process, which is killed if it outlasts its time by far."""
        print(f"{part}, {seconds:.0f} s at most:", file=sys.stderr, flush=True)
        start = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "rows.jsonl"
            process = multiprocessing.get_context("spawn").Process(
                target=measure_part, args=(part, self.device, self.tiny, self.only, seconds, output, file)
            )
            process.start()
            process.join(seconds + GRACE)
            status = "ok" if process.exitcode == 0 else f"its process ended with {process.exitcode}"
            if process.exitcode is None:
                process.kill()
                process.join()
                status = "killed: its last row took too long"
            lines = file.read_text().splitlines() if file.exists() else []
        return {
            "command": shlex.join(["bash", "benchmarks/gpu.sh", part, *self.words()]),
            "status": status,
            "took": round(time.monotonic() - start, 1),
            "rows": [json.loads(line) for line in lines],
        }

    def words(self) -> list[str]:
        """The flags that change what is measured."""
        words = ["--device", self.device] if self.device != "cuda" else []
        words += ["--tiny"] if self.tiny else []
        return words + (["--only", *self.only] if self.only else [])


def with_rows_before(found: dict[str, Any], before: dict[str, Any] | None) -> dict[str, Any]:
    """`found` of a part, and the rows of `before` that it has no figures of."""
    rows = {} if before is None else {row["row"]: row for row in before["rows"]}
    for row in found["rows"]:
        if row["status"] != "left out" or row["row"] not in rows:
            rows[row["row"]] = row
    return {**found, "rows": list(rows.values())}


def device_name(device: str) -> str:
    """The card, or the processor."""
    return torch.cuda.get_device_name() if device == "cuda" else str(machine()["cpu"])


def versions(device: str) -> dict[str, Any]:
    """Of torch and, on a GPU, what it was built for and the driver."""
    found: dict[str, Any] = {"torch": torch.__version__}
    if device == "cuda":
        asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        try:
            driver = subprocess.run(asked, capture_output=True, text=True).stdout.strip().splitlines()
        except OSError:
            driver = []
        found |= {"cuda": torch.version.cuda, "driver": driver[0] if driver else "unknown"}
    return found


def show(rows: list[Mapping[str, Any]]) -> None:
    """Print rows as a table, and what stands in their lists below it."""
    print(table([{key: value for key, value in row.items() if not isinstance(value, dict)} for row in rows]))
    for row in rows:
        for key, share in row.get("top", {}).items():
            print(f"  {row['row']}  {share:6.1%}  {key}")


if __name__ == "__main__":
    sys.exit(tyro.cli(Measure, description=__doc__, config=(tyro.conf.FlagCreatePairsOff,))())
