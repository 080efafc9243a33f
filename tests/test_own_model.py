"""A model of your own: the commands of docs/own_model.md work as they stand there, and mistakes are one line."""

import glob
import json
import re
import runpy
import shlex
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import torch

from neon.checkpoint import load_state, open_checkpoint, save_safetensors
from neon.cli import app as cli
from neon.data.images import pack_set, write_images, write_labels
from neon.demo.assets import real_images
from neon.errors import RequestError
from neon.merge import LEAST_CHANGE
from neon.model import ATTRIBUTES, GenerativeModel, architecture, load_model, save_model
from tests.programs import ROOT, images
from tests.tiny import tiny_edm

DOCUMENT = (ROOT / "docs" / "own_model.md").read_text()
WALK, MERGE = re.findall(r"```sh\n(.*?)```", DOCUMENT, re.DOTALL)
EXAMPLE = ROOT / "docs" / "examples" / "flow.py"
FLOW = f"{EXAMPLE}:Flow"
CONFIG = {"image_shape": [1, 4, 4], "width": 8, "depth": 1}
FEWER = {
    "--name own": "--name own --total_images 1280 --dim 16",
    "--steps 2500": "--steps 150",
    "--num_images 1000": "--num_images 64",
    "--total_images 25600": "--total_images 1024",
    "--save_interval 6400": "--save_interval 256",
    "snapshot-000006.400-kimg": "snapshot-000000.256-kimg",
    "snapshot-000012.800-kimg": "snapshot-000000.512-kimg",
    "--num-images 2000 --report-images 2000": "--num-images 80 --report-images 80 --limit 3",
    "--num_images 2000": "--num_images 80",
}


def run(command: str) -> int:
    """The exit code of a command as a shell would run it, in this process."""
    typed = shlex.split(command, comments=True)
    words = [found for word in typed for found in (sorted(glob.glob(word)) or [word])]  # noqa: PTH207
    if words[0] == "neon":
        return cli.main(words[1:])
    assert words[0] == "python"
    try:
        with pytest.MonkeyPatch.context() as patch:
            if words[1] == "-m":
                patch.setattr("sys.argv", words[2:])
                runpy.run_module(words[2], run_name="__main__", alter_sys=True)
            else:
                patch.setattr("sys.argv", words[1:])
                runpy.run_path(words[1], run_name="__main__")
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


