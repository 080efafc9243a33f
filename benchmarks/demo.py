"""Does the demo's gain hold for other seeds and other bases? Fresh runs of `neon demo`, one after the other.

    python benchmarks/demo.py                                        # the embedded base, seeds 0 1 2
    python benchmarks/demo.py --bases neon/demo/base.safetensors runs/base-1.safetensors

Another base is made by `python -m neon.demo.train base --seed 1 --output runs/base-1.safetensors`.
Each line of the table is one run: a new synthetic set, self-training, choice of w, and three report blocks.
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

ROWS = ("base", "base_twice_the_steps", "self_trained", "neon")


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
    kept = {key: scores[key] for key in ("metric", *ROWS, "spread", "w", "num_images", "blocks", "rows", "selection")}
    gain = 1 - scores["neon"] / scores["base"]
    return {"base_name": base.name, "seed": seed, "gain": gain, "wall_seconds": time.monotonic() - started, **kept}


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
    head = f"{'base':<22}{'seed':>5}{'base':>8}{'2x steps':>10}{'w = -1':>8}{'Neon':>8}{'w':>7}{'gain':>7}{'spread':>8}"
    print(f"\n{head}{'precision':>14}{'recall':>14}{'s':>6}")
    for r in record["runs"]:
        before, after = r["rows"]["base"], r["rows"]["neon"]
        print(
            f"{r['base_name']:<22}{r['seed']:>5}{r['base']:>8.2f}{r['base_twice_the_steps']:>10.2f}"
            f"{r['self_trained']:>8.1f}{r['neon']:>8.2f}{r['w']:>7.2f}{r['gain']:>7.0%}{r['spread']:>8.2f}"
            f"{before['precision']:>7.2f} ->{after['precision']:>4.2f}"
            f"{before['recall']:>7.2f} ->{after['recall']:>4.2f}"
            f"{r['wall_seconds']:>6.0f}"
        )
    write_json(json_file, record)
    print(f"\nwritten to {json_file}")


if __name__ == "__main__":
    tyro.cli(main)
