"""`neon improve` with its own recipe, on one of the small models: what it gains, how long it takes, and on what.

    python benchmarks/improve.py edm        # also digits, VAR, xAR, imm: 4 to 20 minutes each on two cores

The sampler is that of the studies (`benchmarks/studies.py`), with 1,000 selection images; the rest is as by default.
What is not sampling, training or scoring is the start of processes, reading, searching, merging and writing.
"""

import json
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import tyro
from machine import machine
from small_study import ROOT
from studies import STUDIES, Name

from neon.demo.fashion import DEBIAN_FOLDER
from neon.runtime.files import write_json

RUN = ROOT / "runs" / "improve"
RESULTS = Path(__file__).parent / "results"
WORK = ("sampling", "self_training", "evaluation")


def record_of(out: Path, seconds: float) -> dict[str, Any]:
    """What a run found and took."""
    scores = json.loads((out / "scores.json").read_text())
    work = {name: scores["seconds_of"][name] for name in WORK}
    kept = ("metric", "w", "best", "fair", "summary", "weights", "rows")
    return {
        **{name: scores[name] for name in kept},
        "seconds": round(seconds, 1),
        "seconds_of": work,
        "share_of_the_rest": round(1 - sum(work.values()) / seconds, 3),
    }


def main(name: Name, /, select_images: int = 1000, data: Path = DEBIAN_FOLDER) -> None:
    """Improve the small model `name` anew.

    Args:
        name: Which model.
        select_images: Behind each point of the choice, and in each block of the report.
        data: Folder with the four Fashion-MNIST files.
    """
    study = STUDIES[name]
    study.prepare(data)
    out = RUN / name
    shutil.rmtree(out, ignore_errors=True)
    command = [
        sys.executable, "-m", "neon.cli", "improve", str(study.base), "--real", str(study.select), "--report_real",
        str(study.report), "--real_images", str(study.real), "--features", str(study.features), "--set",
        *study.settings.split(), "--select_images", str(select_images), "--device", "cpu", "--out", str(out),
        *study.tune_vae.split(),
    ]  # fmt: skip
    begun = time.monotonic()
    subprocess.run(command, check=True, cwd=ROOT)
    found = record_of(out, time.monotonic() - begun)
    file = RESULTS / f"improve_{name}.json"
    write_json(
        file,
        {"command": shlex.join(["python", "benchmarks/improve.py", *sys.argv[1:]]), "machine": machine(), **found},
    )  # fmt: skip
    print(f"\n{found['seconds']} s, of which {found['share_of_the_rest']:.1%} neither sample, train nor score; {file}")


if __name__ == "__main__":
    tyro.cli(main)
