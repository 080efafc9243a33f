"""`neon reproduce`: a published score measured again; here a tiny network stands in, served by a local server."""

import dataclasses
import json
import re
import threading
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from neon.cli import app, reproduce
from neon.cli.command_line import parse
from neon.evaluate import features as rows
from neon.evaluate import run as evaluation
from neon.model import architecture as model_class
from neon.published import IMAGES, Evaluation, Published
from neon.runtime.published_files import PublishedFile, published_files
from tests import pickles
from tests.programs import ROOT, Killed, dies_after, write_real
from tests.tiny import tiny_edm, tiny_images

RELEASED = reproduce.released_scores()
COUNT = 40


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *arguments: object) -> None:
        pass


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str]]:
    """A folder with a tiny network, features and statistics, and the address under which it is served."""
    folder = tmp_path_factory.mktemp("served")
    model = tiny_edm(0)
    (folder / "Neon_tiny.pkl").write_bytes(pickles.dumps(pickles.snapshot(model.network, model.config["network"])))
    write_real(folder, tiny_images(60))
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder))) as http:
        thread = threading.Thread(target=http.serve_forever, args=(0.01,))
        thread.start()
        yield folder, f"http://127.0.0.1:{http.server_port}"
        http.shutdown()
        thread.join()


@pytest.fixture
def stand_in(
    served: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., dict[str, Any]]:
    """`neon reproduce Neon_tiny` with given words, published figure and exit code, in an empty folder: the record."""
    folder, address = served
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(reproduce, "IMAGES", COUNT)
    files = [
        PublishedFile(name=name, architectures=("edm",), kind=kind, megabytes=0, source=f"{address}/{name}", places=at)
        for name, kind, at in (
            ("Neon_tiny.pkl", "neon", ("checkpoints/Neon_tiny.pkl",)),
            ("real.npz", "statistics", (str(tmp_path / "cache/real.npz"),)),
        )
    ]
    monkeypatch.setattr(reproduce, "published_files", lambda: files)
    how = Evaluation(
        checkpoint="Neon_tiny.pkl",
        statistics="real.npz",
        program="edm.calculate_fid:ScoreEDM",
        flags="--network_pkl {checkpoint} --ref {statistics} --seeds 0-{last} --num_steps 3 "
        f"--features {folder}/features.safetensors --batch_size 8 --device cpu",
        calls=5,
    )

    def run(*words: str, fid: float = 1.0, code: int = 0, record: str = "reproduced/Neon_tiny.json") -> dict[str, Any]:
        row = Published(name="tiny", network={}, settings=None, fid_base=2.0, fid_neon=fid, neon=how)
        monkeypatch.setattr(reproduce, "released_scores", lambda: {"Neon_tiny": ("edm", row, how)})
        assert app.main(["reproduce", "Neon_tiny", "--batch_size", "8", *words]) == code
        return json.loads(Path(record).read_text())

    return run


