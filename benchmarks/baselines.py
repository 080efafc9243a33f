"""Neon against the base's own best sampler, more steps and both networks at inference, for one small model.

    python benchmarks/baselines.py edm     # also VAR, xAR, imm, digits: a quarter of an hour each on one core

A synthetic set and three snapshots of its self-training, then one `neon tune`: it searches the base's sampler and w,
and reports the base as given, at its best sampler, at twice the calls and converged; the self-trained network; Neon on
both samplers, each with its own synthetic set; and SIMS. The table is left in benchmarks/results/baselines_<name>.json.
A killed run goes on where it was.
"""

import json
import resource
import shlex
import sys
import time
from pathlib import Path
from typing import Any

import torch
import tyro
from machine import machine
from small_study import ROOT, neon
from studies import STUDIES, Name, Study

from neon.demo.fashion import DEBIAN_FOLDER
from neon.runtime.files import write_json

RUN = ROOT / "runs" / "baselines"
RESULTS = Path(__file__).parent / "results"
SCORES_FILE = "scores.json"


def tune(study: Study, snapshots: list[Path], out: Path, images: int) -> None:
    """Search sampler and w, and report every row, with `neon tune`."""
    neon(
        "tune",
        f"--base {study.base} --self-trained {' '.join(map(str, snapshots))} --select-stats {study.select} "
        f"--report-stats {study.report} --real_images {study.real} --features {study.features} "
        f"--set {study.settings} {study.tune_vae} --w -0.5 2 --num-images {images} --report-images {images} "
        f"--blocks 3 --batch-size 100 --sampler-scores 12 --device cpu --out {out}",
    )


def table(out: Path) -> dict[str, Any]:
    """What a run of `neon tune` found, as it is kept: all but where files lay and what they held."""
    found = json.loads((out / SCORES_FILE).read_text())
    return {key: value for key, value in found.items() if key != "provenance"}


def markdown(record: dict[str, Any]) -> str:
    """The rows as a table of a document."""
    lines = [f"| | calls | {record['metric']} | against the base's best sampler | precision | recall |"]
    lines.append("|---|---:|---:|---:|---:|---:|")
    for row in record["rows"].values():
        spread = f" ± {row['spread']:.2f}" if len(row["blocks"]) > 1 else " (1 block)"
        difference = "" if row["difference"] is None else f"{row['difference']:+.2f}"
        if row["interval"] is not None:
            difference += " [{:+.2f}, {:+.2f}]".format(*row["interval"])
        cells = (row["name"], row["network_calls"], f"{row['distance']:.2f}{spread}", difference)
        lines.append("| {} | {} | {} | {} |".format(*cells) + f" {row['precision']:.2f} | {row['recall']:.2f} |")
    return "\n".join(lines)


def main(name: Name, /, images: int = 2000, data: Path = DEBIAN_FOLDER) -> None:
    """Make the table of one small model.

    Args:
        name: Which.
        images: Size of the synthetic set, of the set behind each score of the search, and of each report block.
        data: Folder with the four Fashion-MNIST files.
    """
    torch.set_num_threads(1)
    study, run, started = STUDIES[name], RUN / f"{name}-{images}", time.monotonic()
    study.prepare(data)
    snapshots = study.self_trained(run, images)
    tune(study, snapshots, run / "tune", images)
    of_programs = resource.getrusage(resource.RUSAGE_CHILDREN)
    record = {
        "command": shlex.join(["python", "benchmarks/baselines.py", *sys.argv[1:]]),
        "machine": machine(),
        "num_images": images,
        "seconds": round(time.monotonic() - started),
        "cpu_seconds": round(of_programs.ru_utime + of_programs.ru_stime),
        **table(run / "tune"),
    }
    write_json(RESULTS / f"baselines_{name}.json", record)
    print(markdown(record))


if __name__ == "__main__":
    tyro.cli(main)
