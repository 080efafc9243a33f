"""`neon frontier` as users run it, on a tiny network, and what it says of its points."""

import json
from pathlib import Path

import pytest

from neon.checkpoint import load_state
from neon.cli import app as cli
from neon.errors import RequestError
from neon.evaluate import Scores
from neon.evaluate import features as rows
from neon.evaluate import run as evaluation
from neon.model import load_model, save_model
from neon.report.frontier import (
    Frontier,
    FrontierPoint,
    frontier_conclusion,
    frontier_table,
    load_frontier,
    save_frontier,
)
from neon.report.record import Row
from neon.tune.frontier import samplers_at
from tests.programs import Killed, dies_after, images, work_in, write_pair
from tests.tiny import tiny_edm, tiny_imm, tiny_var
from tests.workers import Workers

COMMON = (
    "--base base.safetensors --self-trained tuned.safetensors --select-stats real.npz --features features.safetensors "
    "--num-images 20 --report-images 20 --batch-size 7 --device cpu"
)
USUAL = f"frontier {COMMON} --limit 2 --set solver=heun"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    write_pair(folder)
    save_model(folder / "other.safetensors", tiny_edm(2))
    return folder


@pytest.fixture
def here(files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return work_in(tmp_path, files, monkeypatch)


def frontier(flags: str) -> int:
    return cli.main([*USUAL.split(), *flags.split()])


def result(folder: str) -> dict:
    return json.loads(Path(folder, "frontier.json").read_text())


def log(folder: str) -> dict[str, float]:
    lines = Path(folder, "evaluations.jsonl").read_text().splitlines()
    return {entry["name"]: entry["distance"] for entry in map(json.loads, lines)}


def test_each_point_is_the_sampler_with_the_most_steps_that_fit_and_equal_ones_are_one(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert frontier("--calls 5 4 3 --out run --real-images real --nearest-k 3") == 0
    found = result("run")
    assert [point["calls"] for point in found["points"]] == [3, 5], "with Heun's 2 steps 3 and 4 are the same"
    assert [point["settings"]["num_steps"] for point in found["points"]] == [2, 3]
    for point in found["points"]:
        base, neon = point["base"], point["neon"]
        assert len(base["blocks"]) == 3 and base["precision"] is not None and base["recall"] is not None
        assert point["difference"] == pytest.approx(neon["distance"] - base["distance"])
        assert (base == neon) == (point["w"] == 0)
    names = list(log("run"))
    one_step = [i for i, name in enumerate(names) if "num_steps 2" in name]
    assert one_step == list(range(len(one_step))), "from cheap to dear"
    table = capsys.readouterr().out
    assert found["summary"] in table and "precision" in table
    assert Path("run/frontier.png").read_bytes().startswith(b"\x89PNG")
    header, *lines = Path("run/frontier.csv").read_text().splitlines()
    first = dict(zip(header.split(","), lines[0].split(","), strict=True))
    assert float(first["neon_distance"]) == found["points"][0]["neon"]["distance"] and len(lines) == 2


def test_a_point_does_not_depend_on_those_before_it_and_more_can_be_added(here: Path) -> None:
    assert frontier("--calls 3 5 --w 0.5 1 --out both") == 0
    assert frontier("--calls 5 --w 0.5 1 --out more") == 0
    assert result("more")["points"] == result("both")["points"][1:]
    before = log("more")
    assert frontier("--calls 3 5 --w 0.5 1 --out more") == 0
    assert list(log("more"))[: len(before)] == list(before), "what is done is not done again"
    assert result("more")["points"] == result("both")["points"]


def test_a_killed_run_goes_on_to_the_same_result(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert frontier("--calls 3 5 --out whole") == 0
    monkeypatch.setattr(evaluation, "SAVE_EVERY_SECONDS", 0.0)
    with dies_after(19, rows, "sample_block"), pytest.raises(Killed):
        frontier("--calls 3 5 --out killed")
    assert not Path("killed/frontier.json").exists() and log("killed")
    assert frontier("--calls 3 5 --out killed") == 0
    assert result("killed")["points"] == result("whole")["points"]
    with dies_after(0, rows, "sample_block"):
        assert frontier("--calls 3 5 --out killed") == 0, "what is done is not done again"


def test_each_point_can_have_self_trained_weights_of_its_own(here: Path) -> None:
    base = load_model("base.safetensors")
    recipe = {"batch_size": 8, "lr": 1e-3, "lr_rampup_kimg": 0, "ema_halflife_kimg": 0}
    training = {"images_seen": "16", "training": json.dumps({"images": 4, "recipe": recipe})}
    save_model("tuned-so.safetensors", base, load_state("tuned.safetensors"), training)
    assert (
        frontier("--calls 3 5 --self-trained tuned-so.safetensors --resample --parallel ddp --workers 1 --out run") == 0
    )
    found = result("run")
    assert all((point["w"] == 0) == (point["self_trained"] is None) for point in found["points"])
    few, more = (images(f"run/synthetic-{calls}-calls")[0] for calls in (3, 5))
    assert len(few) == len(more) == 4 and not (few == more).all()
    assert all(list(Path("run", f"self-training-{calls}-calls").glob("snapshot-*")) for calls in (3, 5))
    assert load_frontier("run").resampled  # type: ignore[union-attr]
    assert frontier("--calls 3 5 --self-trained tuned-so.safetensors --out run") == 2, (
        "a run with the given weights is another"
    )


def test_two_processes_find_as_one_does(here: Path, workers: Workers) -> None:
    assert frontier("--calls 3 --out alone") == 0
    workers.run("neon.cli.app:main", f"{USUAL} --calls 3 --out two".split(), folder=here, world_size=2)
    assert log("two") == pytest.approx(log("alone"), rel=1e-9)
    assert [point["w"] for point in result("two")["points"]] == [point["w"] for point in result("alone")["points"]]


def test_the_results_go_on_the_page_of_a_run(here: Path) -> None:
    tune = f"tune {COMMON} --limit 2 --set num_steps=2 solver=euler --no-tune-sampler --no-baselines --out run"
    assert cli.main(tune.split()) == 0
    page = Path("run/report.html")
    before = page.read_text()
    assert "Distance against calls" not in before
    assert frontier("--calls 3 5 --out measured --into run") == 0
    with_it = page.read_text()
    assert "Distance against calls" in with_it and 'aria-label="fd_tiny6 against network calls' in with_it
    page.unlink()
    assert cli.main(["report", "run"]) == 0 and page.read_text() == with_it
    for name in ("frontier.json", "frontier.csv", "frontier.png"):
        assert Path("run", name).read_bytes() == Path("measured", name).read_bytes()
    Path("run/frontier.json").unlink()
    assert cli.main(["report", "run"]) == 0 and page.read_text() == before


@pytest.mark.parametrize("content", ["", "[]", '{"metric": "x", "resampled": false, "provenance": {}, "points": [{}]}'])
def test_a_damaged_record_is_one_line(tmp_path: Path, content: str) -> None:
    Path(tmp_path, "frontier.json").write_text(content)
    with pytest.raises(RequestError, match=r"frontier\.json: damaged"):
        load_frontier(tmp_path)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--calls", "--calls: expected one or several numbers"),
        ("--calls 3 0", "--calls 0: expected at least 1"),
        ("--calls 3 --set solver=heun guidance=0.5", "--calls 3: this sampler takes at least 6 network calls an image"),
        ("--calls 3 --blocks 2", "--blocks 2: expected at least 3"),
        ("--calls 3 --resample", "--resample: tuned.safetensors does not say how many images it was trained on"),
        ("--calls 3 --parallel fsdp", "--parallel: is of the self-trainings of --resample"),
        ("--calls 3 --training-images 8", "--training_images: is of the self-trainings of --resample"),
        ("--calls 3 --into nowhere", "nowhere: no report to show (report.json"),
        ("--calls 3 --self-trained base.safetensors", "base.safetensors: holds the weights of the base"),
    ],
)
def test_a_wrong_request_is_one_line(here: Path, capsys: pytest.CaptureFixture[str], flags: str, message: str) -> None:
    assert frontier(f"{flags} --out run") == 2
    assert message in " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert not Path("run/frontier.json").exists()


def test_the_page_of_another_base_or_metric_is_left_as_it_is(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tune = f"tune {COMMON} --limit 2 --set num_steps=2 solver=euler --no-tune-sampler --no-baselines --out run"
    assert cli.main(tune.split()) == 0
    assert frontier("--calls 3 --into run --out other --base other.safetensors") == 2
    assert "--into run: a run of another base than other.safetensors" in capsys.readouterr().err
    record = Path("run/report.json")
    record.write_text(record.read_text().replace("fd_tiny6", "fid"))
    assert frontier("--calls 3 --into run --out other") == 2
    assert "--into run: scored by fid, expected fd_tiny6" in capsys.readouterr().err
    assert not Path("other").exists() and not Path("run/frontier.json").exists()


def test_samplers_without_steps_and_models_that_count_no_calls_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    var = tiny_var()
    with pytest.raises(RequestError, match="--calls: the sampler of VAR has no number of steps; an image always takes"):
        samplers_at(var, var.default_settings, [5])
    edm = tiny_edm()
    monkeypatch.setattr(edm, "calls", lambda settings: None)
    with pytest.raises(RequestError, match="--calls: edm does not count its network calls"):
        samplers_at(edm, edm.default_settings, [5])


def test_steps_are_found_for_every_number_of_calls() -> None:
    model = tiny_imm()
    given = model.default_settings
    found = samplers_at(model, given, [8, 2, 3])
    each = model.calls(given) // given.num_steps
    assert list(found) == sorted({number // each * each for number in (2, 3, 8)})
    assert all(model.calls(settings) == calls for calls, settings in found.items())


def point(calls: int, base: tuple[float, ...], neon: tuple[float, ...], w: float = 1.0) -> FrontierPoint:
    def row(name: str, values: tuple[float, ...]) -> Row:
        return Row(name=name, key=name, blocks=tuple(Scores(distance=value, num_images=10) for value in values))

    return FrontierPoint(
        calls=calls, settings={"num_steps": calls}, w=w, base=row("base", base), neon=row("neon", neon)
    )  # fmt: skip


FIVE = point(5, (39.0, 40.0, 41.0), (9.7, 9.8, 9.9))
TEN = point(10, (11.8, 11.9, 12.0), (8.0, 8.1, 8.2))
NINETEEN = point(19, (9.5, 9.6, 9.7), (9.4, 9.7, 9.6))
MANY = point(35, (4.0, 4.1, 4.2), (4.0, 4.1, 4.2), w=0.0)


@pytest.mark.parametrize(
    ("points", "text"),
    [
        (
            (FIVE, TEN, NINETEEN, MANY),
            "With 5 network calls Neon (9.80) gives what the base needs 10 to 19 calls for. "
            "At 19 and 35 calls there is no gain beyond the noise.",
        ),
        ((FIVE, MANY), "(9.80) gives what the base needs 5 to 35 calls for. At 35 calls there is no gain"),
        ((FIVE, TEN), "With 5 network calls Neon (9.80) does better than the base with 10 (11.90)."),
        ((TEN,), "With 10 network calls Neon (8.10) does better than the base with as many (11.90)."),
        ((NINETEEN, MANY), "Neon gains nothing beyond the noise at any of these numbers of network calls."),
    ],
)
def test_one_sentence_says_what_calls_neon_saves(points: tuple[FrontierPoint, ...], text: str) -> None:
    assert text in frontier_conclusion(Frontier(metric="fd_x", points=points))


def test_the_table_shows_what_was_scored_and_is_read_back(tmp_path: Path) -> None:
    made = Frontier(metric="fd_x", points=(FIVE, MANY))
    lines = frontier_table(made)
    assert lines[0] == ["calls", "w", "fd_x, base", "Neon", "difference"], "precision was not scored"
    assert lines[1][:4] == ["5", "1", "40.00 ± 1.00", "9.80 ± 0.10"] and lines[1][4].startswith("-30.20 [")
    assert lines[2] == ["35", "0", "4.10 ± 0.10", "4.10 ± 0.10", ""], "Neon is the base there"
    save_frontier(made, tmp_path)
    assert frontier_table(load_frontier(tmp_path)) == lines  # type: ignore[arg-type]
