"""Does the demo's gain hold for other seeds and other bases? Fresh runs of `neon demo`, one after the other.

    python benchmarks/demo.py                                        # the embedded base, seeds 0 1 2
    python benchmarks/demo.py --bases neon/demo/base.safetensors runs/base-1.safetensors

Another base is made by `python -m neon.demo.train base --seed 1 --output runs/base-1.safetensors`.
Each run is a new synthetic set, self-training, search of the base's best sampler, choice of w with both samplers, and
three report blocks. The table has a column for each; differences between them hold what the intervals of one run leave
out: another synthetic set and self-training.
"""

import json
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import tyro
from machine import machine

from neon.demo.assets import BASE
from neon.runtime.files import sha256_file, write_json

KEPT = ("metric", "fair", "best", "spread", "w", "num_images", "blocks", "summary", "rows", "selection")


def run(base: Path, seed: int) -> dict[str, Any]:
    """The scores of one fresh run, and how long it took from start to end."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        started = time.monotonic()
        command = [
            sys.executable,
            "-m",
            "neon.cli",
            "demo",
            "--out",
            str(out),
            "--seed",
            str(seed),
            "--base",
            str(base),
        ]
        subprocess.run(command, check=True)
        scores = json.loads((out / "scores.json").read_text())
    kept = {key: scores[key] for key in KEPT}
    return {"base_name": base.name, "seed": seed, "wall_seconds": time.monotonic() - started, **kept}


def table(runs: list[dict[str, Any]]) -> str:
    """A line for each row of the reports, a column for each run, as a table of a document."""
    keys = dict.fromkeys(key for run in runs for key in run["rows"])
    head = "| | calls |" + "".join(f" {run['base_name'].removesuffix('.safetensors')} {run['seed']} |" for run in runs)
    lines = [head, "|---|---:|" + "---:|" * len(runs)]
    for key in keys:
        rows = [run["rows"].get(key) for run in runs]
        known = next(row for row in rows if row is not None)
        name = known["name"].partition(" (w =")[0]
        cells = []
        for row in rows:
            w = f" (w {row['w']:g})" if row is not None and row["w"] not in (0, -1) else ""
            cells.append(" |" if row is None else f" {row['distance']:.2f}{w} |")
        lines.append(f"| {name} | {known['network_calls']} |{''.join(cells)}")
    return "\n".join(lines)


def main(
    bases: tuple[Path, ...] = (BASE,),
    seeds: tuple[int, ...] = (0, 1, 2),
    json_file: Path = Path(__file__).parent / "results" / "demo_edm.json",
) -> None:
    """Run the demo for every base and seed.

    Args:
        bases: Base models.
        seeds: Seeds of whole runs.
        json_file: Where the figures go.
    """
    record: dict[str, Any] = {
        "command": shlex.join(["python", "benchmarks/demo.py", *sys.argv[1:]]),
        "machine": machine(),
        "bases": {base.name: sha256_file(base) for base in bases},
        "runs": [run(base, seed) for base in bases for seed in seeds],
    }
    print(f"\n{table(record['runs'])}")
    write_json(json_file, record)
    print(f"\nwritten to {json_file}")


if __name__ == "__main__":
    tyro.cli(main)
