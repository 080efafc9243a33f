"""Ctrl-C and SIGTERM: what is done is kept, one line says where the command goes on, and the exit code says why."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest

from neon import sampling
from neon.cli.app import main
from neon.cli.command_line import exit_code
from neon.cli.inspect import Inspect
from neon.errors import DegenerateError
from neon.evaluate import features as rows
from neon.runtime.distributed import processes
from neon.runtime.signals import postponed
from neon.selftrain import TrainingRun, train
from tests.programs import ROOT, dies_after, same_files, write_pair
from tests.tiny import tiny_edm, tiny_images


def signalled_after(calls: int, owner: object, name: str, number: int = signal.SIGTERM) -> object:
    """A context in which a signal reaches this process at the end of the call of `owner.name` of that number."""
    function, left = getattr(owner, name), calls

    def count(*args: object, **kwargs: object) -> object:
        nonlocal left
        left -= 1
        result = function(*args, **kwargs)
        if left == 0:
            os.kill(os.getpid(), number)
        return result

    return mock.patch.object(owner, name, count)


def slowly(owner: object, name: str) -> object:
    """A context in which a call of `owner.name` takes long."""
    function = getattr(owner, name)

    def slow(*args: object, **kwargs: object) -> object:
        time.sleep(0.1)
        return function(*args, **kwargs)

    return mock.patch.object(owner, name, slow)


def send(number: int) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_command_that_keeps_nothing_ends_with_one_line(
    number: int, code: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = signal.getsignal(number)
    monkeypatch.setattr(Inspect, "__call__", lambda command: send(number))
    assert main(["inspect", "base.pth"]) == code
    assert capsys.readouterr() == ("", "neon inspect: stopped\n")
    assert signal.getsignal(number) == before


def test_a_signal_that_is_ignored_stays_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        assert exit_code("neon", lambda: send(signal.SIGINT)) == 0
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(("then", "code"), [(signal.SIGINT, -signal.SIGINT), (signal.SIGTERM, 130)])
def test_only_a_second_ctrl_c_ends_at_once(then: int, code: int) -> None:
    script = (
        "import signal, sys\nfrom neon.cli.command_line import exit_code\nfrom neon.runtime.signals import postponed\n"
        "def run():\n    with postponed():\n        signal.raise_signal(signal.SIGINT)\n"
        f"        signal.raise_signal({int(then)})\n        print('to the end')\nsys.exit(exit_code('neon', run))"
    )
    run = subprocess.run(
        [sys.executable, "-c", script], env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert run.returncode == code
    assert run.stderr.startswith("\nstopping at the end of this step; Ctrl-C again stops at once\n")
    assert run.stdout == ("" if code < 0 else "to the end\n")


def test_a_stop_that_another_error_overtook_is_not_forgotten() -> None:
    def run() -> None:
        with pytest.raises(DegenerateError), postponed():
            send(signal.SIGTERM)
            raise DegenerateError("a search goes on past it")
        with postponed():
            raise AssertionError("went on")

    assert exit_code("neon", run) == 143


def short_training(folder: Path) -> int:
    """The exit code of a training of 12 steps."""

    def run() -> None:
        model = tiny_edm()
        with processes("cpu") as group:
            recipe = replace(model.recipe, batch_size=8)
            train(
                model, tiny_images(), folder, num_steps=12, snapshot_steps=[6], recipe=recipe, seed=0, processes=group,
                micro_batch=4, state_every_seconds=1000,
            )  # fmt: skip

    return exit_code("train", run)


def test_training_saves_its_state_and_goes_on_to_the_same_bits(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert short_training(tmp_path / "whole") == 0
    with signalled_after(9, TrainingRun, "_loss", signal.SIGINT):
        assert short_training(tmp_path / "stopped") == 130
    assert capsys.readouterr().err.endswith("train: stopped; the same command goes on from step 5 of 12\n")
    with dies_after(7, TrainingRun, "one_step"):
        assert short_training(tmp_path / "stopped") == 0
    same_files(tmp_path / "whole", tmp_path / "stopped", "snapshot*")


def stop_one_of_two(folder: str) -> int:
    """In two processes of which a signal reaches the second only: both end alike (tests/test_edm_programs.py)."""
    if os.environ["RANK"] == "1":
        with signalled_after(3, TrainingRun, "_loss"):
            code = short_training(Path(folder))
    else:
        code = short_training(Path(folder))
    return 0 if code == 143 else 1


def test_sampling_keeps_finished_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_pair(tmp_path)
    monkeypatch.chdir(tmp_path)
    command = "sample --network base.safetensors --num_images 20 --batch_size 5 --num_steps 2 --device cpu --outdir"
    assert main([*command.split(), "whole.zip"]) == 0
    with signalled_after(3, sampling, "sample_block"), slowly(sampling, "write_images"):
        assert main([*command.split(), "out.zip"]) == 143
    assert len([*Path("out.zip.unfinished").glob("*.png")]) == 10  # also those that were still to be written
    assert capsys.readouterr().err.endswith("neon sample: stopped; the same command goes on from image 10 of 20\n")
    with dies_after(2, sampling, "sample_block"):
        assert main([*command.split(), "out.zip"]) == 0
    assert Path("out.zip").read_bytes() == Path("whole.zip").read_bytes()


@pytest.mark.parametrize(("flags", "advice"), [("", "the same command goes"), ("--fresh", "without --fresh goes")])
def test_an_evaluation_keeps_finished_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], flags: str, advice: str
) -> None:
    write_pair(tmp_path)
    monkeypatch.chdir(tmp_path)
    command = "evaluate --network base.safetensors --features features.safetensors --ref real.npz --num_images 20"
    command += " --batch_size 4 --num_steps 2 --device cpu --run_dir"
    assert main([*command.split(), "whole"]) == 0
    with signalled_after(3, rows, "sample_block"):
        assert main([*command.split(), "run", *flags.split()]) == 143
    said = capsys.readouterr().err.splitlines()[-1]
    assert advice in said and said.endswith("on from image 12 of 20 (evaluating)")
    with dies_after(2, rows, "sample_block"):
        assert main([*command.split(), "run"]) == 0
    score = '"distance": '
    lines = [[x for x in Path(d, "scores.json").read_text().splitlines() if score in x] for d in ("whole", "run")]
    assert lines[0] == lines[1] != []
