"""Files of an earlier commit open, and the runs that it left unfinished go on: tests/fixtures/written_by_553f1e5.

The commands are those that users type. Where the processor and torch are those that computed the recorded results,
these come out to the bit. Elsewhere sums are rounded in another order: with fewer vector instructions, or two threads,
images stayed the same, weights moved by 0.03% of the way that training took, and distances by 0.004%; ten times that is
let pass. A run of another version of neon or torch may be refused, in one line.
"""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch

import neon
from neon.checkpoint import load_state, open_checkpoint
from neon.metrics import Statistics
from neon.model import load_model
from tests.programs import ROOT, images, log
from tests.test_own_model import run

OLD = Path(__file__).parent / "fixtures" / "written_by_553f1e5"
KILLED, FINISHED = OLD / "killed", OLD / "finished"
HALF, WHOLE = (f"training/snapshot-000000.{kimg}-kimg.safetensors" for kimg in ("096", "192"))
SNAPSHOT, MERGED = FINISHED / WHOLE, FINISHED / "neon.safetensors"

SAMPLE = (
    "neon sample --network base.safetensors --num_images 64 --batch_size 16 --set num_steps=5 solver=euler "
    "--outdir synthetic.zip"
)
SAMPLE_EDM = (
    "python edm/sample.py --network_pkl base.safetensors --seeds 0-31 --batch 16 --num_steps 5 --solver euler "
    "--outdir sampled"
)
TRAIN = (
    "python edm/finetune.py --transfer base.safetensors --data synthetic.zip --augment 0 --batch 32 --batch_gpu 16 "
    "--lr 1e-3 --lr_rampup 0 --ema 0.0001 --duration 0.000192 --tick 0.096 --snap 1 --state_every 0.000001 "
    "--outdir training"
)
SCORE = (
    f"python edm/calculate_fid.py --network_pkl base.safetensors --self_trained {WHOLE} --w 0 1 "
    "--ref test-statistics.npz --features features.safetensors --precision_recall synthetic.zip --nearest_k 3 "
    "--seeds 1000-1063 --batch_size 16 --num_steps 3 --solver euler --run_dir scoring"
)
TUNE = (
    f"neon tune --base base.safetensors --self-trained {HALF} {WHOLE} --select-stats train-statistics.npz "
    "--no-tune-sampler --no-baselines "
    "--report-stats test-statistics.npz --features features.safetensors --num-images 64 --report-images 64 "
    "--batch-size 16 --set num_steps=3 solver=euler --guidance 0 2 --limit 6 --out tuning"
)


def machine() -> dict[str, str]:
    """What rounding depends on: torch, and the processor where the system tells which."""
    facts = Path("/proc/cpuinfo")
    text = facts.read_text() if facts.exists() else ""
    return {"torch": torch.__version__, **dict(re.findall(r"(vendor_id|cpu family|model|stepping)\s*: (.*)", text))}


SAME_MACHINE = machine() == json.loads((OLD / "machine.json").read_text())


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with the programs, what the old runs started from, and the images they sampled."""
    (tmp_path / "edm").symlink_to(ROOT / "edm")
    for name in ("base.safetensors", "features.safetensors", "train-statistics.npz", "test-statistics.npz"):
        (tmp_path / name).symlink_to(ROOT / "neon" / "demo" / name)
    shutil.copy(FINISHED / "synthetic.zip", tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def killed(name: str) -> None:
    """Put the folder `name` here as a kill left it."""
    shutil.copytree(KILLED / name, name)


def finished(name: str) -> None:
    """Put the folder `name` here as its finished run left it."""
    killed(name)
    for state in ("training-state.pt", "evaluation.safetensors"):
        Path(name, state).unlink(missing_ok=True)
    shutil.copytree(FINISHED / name, name, dirs_exist_ok=True)


def go_on(command: str, folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Run the command to whose run `folder` belongs; skips the test where that may be refused, and is in one line."""
    written_by = json.loads(Path(folder, "run.json").read_text())
    now = {"neon": neon.__version__, "torch": torch.__version__}
    status = run(f"{command} --device cpu")
    if status and any(written_by.get(name, version) != version for name, version in now.items()):
        *_, line = capsys.readouterr().err.splitlines()
        assert status == 2 and f"{folder}: holds a run with other settings" in line and "--fresh" in line
        pytest.skip(line)
    assert status == 0


