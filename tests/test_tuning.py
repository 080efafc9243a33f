"""`neon tune` and `neon report` as users run them, on a tiny network."""

import json
import resource
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from neon.checkpoint import load_state, save_safetensors
from neon.cli import app as cli
from neon.cli.choose import Tune
from neon.cli.flags import settings_with
from neon.errors import RequestError
from neon.evaluate import features as rows
from neon.evaluate import run as evaluation
from neon.metrics import Statistics, frechet_distance
from neon.model import GenerativeModel, load_model, save_model
from neon.noise import Purpose, image_seeds
from neon.report.record import load
from neon.runtime.distributed import Processes
from neon.tune import pictures
from neon.tune.plan import TunePlan
from neon.tune.snapshots import as_file_name, budgets, snapshot_names
from tests.programs import Killed, dies_after, work_in, write_pair
from tests.tiny import tiny_edm, tiny_imm
from tests.workers import Workers, ended
from VAR.settings import VARSettings

USUAL = (
    "--base base.safetensors --self-trained tuned.safetensors --select-stats real.npz --features features.safetensors "
    "--num-images 20 --report-images 20 --batch-size 7 --set num_steps=2 solver=euler --device cpu "
    "--no-tune-sampler --no-baselines"
)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, two snapshots on one line and one that is broken, features, statistics, and images."""
    folder = tmp_path_factory.mktemp("files")
    write_pair(folder)
    base = load_model(folder / "base.safetensors")
    weights, tuned = base.network.state_dict(), load_state(folder / "tuned.safetensors")
    for name, times in (("longer", 2.0), ("broken", 1e31)):
        moved = {key: tensor + times * (tuned[key] - tensor) for key, tensor in weights.items()}
        save_model(folder / f"{name}.safetensors", base, moved)
    save_model(folder / "unconditional.safetensors", tiny_edm(0, label_dim=0))
    return folder


@pytest.fixture
def here(files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return work_in(tmp_path, files, monkeypatch)


def tune(flags: str) -> int:
    limit = [] if "--grid" in flags else ["--limit", "4"]
    return cli.main(["tune", *USUAL.split(), *limit, *flags.split()])


def result(folder: str) -> dict:
    return json.loads(Path(folder, "tune.json").read_text())


def log(folder: str) -> list[dict]:
    return [json.loads(line) for line in Path(folder, "evaluations.jsonl").read_text().splitlines()]


def test_a_run_tells_its_choice_and_reports_it_on_images_that_chose_nothing(here: Path) -> None:
    assert tune("--out run --real-images real --nearest-k 3") == 0
    found = result("run")
    assert found["evaluations"] <= 4 and found["blocks"] == 3 and found["metric"] == "fd_tiny6"
    names = [entry["name"] for entry in log("run")]
    assert len(set(names)) == len(names), "nothing is scored twice"
    assert names[0] == "selection 0: w 0"
    assert {name.split(":")[0] for name in names} == {"selection 0", "report 0", "report 1", "report 2"}
    report = load("run")
    assert report.rows[0].name == "base" and all(len(row.blocks) == 3 for row in report.rows)
    assert {0.0, -1.0, -0.5} <= report.samples.grids.keys()
    assert found["recommended"] == ("neon" if found["w"] else "base")
    page = Path("run/report.html")
    before = page.read_bytes()
    page.unlink()
    assert cli.main(["report", "run"]) == 0 and page.read_bytes() == before


def test_selection_and_report_share_no_seed() -> None:
    selection = set(image_seeds(Purpose.SELECTION, 0, 10_000))
    for block in range(3):
        assert selection.isdisjoint(image_seeds(Purpose.REPORT, 0, 10_000, start=block * 10_000))


def test_guidance_snapshots_and_grids_are_searched(here: Path) -> None:
    both = "--self-trained tuned.safetensors longer.safetensors"
    assert tune(f"{both} --guidance 0 1 --limit 7 --out search") == 0
    assert result("search")["evaluations"] <= 7 and result("search")["guidance"] is not None
    assert tune(f"{both} --grid 0 1 --guidance-grid 0 1 --out grid") == 0
    names = [entry["name"].removeprefix("selection 0: ") for entry in log("grid") if "selection" in entry["name"]]
    assert sorted(names) == sorted(
        ["w 0, guidance 0", "w 0, guidance 1"]
        + [f"w 1, guidance {g}, {name}" for g in (0, 1) for name in ("tuned", "longer")]
    )


def test_a_run_that_was_killed_inside_a_point_goes_on_to_the_same_result(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert tune("--out whole") == 0
    monkeypatch.setattr(evaluation, "SAVE_EVERY_SECONDS", 0.0)
    with pytest.raises(Killed), dies_after(4, rows, "sample_block"):
        tune("--out killed")
    assert len(log("killed")) == 1 and Path("killed/evaluation.safetensors").exists()
    assert tune("--out killed") == 0
    whole, killed = result("whole"), result("killed")
    for name in ("w", "base", "neon", "gain", "best_on_selection"):
        assert whole[name] == killed[name], name
    with dies_after(0, rows, "sample_block"):
        assert tune("--out killed") == 0, "what is done is not done again"


def test_the_search_sees_the_statistics_of_its_points_and_makes_lost_ones_again(here: Path) -> None:
    assert tune("--out run") == 0
    best = result("run")["best_on_selection"]
    kept = sorted(Path("run/statistics").glob("*.npz"))
    assert len(kept) == result("run")["evaluations"]
    distances = {path: frechet_distance(Statistics.load("real.npz"), Statistics.load(path)) for path in kept}
    assert min(distances.values()) == pytest.approx(best["value"], rel=1e-9)
    before = kept[1].read_bytes()
    kept[1].unlink()
    assert tune("--out run") == 0
    assert kept[1].read_bytes() == before and result("run")["best_on_selection"] == best
    assert tune("--out grid --grid 0 1") == 0 and not Path("grid/statistics").exists(), "a grid needs none"


def test_two_processes_choose_as_one_does(here: Path, workers: Workers) -> None:
    flags = f"tune {USUAL} --limit 4 --guidance 0 1 --self-trained tuned.safetensors longer.safetensors"
    assert cli.main([*flags.split(), "--out", "alone"]) == 0
    workers.run("neon.cli.app:main", [*flags.split(), "--out", "two"], folder=here, world_size=2)
    alone, two = ({entry["name"]: entry["distance"] for entry in log(run)} for run in ("alone", "two"))
    assert alone.keys() == two.keys()
    assert two == pytest.approx(alone, rel=1e-9)
    one, both = result("alone"), result("two")
    assert all(one[name] == both[name] for name in ("w", "guidance", "self_trained", "evaluations", "recommended"))


def test_points_that_cannot_be_scored_are_recorded_and_do_not_stop_the_search(here: Path) -> None:
    assert tune("--self-trained broken.safetensors --out run") == 0
    failures = [entry for entry in log("run") if "failure" in entry]
    assert failures and all(entry["name"].split(": ")[1] != "w 0" for entry in failures)
    assert result("run")["recommended"] == "base" and result("run")["w"] == 0
    assert any(one.failure for one in load("run").evaluated)
    assert any("The self-trained weights could not be scored" in note for note in load("run").notes)


def limited(flags: list[str]) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
    torch.set_num_threads(1)
    sys.exit(cli.main(flags))


def test_a_full_disk_ends_a_run_in_one_line_and_the_next_one_goes_on(here: Path) -> None:
    """A limit on the size of files stands for the disk: the log of evaluations outgrows it in the middle of a line."""
    flags = ["tune", *USUAL.split(), "--grid", "0", "0.25", "0.5", "0.75", "1", "1.25", "1.5", "--out", "run"]
    code, said = ended(limited, flags)
    assert code == 1 and "Traceback" not in said
    assert said.splitlines()[-1].startswith("neon tune: run/evaluations.jsonl: writing failed")
    whole = Path("run/evaluations.jsonl").read_text().splitlines()[:-1]
    assert whole and cli.main(flags) == 0
    assert Path("run/evaluations.jsonl").read_text().splitlines()[: len(whole)] == whole
    assert result("run")["evaluations"] == 7


def test_a_better_score_of_another_kind_can_be_asked_for(here: Path) -> None:
    assert tune("--metric recall --real-images real --nearest-k 3 --out run") == 0
    selected = [entry for entry in log("run") if entry["name"].startswith("selection")]
    assert result("run")["best_on_selection"]["value"] == -max(entry["recall"] for entry in selected)


def test_the_self_trained_weights_may_lie_below_a_key_of_their_file(here: Path) -> None:
    torch.save({"theirs": load_state("tuned.safetensors"), "model": load_state("base.safetensors")}, "tuned.pth")
    assert tune("--grid 0 1 --out plain") == 0
    assert tune("--self-trained tuned.pth --self_trained_key theirs --grid 0 1 --out run") == 0
    assert result("run")["best_on_selection"] == result("plain")["best_on_selection"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--w 1 -1", "--w 1 -1: expected a range"),
        ("--guidance 2 1", "--guidance 2 1: expected a range"),
        ("--blocks 2", "--blocks 2: expected at least 3"),
        ("--num-images 0", "--num_images 0"),
        ("--self-trained wide.safetensors", "wide.safetensors"),
        ("--self-trained base.safetensors", "base.safetensors: holds the weights of the base"),
        ("--select-stats seven.npz", "statistics of 7 features, but tiny6 has 6"),
        ("--report-stats seven.npz", "statistics of 7 features, but tiny6 has 6"),
        ("--set solver=dpm", "solver is 'dpm'"),
        ("--set steps=3", "--set steps=3: expected NAME=VALUE with a NAME of"),
        ("--set num_steps=three", "--set num_steps=three: expected a value such as"),
        ("--metric recall", "--metric recall: is not scored here; add --real_images"),
        ("--vae x", "works on pixels"),
        ("--inception-weights x.pth", "--inception_weights x.pth: --features features.safetensors is another network"),
        ("--guidance-grid 1 2", "--guidance_grid: goes with --grid"),
        ("--grid nan", "--grid nan: expected one or several finite numbers"),
        ("--grid", "--grid : expected one or several finite numbers"),
        ("--grid 1 --guidance-grid nan", "--guidance_grid nan: expected one or several finite numbers"),
        ("--tolerance -1", "--tolerance -1: expected 0 or more"),
        ("--grid 0 1 --limit 4", "--limit: is of a search, and --grid scores all of its points; leave it out"),
        ("--grid 0 1 --limit 16 --w 0 1", "--w: is of a search"),
        ("--grid 0 1 --limit 16 --guidance 0 1", "its points; give --guidance_grid"),
        ("--grid 0 1 --limit 16 --tolerance 0.1", "--tolerance: is of a search"),
        ("--base unconditional.safetensors --self-trained unconditional.safetensors --guidance 0 1", "unconditional"),
        ("--seed -1", "--seed is -1"),
        ("--key nowhere", "base.safetensors: no nesting 'nowhere'"),
        ("--self_trained_key nowhere", "tuned.safetensors: no nesting 'nowhere'"),
    ],
)
def test_a_wrong_request_is_one_line(here: Path, capsys: pytest.CaptureFixture[str], flags: str, message: str) -> None:
    assert tune(f"{flags} --out run") == 2
    assert message in " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert not Path("run/tune.json").exists()


def test_fid_of_fewer_images_than_features_is_refused_and_small_features_are_not(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tune("--features inception --out run") == 2
    assert "FID of as few images as features (2048)" in capsys.readouterr().err


def test_a_run_of_other_settings_does_not_mix(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert tune("--out run") == 0
    assert tune("--out run --num-images 21") == 2
    assert "holds a run with other settings (num_images is 20, now 21" in capsys.readouterr().err


def test_zero_is_added_to_a_range_without_it_and_said_so(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert tune("--w 0.5 1 --out run") == 0
    assert "0, the base, is added to the range" in capsys.readouterr().err
    assert any(entry["name"] == "selection 0: w 0" for entry in log("run"))


def test_settings_are_read_in_the_type_of_their_defaults() -> None:
    model = tiny_imm()
    found = settings_with(model.default_settings, ["num_steps=2", "guidance=2", "mid_nt=1.4", "restart=true"])
    assert (found.num_steps, found.guidance, found.mid_nt, found.restart) == (2, 2.0, (1.4,), True)


@pytest.mark.parametrize("command", [["report", "."], ["report", "nowhere"]])
def test_a_folder_without_a_report_is_refused(
    here: Path, capsys: pytest.CaptureFixture[str], command: list[str]
) -> None:
    assert cli.main(command) == 2
    assert "report.json" in capsys.readouterr().err


def test_two_snapshots_of_one_name_are_two(here: Path) -> None:
    for name in ("tuned", "longer"):
        Path(name).mkdir()
        Path(name, "s.safetensors").write_bytes(Path(f"{name}.safetensors").read_bytes())
    assert tune("--self-trained tuned/s.safetensors longer/s.safetensors --grid 0 1 --out run") == 0
    names = {entry["name"] for entry in log("run") if entry["name"].startswith("selection")}
    assert names == {"selection 0: w 0", *(f"selection 0: w 1, {name}/s.safetensors" for name in ("tuned", "longer"))}
    assert {one.snapshot for one in load("run").evaluated if one.w} == {
        f"{n}/s.safetensors" for n in ("tuned", "longer")
    }
    Path("link.safetensors").symlink_to("tuned.safetensors")
    assert tune("--self-trained tuned.safetensors link.safetensors --out twice") == 2


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["a/s.safetensors", "a/t.safetensors"], ["s", "t"]),
        (["s.pth", "s.safetensors"], ["s.pth", "s.safetensors"]),
        (["/x/a/s.pth", "/x/b/s.pth", "/y/b/t.pth"], ["a/s.pth", "b/s.pth", "b/t.pth"]),
        (["a b.pth", "a-b.pth", "c.pth"], None),
    ],
)
def test_snapshots_are_named_by_as_much_of_their_path_as_it_takes(paths: list[str], names: list[str] | None) -> None:
    found = snapshot_names([Path(path) for path in paths])
    assert len({as_file_name(name) for name in found}) == len(paths)
    assert names is None or found == names


@pytest.mark.parametrize(
    ("name", "facts", "budget"),
    [
        ("tuned-16", {}, None),
        ("w-1.5", {}, None),
        ("tuned-16", {"images_seen": "12800"}, 12.8),
        ("snapshot-000012.800-kimg", {}, 12.8),
        ("raw-snapshot-000012.800-kimg", {}, 12.8),
        ("network-snapshot-000064", {}, 64.0),
        ("snapshot-000012.800-kimg", {"images_seen": "many"}, 12.8),
    ],
)
def test_a_budget_is_what_a_file_says_or_is_named_after(
    tmp_path: Path, name: str, facts: dict[str, str], budget: float | None
) -> None:
    path = tmp_path / f"{name}.safetensors"
    save_safetensors(path, {"x": torch.zeros(1)}, facts)
    assert budgets([path]) == [budget]
    assert budgets([path, path]) == [None, None], "a budget that does not tell them apart"


def test_guidance_that_the_sampler_refuses_is_found_before_any_image() -> None:
    plan = TunePlan(base=Path("base.pth"), self_trained=(Path("tuned.pth"),), guidance=(-1.0, 1.0))
    flags = Tune(plan=plan, select_stats=Path("real.npz"), features="features.safetensors")
    with pytest.raises(RequestError, match="guidance is -1"):
        flags._check_plan(plan, tiny_edm(), VARSettings())


def test_images_to_look_at_are_sampled_no_more_at_a_time_than_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    model, largest, sample = tiny_edm(), [], pictures.sample_block
    settings = replace(model.default_settings, num_steps=2)

    def counted(model: GenerativeModel, block: range, *rest: Any) -> Any:
        largest.append(len(block))
        return sample(model, block, *rest)

    monkeypatch.setattr(pictures, "sample_block", counted)
    few, all_at_once = (
        pictures.samples_at((0.0,), lambda w: model, model, settings, 0, 20, size, Processes()) for size in (3, 20)
    )
    assert max(largest[:-1]) == 3 and largest[-1] == len(few.grids[0.0]) > 3
    assert (few.grids[0.0].int() - all_at_once.grids[0.0].int()).abs().max() <= 1, "but for a rounding"
    assert few.captions == all_at_once.captions
