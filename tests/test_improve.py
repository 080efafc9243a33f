"""`neon improve`: what it leaves, that it says so where nothing is gained, that it can be repeated and is refused."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import neon
from neon.checkpoint import load_state, open_checkpoint
from neon.cli.app import main
from neon.data.images import write_images
from neon.demo.assets import BASE, FEATURES, TEST_STATISTICS, TRAIN_STATISTICS, real_images
from neon.evaluate import Scores
from neon.merge import merge_state
from neon.model import load_model
from neon.report.record import Report, Row
from neon.runtime.files import sha256_file
from neon.settings import usual_settings
from neon.tune.reasons import why_nothing_gained
from neon.tune.search import Point
from tests.test_readme import blocks, fewer

TRAININGS = ("self-training", "self-training-faster")
EULER = ["--num_steps", "5", "--set", "solver=euler"]
SCORED = ["--real", str(TRAIN_STATISTICS), "--report_real", str(TEST_STATISTICS), "--features", str(FEATURES)]
SMALL = [
    "--num_synthetic", "100", "--training_images", "640", "--batch", "32", "--lr", "3e-4", "--lr_rampup", "0",
    "--ema", "0", "--select_images", "70", "--limit", "3", "--sampler_scores", "1", "--no-baselines",
]  # fmt: skip


def improve(out: Path, *words: str, base: Path = BASE) -> int:
    """The exit code of a run in one process."""
    return main(["improve", str(base), "--out", str(out), "--processes", "1", *words])


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small run that gains."""
    out = tmp_path_factory.mktemp("improve") / "run"
    assert improve(out, *EULER, *SCORED, *SMALL) == 0
    return out


def scores_of(run: Path) -> dict:
    return json.loads((run / "scores.json").read_text())


def test_a_run_leaves_what_others_rely_on(finished: Path) -> None:
    for name in ("improved.safetensors", "README.md", "report.html", "scores.json", "scores.csv", "run.json"):
        assert (finished / name).stat().st_size > 0, name
    scores = scores_of(finished)
    assert scores["best"] == "neon" and scores["neon"] < scores["base"]
    assert scores["weights"] == ["improved.safetensors"]
    assert f"w = {scores['w']:g}" in (finished / "README.md").read_text()


def test_the_improved_model_is_the_merge_that_was_scored_and_knows_its_sampler(finished: Path) -> None:
    file = finished / "improved.safetensors"
    snapshot = Path(json.loads((finished / "tune.json").read_text())["self_trained"])
    expected = merge_state(load_state(BASE), load_state(snapshot), scores_of(finished)["w"])
    model = load_model(file)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.network.state_dict().items())
    settings = usual_settings(model)
    assert (settings.num_steps, settings.solver, settings.S_max) == (5, "euler", float("inf"))


