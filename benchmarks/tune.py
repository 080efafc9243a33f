"""`neon tune` against a coarse grid of the published kind: evaluations, images, time, and how good the choice is.

    python benchmarks/tune.py edm     # also VAR, xAR, imm, digits; from 20 minutes to an hour each on one core

For a small model of each architecture: a synthetic set, three snapshots of its self-training, then the search and a
grid of w x guidance x snapshots, both on the same selection images; both choices are reported on the same report images
in three blocks. Then some points in one process against one launch of calculate_fid.py for each.
"""

import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tyro
from machine import machine
from small_study import ROOT, neon, program
from studies import STUDIES, Name, Study

from neon.demo.fashion import DEBIAN_FOLDER
from neon.report.record import load
from neon.runtime.files import write_json

RUN = ROOT / "runs" / "tune-study"
RESULTS = Path(__file__).parent / "results"
WS = (-0.5, 0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0)
IMAGES = 1000
LAUNCHED = ("0.5", "0.6", "0.7", "0.8")
"""merge weights that are scored by one process, then by a launch each"""


def tuned(study: Study, snapshots: list[Path], out: Path, flags: str) -> dict[str, Any]:
    """Run `neon tune` and read what it found."""
    words = (
        f"--base {study.base} --self-trained {' '.join(map(str, snapshots))} --select-stats {study.select} "
        f"--report-stats {study.report} --features {study.features} --num-images {IMAGES} --report-images 2000 "
        f"--batch-size 100 --set {study.settings} {study.tune_vae} --no_tune_sampler --no_baselines --device cpu "
        f"--out {out} {flags}"
    )
    neon("tune", words)
    found = json.loads((out / "tune.json").read_text())
    return {**found, "self_trained": Path(found["self_trained"] or "").name}


def grid_points(study: Study, snapshots: list[Path]) -> int:
    """How many points the grid has; w = 0 is the same in every snapshot."""
    return len(study.guidance) * (1 + (len(WS) - 1) * len(snapshots))


def blocks_of(out: Path) -> list[float]:
    """The distances of the choice of a run, block by block."""
    return [block.distance for block in load(out).neon.blocks]


def seconds_per_point(study: Study, snapshot: Path) -> dict[str, float]:
    """What a point takes if all are scored by one process, and if calculate_fid.py is launched for each."""
    number = study.number.format(last=IMAGES - 1, count=IMAGES)

    def score(ws: Sequence[str]) -> float:
        network = f"{study.flag} {study.base} --self_trained {snapshot} --w {' '.join(ws)} {study.vae}"
        scored = f"--ref {study.select} --features {study.features} --device cpu"
        start = time.monotonic()
        program(study.architecture, "calculate_fid", f"{network} {study.sample} {number} {scored}")
        return (time.monotonic() - start) / len(ws)

    alone = statistics.median(score([w]) for w in LAUNCHED)
    return {"one process": score(LAUNCHED), "one launch each": alone}


def main(architecture: Name, /, data: Path = DEBIAN_FOLDER) -> None:
    """Compare the search with the grid.

    Args:
        architecture: Which small model.
        data: Folder with the four Fashion-MNIST files.
    """
    study, run = STUDIES[architecture], RUN / architecture
    study.prepare(data)
    snapshots = study.self_trained(run, 2000)
    ends = f"--w -0.5 2 --guidance {study.guidance[0]} {study.guidance[-1]}"
    found = tuned(study, snapshots, run / "search", f"{ends} --limit {grid_points(study, snapshots) // 8}")
    plain = tuned(
        study,
        snapshots,
        run / "grid",
        f"--grid {' '.join(map(str, WS))} --guidance-grid {' '.join(map(str, study.guidance))}",
    )
    ours, theirs = blocks_of(run / "search"), blocks_of(run / "grid")
    excess = [a - b for a, b in zip(ours, theirs, strict=True)]
    record = {
        "command": f"python benchmarks/tune.py {architecture}",
        "machine": machine(),
        "search": {**found, "blocks": ours},
        "grid": {**plain, "blocks": theirs},
        "evaluations": f"{found['evaluations']} against {plain['evaluations']}",
        "excess": {
            "mean": statistics.fmean(excess),
            "share": statistics.fmean(excess) / statistics.fmean(theirs),
            "standard_error": statistics.stdev(excess) / len(excess) ** 0.5,
        },
        "seconds_per_point": seconds_per_point(study, snapshots[-1]),
    }
    write_json(RESULTS / f"tune_{architecture}.json", record)
    print(json.dumps({key: record[key] for key in ("evaluations", "excess", "seconds_per_point")}, indent=2))


if __name__ == "__main__":
    tyro.cli(main)
