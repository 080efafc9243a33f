"""The `neon` command: what it prints, its exit codes, and one line for everything that can go wrong."""

import json
import os
import resource
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from neon.checkpoint import load_state, open_checkpoint, save_safetensors
from neon.cli.app import main
from neon.model import load_model
from neon.runtime.files import sha256_file
from tests import pickles
from tests.test_own_model import run
from tests.tiny import tiny_edm
from tests.workers import ended

ROOT = Path(__file__).parents[1]
BASE = {"net.weight": torch.linspace(-1, 1, 600).reshape(20, 30), "steps": torch.tensor(3)}
TUNED = {"net.weight": BASE["net.weight"] * 1.1, "steps": torch.tensor(4)}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with base and self-trained weights in it."""
    monkeypatch.chdir(tmp_path)
    save_safetensors("base.safetensors", BASE, {"architecture": "toy", "config": "{}"})
    save_safetensors("tuned.safetensors", TUNED, {"architecture": "toy", "config": "{}"})
    torch.save({"model_ema": BASE, "model": TUNED}, "base.pth")
    return tmp_path


def merge(*arguments: str, base: str = "base.safetensors", tuned: str = "tuned.safetensors") -> int:
    return main(["merge", "--base", base, "--self-trained", tuned, *arguments])


def test_merge_writes_the_output_and_says_what_it_did(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert merge("-w", "1.5", "--output", "neon.safetensors", "--json", "report.json", base="base.pth") == 0
    expected = 2.5 * BASE["net.weight"] - 1.5 * TUNED["net.weight"]
    torch.testing.assert_close(load_state("neon.safetensors")["net.weight"], expected)
    printed = capsys.readouterr()
    assert "theta_neon = (1 + w) * theta_base - w * theta_self_trained" in printed.out
    assert "base.pth [model_ema; also there: model]" in printed.out
    assert "1 merged, 1 copied" in printed.out
    assert "neon.safetensors" in printed.out
    assert printed.err == ""
    [report] = json.loads(Path("report.json").read_text())
    assert report["w"] == 1.5
    assert report["base_sha256"] == sha256_file("base.pth")


@pytest.mark.parametrize("flags", [["-w", "-1", "0", "1.5"], ["--w", "-1", "0", "1.5"]])
def test_several_weights_negative_ones_too(folder: Path, flags: list[str]) -> None:
    assert merge(*flags, "--output", "neon_{w}.safetensors") == 0
    assert torch.equal(load_state("neon_-1.safetensors")["net.weight"], TUNED["net.weight"])
    assert torch.equal(load_state("neon_0.safetensors")["net.weight"], BASE["net.weight"])
    assert Path("neon_1.5.safetensors").exists()


def test_flags_take_hyphens_or_underscores_and_an_equals_sign(folder: Path) -> None:
    command = "merge --base=base.pth --self_trained base.pth --self_trained_key model -w=-1 --output=a.pth"
    assert main(command.split()) == 0
    assert torch.equal(load_state("a.pth")["net.weight"], TUNED["net.weight"])


def test_the_program_in_the_checkout_is_the_same_command(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = f"{ROOT / 'neon_merge.py'} --base base.safetensors --self-trained tuned.safetensors -w -1"
    typed = [sys.executable, *command.split(), "--output", "a.safetensors"]
    done = subprocess.run(typed, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert torch.equal(load_state("a.safetensors")["net.weight"], TUNED["net.weight"])
    assert run(f"python {command} --output a.safetensors") == 2
    assert capsys.readouterr().err == (
        "neon merge: a.safetensors: already exists; choose another name or pass --overwrite to replace it\n"
    )


def test_equal_weights_are_merged_with_a_warning(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert merge("-w", "1", "2", "--output", "neon_{w}.safetensors", tuned="base.safetensors") == 0
    warning = "neon merge: warning: base and self-trained are equal: nothing to extrapolate\n"
    assert capsys.readouterr().err == warning


def expect_one_line(capsys: pytest.CaptureFixture[str], command: str, *parts: str) -> None:
    printed = capsys.readouterr()
    assert printed.err.startswith(f"neon {command}: "), printed.err
    assert printed.err.count("\n") == 1
    assert "Traceback" not in printed.err
    for part in parts:
        assert part in printed.err


BAD_FILES = {
    "empty": b"",
    "page": b"<!DOCTYPE html><html></html>",
    "pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
    "truncated": struct.pack("<Q", 54) + b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}1234',
    "text": b"these are no weights",
}


@pytest.mark.parametrize("name", [*BAD_FILES, "missing", "directory"])
@pytest.mark.parametrize("command", ["merge --base", "merge --self-trained", "inspect", "convert"])
def test_something_else_in_place_of_weights_is_one_line_and_exit_code_2(
    folder: Path, capsys: pytest.CaptureFixture[str], name: str, command: str
) -> None:
    Path("directory").mkdir()
    if name in BAD_FILES:
        Path(name).write_bytes(BAD_FILES[name])
    code = {
        "merge --base": lambda: merge("-w", "1", "--output", "neon.safetensors", base=name),
        "merge --self-trained": lambda: merge("-w", "1", "--output", "neon.safetensors", tuned=name),
        "inspect": lambda: main(["inspect", name]),
        "convert": lambda: main(["convert", name, "neon.safetensors"]),
    }[command]()
    assert code == 2
    expect_one_line(capsys, command.split()[0], name)
    assert not Path("neon.safetensors").exists()


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["-w", "nan", "--output", "n.safetensors"], "w = nan"),
        (["-w", "-inf", "--output", "n.safetensors"], "w = -inf"),
        (["-w", "1", "abc", "--output", "n_{w}.safetensors"], "-w abc: not a number"),
        (["-w", "1", "--output", "base.safetensors", "--overwrite"], "the output is the input"),
        (["-w", "1", "--output", "n.bin"], "unknown output format"),
        (["-w", "1", "--output", "base.safetensors/n.safetensors"], "cannot write here"),
        (["-w", "1", "--output", "/proc/neon/n.safetensors"], "cannot write here"),
        (["-w", "1", "--output", "n" * 300 + ".safetensors"], "name too long"),
        (["-w", "1", "2", "--output", "n.safetensors"], "{w}"),
        (["-w", "1", "--output", "n.safetensors", "--key", "ema"], "no nesting 'ema'"),
    ],
)
def test_a_wrong_request_is_one_line_and_exit_code_2(
    folder: Path, capsys: pytest.CaptureFixture[str], flags: list[str], expected: str
) -> None:
    before = sorted(Path().iterdir())
    assert merge(*flags) == 2
    expect_one_line(capsys, "merge", expected)
    assert sorted(Path().iterdir()) == before


def test_other_shapes_are_one_line_that_lists_both_sides(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_safetensors("deep.safetensors", {**TUNED, "net.bias": torch.zeros(3)}, {})
    assert merge("-w", "1", "--output", "n.safetensors", tuned="deep.safetensors") == 2
    expect_one_line(capsys, "merge", "only in self-trained: net.bias", "2 and 3 tensors")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["mrege"], "did you mean merge?"),
        (["inspect", "base.pth", "--jsno"], "--json"),
        (["merge", "--base", "base.pth"], "--self_trained"),
    ],
)
def test_a_mistyped_command_suggests_the_nearest(
    folder: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], expected: str
) -> None:
    assert main(arguments) == 2
    assert expected in capsys.readouterr().err


@pytest.mark.parametrize("command", ["stats images out.npz", "fid a.npz b.npz"])
def test_no_images_per_pass_are_refused(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*command.split(), "--batch_size", "0"]) == 2
    expect_one_line(capsys, command.split()[0], "--batch_size 0: expected at least 1")


def limited(command: list[str]) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
    sys.exit(main(command))


@pytest.mark.parametrize("output", ["neon.safetensors", "neon.pth"])
def test_a_write_that_fails_midway_is_one_line_and_exit_code_1_with_nothing_half_written(
    folder: Path, output: str
) -> None:
    before = sorted(folder.iterdir())
    command = ["merge", "--base", "base.pth", "--self-trained", "tuned.safetensors", "-w", "1", "--output", output]
    message = f"neon merge: {output}: writing failed (File too large); nothing was written\n"
    assert ended(limited, command) == (1, message)
    assert sorted(folder.iterdir()) == before


def test_a_reader_that_leaves_early_is_no_error(folder: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "neon.cli", "inspect", "base.pth"]
    run = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, env=environment)
    os.close(writer)
    assert (run.returncode, run.stderr) == (0, b"")


def test_inspect_shows_format_names_shapes_dtypes_and_hash(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "base.pth"]) == 0
    printed = capsys.readouterr().out
    for part in ("torch", "model_ema", "net.weight", "[20, 30]", "float32", "int64", sha256_file("base.pth")):
        assert part in printed


def test_inspect_prints_json(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "base.safetensors", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["format"] == "safetensors"
    assert facts["architecture"] == "toy"
    assert facts["sha256"] == sha256_file("base.safetensors")
    assert facts["parameters"] == 600
    assert facts["tensors"] == {
        "steps": {"shape": [], "dtype": "int64"},
        "net.weight": {"shape": [20, 30], "dtype": "float32"},
    }
    assert main(["inspect", "base.pth", "--json", "--key", "model"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["key"], facts["candidates"]) == ("model", ["model_ema", "model"])


def test_convert_writes_safetensors(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", "base.pth", "a.safetensors"]) == 0
    assert "model_ema; also there: model" in capsys.readouterr().out
    assert torch.equal(load_state("a.safetensors")["net.weight"], BASE["net.weight"])
    assert main(["convert", "base.pth", "a.safetensors"]) == 2
    assert main(["convert", "base.pth", "a.safetensors", "--key", "model", "--overwrite"]) == 0
    with open_checkpoint("a.safetensors") as checkpoint:
        assert checkpoint.metadata["source_key"] == "model"
    assert main(["convert", "base.pth", "a.pth"]) == 2
    assert main(["convert", "a.safetensors", "a.safetensors", "--overwrite"]) == 2


def test_a_published_pickle_is_described_converted_and_sampled_from(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny_edm()
    Path("base.pkl").write_bytes(pickles.dumps(pickles.snapshot(model.network, model.config["network"])))
    assert main(["inspect", "base.pkl", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["format"], facts["architecture"], facts["key"]) == ("pickle", "edm", "ema")
    assert list(facts["tensors"]) == list(model.network.state_dict())
    assert main(["convert", "base.pkl", "converted.safetensors"]) == 0
    for name in ("base.pkl", "converted.safetensors"):
        loaded = load_model(name)
        assert loaded.config == {"precond": "EDMPrecond", "network": model.config["network"]}
        for ours, theirs in zip(loaded.network.parameters(), model.network.parameters(), strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("given", [{}, {"TQDM_DISABLE": "1"}])
def test_progress_bars_are_left_out_where_the_environment_says_so(given: dict[str, str]) -> None:
    bar = (
        "import types; from neon.runtime.progress import Progress; main = types.SimpleNamespace(is_main=True)\n"
        "with Progress('sampling', 3, 'img', main) as bar: bar.advance(3)"
    )
    done = subprocess.run([sys.executable, "-c", bar], cwd=ROOT, env={**os.environ, **given}, capture_output=True)
    assert done.returncode == 0 and (b"sampling" in done.stderr) is not bool(given)
