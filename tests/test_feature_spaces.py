"""Scores in several feature spaces at once, the kernel distance, and statistics that say whose features they are."""

import csv
import itertools
import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from neon.cli import app as cli
from neon.errors import DegenerateError, RequestError
from neon.evaluate import features as rows
from neon.evaluate import run as evaluation
from neon.metrics import Statistics, kernel_distance, load_all_statistics
from neon.metrics.small import SmallFeatures, load_features
from neon.report.page import page
from neon.report.record import Row, load
from tests.programs import Killed, dies_after, work_in, write_pair
from tests.workers import Workers

FLAGS = "--num_images 40 --batch_size 8 --num_steps 2 --device cpu --json scores.json"
SCORE = f"evaluate --network base.safetensors --ref both.npz {FLAGS}"


def write_second(folder: Path, name: str = "other5", seed: int = 7, dim: int = 5) -> None:
    """Another feature network than that of `write_pair`."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        SmallFeatures(name, (1, 8, 8), dim, 3).save(folder / f"{name}.safetensors")


def run(command: str) -> int:
    return cli.main(command.split())


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    write_pair(folder)
    write_second(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert run("stats real both.npz --features features.safetensors other5.safetensors --device cpu") == 0
    return folder


@pytest.fixture
def here(tmp_path: Path, files: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return work_in(tmp_path, files, monkeypatch)


def scores(command: str) -> dict:
    assert run(command) == 0
    return json.loads(Path("scores.json").read_text())


def test_each_space_scores_as_if_it_were_alone(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    both = scores(f"{SCORE} --features features.safetensors other5.safetensors --precision_recall real")
    line = capsys.readouterr().out.splitlines()[-1]
    first = scores(f"{SCORE} --features features.safetensors --precision_recall real")
    second = scores(f"{SCORE} --features other5.safetensors --precision_recall real")
    names = ("precision", "recall", "density", "coverage")
    assert both["metric"] == "fd_tiny6" and all(both[name] == first[name] for name in ("fd_tiny6", "kd_tiny6", *names))
    assert both["beside"]["fd_other5"] == {
        name: second[name] for name in ("fd_other5", "kd_other5", "kd_other5_std", "is_mean", "is_std", *names)
    }
    assert both["fd_other5"] == second["fd_other5"]
    assert re.match(r"FD_tiny6=\d.* KD_tiny6=.*precision=.* FD_other5=\d.* KD_other5=.*40 images", line)


def test_the_images_are_sampled_once_for_all_spaces(here: Path) -> None:
    with dies_after(5, rows, "sample_block"):
        assert run(f"{SCORE} --features features.safetensors other5.safetensors") == 0


def test_a_killed_evaluation_in_two_spaces_goes_on_to_the_same_bits(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = f"{SCORE} --features features.safetensors other5.safetensors --precision_recall real"
    whole = scores(command)
    monkeypatch.setattr(evaluation, "SAVE_EVERY_SECONDS", 0.0)
    with dies_after(3, rows, "sample_block"), pytest.raises(Killed):
        run(command)
    with dies_after(2, rows, "sample_block"):
        found = scores(command)
    for name in ("fd_tiny6", "fd_other5", "kd_tiny6", "precision", "beside"):
        assert found[name] == whole[name], name


def in_processes() -> None:
    run(f"{SCORE} --features features.safetensors other5.safetensors --precision_recall real")


def test_two_processes_give_the_same_scores(here: Path, workers: Workers) -> None:
    in_processes()
    alone = json.loads(Path("scores.json").read_text())
    workers.run("tests.test_feature_spaces:in_processes", folder=here, world_size=2)
    together = json.loads(Path("scores.json").read_text())
    for name in ("fd_tiny6", "fd_other5", "kd_tiny6", "precision", "beside"):
        assert together[name] == alone[name], name


def test_sets_are_compared_in_every_space(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    both = "--features features.safetensors other5.safetensors --device cpu --json scores.json"
    found = scores(f"fid real both.npz {both}")
    assert abs(found["fd_tiny6"]) < 1e-6 and abs(found["fd_other5"]) < 1e-6, "the images with their own statistics"
    found = scores(f"fid real real --precision_recall {both}")
    assert found["precision"] == 1 and found["kd_tiny6"] < 0, "without bias, the mean over pairs of others is lower"
    assert found["kernel_subsets"] == 100 and "KD_other5=" in capsys.readouterr().out


@pytest.fixture(scope="module")
def tuned(files: Path) -> Path:
    """A run of `neon tune` with a second opinion."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(files)
        command = (
            "tune --base base.safetensors --self-trained tuned.safetensors --select-stats both.npz --num-images 20 "
            "--report-images 20 --batch-size 20 --set num_steps=2 solver=euler --device cpu --grid -1 1 "
            "--no-tune-sampler --no-baselines --features features.safetensors other5.safetensors --out run"
        )
        assert run(command) == 0
    return files / "run"


