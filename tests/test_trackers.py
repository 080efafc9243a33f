"""Curves as CSV beside the logs, and `--log`: what a tracker gets, after kills too, and that it never changes a run."""

import csv
import json
import shutil
import sqlite3
import sys
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

import pytest

from neon import selftrain
from neon.cli.app import main
from neon.cli.command_line import run_program
from neon.errors import DegenerateError
from neon.evaluate import features as rows
from neon.runtime import trackers
from neon.tune import scorer
from tests.programs import Killed, dies_after, log, work_in, write_pair
from VAR.train_tokenizer import TrainTokenizer

TRAIN = (
    "selftrain --network base.safetensors --data real --batch 8 --ema 0 --total_images 80 --save_interval 40 "
    "--state_every 1e9 --device cpu"
)
TUNE = (
    "tune --base base.safetensors --self-trained tuned.safetensors --select-stats real.npz --real-images real "
    "--nearest-k 3 --features features.safetensors --num-images 20 --report-images 20 --batch-size 7 --limit 3 "
    "--set num_steps=2 solver=euler --device cpu --no-baselines"
)
RESAMPLED = "--sampler_scores 3 --training_images 1100 --synthetic_images 20"
IMPROVE = "improve base.safetensors --real real.npz --features features.safetensors --processes 1 --device cpu"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    write_pair(folder)
    return folder


