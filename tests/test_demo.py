"""The demo, small: what it leaves behind, that it can be killed anywhere, and that processes do not matter."""

import dataclasses
import errno
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from neon.cli import app as cli
from neon.demo.assets import BASE, FEATURES, real_images
from neon.demo.fashion import CLASS_NAMES
from neon.demo.run import run_demo
from neon.errors import RequestError, WorkError
from neon.metrics.small import load_features
from neon.model import load_model
from neon.report.page import report_again
from neon.report.record import load
from neon.runtime.distributed import Processes
from neon.runtime.run_folder import read_record, run_folder
from tests.demo_driver import SMALL, main, write_base
from tests.workers import Workers, start

ROOT = Path(__file__).parent.parent
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("base") / "base.safetensors"
    write_base(path)
    return path


@pytest.fixture(scope="module")
def finished(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, one process, one thread."""
    out = tmp_path_factory.mktemp("demo") / "run"
    run_demo(SMALL, out, Processes(), base=base)
    return out


def test_the_base_of_the_demo_makes_images_like_those_it_is_compared_with() -> None:
    assert load_model(BASE).image_shape == load_features(FEATURES).image_shape == real_images().shape[1:]


def outcome(out: Path) -> dict:
    """All of scores.json that must not differ between runs of one plan."""
    scores = json.loads((out / "scores.json").read_text())
    for varies in ("seconds", "seconds_of"):
        scores.pop(varies)
    for varies in ("processes", "command"):
        scores["provenance"].pop(varies)
    return scores


def same(a: Path, b: Path) -> None:
    """Assert that two runs made the same images, weights and scores, to the bit."""
    images = [sorted((out / "synthetic").iterdir()) for out in (a, b)]
    assert [file.name for file in images[0]] == [file.name for file in images[1]]
    assert all(x.read_bytes() == y.read_bytes() for x, y in zip(*images, strict=True))
    assert outcome(a) == outcome(b)
    snapshots = [sorted(out.glob("self-training*/snapshot-*")) for out in (a, b)]
    assert [file.name for file in snapshots[0]] == [file.name for file in snapshots[1]] != []
    assert all(x.read_bytes() == y.read_bytes() for x, y in zip(*snapshots, strict=True))


def test_scores_hold_what_others_rely_on(finished: Path) -> None:
    scores = json.loads((finished / "scores.json").read_text())
    for name in ("base", "neon", "self_trained", "spread", "w", "seconds"):
        assert isinstance(scores[name], float), name
    assert scores["metric"] == "fd_fashion64"
    assert (scores["blocks"], scores["num_images"]) == (3, SMALL.select_images)
    assert scores["base"] == pytest.approx(sum(scores["rows"]["base"]["blocks"]) / 3)


def test_the_chosen_w_is_the_best_of_the_searched_ones_on_selection_seeds(finished: Path) -> None:
    scores = json.loads((finished / "scores.json").read_text())
    searched = {float(w): distance for w, distance in scores["selection"].items() if float(w) >= 0}
    assert scores["w"] == min(searched, key=lambda w: searched[w])


def test_selection_and_report_seeds_are_disjoint(finished: Path) -> None:
    provenance = json.loads((finished / "scores.json").read_text())["provenance"]
    spans = sorted(
        tuple(map(int, provenance[f"{name}_seeds"].split("-"))) for name in ("synthetic", "selection", "report")
    )
    assert all(before[1] < after[0] for before, after in itertools.pairwise(spans))


class References(HTMLParser):
    """Collects every attribute of a page that could fetch something, but for places inside the page itself."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag not in ("link", "iframe", "object", "embed")
        values = [value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "srcset")]
        self.found += [value for value in values if not value.startswith("#")]


def test_the_report_is_one_file_that_fetches_nothing(finished: Path) -> None:
    page = (finished / "report.html").read_text()
    references = References()
    references.feed(page)
    scores = json.loads((finished / "scores.json").read_text())
    pictures = [reference for reference in references.found if reference.startswith("data:image/webp;base64,")]
    table = [reference for reference in references.found if reference.startswith("data:text/csv;base64,")]
    assert len(pictures) >= len(scores["selection"]) + 2, "a grid for each w, real images, and the nearest of these"
    assert len(table) == 1 and len(pictures) + 1 == len(references.found)
    for text in (f"{scores['base']:.2f}", f"{scores['neon']:.2f}", "precision", "recall", "fd_fashion64"):
        assert text in page


def test_samples_are_of_as_many_of_each_class_and_beside_the_nearest_real_images(finished: Path) -> None:
    samples = load(finished).samples
    assert samples.captions == tuple(name for name in CLASS_NAMES for _ in range(5)) and samples.of_a_class == 5
    real, extractor = real_images(), load_features(FEATURES, torch.device("cpu"))
    assert samples.real is not None and torch.equal(samples.real, real[:50]) and samples.neighbours is not None
    assert 0.0 in samples.nearest
    for w, places in samples.nearest.items():
        shown = samples.neighbours[torch.tensor(places)]
        away = torch.cdist(extractor(samples.grids[w]).double(), extractor(real).double())
        assert torch.equal(shown, real[away.argsort(1)[:, : shown.shape[1]]]), w