def test_a_choice_is_made_in_the_first_space_and_reported_in_all(tuned: Path) -> None:
    report = load(tuned)
    assert report.metric == "fd_tiny6" and report.beside == ("fd_other5",)
    assert all(one.scores is None or not one.scores.beside for one in report.evaluated), "the choice saw one space"
    found = json.loads((tuned / "scores.json").read_text())
    assert found["beside"]["fd_other5"].keys() == found["rows"].keys()
    assert found["beside"]["fd_other5"]["base"] == report.base.in_space("fd_other5").distance != report.base.distance
    shown = page(report)
    assert "fd_other5" in shown
    if report.best is not report.fair:
        assert "had no part in the choice" in shown
    with open(tuned / "scores.csv") as file:
        lines = list(csv.DictReader(file))
    assert {line["metric"] for line in lines} == {"fd_tiny6", "fd_other5"} and len(lines) == 2 * 3 * len(report.rows)


def test_a_report_says_whether_another_space_agrees(tuned: Path) -> None:
    report = load(tuned)

    def row_of(factors: tuple[float, ...]) -> Row:
        """Twice as good as the base, but in another space so many times as far from real images, block by block."""
        blocks = []
        for block, factor in zip(report.base.blocks, itertools.cycle(factors), strict=False):
            beside = {name: replace(one, distance=factor * one.distance) for name, one in block.beside.items()}
            blocks.append(replace(block, distance=block.distance / 2, beside=beside))
        return replace(report.base, blocks=tuple(blocks))

    for factors, said in (((0.1,), "agrees"), ((10.0,), "does not agree"), ((0.9, 1.1), "leaves it open")):
        row = row_of(factors)
        found = replace(report, rows=(report.base, row), neon=row, choice=None, base_best_sampler=None)
        assert f"had no part in the choice, {said}:" in page(found)


# The kernel distance against its definition, pair by pair.


def by_definition(real: Tensor, generated: Tensor) -> float:
    """The unbiased estimate over all images of both sides."""

    def k(x: Tensor, y: Tensor) -> Tensor:
        return ((x.double() @ y.double()) / len(x) + 1) ** 3

    def among(points: Tensor) -> float:
        values = [float(k(a, b)) for i, a in enumerate(points) for j, b in enumerate(points) if i != j]
        return sum(values) / len(values)

    across = [float(k(a, b)) for a in real for b in generated]
    return among(real) + among(generated) - 2 * sum(across) / len(across)


def test_the_kernel_distance_of_few_images_is_that_of_all_pairs() -> None:
    generator = torch.Generator().manual_seed(0)
    real, generated = (torch.randn(12, 4, generator=generator) + shift for shift in (0.0, 0.7))
    found = kernel_distance(real, generated)
    assert found.subset_size == 12 and found.std < 1e-12, "each subset holds all of them"
    assert found.mean == pytest.approx(by_definition(real, generated), rel=1e-9)


def test_the_kernel_distance_of_equal_distributions_is_zero_on_average_whatever_their_number() -> None:
    generator = torch.Generator().manual_seed(0)
    found = [
        kernel_distance(torch.randn(10, 4, generator=generator), torch.randn(14, 4, generator=generator)).mean
        for _ in range(40)
    ]
    mean, error = float(np.mean(found)), float(np.std(found)) / 40**0.5
    assert abs(mean) < 3 * error < 0.3