def test_images_of_the_improved_file_need_no_flags(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    network = ["--network", str(finished / "improved.safetensors"), "--num_images", "4"]
    assert main(["sample", *network, "--outdir", str(tmp_path / "plain")]) == 0
    assert "sampling as the file says: num_steps 5, solver euler" in capsys.readouterr().err
    assert main(["sample", *network, "--outdir", str(tmp_path / "said"), *EULER]) == 0
    for image in (tmp_path / "plain").rglob("*.png"):
        assert image.read_bytes() == next((tmp_path / "said").rglob(image.name)).read_bytes()


def test_a_finished_run_is_shown_again(finished: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in (*finished.rglob("*.png"), finished / "evaluations.jsonl")}
    assert improve(finished, *EULER, *SCORED, *SMALL) == 0
    kept = {path: when for path, when in before.items() if "synthetic" in path.parts or path.suffix == ".jsonl"}
    assert all(path.stat().st_mtime_ns == when for path, when in kept.items())


def test_a_recipe_repeats_a_run_and_a_killed_one_goes_on_by_it(finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    for made in ("improved.safetensors", "scores.json", "report.html", "README.md", "tune.json", "scores.csv"):
        (out / made).unlink()
    lines = (out / "evaluations.jsonl").read_text().splitlines(keepends=True)
    (out / "evaluations.jsonl").write_text("".join(lines[:2]))
    snapshot = max((out / "self-training").glob("snapshot-*"))
    snapshot.unlink()
    (out / "self-training" / "training-state.pt").unlink()
    next((out / "synthetic").rglob("*.png")).unlink()
    assert main(["improve", "--recipe", str(finished / "run.json"), "--out", str(out), "--processes", "1"]) == 0
    assert scores_of(out)["rows"] == scores_of(finished)["rows"]
    assert sha256_file(out / "improved.safetensors") == sha256_file(finished / "improved.safetensors")


def test_a_base_of_torch_gets_its_own_format_too(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    with open_checkpoint(BASE) as checkpoint:
        config = checkpoint.metadata
    base = tmp_path / "base.pth"
    torch.save(load_state(BASE), base)
    Path(tmp_path / "own.py").write_text(
        "import json\nfrom edm.model import EDM\n\n"
        f"CONFIG = json.loads({config['config']!r})\n\n\nclass Own(EDM):\n    @classmethod\n"
        "    def config_of(cls, checkpoint):\n        return CONFIG\n"
    )
    flags = ["--model", f"{tmp_path / 'own.py'}:Own"]
    assert improve(tmp_path / "run", *EULER, *SCORED, *SMALL, *flags, base=base) == 0
    merged, same = (load_state(tmp_path / "run" / f"improved.{suffix}") for suffix in ("pth", "safetensors"))
    assert merged.keys() == same.keys() and all(torch.equal(merged[name], same[name]) for name in same)
    printed = capsys.readouterr().out
    assert "improved.pth" in printed
    network = f"--network {tmp_path / 'run' / 'improved.safetensors'}"
    assert f"Next: neon sample {network} --model {tmp_path / 'own.py'}:Own --num_images" in printed


def test_where_nothing_is_gained_there_is_no_model_but_a_reason(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out, reason = tmp_path / "run", "The self-training moved the weights by"
    assert improve(out, *EULER, *SCORED, *SMALL, "--lr", "1e-6", "--w", "0", "0.02") == 0
    printed = capsys.readouterr().out
    assert "No gain" in printed and reason in printed
    assert not list(out.glob("improved*")) and not (out / "README.md").exists()
    assert reason in (out / "report.html").read_text()
    assert scores_of(out)["weights"] == []


def row(*distances: float, w: float = 0.0) -> Row:
    return Row(name="", key="", w=w, blocks=tuple(Scores(distance=each, num_images=100) for each in distances))


@pytest.mark.parametrize(
    ("neon", "moved", "w", "reason"),
    [
        (row(5, 6, 7, w=0.5), 1e-2, 0.5, None),
        (row(8, 11, 9, w=0.5), 1e-4, 0.5, "moved the weights by 1.0e-04 of their norm, less than 0.001"),
        (row(8, 11, 9, w=4.9), 1e-2, 4.9, "lies at the end of its range, 5"),
        (row(8, 11, 9, w=0.5), 1e-2, 0.5, "within the noise of 3 x 100 report images"),
        (row(12, 14, 15, w=0.5), 1e-2, 0.5, "this sampler hardly seeks modes"),
        (None, 1e-2, 0.0, "this sampler hardly seeks modes"),
    ],
)
def test_the_likeliest_reason_is_named(neon: Row | None, moved: float, w: float, reason: str | None) -> None:
    base = row(10, 10, 11)
    report = Report(title="", metric="fd", rows=(base,), base=base, neon=neon or base, w=w)
    plan = SimpleNamespace(w=(0.0, 5.0), grid=None, blocks=3, report_images=100)
    said = why_nothing_gained(report, (SimpleNamespace(plan=plan, moved=moved, best=Point(w)),))  # type: ignore[arg-type]
    assert said is None if reason is None else reason in (said or "")


def test_without_real_images_there_are_merges_and_a_page_but_no_score(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert improve(tmp_path / "run", *EULER, "--num_synthetic", "40", "--training_images", "640") == 0
    assert "Nothing was scored" in capsys.readouterr().out
    run = tmp_path / "run"
    assert {path.name for path in run.glob("improved*")} == {f"improved-{w}.safetensors" for w in (0.5, 1, 1.5)}
    assert not (run / "scores.json").exists() and "Nothing was scored" in (run / "report.html").read_text()
    assert usual_settings(load_model(run / "improved-1.safetensors")).solver == "euler"


def test_a_dry_run_says_what_it_would_do_and_leaves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert improve(tmp_path / "run", *EULER, *SCORED, "--select_images", "1000", "--dry-run") == 0
    printed = capsys.readouterr().out
    assert "synthetic set" in printed and "592,400" in printed
    assert not (tmp_path / "run").exists()


def test_real_images_stand_for_their_statistics(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    write_images(tmp_path / "few", range(70), real_images()[:70])
    flags = ["--real", str(tmp_path / "few"), "--features", str(FEATURES)]
    assert improve(tmp_path / "run", *EULER, *SMALL, *flags, "--limit", "1") == 0
    assert (tmp_path / "run" / "samples" / "real.png").exists()


RECIPE = {"base": str(BASE), "real": str(TRAIN_STATISTICS), "features": str(FEATURES), "select_images": 100}


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ({**RECIPE, "model": "evil.py:Model"}, "'model' is no flag that a recipe can hold"),
        ({**RECIPE, "out": "elsewhere"}, "'out' is no flag"),
        ({**RECIPE, "base": "--model=evil.py:Model"}, "base is '--model=evil.py:Model'; expected the name of a file"),
        ({**RECIPE, "real": "--model=evil.py:Model"}, "--model=evil.py:Model"),
        ({**RECIPE, "settings": {"num_steps": "5 --model=evil.py:M"}}, "expected a value such as"),
        ({**RECIPE, "settings": {"a b": 5}}, "expected the names of settings"),
        ({**RECIPE, "settings": [1]}, "expected a table of settings"),
        ({**RECIPE, "w": ["--model", 2]}, "expected numbers"),
        ({**RECIPE, "tune_sampler": "no"}, "expected true or false"),
        ({**RECIPE, "select_images": {"a": 1}}, "expected a number or a text"),
        ({**RECIPE, "select_images": 0}, "--select_images 0: expected at least 1"),
        ([1, 2], "no table of flags"),
        ({"state_version": 1, "seed": 0}, "no table of flags"),
        ({"state_version": 99, "recipe": RECIPE}, "written by another version"),
    ],
)
def test_a_recipe_is_checked_and_cannot_name_code(
    tmp_path: Path, capsys: pytest.CaptureFixture, recipe: object, message: str
) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(json.dumps(recipe))
    assert main(["improve", "--recipe", str(file), "--dry-run", "--out", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.strip().splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_a_recipe_in_yaml_stands_for_flags_and_typed_ones_win(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(
        f"base: {BASE}\nreal: {TRAIN_STATISTICS}\nfeatures: {FEATURES}\nselect_images: 100\ntune_sampler: false\n"
        "baselines: false\nnum_synthetic: 70\nlr: 1e-3\nsettings: {solver: euler, num_steps: 7}\n"
    )
    assert main(["improve", f"--recipe={file}", "--dry-run", "--num_synthetic", "80"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split()[:5] == ["synthetic", "set", "80", "7", "560"] and len(lines) == 7


@pytest.mark.parametrize("text", ["!!python/object/apply:os.system ['true']", "{", "\x00", "[" * 5000])
def test_a_recipe_that_is_none_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture, text: str) -> None:
    (tmp_path / "recipe.yaml").write_text(text)
    assert main(["improve", "--recipe", str(tmp_path / "recipe.yaml")]) == 2
    assert "neither JSON nor YAML" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--select_images", "50"], "--select_images 50: a distance on 64 features of as few images"),
        (["--select_images", "100", "--report_images", "64"], "--report_images 64: a distance on 64 features"),
        (["--w", "0", "0"], "expected a range that ends above 0"),
        (["--blocks", "2"], "--blocks 2: expected at least 3"),
        (["--guidance_range", "1", "0"], "--guidance_range 1 0: expected a range"),
        (["--snapshots", "0"], "--snapshots 0: expected at least 1"),
        (["--real", "nothing.npz"], "nothing.npz: no such file"),
        (["--lr", "-1"], "--lr: lr is -1.0; expected a positive number"),
        (["--set", "colour=red"], "--set colour=red: expected NAME=VALUE"),
        (["--num_steps", "0"], "num_steps"),
        (["--precision", "fp8"], "fp8"),
    ],
)
def test_a_wrong_request_is_refused_before_anything_is_made(
    tmp_path: Path, capsys: pytest.CaptureFixture, words: list[str], message: str
) -> None:
    assert improve(tmp_path / "run", *EULER, *SCORED, *words) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_statistics_of_other_features_and_images_of_another_size_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    np.savez(tmp_path / "other.npz", mu=np.zeros(8), sigma=np.eye(8))
    write_images(tmp_path / "large", range(70), real_images()[:70].repeat(1, 1, 2, 2))
    write_images(tmp_path / "few", range(20), real_images()[:20])
    for name, message in (
        ("other.npz", "statistics of 8 features, but fashion64 has 64"),
        ("large", "images are (1, 28, 28) (C, H, W), but the model makes (1, 14, 14)"),
        ("few", "20 images are too few for 64 features; expected more than as many, better 1,408"),
    ):
        assert improve(tmp_path / "run", "--real", str(tmp_path / name), "--features", str(FEATURES), "--dry-run") == 2
        assert message in capsys.readouterr().err


def test_settings_in_a_file_that_make_no_sense_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    from neon.model import save_model

    for number, (settings, message) in enumerate(
        [
            ("[1]", "expected a JSON table of settings"),
            ('{"colour": 1}', "no setting is called colour"),
            ('{"num_steps": "5"}', "num_steps is '5'; expected a value such as 18"),
            ('{"num_steps": 0}', "num_steps"),
        ]
    ):
        file = tmp_path / f"{number}.safetensors"
        save_model(file, load_model(BASE), metadata={"settings": settings})
        assert main(["sample", "--network", str(file), "--num_images", "1", "--outdir", str(tmp_path / "out")]) == 2
        assert message in capsys.readouterr().err


def plan_of(words: list[str]) -> dict:
    """The flags of a plan as keywords."""
    plan: dict = {}
    for word, value in zip(words, [*words[1:], "--"], strict=True):
        if word.startswith("--no-"):
            plan[word[5:]] = False
        elif word.startswith("--"):
            plan[word[2:]] = float(value) if "." in value or "e" in value else int(value)
    return plan


def test_from_python_the_same_run_goes_on_and_gives_the_improved_model(finished: Path) -> None:
    base = neon.load(BASE).with_settings(num_steps=5, solver="euler")
    real = {"real": TRAIN_STATISTICS, "report_real": TEST_STATISTICS, "features": FEATURES}
    before = (finished / "evaluations.jsonl").read_bytes()
    improved = neon.improve_model(base, finished, **real, **plan_of(SMALL))
    assert improved.path == finished / "improved.safetensors" and improved.w == scores_of(finished)["w"]
    assert (finished / "evaluations.jsonl").read_bytes() == before, "nothing is scored twice"
    assert neon.load(improved.path).sample(2, seed=1).shape == (2, 1, 14, 14)
    with pytest.raises(neon.RequestError, match="seed is 0, now 1"):
        neon.improve_model(base, finished, **real, **plan_of(SMALL), seed=1)


def test_the_python_lines_of_the_readme_run_as_printed(finished: Path) -> None:
    """Over fewer images: those of the run that is finished, which it finds."""
    [code] = blocks("python")
    plan = ", ".join(f"{name}={value}" for name, value in plan_of(SMALL).items())
    few = {"select_images=1000": plan, "runs/python/improve": str(finished), "neon/demo": str(BASE.parent)}
    scope: dict = {}
    exec(fewer(code, few), scope)
    assert scope["improved"].path == finished / "improved.safetensors"
    assert scope["images"].shape == (16, 1, 14, 14) and scope["images"].dtype == torch.uint8


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"colour": 1}, r"unexpected keyword argument 'colour'; expected among num_synthetic"),
        ({"num_synthetic": 0}, "num_synthetic 0: expected at least 1"),
        ({"real_images": "x"}, "real_images: go with real"),
        ({"real": "nothing.npz", "features": FEATURES}, "nothing.npz: no such file"),
    ],
)
def test_a_wrong_call_is_one_line(tmp_path: Path, keywords: dict, message: str) -> None:
    with pytest.raises(neon.RequestError, match=message):
        neon.improve_model(neon.load(BASE), tmp_path / "run", **keywords)
    assert not (tmp_path / "run").exists()


def test_a_rate_that_leaves_the_weights_where_they_are_is_raised(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    flags = [*EULER, "--num_synthetic", "32", "--training_images", "320", "--batch", "32", "--ema", "0"]
    flags += ["--lr_rampup", "1000"]  # 10 steps at next to nothing
    assert improve(tmp_path / "run", *flags) == 0
    assert "at the published learning rate 0.001 so few images move the weights by" in capsys.readouterr().err
    slow, fast = (load_state(max((tmp_path / "run" / name).glob("*.safetensors"))) for name in TRAININGS)
    base = load_state(BASE)

    def moved(state: dict[str, torch.Tensor]) -> float:
        squares = sum(float((state[name] - base[name]).square().sum()) for name in base)
        return (squares / sum(float(base[name].square().sum()) for name in base)) ** 0.5

    assert moved(slow) < 5e-3 < moved(fast) < 2e-2
