"""benchmarks/gpu.sh, which is run on a GPU when one is at hand, works: here its dry form on a CPU."""

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

from tests.workers import start

ROOT = Path(__file__).parent.parent
PARTS = ("correct", "drift", "speed", "train", "ratios", "profile")


def script(*flags: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", "benchmarks/gpu.sh", *flags],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
    )


def measure_here(words: list[str], said: Path) -> None:
    """What the script starts, with all parts in this process, where each would import the same; it prints to `said`."""
    import tyro

    sys.path.insert(0, str(ROOT / "benchmarks"))
    from gpu import __main__ as gpu

    def process(target: Callable[..., None], args: tuple[object, ...]) -> SimpleNamespace:
        return SimpleNamespace(start=lambda: target(*args), join=lambda seconds: None, exitcode=0)

    context = SimpleNamespace(Process=process)
    with (
        mock.patch.object(gpu.multiprocessing, "get_context", lambda kind: context),
        open(said, "w") as file,
        contextlib.redirect_stdout(file),
    ):
        code = tyro.cli(gpu.Measure, args=words, config=(tyro.conf.FlagCreatePairsOff,))()
    sys.exit(code)


def test_the_dry_form_runs_every_part(tmp_path: Path) -> None:
    record, said = tmp_path / "gpu.json", tmp_path / "stdout"
    process = start(measure_here, ["--device", "cpu", "--tiny", "--minutes", "60", "--output", str(record)], said)
    process.join()
    printed = said.read_text()
    assert process.exitcode == 0, printed
    parts = json.loads(record.read_text())["parts"]
    assert tuple(parts) == PARTS
    for part, found in parts.items():
        rows = {row["row"]: row for row in found["rows"]}
        assert rows, part
        failed = {name: row for name, row in rows.items() if row["status"] != "ok"}
        assert failed.keys() <= {"workers"}, failed  # this process is a daemon, which starts none
        assert all(row["status"] == "left out" for row in failed.values()), failed
        assert all(name in printed for name in rows)
    drift = {row["row"]: row for row in parts["drift"]["rows"]}
    assert drift["edm tf32"]["largest"] == 0, "a CPU knows no TF32"
    assert drift["edm bf16"]["largest"] > 0, "half precision moves images"


def test_a_part_that_fails_does_not_keep_the_others_from_running(tmp_path: Path) -> None:
    record = tmp_path / "gpu.json"
    flags = ("--device", "cpu", "--tiny", "--output", str(record), "--only", "goldens", "edm tf32")
    ran = script("correct", "drift", *flags, NEON_GOLDEN_DIR=str(tmp_path / "missing"))
    assert ran.returncode == 1
    parts = json.loads(record.read_text())["parts"]
    assert [row["status"] for row in parts["correct"]["rows"]] == ["failed"]
    assert [row["status"] for row in parts["drift"]["rows"]] == ["ok"]
    assert "No such file or directory" in parts["correct"]["rows"][0]["note"], "it says what is missing"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_how_to_run_it_dry(tmp_path: Path) -> None:
    ran = script("--output", str(tmp_path / "gpu.json"))
    assert (ran.returncode, ran.stdout) == (2, "")
    assert ran.stderr == "gpu.sh: no GPU on this machine; for a dry run: gpu.sh --device cpu --tiny\n"


def test_a_dry_run_does_not_replace_the_record() -> None:
    ran = script("--device", "cpu", "--tiny")
    assert ran.returncode == 2
    assert "--output" in ran.stderr
