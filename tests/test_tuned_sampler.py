"""`neon tune` where it searches the sampler, too: the fair baseline, weights of its own, and what becomes of kills."""

import json
from pathlib import Path

import pytest
import torch

from neon import trained
from neon.checkpoint import load_state, open_checkpoint
from neon.cli import app as cli
from neon.data.images import ImageDataset
from neon.evaluate import features as rows
from neon.model import load_model
from neon.report.record import load
from tests.programs import Killed, dies_after, work_in, write_pair
from tests.workers import Workers

TUNE = (
    "tune --base base.safetensors --select-stats real.npz --features features.safetensors --num-images 40 "
    "--report-images 40 --batch-size 20 --set num_steps=3 solver=euler --device cpu --limit 3 --sampler-scores 6"
)
CALLS = 3
ROWS = {
    "base": CALLS,
    "base_best_sampler": CALLS,
    "base_twice_the_calls": 2 * CALLS,
    "base_converged": 35,
    "self_trained": CALLS,
    "neon": CALLS,
    "neon_best_sampler": CALLS,
    "sims": 2 * CALLS,
}


def run(command: str) -> int:
    return cli.main(command.split())


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, its statistics, and a self-training on its own samples as the programs leave it."""
    folder = tmp_path_factory.mktemp("files")
    write_pair(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        sampler = "--num_steps 3 --set solver=euler"
        assert run(f"sample --network base.safetensors --num_images 16 --outdir s.zip {sampler}") == 0
        training = "--total_images 32 --batch 8 --lr 1e-3 --lr_rampup 0 --ema 0"
        assert run(f"selftrain --network base.safetensors --data s.zip --outdir self {training}") == 0
    (snapshot,) = (folder / "self").glob("snapshot-*.safetensors")
    snapshot.rename(folder / "trained.safetensors")
    return folder


@pytest.fixture(scope="module")
def finished(files: Path) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(files)
        assert run(f"{TUNE} --self-trained trained.safetensors --out run") == 0
    return files / "run"


@pytest.fixture
def here(files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return work_in(tmp_path, files, monkeypatch)


def scores(folder: Path) -> dict:
    return json.loads((folder / "scores.json").read_text())


def names(folder: Path) -> list[str]:
    return [json.loads(line)["name"] for line in (folder / "evaluations.jsonl").read_text().splitlines()]


def test_every_way_to_spend_calls_and_scores_is_in_the_table(finished: Path) -> None:
    found = scores(finished)
    assert {key: row["network_calls"] for key, row in found["rows"].items()} == ROWS
    assert found["base"] == found["rows"]["base"]["distance"] and found["neon"] == found["rows"]["neon"]["distance"]
    assert found["rows"]["base"]["settings"]["num_steps"] == CALLS, "the base as it was asked for"
    assert {key: len(row["blocks"]) for key, row in found["rows"].items()} == {
        key: 1 if calls > 2 * CALLS else 3 for key, calls in ROWS.items()
    }
    assert found["fair"] == "base_best_sampler" and found["rows"][found["fair"]]["difference"] is None
    assert all(row["difference"] is not None for key, row in found["rows"].items() if key != found["fair"])


def test_no_sampler_is_compared_that_takes_more_calls_and_the_best_on_selection_is_used(finished: Path) -> None:
    report = load(finished)
    model = load_model(finished.parent / "base.safetensors")
    assert len(report.samplers) <= 6 and report.samplers[0].settings == "as asked for"
    lowest = min(report.samplers, key=lambda one: float("inf") if one.value is None else one.value)
    used = scores(finished)["rows"]["neon_best_sampler"]["settings"]
    for part in lowest.settings.split(", "):
        name, value = part.split()
        assert str(used[name]) == value or float(used[name]) == float(value), part
    settings = model.default_settings.__class__(**{**used, "S_max": float("inf")})
    assert model.calls(settings) <= CALLS
    log = names(finished)
    assert len(set(log)) == len(log), "nothing is scored twice"
    assert sum(name == f"selection 0: w 0, {lowest.settings}" for name in log) == 1, "w = 0 there is known already"


def test_what_is_advised_samples_what_was_scored(
    finished: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The commands of the last lines, as they are printed, warn of nothing and give the reported images."""
    monkeypatch.chdir(finished.parent)
    assert run(f"{TUNE} --self-trained trained.safetensors --out run") == 0
    made, advice = capsys.readouterr().out.splitlines()[-2:]
    row = scores(finished)["rows"][scores(finished)["best"]]
    merge = made.partition("(as by neon ")[2].partition("),")[0]
    assert run(merge.replace("run/improved.safetensors", "again.safetensors")) == 0
    ours, theirs = load_state("run/improved.safetensors"), load_state("again.safetensors")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    capsys.readouterr()
    sample = advice.removeprefix("Next: neon ").replace("50000", "2").replace("samples.zip", "few")
    assert run(sample) == 0
    assert "very different sampler" not in capsys.readouterr().err
    settings = json.loads(Path("few/dataset.json").read_text())["sampler"]["settings"]
    assert settings == row["settings"]


