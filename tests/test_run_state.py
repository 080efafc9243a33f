"""What runs leave for the next one: told from that of other inputs and versions, and damaged files told in one line."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from edm import calculate_fid, finetune
from neon import selftrain
from neon.cli.app import main
from neon.cli.command_line import run_program
from neon.errors import RequestError
from neon.evaluate import ScoreLog, Scores
from neon.evaluate import features as rows
from neon.evaluate import run as evaluation
from neon.noise import Purpose, image_seeds
from neon.recipe import Recipe
from neon.runtime.distributed import Processes
from neon.runtime.run_folder import STATE_VERSION, run_folder
from tests.programs import Killed, dies_after, log, work_in, write_pair
from tests.test_training import run as train


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    write_pair(folder)
    return folder


@pytest.fixture
def here(files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory in which every evaluation is saved after each block."""
    monkeypatch.setattr(evaluation, "SAVE_EVERY_SECONDS", 0.0)
    return work_in(tmp_path, files, monkeypatch)


USUAL = "--features features.safetensors --num_steps 3 --device cpu --batch_size 8 --seeds 0-39"


def score(flags: str) -> int:
    return run_program(calculate_fid.ScoreEDM, f"--network_pkl base.safetensors --ref real.npz {USUAL} {flags}".split())


def self_train(flags: str = "") -> int:
    usual = "--transfer base.safetensors --data real --outdir run --augment 0 --batch 8 --ema 0 --duration 0.000048"
    return run_program(finetune.TrainEDM, f"{usual} --state_every 1e-9 --device cpu {flags}".split())


TUNE = (
    "tune --base base.safetensors --self-trained tuned.safetensors --select-stats real.npz --real-images real "
    "--nearest-k 3 --features features.safetensors --num-images 20 --report-images 20 --batch-size 7 --limit 3 "
    "--set num_steps=2 solver=euler --device cpu --out run"
)


def replace_images(folder: str) -> None:
    """Put other images of the same number, names and classes where `folder` was."""
    source = Path(folder).resolve()
    Path(folder).unlink()
    shutil.copytree(source, folder)
    first, second = (Path(folder, f"{i:08d}.png") for i in (0, 1))
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(content)


def last_line(capsys: pytest.CaptureFixture[str]) -> str:
    *_, line = capsys.readouterr().err.splitlines()
    return line


# Inputs that changed