@pytest.fixture
def here(files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return work_in(tmp_path, files, monkeypatch)


class Recorder:
    """Stands for the trackers: what each run in it was told, by the name of its folder."""

    def __init__(self) -> None:
        self.values: dict[str, dict[str, dict[int, float]]] = {}
        self.configs: dict[str, dict] = {}
        self.steps: list[int] = []
        self.finished: list[str] = []
        self.fails_after = sys.maxsize

    def start(self, folder: Path, run: str, kept: int, config: dict) -> tuple[trackers.Log, trackers.Finish]:
        self.configs[str(folder)] = json.loads(json.dumps(config, allow_nan=False))
        of_folder = self.values.setdefault(str(folder), {})

        def take(values: dict[str, float], step: int) -> None:
            print("nothing that a result may be mistaken for")
            if len(self.steps) >= self.fails_after:
                raise OSError("the network is gone")
            self.steps.append(step)
            for name, value in values.items():
                of_folder.setdefault(name, {})[step] = value

        return take, lambda: self.finished.append(str(folder))


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    """Stands for tensorboard and its package."""
    package = ModuleType("tensorboard")
    package.__spec__ = ModuleSpec("tensorboard", None, origin="here")
    monkeypatch.setitem(sys.modules, "tensorboard", package)
    found = Recorder()
    monkeypatch.setitem(trackers.START, "tensorboard", found.start)
    return found


def table(path: str | Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def curve(run: str, column: str) -> dict[int, float]:
    """A column of the table of a training, by images seen."""
    return {int(row["images_seen"]): float(row[column]) for row in table(f"{run}/training.csv")}


def evaluations(run: str) -> list[str]:
    return [json.loads(line)["name"] for line in Path(run, "evaluations.jsonl").read_text().splitlines()]


def selected(run: str, column: str) -> dict[int, float]:
    """A column of the table of a search, of selection images, by the number of the evaluation."""
    rows = enumerate(table(f"{run}/evaluations.csv"), 1)
    return {number: float(row[column]) for number, row in rows if row["purpose"] == "selection"}


def assert_table_of_log(run: str, steps: int) -> None:
    """The table of a training tells what its log does, each step once."""
    rows, entries = table(f"{run}/training.csv"), log(run)
    assert [int(row["step"]) for row in rows] == list(range(1, steps + 1))
    for row, entry in zip(rows, entries, strict=True):
        assert int(row["images_seen"]) == 8 * entry["step"]
        assert [float(row[name]) for name in ("loss", "lr", "seconds")] == [
            entry[name] for name in ("loss", "lr", "seconds")
        ]
        assert row["moved"] == str(entry.get("moved", ""))


# Tables


def test_the_table_of_a_training_is_its_log_also_while_it_runs_and_after_a_kill(here: Path) -> None:
    words = f"{TRAIN} --outdir run".split()
    with dies_after(8, selftrain.TrainingRun, "one_step"), pytest.raises(Killed):
        main(words)
    assert len(log("run")) == 8 and len(table("run/training.csv")) == 5, "as of the last saved state"
    with dies_after(1, selftrain.TrainingRun, "one_step"), pytest.raises(Killed):
        main(words)
    assert len(log("run")) == 6 and len(table("run/training.csv")) == 5, "lost steps are not told"
    assert main(words) == 0
    assert_table_of_log("run", 10)


def test_the_curve_that_a_report_draws_is_that_table_in_fewer_places(tmp_path: Path) -> None:
    (tmp_path / "training.csv").write_text(
        "step,images_seen,loss\n" + "".join(f"{n},{8 * n},{n % 2}\n" for n in range(1, 1001))
    )
    found = selftrain.training_curve(tmp_path)
    assert len(found) == 200 and found[-1][0] == 8000 and found[0] == (40.0, pytest.approx(0.6))
    for foreign in ("epoch,loss\n1,2\n", "images_seen,loss\nmany,few\n", "\0", ""):
        (tmp_path / "training.csv").write_text(foreign)
        assert selftrain.training_curve(tmp_path) == [], "weights of others may lie beside any table"
    assert selftrain.training_curve(tmp_path / "nowhere") == []


def test_half_a_line_in_the_log_is_no_line_of_the_table(here: Path) -> None:
    words = f"{TRAIN} --outdir run".split()
    with dies_after(5, selftrain.TrainingRun, "one_step"), pytest.raises(Killed):
        main(words)
    lines = Path("run/training.jsonl").read_text().splitlines(keepends=True)
    Path("run/training.jsonl").write_text("".join([*lines[:4], lines[4][:9], "\n"]))
    assert main(words) == 0
    assert [int(row["step"]) for row in table("run/training.csv")] == [1, 2, 3, 4, 6, 7, 8, 9, 10]


def test_every_evaluation_of_a_search_is_a_line_in_order_also_after_a_kill(here: Path) -> None:
    words = f"{TUNE} --sampler_scores 3 --no-resample --out run".split()
    with dies_after(8, rows, "sample_block"), pytest.raises(Killed):
        main(words)
    assert [row["name"] for row in table("run/evaluations.csv")] == evaluations("run")
    assert main(words) == 0
    lines, entries = table("run/evaluations.csv"), Path("run/evaluations.jsonl").read_text().splitlines()
    assert [row["name"] for row in lines] == evaluations("run")
    assert [float(row["distance"]) for row in lines] == [json.loads(line)["distance"] for line in entries]
    assert lines[0]["purpose"] == "selection" and float(lines[0]["w"]) == 0 and float(lines[0]["guidance"]) == 0
    assert {row["block"] for row in lines if row["purpose"] == "report"} == {"0", "1", "2"}
    assert any(row["sampler"] for row in lines) and not lines[0]["sampler"]
    Path("run/evaluations.csv").unlink()
    assert main(words) == 0 and table("run/evaluations.csv") == lines, "runs of before get it, too"


def test_what_cannot_be_scored_says_why_in_the_table(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scorer, "evaluate", lambda *_, **__: _degenerate())
    main(f"{TUNE} --out run".split())
    assert {row["failure"] for row in table("run/evaluations.csv")} == {"all images look the same"}


def _degenerate() -> None:
    raise DegenerateError("all images look the same")


# Trackers


def test_a_tracker_gets_the_curves_and_the_training_is_as_without(
    here: Path, recorder: Recorder, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(f"{TRAIN} --outdir plain".split()) == 0
    plain = capsys.readouterr().out
    assert main(f"{TRAIN} --outdir run --log tensorboard".split()) == 0
    told = recorder.values["run"]
    assert told["training/loss"] == curve("run", "loss") and told["training/lr"] == curve("run", "lr")
    assert all(rate > 0 for rate in told["training/images_per_second"].values())
    assert recorder.configs["run"]["recipe"]["batch_size"] == 8 and recorder.finished == ["run"]
    assert capsys.readouterr().out == plain.replace("plain/", "run/"), "results alone stand on stdout"
    assert Path("run/run.json").read_bytes() == Path("plain/run.json").read_bytes()
    for snapshot in Path("plain").glob("*.safetensors"):
        assert Path("run", snapshot.name).read_bytes() == snapshot.read_bytes()


def test_a_killed_run_goes_on_with_a_tracker_that_then_has_all_of_it(here: Path, recorder: Recorder) -> None:
    with dies_after(8, selftrain.TrainingRun, "one_step"), pytest.raises(Killed):
        main(f"{TRAIN} --outdir run".split())
    assert main(f"{TRAIN} --outdir run --log tensorboard".split()) == 0
    assert recorder.values["run"]["training/loss"] == curve("run", "loss")


def test_steps_that_a_tracker_has_are_not_sent_again(
    here: Path, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = f"{TRAIN} --outdir run --log tensorboard".split()
    with dies_after(8, selftrain.TrainingRun, "one_step"), pytest.raises(Killed):
        main(words)
    assert main(words) == 0
    assert recorder.steps == [8 * step for step in range(1, 11)], "each once, the two that were taken twice, too"
    first = json.loads(Path("run/tensorboard-run.json").read_text())
    assert first["step"] == 80
    assert main([*words, "--fresh"]) == 0 and recorder.steps[10:] == recorder.steps[:10]
    assert json.loads(Path("run/tensorboard-run.json").read_text())["run"] != first["run"]


@pytest.mark.parametrize("seconds", [0.0, 1e9])
def test_what_a_kill_took_from_a_tracker_is_sent_again(
    here: Path, recorder: Recorder, monkeypatch: pytest.MonkeyPatch, seconds: float
) -> None:
    """A kill leaves no time to finish; what was logged in the last `seconds` may be lost."""
    monkeypatch.setattr(trackers, "SECONDS_TO_KEEP", seconds)
    words = f"{TRAIN} --outdir run --log tensorboard".split()
    with monkeypatch.context() as patch, dies_after(8, selftrain.TrainingRun, "one_step"), pytest.raises(Killed):
        patch.setattr(trackers.Tracker, "__exit__", lambda *_: None)
        main(words)
    kept = json.loads(Path("run/tensorboard-run.json").read_text())["step"]
    assert kept == (48 if seconds == 0 else 0)
    assert main(words) == 0
    assert recorder.steps[8:] == list(range(kept + 8, 88, 8))


def test_a_tracker_gets_every_evaluation_the_report_and_the_training_within(here: Path, recorder: Recorder) -> None:
    assert main(f"{TUNE} {RESAMPLED} --out plain".split()) == 0
    with dies_after(8, rows, "sample_block"), pytest.raises(Killed):
        main(f"{TUNE} {RESAMPLED} --out run --log tensorboard".split())
    assert main(f"{TUNE} {RESAMPLED} --out run --log tensorboard".split()) == 0
    assert set(recorder.values) == {"run", "run/self-training-best-sampler"} == set(recorder.finished)
    told = recorder.values["run"]
    for name in ("w", "guidance", "distance", "precision", "recall"):
        assert told[f"selection/{name}"] == selected("run", name)
    report = json.loads(Path("run/scores.json").read_text())
    last = len(table("run/evaluations.csv")) + 1
    assert told["scores/base/distance"] == {last: report["base"]}
    assert told["scores/base_best_sampler/distance"].keys() == {last}
    training = recorder.values["run/self-training-best-sampler"]["training/loss"]
    assert training == {512 * int(row["step"]): float(row["loss"])
                        for row in table("run/self-training-best-sampler/training.csv")}  # fmt: skip
    for name in ("run.json", "tune.json"):
        ours, plain = (json.loads(Path(folder, name).read_text()) for folder in ("run", "plain"))
        assert ours.pop("seconds", 0) is not None and plain.pop("seconds", 0) is not None
        assert {key: value for key, value in ours.items() if value != plain[key]} == {}


def test_improve_tracks_its_training_and_its_search(here: Path, recorder: Recorder) -> None:
    words = f"{IMPROVE} --out run --log tensorboard --num_synthetic 20 --training_images 80 --batch 8 --lr 1e-3 "
    words += "--lr_rampup 0 --ema 0 --select_images 20 --limit 2 --sampler_scores 1 --no-baselines --num_steps 2"
    assert main(words.split()) == 0
    assert recorder.values["run/self-training"]["training/loss"] == curve("run/self-training", "loss")
    assert recorder.values["run"]["selection/distance"] == selected("run", "distance")
    assert recorder.configs["run"]["recipe"]["num_synthetic"] == 20
    assert "log" not in recorder.configs["run"]["recipe"]


def test_a_tracker_that_fails_is_warned_of_once_and_the_run_goes_on(
    here: Path, recorder: Recorder, capsys: pytest.CaptureFixture[str]
) -> None:
    recorder.fails_after = 3
    assert main(f"{TRAIN} --outdir run --log tensorboard".split()) == 0
    warnings = [line for line in capsys.readouterr().err.splitlines() if "--log" in line]
    assert len(warnings) == 1 and "--log tensorboard: the network is gone; the run goes on without" in warnings[0]
    assert_table_of_log("run", 10)
    recorder.fails_after = sys.maxsize
    Path("run/tensorboard-run.json").write_text("{")
    Path("run/snapshot-000000.080-kimg.safetensors").unlink()
    Path("run/training-state.pt").unlink()
    assert main(f"{TRAIN} --outdir run --log tensorboard".split()) == 0
    assert "tensorboard-run.json: damaged" in capsys.readouterr().err and len(recorder.steps) == 3


@pytest.mark.parametrize("command", [f"{TRAIN} --outdir run", f"{TUNE} --out run", f"{IMPROVE} --out run"])
@pytest.mark.parametrize("name", ["tensorboard", "wandb", "trackio"])
def test_a_package_that_is_missing_is_said_before_any_work(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str, name: str
) -> None:
    monkeypatch.setitem(sys.modules, name, None)  # as if it were not installed
    assert main(f"{command} --log {name}".split()) == 2
    assert f"--log {name}: the package {name} is not installed; pip install {name}" in capsys.readouterr().err
    assert not Path("run").exists()


def test_a_folder_called_as_a_package_is_none(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if any((Path(path) / "wandb" / "__init__.py").exists() for path in sys.path):
        pytest.skip("wandb is installed")
    Path("wandb").mkdir()
    monkeypatch.syspath_prepend(here)
    words = "--data real --outdir run --total_images 8 --log wandb"
    assert run_program(TrainTokenizer, words.split(), name="train_tokenizer.py") == 2
    assert "the package wandb is not installed" in capsys.readouterr().err


# The packages themselves


@pytest.fixture
def trained(here: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[dict[int, float]]:
    """The losses of a run that was stopped and went on with the tracker of this test, by images seen."""
    name = request.param
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("TRACKIO_DIR", str(here / "trackio"))  # read when it is imported
    pytest.importorskip(name)
    words = f"{TRAIN} --outdir run --log {name}".split()
    with dies_after(8, selftrain.TrainingRun, "one_step"), pytest.raises(Killed):
        main(words)
    assert main(words) == 0
    yield curve("run", "loss")
    shutil.rmtree("run")


@pytest.mark.parametrize("trained", ["tensorboard"], indirect=True)
def test_tensorboard_reads_the_curve_of_the_table(trained: dict[int, float]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator("run/tensorboard", size_guidance={"scalars": 0}).Reload()
    assert {event.step: event.value for event in events.Scalars("training/loss")} == pytest.approx(trained, rel=1e-6)


@pytest.mark.parametrize("trained", ["wandb"], indirect=True)
def test_wandb_keeps_an_offline_run_that_goes_on_under_its_identifier(trained: dict[int, float]) -> None:
    run = json.loads(Path("run/wandb-run.json").read_text())["run"]
    parts = sorted(Path("run/wandb").glob(f"offline-run-*-{run}/run-{run}.wandb"))
    assert len(parts) == 2 and all(b"training/loss" in part.read_bytes() for part in parts)


@pytest.mark.parametrize("trained", ["trackio"], indirect=True)
def test_trackio_has_the_curve_of_the_table(trained: dict[int, float]) -> None:
    (file,) = Path("trackio").glob("*.db")
    with sqlite3.connect(file) as database:
        rows = database.execute("select step, metrics from metrics order by id").fetchall()
    assert {step: json.loads(values)["training/loss"] for step, values in rows} == trained