def test_weights_are_not_kept_where_they_are_not_wanted(
    finished: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(finished.parent)
    (finished / "improved.safetensors").unlink(missing_ok=True)
    assert run(f"{TUNE} --self-trained trained.safetensors --out run --no-save") == 0
    assert not (finished / "improved.safetensors").exists()
    assert "Next: neon merge --base" in capsys.readouterr().out


def test_w_for_that_sampler_is_of_a_synthetic_set_drawn_with_it(finished: Path) -> None:
    own = finished / "synthetic-best-sampler"
    first, second = ImageDataset(finished.parent / "s.zip"), ImageDataset(own)
    assert len(first) == len(second) == 16, "as large as the first"
    assert not torch.equal(first.load([0])[0], second.load([0])[0])
    (snapshot,) = (finished / "self-training-best-sampler").glob("snapshot-*.safetensors")
    with open_checkpoint(snapshot) as one, open_checkpoint(finished.parent / "trained.safetensors") as other:
        trainings = [json.loads(file.metadata["training"]) for file in (one, other)]
        assert one.metadata["images_seen"] == other.metadata["images_seen"]
    assert trainings[0]["recipe"] == trainings[1]["recipe"], "trained as the first"
    result = json.loads((finished / "tune.json").read_text())
    if scores(finished)["best"] == "neon_best_sampler" and result["recommended"] == "neon":
        assert result["self_trained"].endswith(snapshot.name) and result["settings"]["num_steps"] <= CALLS


@pytest.mark.parametrize(("module", "name", "times"), [(rows, "sample_block", 9), (trained, "save_model", 0)])
def test_a_run_killed_in_the_middle_ends_as_one_that_was_not(
    here: Path, finished: Path, module: object, name: str, times: int
) -> None:
    """In the search for the sampler, and where the second self-training leaves its weights."""
    with pytest.raises(Killed), dies_after(times, module, name):
        run(f"{TUNE} --self-trained trained.safetensors --out killed")
    assert run(f"{TUNE} --self-trained trained.safetensors --out killed") == 0
    whole, killed = scores(finished), scores(Path("killed"))
    for one in (whole, killed):
        del one["provenance"]
    assert killed == whole


def test_the_search_can_be_left_out_and_given_weights_be_used_again(here: Path) -> None:
    assert run(f"{TUNE} --self-trained trained.safetensors --no-resample --no-baselines --out given") == 0
    assert not Path("given/self-training-best-sampler").exists()
    assert {"neon_best_sampler"} <= scores(Path("given"))["rows"].keys() <= ROWS.keys() - {"sims", "base_converged"}
    assert any("drawn with another sampler" in note for note in load("given").notes)
    plain = TUNE.replace("--sampler-scores 6", "--no-tune-sampler")
    assert run(f"{plain} --self-trained trained.safetensors --out plain") == 0
    assert scores(Path("plain"))["rows"].keys() == ROWS.keys() - {
        "base_best_sampler", "neon_best_sampler",
    }  # fmt: skip
    assert load("plain").samplers == () and scores(Path("plain"))["fair"] == "base"


def test_weights_of_unknown_training_are_used_as_they_are(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without a record there is no telling how to train again."""
    assert run(f"{TUNE} --self-trained tuned.safetensors --no-baselines --out unknown") == 0
    assert "tuned.safetensors" in capsys.readouterr().err
    assert any("drawn with another sampler" in note for note in load("unknown").notes)


def test_two_processes_search_the_same_samplers(here: Path, finished: Path, workers: Workers) -> None:
    flags = f"{TUNE} --self-trained trained.safetensors --out two"
    workers.run("neon.cli.app:main", flags.split(), folder=here, world_size=2)
    assert names(Path("two")) == names(finished)
    for key, row in scores(Path("two"))["rows"].items():
        assert row["distance"] == pytest.approx(scores(finished)["rows"][key]["distance"], rel=1e-9)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--no-tune-sampler", "--sampler_scores: is of the search for the best sampler"),
        ("--sampler_images 0", "--sampler_images 0: expected at least 1"),
        ("--synthetic-images 0", "--synthetic_images 0: expected at least 1"),
    ],
)
def test_what_makes_no_sense_is_refused_in_one_line(
    here: Path, flags: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(f"{TUNE} --self-trained trained.safetensors {flags} --out refused") == 2
    assert message in capsys.readouterr().err