def test_a_score_is_fetched_measured_compared_and_recorded(
    stand_in: Callable[..., dict[str, Any]], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    first = stand_in(fid=1e-4, code=1)
    value = first["measured"]["fd_tiny6"]
    assert first["verdict"] == "higher"
    *_, verdict = capsys.readouterr().out.splitlines()
    assert verdict.startswith(f"Neon_tiny: not reproduced, {value:.2f} is higher than the published 0.00 of {COUNT}")
    assert Path("checkpoints/Neon_tiny.pkl").is_file() and not [*Path("runs").iterdir()]

    again = stand_in(fid=value * 1.02)
    assert again["verdict"] == "reproduced" and again["measured"]["fd_tiny6"] == value
    printed = capsys.readouterr().out
    assert "fetching" not in printed and "reproduced," in printed.splitlines()[-1]
    assert stand_in(fid=value * 1.1, code=1)["verdict"] == "lower"

    assert again["published"] == {"fid": value * 1.02, "fid_of_base": 2.0, "num_images": COUNT}
    assert again["measured"]["network"] == "Neon_tiny.pkl" and len(again["measured"]["network_sha256"]) == 64
    assert again["measured"]["ref"] == "real.npz" and again["measured"]["settings"]["num_steps"] == 3
    assert again["packages"]["torch"] and again["hardware"] and again["measured"]["seconds"] > 0
    assert str(tmp_path) not in json.dumps({**again, "flags": None}), "no place on this machine"


def test_a_quick_try_says_that_it_does_not_compare(
    stand_in: Callable[..., dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    record = stand_in("--num_images", "10", fid=1e-3, record="reproduced/Neon_tiny-10.json")
    assert record["verdict"] == "does not compare" and record["measured"]["num_images"] == 10
    assert f"of 10 images does not compare with the published 0.00 of {COUNT}" in capsys.readouterr().out
    assert not Path("reproduced/Neon_tiny.json").exists()


def test_a_killed_one_goes_on_to_the_score_of_a_whole_one(stand_in: Callable[..., dict[str, Any]]) -> None:
    whole = stand_in("--json", "whole.json", record="whole.json", code=1)["measured"]["fd_tiny6"]
    with mock.patch.object(evaluation, "SAVE_EVERY_SECONDS", 0.0):
        with dies_after(3, rows, "sample_block"), pytest.raises(Killed):
            stand_in()
        with dies_after(2, rows, "sample_block"):
            assert stand_in(code=1)["measured"]["fd_tiny6"] == whole


def test_what_cannot_be_fetched_is_one_line_that_says_how_to_get_it(
    stand_in: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint, real = reproduce.published_files()
    elsewhere = dataclasses.replace(real, source=real.source.replace("real", "none"))
    monkeypatch.setattr(reproduce, "published_files", lambda: [checkpoint, elsewhere])
    with pytest.raises(FileNotFoundError):
        stand_in(code=2)
    [line] = capsys.readouterr().err.splitlines()
    assert "real.npz (statistics) is missing" in line and "404" in line
    assert "neon download --only edm" in line and real.places[0] in line


def test_another_name_is_refused_with_the_nearest_and_numbers_that_make_no_sense(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert app.main(["reproduce", "neon_edm_fhq"]) == 2
    assert "did you mean Neon_EDM_FFHQ?" in capsys.readouterr().err
    assert app.main(["reproduce", "Neon_EDM_FFHQ", "--num_images", "60000"]) == 2
    assert "--num_images 60000" in capsys.readouterr().err


def test_the_list_says_what_there_is_what_it_costs_and_what_is_missing(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert app.main(["reproduce"]) == 0
    listed = capsys.readouterr().out
    assert re.search(r"Neon_EDM_FFHQ +2\.39 +1\.12 +79  \d missing, \d+ MB to come", listed)
    assert app.main(["reproduce", "--list"]) == 0 and capsys.readouterr().out == listed


def test_every_released_merge_has_a_row_with_the_figures_of_the_readme() -> None:
    names = {file.name for file in published_files() if file.kind == "neon"}
    assert {how.checkpoint for _, _, how in RELEASED.values()} == names
    readme = (ROOT / "README.md").read_text()
    for _, row, how in RELEASED.values():
        [line] = [line for line in readme.splitlines() if line.startswith("|") and how.checkpoint in line]
        assert f"| {row.fid_base:.2f} | {row.fid_neon:.2f} |" in line


@pytest.mark.parametrize("name", RELEASED)
def test_the_protocol_of_a_released_merge_is_a_command_of_its_program(name: str) -> None:
    """Its flags parse, its files are in the table, its calls are those that its model tells, and it is as published."""
    architecture, row, how = RELEASED[name]
    files = {file.name: file for file in reproduce.needed(architecture, how)}
    assert {how.checkpoint, how.statistics} <= files.keys() and "inception" in {file.kind for file in files.values()}
    module, _, cls = how.program.partition(":")
    command: Any = parse(getattr(import_module(module), cls), how.words("a.pkl", "b.npz", IMAGES), name)
    keyword = {"edm": "network", "imm": "network", "VAR": "transformer", "xAR": "transformer"}[architecture]
    with torch.device("meta"):
        model = model_class(architecture)({keyword: row.network})
    settings = command.settings_for(model)
    assert model.calls(settings) == how.calls
    count = command.num_images if architecture != "edm" else len(command.seeds_of(None))
    assert count == IMAGES
    published = {"VAR": "--cfg", "xAR": "--cfg", "imm": "--cfg_scale", "edm": "--num_steps"}[architecture]
    [line] = [line for line in (ROOT / "README.md").read_text().splitlines() if line.startswith("|") and name in line]
    value = how.flags.split()[how.flags.split().index(published) + 1]
    assert value in line.rsplit("|", 2)[1]