def test_training_does_not_go_on_with_other_images_of_the_same_name(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with dies_after(3, selftrain.TrainingRun, "one_step"), pytest.raises(Killed):
        self_train()
    replace_images("real")
    assert self_train() == 2 and "the contents of data have changed" in last_line(capsys)


@pytest.mark.parametrize("program", [lambda: score("--precision_recall real --nearest_k 3 --run_dir run"),
                                     lambda: main(TUNE.split())], ids=["evaluate", "tune"])  # fmt: skip
def test_evaluations_do_not_go_on_with_other_real_images_of_the_same_name(
    here: Path, capsys: pytest.CaptureFixture[str], program: Callable[[], int]
) -> None:
    with dies_after(2, rows, "sample_block"), pytest.raises(Killed):
        program()
    replace_images("real")
    assert program() == 2 and "the contents of real_images have changed" in last_line(capsys)


def test_contents_that_were_not_recorded_are_not_compared(tmp_path: Path) -> None:
    with run_folder(tmp_path / "run", {"data": "set"}):
        pass
    with run_folder(tmp_path / "run", {"data": "set", "data_fingerprint": "1 file"}):
        pass
    with run_folder(tmp_path / "new", {"data": "set", "data_fingerprint": "1 file"}):
        pass
    with (
        pytest.raises(RequestError, match="contents of data have changed: 1 file, now 2 files"),
        run_folder(tmp_path / "new", {"data": "set", "data_fingerprint": "2 files"}),
    ):
        pass


# Versions


def test_runs_go_on_with_another_version_of_neon(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with dies_after(3, selftrain.TrainingRun, "one_step"), pytest.raises(Killed):
        self_train()
    with dies_after(2, rows, "sample_block"), pytest.raises(Killed):
        score("")
    for module in ("neon.cli.programs", "neon.cli.score"):
        monkeypatch.setattr(f"{module}.__version__", "99.0")
    assert self_train() == 0 and [entry["step"] for entry in log("run")] == [1, 2, 3, 4, 5, 6]
    with dies_after(3, rows, "sample_block"):
        assert score("") == 0
    assert not list(Path("runs").iterdir()), "the folder of the other version was gone on in"


def test_state_of_a_later_version_is_refused(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with dies_after(2, rows, "sample_block"), pytest.raises(Killed):
        score("--run_dir run")
    record = Path("run/run.json")
    found = json.loads(record.read_text())
    assert found["state_version"] == STATE_VERSION
    record.write_text(json.dumps({**found, "state_version": STATE_VERSION + 1}))
    assert score("--run_dir run") == 2
    assert f"another version of neon (state_version {STATE_VERSION + 1}" in last_line(capsys)


def test_training_state_and_evaluations_of_a_later_version_are_refused(
    tmp_path: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    killed_training(tmp_path / "training")
    file = tmp_path / "training" / selftrain.STATE_FILE
    torch.save({**torch.load(file, weights_only=True), "state_version": STATE_VERSION + 1}, file)
    with pytest.raises(RequestError, match="another version of neon"):
        train(tmp_path / "training", recipe=AVERAGED)
    with dies_after(2, rows, "sample_block"), pytest.raises(Killed):
        score("--run_dir run")
    rewrite("run/evaluation.safetensors", {}, {"state_version": str(STATE_VERSION + 1)})
    assert score("--run_dir run") == 2 and "another version of neon" in last_line(capsys)


# Damage


def rewrite(file: str, tensors: dict[str, Any], facts: dict[str, str]) -> None:
    """Change tensors and metadata of a safetensors file."""
    with safe_open(file, "pt") as old:
        state, metadata = {name: old.get_tensor(name) for name in old.keys()}, old.metadata()  # noqa: SIM118
    save_file({**state, **tensors}, file, {**metadata, **facts})


def killed_training(folder: Path) -> None:
    with dies_after(4, selftrain.TrainingRun, "one_step"), pytest.raises(Killed):
        train(folder, recipe=AVERAGED)


AVERAGED = Recipe(batch_size=8, lr=1e-3, ema_halflife_kimg=0.02)
DEEP = "[" * 100_000 + "]" * 100_000
GARBAGE = {
    "empty": b"",
    "bytes": bytes(range(128, 256)) * 20,
    "null": b"null",
    "number": b"3",
    "deep": DEEP.encode(),
    "list": b"[1, 2]",
    "text": b"half a rec",
}


@pytest.mark.parametrize("content", GARBAGE.values(), ids=GARBAGE)
def test_a_damaged_record_of_a_run_is_told(tmp_path: Path, content: bytes) -> None:
    with run_folder(tmp_path / "run", {"seed": 0}):
        pass
    (tmp_path / "run/run.json").write_bytes(content)
    with pytest.raises(RequestError, match=r"run/run.json: damaged .*--fresh"), run_folder(tmp_path / "run", {}):
        pass


@pytest.mark.parametrize("line", [b"null", b"3", b'{"a": 1}', b"\xff\xfe{", b'{"name": "w 1", "distance": "low"}',
                                  b'{"name": "w 1", "distance": 1.0, "num_images": 2, "more": 3}', DEEP.encode(),
                                  b'{"name": 3, "failure": "x"}', b'{"name": "w 1", "distance": NaN, "num_images": 1}'],
                         ids=range(9))  # fmt: skip
def test_a_damaged_line_of_evaluations_is_told(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "evaluations.jsonl"
    ScoreLog(path, Processes()).get_or("w 0", lambda: Scores(distance=0.0, num_images=1))
    path.write_bytes(path.read_bytes() + line + b"\n")
    with pytest.raises(RequestError, match=r"evaluations.jsonl: damaged .*delete line 2, whose evaluation is then"):
        ScoreLog(path, Processes())


def flipped(content: bytes) -> bytes:
    """`content` with a byte of the last third changed."""
    at = 2 * len(content) // 3
    return content[:at] + bytes([content[at] ^ 255]) + content[at + 1 :]


@pytest.mark.parametrize(
    "damage",
    [lambda b: b[: len(b) // 2], flipped, *(lambda b, c=c: c for c in GARBAGE.values())],
    ids=["cut short", "a byte", *GARBAGE],
)
def test_a_damaged_state_of_training_is_told(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    killed_training(tmp_path)
    file = tmp_path / selftrain.STATE_FILE
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(
        RequestError, match=r"training-state.pt: damaged .*; delete it, and training begins anew"
    ) as told:
        train(tmp_path, recipe=AVERAGED)
    assert "weights_only" not in str(told.value)


@pytest.mark.parametrize(
    "changes", [{"network": {}}, {"optimizer": 3}, {"average": []}, {"step": None}, {"identity": 3}]
)
def test_a_state_of_training_with_other_things_in_it_is_told(tmp_path: Path, changes: dict[str, Any]) -> None:
    killed_training(tmp_path)
    file = tmp_path / selftrain.STATE_FILE
    torch.save({**torch.load(file, weights_only=True), **changes}, file)
    with pytest.raises(RequestError, match=r"training-state.pt: damaged .*; delete it, and training begins anew|start"):
        train(tmp_path, recipe=AVERAGED)


def test_training_goes_on_whatever_became_of_its_log(tmp_path: Path) -> None:
    train(tmp_path / "whole")
    for name, content in (("gone", None), ("damaged", b"\xff\xfe\nnull\n")):
        with dies_after(4, selftrain.TrainingRun, "one_step"), pytest.raises(Killed):
            train(tmp_path / name)
        file = tmp_path / name / selftrain.LOG_FILE
        file.unlink()
        if content is not None:
            file.write_bytes(content)
        last = train(tmp_path / name)[-1].path
        assert last.read_bytes() == (tmp_path / "whole" / last.name).read_bytes()


@pytest.mark.parametrize("damage", ["cut short", "text", "seconds", "dimensions", "count", "features"])
def test_a_damaged_half_of_an_evaluation_is_told(here: Path, capsys: pytest.CaptureFixture[str], damage: str) -> None:
    flags = "--precision_recall real --nearest_k 3 --run_dir run"
    with dies_after(2, rows, "sample_block"), pytest.raises(Killed):
        score(flags)
    file = Path("run/evaluation.safetensors")
    if damage == "cut short":
        file.write_bytes(file.read_bytes()[:100])
    elif damage == "text":
        file.write_text("half")
    elif damage == "seconds":
        rewrite(str(file), {}, {"seconds": "long"})
    else:
        rewrite(str(file), {
            "dimensions": {"moments.mean": torch.zeros(5).double(), "moments.scatter": torch.zeros(5, 5).double()},
            "count": {"moments.count": torch.tensor(-8)},
            "features": {"features": torch.zeros(3)},
        }[damage], {})  # fmt: skip
    assert score(flags) == 2
    assert re.search(r"evaluation.safetensors: damaged .*; delete it, and the evaluation", last_line(capsys))
    file.unlink()
    assert score(flags) == 0


# Order, seeds


def test_a_killed_sweep_goes_on_with_its_w_in_another_order(here: Path) -> None:
    flags = "--self_trained tuned.safetensors --run_dir run"
    assert score(f"{flags} --w 0 1") == 0
    whole = json.loads(Path("run/scores.json").read_text())
    shutil.rmtree("run")
    with dies_after(7, rows, "sample_block"), pytest.raises(Killed):
        score(f"{flags} --w 0 1")
    with dies_after(3, rows, "sample_block"):
        assert score(f"{flags} --w 1 0") == 0
    found = json.loads(Path("run/scores.json").read_text())
    assert list(found) == ["1.0", "0.0"]
    assert {w: entry["distance"] for w, entry in found.items()} == {w: entry["distance"] for w, entry in whole.items()}


def test_runs_whose_images_would_be_those_of_another_are_refused(tmp_path: Path) -> None:
    assert image_seeds(Purpose.SYNTHETIC, 1023, 1) == [1023 * 2**20]
    with pytest.raises(RequestError, match="--seed is 1024; expected 0 to 1023"):
        image_seeds(Purpose.REPORT, 1024, 1)
    with pytest.raises(RequestError, match="--seed is 1024"):
        train(tmp_path, seed=1024)
    assert not list(tmp_path.iterdir())
