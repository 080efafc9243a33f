"""`neon tune` against a coarse grid of the published kind: evaluations, images, time, and how good the choice is.

    python benchmarks/tune.py edm     # also VAR, xAR, imm; from 20 minutes to an hour each on one core

For a small model of each architecture: a synthetic set, three snapshots of its self-training, then the search and a
grid of w x guidance x snapshots, both on the same selection images; both choices are reported on the same report images
in three blocks. Then some points in one process against one launch of calculate_fid.py for each.
"""

import json
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro
from machine import machine
from small_study import ASSETS, DATA, FEATURES, ROOT, prepare_data, program

from neon.demo.assets import BASE as DEMO_BASE
from neon.demo.assets import FEATURES as DEMO_FEATURES
from neon.demo.assets import TEST_STATISTICS, TRAIN_STATISTICS
from neon.demo.fashion import DEBIAN_FOLDER
from neon.report.record import load
from neon.runtime.files import write_json

RUN = ROOT / "runs" / "tune-study"
RESULTS = Path(__file__).parent / "results"
WS = (-0.5, 0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0)
IMAGES = 1000
LAUNCHED = ("0.5", "0.6", "0.7", "0.8")
"""merge weights that are scored by one process, then by a launch each"""


@dataclass(frozen=True, kw_only=True)
class Study:
    """One small model: how it is sampled, self-trained and tuned."""

    base: Path
    flag: str
    """that names the network in the programs"""
    sample: str
    """flags of sample.py and calculate_fid.py for the sampler of S"""
    number: str
    """flags that ask for so many images"""
    train: str
    """flags of finetune.py"""
    settings: str
    """the sampler, as `--set` of `neon tune`"""
    guidance: tuple[float, ...]
    """of the grid; its ends are the range of the search"""
    features: Path = FEATURES
    select: Path = DATA / "train.npz"
    report: Path = DATA / "test.npz"
    vae: str = ""
    """flags that name the autoencoder, in the programs"""
    tune_vae: str = ""
    """the same in `neon tune`"""


STUDIES = {
    "edm": Study(
        base=DEMO_BASE,
        flag="--network_pkl",
        sample="--num_steps 5 --solver euler",
        number="--seeds 0-{last} --max_batch_size 100",
        train="--batch 128 --batch_gpu 32 --lr 1e-4 --lr_rampup 0 --ema 0 --augment 0 "
        "--duration 0.009600 --tick 3.2 --snap 1",
        settings="num_steps=5 solver=euler",
        guidance=(0.0, 0.25, 0.5, 1.0),
        features=DEMO_FEATURES,
        select=TRAIN_STATISTICS,
        report=TEST_STATISTICS,
    ),
    "VAR": Study(
        base=ASSETS / "small_var_base.safetensors",
        flag="--var_ckpt",
        sample="--top_k 0 --top_p 0 --cfg 1.5",
        number="--num_images {count} --batch_size 100",
        train="--batch 64 --batch_gpu 64 --target_lr 3e-5 --constant_lr --mid_reso 1 --total_images 9600 "
        "--save_interval 3200",
        settings="top_k=0 top_p=0",
        guidance=(0.0, 0.75, 1.5, 2.5),
        vae=f"--vae_ckpt {ASSETS}/small_var_tokenizer.safetensors",
        tune_vae=f"--vae {ASSETS}/small_var_tokenizer.safetensors",
    ),
    "xAR": Study(
        base=ASSETS / "small_xar_base.safetensors",
        flag="--model_ckpt",
        sample="--flow_steps 8 --cfg 1",
        number="--num_images {count} --batch_size 100",
        train="--batch 64 --batch_gpu 64 --lr 1e-4 --warmup_epochs 0 --ema_rate 0 --attn_dropout 0 --proj_dropout 0 "
        "--no_mirror --total_images 9600 --save_interval 3200",
        settings="num_steps=8",
        guidance=(1.0, 1.5, 2.0, 3.0),
    ),
    "imm": Study(
        base=ASSETS / "small_imm_base.safetensors",
        flag="--network_pkl",
        sample="--num_steps 2 --cfg_scale 1.5",
        number="--num_images {count} --batch_size 100",
        train="--batch 64 --batch_gpu 64 --lr 1e-4 --ema_rate 0 --total_images 9600 --save_interval 3200",
        settings="num_steps=2",
        guidance=(1.0, 1.5, 2.0, 3.0),
    ),
}


def tuned(study: Study, snapshots: list[Path], out: Path, flags: str) -> dict[str, Any]:
    """Run `neon tune` and read what it found."""
    words = (
        f"--base {study.base} --self-trained {' '.join(map(str, snapshots))} --select-stats {study.select} "
        f"--report-stats {study.report} --features {study.features} --num-images {IMAGES} --report-images 2000 "
        f"--batch-size 100 --set {study.settings} {study.tune_vae} --device cpu --out {out} {flags}"
    )
    command = [sys.executable, "-m", "neon.cli", "tune", *shlex.split(words)]
    print(shlex.join(command), file=sys.stderr)
    subprocess.run(command, check=True, env={"OMP_NUM_THREADS": "1", "PATH": ""})
    found = json.loads((out / "tune.json").read_text())
    return {**found, "self_trained": Path(found["self_trained"] or "").name}


def grid_points(study: Study, snapshots: list[Path]) -> int:
    """How many points the grid has; w = 0 is the same in every snapshot."""
    return len(study.guidance) * (1 + (len(WS) - 1) * len(snapshots))


def blocks_of(out: Path) -> list[float]:
    """The distances of the choice of a run, block by block."""
    return [block.distance for block in load(out).neon.blocks]


def seconds_per_point(architecture: str, study: Study, snapshot: Path) -> dict[str, float]:
    """What a point takes if all are scored by one process, and if calculate_fid.py is launched for each."""
    number = study.number.format(last=IMAGES - 1, count=IMAGES)

    def score(ws: Sequence[str]) -> float:
        network = f"{study.flag} {study.base} --self_trained {snapshot} --w {' '.join(ws)} {study.vae}"
        scored = f"--ref {study.select} --features {study.features} --device cpu"
        start = time.monotonic()
        program(architecture, "calculate_fid", f"{network} {study.sample} {number} {scored}")
        return (time.monotonic() - start) / len(ws)

    alone = statistics.median(score([w]) for w in LAUNCHED)
    return {"one process": score(LAUNCHED), "one launch each": alone}


def main(architecture: Literal["edm", "VAR", "xAR", "imm"], /, data: Path = DEBIAN_FOLDER) -> None:
    """Compare the search with the grid.

    Args:
        architecture: Which small model.
        data: Folder with the four Fashion-MNIST files.
    """
    study, run = STUDIES[architecture], RUN / architecture
    if architecture != "edm":
        prepare_data(data)
    number = study.number.format(last=1999, count=2000)
    program(
        architecture,
        "sample",
        f"{study.flag} {study.base} {study.sample} {number} {study.vae} --outdir {run}/S.zip --device cpu --fresh",
    )
    start_flag = "--transfer" if architecture == "edm" else study.flag
    program(
        architecture,
        "finetune",
        f"{start_flag} {study.base} --data {run}/S.zip --outdir {run}/self {study.vae} {study.train} --device cpu",
    )
    snapshots = sorted((run / "self").glob("snapshot-*.safetensors"))
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
        "seconds_per_point": seconds_per_point(architecture, study, snapshots[-1]),
    }
    write_json(RESULTS / f"tune_{architecture}.json", record)
    print(json.dumps({key: record[key] for key in ("evaluations", "excess", "seconds_per_point")}, indent=2))


if __name__ == "__main__":
    tyro.cli(main)