def test_the_page_can_be_written_again_from_the_run_folder(finished: Path) -> None:
    page = (finished / "report.html").read_bytes()
    (finished / "report.html").unlink()
    assert report_again(finished).read_bytes() == page


def test_a_finished_run_is_shown_again_and_computes_nothing(finished: Path, base: Path) -> None:
    kept = [*finished.glob("synthetic/*.png"), *finished.glob("self-training/*"), finished / "evaluations.jsonl"]
    before = outcome(finished), {path: path.stat().st_mtime_ns for path in kept}
    run_demo(SMALL, finished, Processes(), base=base)
    assert (outcome(finished), {path: path.stat().st_mtime_ns for path in kept}) == before


def test_another_plan_in_the_same_folder_is_refused_and_changes_nothing(finished: Path, base: Path) -> None:
    before = (finished / "scores.json").read_bytes()
    with pytest.raises(RequestError, match=r"seed is 0, now 1.*--fresh"):
        run_demo(dataclasses.replace(SMALL, seed=1), finished, Processes(), base=base)
    assert (finished / "scores.json").read_bytes() == before


def test_a_run_that_cannot_be_told_is_refused_until_fresh(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "run")
    (tmp_path / "run" / "run.json").write_text("half a rec")
    with pytest.raises(RequestError, match=r"run.json: damaged .*--fresh"):
        run_demo(SMALL, tmp_path / "run", Processes())
    with run_folder(tmp_path / "run", {"seed": 0}, fresh=True) as folder:
        assert [file.name for file in folder.iterdir() if file.name != ".lock"] == ["run.json"]


def test_a_folder_that_is_no_run_is_never_emptied(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(RequestError, match=r"no run of ours"):
        run_demo(SMALL, tmp_path, Processes(), fresh=True)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


@pytest.mark.slow
def test_the_number_of_processes_changes_no_image_and_no_score(
    finished: Path, base: Path, tmp_path: Path, workers: Workers
) -> None:
    workers.run("tests.demo_driver:main", base, tmp_path / "run", folder=tmp_path, world_size=2)
    same(finished, tmp_path / "run")
    provenance = json.loads((tmp_path / "run" / "scores.json").read_text())["provenance"]
    assert provenance["processes"] == 2


@pytest.mark.slow
def test_a_run_killed_at_every_stage_ends_like_one_that_was_not(finished: Path, base: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    log = out / "evaluations.jsonl"
    stages: list[Callable[[], bool]] = [
        lambda: len(list(out.glob("synthetic/*.png"))) >= 4,
        lambda: (out / "self-training" / "training.jsonl").exists(),
        lambda: log.exists() and len(log.read_text().splitlines()) >= 2,
        lambda: log.exists() and len(log.read_text().splitlines()) >= 8,
    ]
    for reached in stages:
        process = start(main, base, out)
        while not reached() and process.exitcode is None:
            time.sleep(0.005)
        assert process.exitcode is None, "the run ended before it could be killed"
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL and not (out / "scores.json").exists()
    process = start(main, base, out)
    process.join()
    assert process.exitcode == 0
    same(finished, out)


def test_two_processes_do_not_work_on_one_run(finished: Path) -> None:
    with (
        run_folder(finished, read_record(finished)),
        pytest.raises(RequestError, match="another process"),
        run_folder(finished, read_record(finished)),
    ):
        pass


def test_a_wrong_request_is_one_line_from_the_processes_that_it_starts(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "neon.cli", "demo", "--out", "run", "--base", "nothing.safetensors"]
    done = subprocess.run([*command, "--processes", "2"], cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 2
    one_line(done.stderr, "nothing.safetensors: no such file")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--seed -1", "--seed is -1; expected 0 to 1023"),
        ("--out file", "file: a file, but a run needs a folder"),
    ],
)
def test_a_wrong_request_is_one_line_from_processes_that_were_started(
    tmp_path: Path, workers: Workers, arguments: str, message: str
) -> None:
    (tmp_path / "file").touch()
    workers.run("tests.test_demo:refused", arguments, folder=tmp_path, world_size=2)
    one_line((tmp_path / "stderr").read_text(), message)
    assert not (tmp_path / "run").exists()


def refused(arguments: str) -> None:
    assert cli.main(["demo", "--out", "run", *arguments.split()]) == 2


def test_a_demo_of_no_process_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["demo", "--processes", "0"]) == 2
    one_line(capsys.readouterr().err, "--processes 0: expected at least 1")


def one_line(said: str, message: str) -> None:
    assert said.strip().splitlines() == [said.strip()] and f"neon demo: {message}" in said


def test_a_full_disk_while_sampling_is_told_and_leaves_only_whole_images(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from PIL import Image

    save, written = Image.Image.save, []

    def full_after_6(self: Image.Image, file: object, **keywords: object) -> None:
        if len(written) == 6:
            raise OSError(errno.ENOSPC, "No space left on device")
        written.append(file)
        save(self, file, **keywords)

    monkeypatch.setattr(Image.Image, "save", full_after_6)
    with pytest.raises(WorkError, match="disk is full"):
        run_demo(SMALL, tmp_path / "run", Processes(), base=base)
    files = list((tmp_path / "run" / "synthetic").iterdir())
    assert len(files) == 6 and all(file.suffix == ".png" for file in files)
    monkeypatch.undo()
    run_demo(SMALL, tmp_path / "run", Processes(), base=base)