@pytest.mark.parametrize(
    ("real", "generated", "error", "said"),
    [
        (torch.rand(5, 4), torch.rand(5, 3), RequestError, "F as of the others"),
        (torch.rand(5, 4), torch.rand(1, 4), RequestError, "at least 2 generated images, found 1"),
        (torch.rand(5, 4), torch.full((5, 4), torch.nan), DegenerateError, "not finite"),
    ],
)
def test_what_has_no_kernel_distance_is_refused(real: Tensor, generated: Tensor, error: type, said: str) -> None:
    with pytest.raises(error, match=said):
        kernel_distance(real, generated)


# Statistics that name their network.


def test_statistics_hold_every_space_and_the_first_is_what_everybody_reads(here: Path) -> None:
    first, second = load_all_statistics("both.npz")
    tiny, other = load_features("features.safetensors"), load_features("other5.safetensors")
    assert (first.features, second.features) == (tiny.identity, other.identity) and first.count == second.count == 60
    plain = np.load("both.npz")
    assert np.array_equal(plain["mu"], first.mu) and np.array_equal(plain[f"{other.identity}.sigma"], second.sigma)
    assert Statistics.load("both.npz", other.identity).dim == 5


def test_published_statistics_are_kept_beside_ones_own(here: Path) -> None:
    Statistics(mu=np.zeros(2048), sigma=np.eye(2048), count=9).save("published.npz")
    assert run("stats real out.npz --features other5.safetensors --beside published.npz --device cpu") == 0
    assert [(one.features or "").partition(":")[0] for one in load_all_statistics("out.npz")] == ["other5", "inception"]
    assert Statistics.load("out.npz", "inception").count == 9


def test_statistics_of_before_know_no_names_and_still_score(here: Path) -> None:
    assert Statistics.load("real.npz").features is None
    assert run(f"{SCORE} --features features.safetensors".replace("both", "real")) == 0


BAD = {
    "statistics of another network": (
        "--features features.safetensors --ref foreign.npz", r"foreign.npz: .*features other5:\w+, not of tiny6:\w+"
    ),
    "of another network of that name": (
        "--features again/other5.safetensors --ref foreign.npz", r"features other5:\w+, not of other5:\w+"
    ),
    "one network twice": (
        "--features features.safetensors features.safetensors", "two of them score fd_tiny6"
    ),
    "no network": ("--features", "expected"),
    "no statistics in one of the spaces": (
        "--features features.safetensors other5.safetensors --ref seven.npz", "seven.npz: statistics of 7 features"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_a_wrong_request_is_one_line(here: Path, capsys: pytest.CaptureFixture[str], case: str) -> None:
    flags, said = BAD[case]
    assert run("stats real foreign.npz --features other5.safetensors --device cpu") == 0
    Path("again").mkdir()
    write_second(Path("again"), seed=8)
    capsys.readouterr()
    command = f"evaluate --network base.safetensors {FLAGS} {flags}"
    assert run(command if "--ref" in command else f"{command} --ref both.npz") == 2
    words = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert re.search(said, words), words


def test_statistics_without_a_name_serve_one_network_only(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_second(here, "other6", dim=6)
    networks = "--features features.safetensors other6.safetensors"
    for command in (f"{SCORE} {networks}".replace("both", "real"), f"fid real real.npz {networks} --device cpu"):
        assert run(command) == 2
        said = capsys.readouterr().err
        assert "real.npz: does not say of which network" in said and "tiny6 and other6" in said


def test_a_recipe_holds_several_networks(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    networks = ["features.safetensors", "other5.safetensors"]
    recipe = {"base": "base.safetensors", "real": "both.npz", "features": networks, "select_images": 20}
    for features, expected in ((networks, 0), (["features.safetensors", "--model=evil.py:M"], 2)):
        Path("run.json").write_text(json.dumps({**recipe, "features": features}))
        assert run("improve --recipe run.json --dry-run --num_steps 2 --device cpu") == expected
    assert "expected names, and none that begins as flags do" in capsys.readouterr().err


def test_statistics_that_are_already_there_or_unknown_are_not_kept_beside(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for beside, said in (("both.npz", "which are computed here"), ("seven.npz", "do not say of which network")):
        assert run(f"stats real out.npz --features features.safetensors --beside {beside} --device cpu") == 2
        assert said in capsys.readouterr().err and not Path("out.npz").exists()
