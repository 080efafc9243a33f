"""Several nodes: `docs/slurm.sh` as it is, with stand-ins for Slurm's commands that start both nodes on this one."""

import os
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from neon.model import save_model
from tests.programs import ROOT, same_scores, write_real
from tests.test_own_model import run
from tests.tiny import tiny_edm, tiny_images

SCORE = (
    f"{ROOT}/edm/calculate_fid.py --network_pkl base.safetensors --ref real.npz --features features.safetensors "
    "--seeds 0-19 --num_steps 2 --max_batch_size 3 --device cpu --json scores.json"
)
TORCHRUN = shlex.quote(str(Path(sys.executable).with_name("torchrun")))
STAND_INS = {
    "scontrol": "echo localhost; sleep 0.2; echo localhost",  # not at once: a reader of the first line only kills it
    "srun": '"$@" & first=$!; "$@" & second=$!; wait $first && wait $second',
    "torchrun": f'exec {TORCHRUN} "${{@/proc_per_node=8/proc_per_node=1}}"',
}


def job_with_free_port() -> int:
    """A job number from which the script makes the number of a port that nobody listens on."""
    for job in range(os.getpid(), os.getpid() + 100):
        with socket.socket() as probe:
            if probe.connect_ex(("localhost", 20000 + job % 20000)):
                return job
    raise AssertionError("no free port")


def on_two_nodes(script: str, folder: Path) -> subprocess.CompletedProcess[str]:
    tools = folder / "tools"
    tools.mkdir(exist_ok=True)
    for name, body in STAND_INS.items():
        (tools / name).write_text(f"#!/bin/bash\n{body}\n")
        (tools / name).chmod(0o755)
    slurm = {"SLURM_JOB_ID": str(job_with_free_port()), "SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "both"}
    threads = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        ["bash", str(ROOT / "docs" / "slurm.sh"), *shlex.split(script)],
        cwd=folder,
        env={**os.environ, **slurm, **threads, "PATH": f"{tools}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        timeout=200,
    )


def test_two_nodes_score_as_one_process_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    for folder in (one, two):
        folder.mkdir()
        save_model(folder / "base.safetensors", tiny_edm(0))
        write_real(folder, tiny_images(20))
    monkeypatch.chdir(one)
    assert run(f"python {SCORE}") == 0
    done = on_two_nodes(SCORE, two)
    assert done.returncode == 0, done.stderr
    same_scores(one, two)