def same_images(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert found.shape == expected.shape
    assert (found.int() - expected.int()).abs().max() <= (0 if SAME_MACHINE else 1)


def same_distance(found: float, expected: float) -> None:
    """Not to the last bit, which U-Nets of one head have changed since."""
    assert found == pytest.approx(expected, rel=4e-4)


def same_choice(here: Path) -> None:
    found, expected = (json.loads((folder / "tuning/tune.json").read_text()) for folder in (here, FINISHED))
    for name in ("metric", "recommended", "self_trained", "evaluations"):
        assert found[name] == expected[name], name
    for name in ("w", "guidance"):
        assert found[name] == pytest.approx(expected[name], abs=0 if SAME_MACHINE else 0.1)
    for name in ("base", "neon"):
        same_distance(found[name], expected[name])


# Weights, merged weights, statistics


@pytest.mark.parametrize("old", [SNAPSHOT, KILLED / HALF, MERGED], ids=["snapshot", "of a killed run", "merged"])
def test_old_weights_are_shown_sampled_from_and_merged(
    here: Path, capsys: pytest.CaptureFixture[str], old: Path
) -> None:
    assert run(f"neon inspect {old} --json") == 0
    told = json.loads(capsys.readouterr().out)
    base, weights = load_state("base.safetensors"), load_state(old)
    assert told["architecture"] == "edm" and told["tensors"].keys() == base.keys() == weights.keys()
    model = load_model(old)
    assert model.image_shape == (1, 14, 14) and model.num_classes == 10
    assert run(f"neon sample --network {old} --num_images 4 --set num_steps=2 --outdir few --device cpu") == 0
    assert images("few")[0].shape == (4, 1, 14, 14)
    assert run(f"neon merge --base base.safetensors --self-trained {old} -w 0 -1 --output w{{w}}.safetensors") == 0
    for name, expected in (("w0.safetensors", base), ("w-1.safetensors", weights)):
        merged = load_state(name)
        assert all(torch.equal(merged[key], expected[key]) for key in expected)


def test_the_same_merge_gives_the_weights_of_the_old_one_and_says_of_what(here: Path) -> None:
    assert run(f"neon merge --base base.safetensors --self-trained {SNAPSHOT} -w 1 --output again.safetensors") == 0
    old, again = load_state(MERGED), load_state("again.safetensors")
    assert old.keys() == again.keys() and all(torch.equal(old[name], again[name]) for name in old)
    with open_checkpoint(MERGED) as before, open_checkpoint("again.safetensors") as now:
        assert before.metadata["w"] == "1.0" and before.metadata["self_trained"] == SNAPSHOT.name
        same = before.metadata.keys() - {"neon_version"}
        assert {name: before.metadata[name] for name in same} == {name: now.metadata[name] for name in same}


def test_old_statistics_are_those_of_the_same_images_today(here: Path) -> None:
    usual = "--features features.safetensors --device cpu"
    assert run(f"neon stats synthetic.zip again.npz {usual}") == 0
    old, again = Statistics.load(FINISHED / "synthetic.npz"), Statistics.load("again.npz")
    assert old.count == again.count == 64
    assert abs(old.mu - again.mu).max() < 1e-5 and abs(old.sigma - again.sigma).max() < 1e-4
    for name, scored in (("old", FINISHED / "synthetic.npz"), ("images", Path("synthetic.zip"))):
        assert run(f"neon fid {scored} test-statistics.npz {usual} --json {name}.json") == 0
    told = [json.loads(Path(f"{name}.json").read_text()) for name in ("old", "images")]
    old_distance, distance = (one[one["metric"]] for one in told)
    assert old_distance == pytest.approx(distance, rel=1e-4)


# Runs that were killed


def test_a_killed_sampling_goes_on_and_keeps_the_images_that_are_there(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    killed("sampled")
    first = Path("sampled/00000015.png")  # the last of the only whole block
    before = first.stat().st_mtime_ns
    go_on(SAMPLE_EDM, "sampled", capsys)
    (found, labels), (expected, classes) = images("sampled"), images("synthetic.zip")
    same_images(found, expected[:32])
    assert labels is not None and classes is not None and torch.equal(labels, classes[:32])
    assert first.stat().st_mtime_ns == before


def test_a_killed_sampling_into_a_zip_goes_on(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("synthetic.zip").unlink()
    killed("synthetic.zip.unfinished")
    go_on(SAMPLE, "synthetic.zip.unfinished", capsys)
    (found, labels), (expected, classes) = images("synthetic.zip"), images(str(FINISHED / "synthetic.zip"))
    same_images(found, expected)
    assert labels is not None and classes is not None and torch.equal(labels, classes)
    assert not Path("synthetic.zip.unfinished").exists()


def test_a_killed_self_training_goes_on_to_the_recorded_weights(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It was killed in its fifth step of six: after that was logged, before the state of the run was saved again."""
    killed("training")
    go_on(TRAIN, "training", capsys)
    found, expected, base = (load_state(path) for path in (WHOLE, SNAPSHOT, "base.safetensors"))
    assert found.keys() == expected.keys()
    if SAME_MACHINE:
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    away, moved = (
        torch.cat([(found[name] - other[name]).double().flatten() for name in found]).norm()
        for other in (expected, base)
    )
    assert away < 3e-3 * moved
    assert load_model(WHOLE).architecture == "edm"
    done = [json.loads(line) for line in (KILLED / "training" / "training.jsonl").read_text().splitlines()]
    recorded = [json.loads(line) for line in (FINISHED / "training" / "training.jsonl").read_text().splitlines()]
    assert log("training")[:4] == done[:4], "four steps were not taken again"
    assert [entry["loss"] for entry in log("training")] == pytest.approx([e["loss"] for e in recorded], rel=1e-4)


def test_a_killed_evaluation_goes_on_to_the_recorded_scores(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It was killed inside the second w."""
    finished("training")
    killed("scoring")
    go_on(SCORE, "scoring", capsys)
    found, expected = (json.loads((folder / "scoring/scores.json").read_text()) for folder in (here, FINISHED))
    assert found.keys() == expected.keys() and found["0.0"] == expected["0.0"]
    same_distance(found["1.0"]["distance"], expected["1.0"]["distance"])
    for share in ("precision", "recall", "density", "coverage"):
        assert found["1.0"][share] == pytest.approx(expected["1.0"][share], abs=0 if SAME_MACHINE else 0.1)


def test_a_killed_choice_of_w_goes_on_to_the_recorded_one(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It was killed inside the fifth point of six."""
    finished("training")
    killed("tuning")
    go_on(TUNE, "tuning", capsys)
    entries = Path("tuning/evaluations.jsonl").read_text()
    assert entries.startswith((KILLED / "tuning/evaluations.jsonl").read_text()), "four points were not scored again"
    same_choice(here)


# Runs that were finished


def test_a_finished_choice_of_w_is_reported_again(here: Path) -> None:
    finished("tuning")
    assert run("neon report tuning") == 0
    page = Path("tuning/report.html").read_text()
    for text in ("w = 0.72", "guidance 0.6", "123.55", "101.22", "0.192 kimg"):
        assert text in page, text


def test_finished_runs_have_nothing_left_to_do(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    finished("training")
    finished("tuning")
    before = {path: path.read_bytes() for path in (Path(HALF), Path(WHOLE), Path("tuning/evaluations.jsonl"))}
    go_on(TRAIN, "training", capsys)
    assert "the last of 2 snapshots, 192 images seen" in capsys.readouterr().out
    go_on(TUNE, "tuning", capsys)
    assert {path: path.read_bytes() for path in before} == before
    same_choice(here)