@pytest.fixture(scope="module")
def walked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which the commands of the document ran, with fewer steps and images."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("docs", "neon", "neon_merge.py"):
        (folder / name).symlink_to(ROOT / name)
    commands = WALK
    for printed, fewer in FEWER.items():
        assert printed in commands
        commands = commands.replace(printed, fewer)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        write_images("images", range(400), real_images()[:400])
        write_labels("images", None, 400)
        pack_set("images", "images.zip")
        for command in commands.splitlines():
            assert run(command) == 0, command
    return folder / "runs" / "own"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with an untrained base of the example, and a network of EDM."""
    monkeypatch.chdir(tmp_path)
    save_model("base.safetensors", architecture(FLOW)(CONFIG))
    save_model("edm.safetensors", tiny_edm())
    return tmp_path


def test_the_commands_of_the_document_sample_train_merge_and_report(walked: Path) -> None:
    sampled, labels = images(str(walked / "synthetic.zip"))
    assert sampled.shape == (64, 1, 14, 14) and labels is None
    base, tuned, merged = (
        load_state(walked / name)
        for name in ("base.safetensors", "self/snapshot-000000.512-kimg.safetensors", "neon.safetensors")
    )
    for name, weights in merged.items():
        torch.testing.assert_close(weights, 3 * base[name] - 2 * tuned[name], rtol=1e-5, atol=1e-6)
    with open_checkpoint(walked / "self/snapshot-000000.512-kimg.safetensors") as snapshot:
        assert float(snapshot.metadata["moved"]) > LEAST_CHANGE
    found = json.loads((walked / "tune" / "tune.json").read_text())
    assert found["metric"] == "fd_own" and found["recommended"] in ("base", "neon")
    assert "flow" in (walked / "tune" / "report.html").read_text()


def test_the_run_remembers_which_code_it_ran(walked: Path) -> None:
    record = json.loads((walked / "tune" / "run.json").read_text())
    assert record["architecture"] == "flow" and len(record["model_sha256"]) == 64


def test_bare_files_of_any_framework_merge_as_documented(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "neon_merge.py").symlink_to(ROOT / "neon_merge.py")
    generator = np.random.default_rng(0)
    a, b = ({"layer/kernel": generator.normal(size=(3, 4)).astype(np.float32), "step": np.array(7)} for _ in range(2))
    safetensors.numpy.save_file(a, "a.safetensors")
    safetensors.numpy.save_file(b, "b.safetensors")
    assert run(MERGE.strip()) == 0
    for w in (0.5, 1.0):
        merged = safetensors.numpy.load_file(f"neon_w{w:g}.safetensors")
        np.testing.assert_allclose(
            merged["layer/kernel"], (1 + w) * a["layer/kernel"] - w * b["layer/kernel"], rtol=1e-5, atol=1e-6
        )
        assert merged["step"] == 7


def test_images_do_not_depend_on_the_batch(here: Path) -> None:
    command = f"neon sample --model {FLOW} --network base.safetensors --num_images 8"
    for size in (3, 8):
        assert run(f"{command} --outdir of{size} --batch_size {size}") == 0
    assert torch.equal(images("of3")[0], images("of8")[0])


def test_the_programs_take_networks_of_installed_architectures_too(here: Path) -> None:
    command = "neon sample --network edm.safetensors --num_images 4 --outdir out --set num_steps=2 --class 1"
    assert run(command) == 0
    labels = images("out")[1]
    assert labels is not None and labels.tolist() == [1, 1, 1, 1]
    assert run(f"{command} --model edm --fresh") == 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            "--network base.safetensors",
            "base.safetensors: architecture 'flow' is unknown; expected one of diff",
        ),
        ("--network base.safetensors --model nowhere.py:Flow", "no file nowhere.py"),
        (f"--network base.safetensors --model {EXAMPLE}:Flwo", "called Flwo; it holds Flow"),
        (f"--network base.safetensors --model {EXAMPLE}:Velocity", "called Velocity; it holds Flow"),
        ("--network base.safetensors --model edn", "expected one of diffusers, edm"),
        (f"--network edm.safetensors --model {FLOW}", "edm.safetensors: a checkpoint of 'edm', but --model names Flow"),
        (f"--network none.safetensors --model {FLOW}", "none.safetensors: no such file"),
        (f"--network base.safetensors --model {FLOW} --set steps=3", "NAME=VALUE with a NAME of num_steps"),
        (f"--network base.safetensors --model {FLOW} --set num_steps=0", "num_steps is 0; expected at least 1"),
        (f"--network base.safetensors --model {FLOW} --class 2", "the network is unconditional"),
        (f"--network base.safetensors --model {FLOW} --vae vae.pth", "works on pixels"),
    ],
)
def test_a_wrong_model_is_one_line_and_exit_code_2(
    here: Path, capsys: pytest.CaptureFixture[str], flags: str, message: str
) -> None:
    assert run(f"neon sample {flags} --num_images 4 --outdir out") == 2
    [line] = capsys.readouterr().err.splitlines()
    assert message in line
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("class Mine:\n    pass\n", "no subclass of GenerativeModel called Mine"),
        ("def (", "mine.py does not run (SyntaxError"),
        ("import no_such_module", "mine.py does not run (ModuleNotFoundError: No module named 'no_such_module'"),
        (
            "from neon.model import GenerativeModel\nclass Mine(GenerativeModel):\n    pass\n",
            "Mine lacks encode, sample, training_loss, architecture",
        ),
    ],
)
def test_a_file_that_holds_no_model_is_refused_with_what_it_lacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(text)
    with pytest.raises(RequestError, match=re.escape(message)):
        architecture("mine.py:Mine")


def variant(replaced: str, by: str) -> str:
    """What names the example with some of its text replaced, in the working directory."""
    text = EXAMPLE.read_text()
    assert replaced in text
    Path("mine.py").write_text(text.replace(replaced, by))
    return "mine.py:Flow"


@pytest.mark.parametrize(
    ("replaced", "by", "message"),
    [
        ("self.recipe =", "recipe =", "its __init__ sets no recipe"),
        ("self.default_settings = FlowSettings()", 'self.default_settings = {"num_steps": 5}', "is no dataclass"),
        ('config["depth"]', 'config["layers"]', "no flow network can be built as the file describes it"),
        ("pixels, width)", "pixels, width, bias=False)", "not in the model: enter.bias"),
    ],
)
def test_a_model_that_breaks_the_contract_is_told_where(here: Path, replaced: str, by: str, message: str) -> None:
    with pytest.raises(RequestError, match=re.escape(message)):
        load_model("base.safetensors", kind=variant(replaced, by))


def test_postponed_annotations_in_the_file_work(here: Path) -> None:
    name = variant("\nimport sys", "\nfrom __future__ import annotations\n\nimport sys")
    assert load_model("base.safetensors", kind=name).default_settings.num_steps == 5


def test_weights_that_neon_did_not_write_open_if_the_class_tells_their_config(here: Path) -> None:
    state = load_state("base.safetensors")
    torch.save({"model": state}, "bare.pth")
    with pytest.raises(RequestError, match=r"bare\.pth: carries no config"):
        load_model("bare.pth", kind=FLOW)
    name = variant(
        "    def encode(",
        f"    @classmethod\n    def config_of(cls, checkpoint):\n        return {CONFIG!r}\n\n    def encode(",
    )
    loaded = load_model("bare.pth", kind=name).network.state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in state.items())


def test_a_checkpoint_cannot_name_a_file_that_is_run(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("evil.py").write_text("open('was-here', 'w').write('!')\n")
    with open_checkpoint("base.safetensors") as checkpoint:
        metadata = {**checkpoint.metadata, "architecture": f"{here / 'evil.py'}:Flow"}
    save_safetensors("evil.safetensors", load_state("base.safetensors"), metadata)
    assert run("neon sample --network evil.safetensors --num_images 4 --outdir out") == 2
    assert run(f"neon sample --model {FLOW} --network evil.safetensors --num_images 4 --outdir out") == 2
    assert run("neon inspect evil.safetensors") == 0
    assert run("neon convert evil.safetensors copy.safetensors") == 0
    assert not Path("was-here").exists()
    with pytest.raises(RequestError, match="is unknown"):
        load_model("evil.safetensors")


def test_the_document_names_every_member_of_the_contract() -> None:
    for name in (*ATTRIBUTES, *GenerativeModel.__abstractmethods__, "architecture", "config_of", "autoencoder_file"):
        assert f"`{name}" in DOCUMENT, name
    members = {name for name in vars(GenerativeModel) if not name.startswith("_")}
    for name in members | set(GenerativeModel.__annotations__):
        assert name in DOCUMENT, name
