"""What the README and the documents say works as it is written, and the pins agree with each other."""

import re
import runpy
import sys
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

import neon
from neon.checkpoint import load_state
from neon.merge import LEAST_CHANGE
from neon.model import save_model
from tests.test_own_model import run
from tests.tiny import tiny_edm

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parent.parent


DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(language: str, document: str = "README.md") -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / document).read_text(), re.DOTALL)


GIVEN = {"base.safetensors", "base.pth", "tuned.safetensors", "tuned.pth", "neon_merge.py"}
"""the files that the first commands of docs/merging.md name"""
MERGED = {"neon.safetensors", "converted.safetensors"}
MERGED |= {f"neon_w{w}.pth{end}" for w in ("0.5", "1", "1.5") for end in ("", ".json")}
"""what they make of these"""


def write_given(folder: Path) -> None:
    for name, model in (("base", tiny_edm(0)), ("tuned", tiny_edm(1))):
        save_model(folder / f"{name}.safetensors", model)
        torch.save({"model_ema": model.network.state_dict(), "epoch": 3}, folder / f"{name}.pth")
    (folder / "neon_merge.py").write_text((ROOT / "neon_merge.py").read_text())


def test_its_pictures_are_light_and_the_strip_goes_there_and_back() -> None:
    strip, still = (Image.open(ROOT / "docs" / f"neon-{name}.webp") for name in ("strip", "samples"))
    assert strip.width == still.width == 2 * 830 and strip.n_frames > 40 and strip.info["loop"] == 0
    assert sum(Path(picture.filename).stat().st_size for picture in (strip, still)) < 400_000


def test_the_merge_commands_run_as_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_given(tmp_path)
    [commands] = [block for block in blocks("sh", "docs/merging.md") if "neon_merge.py" in block]
    monkeypatch.chdir(tmp_path)
    for command in commands.splitlines():
        assert run(command) == 0, command
    assert {path.name for path in tmp_path.iterdir()} == GIVEN | MERGED


def fewer(text: str, replaced: dict[str, str]) -> str:
    for printed, few in replaced.items():
        assert printed in text
        text = text.replace(printed, few)
    return text


def test_the_python_lines_run_as_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "neon").symlink_to(ROOT / "neon")
    [code] = blocks("python", "docs/by_hand.md")
    scope: dict = {}
    exec(fewer(code, {"base, 1000": "base, 16", "=6400": "=256", "num_images=2000": "num_images=70"}), scope)
    assert scope["images"].shape == (16, 1, 14, 14)
    base, improved = map(float, capsys.readouterr().out.split())
    assert improved < base
    theirs, trained = load_state("neon/demo/base.safetensors"), load_state(scope["self_trained"])
    ours = load_state("runs/python/neon.safetensors")
    weights = [name for name in ours if not name.endswith("resample_filter")]
    for name in weights:
        torch.testing.assert_close(ours[name], 2 * theirs[name] - trained[name], rtol=1e-5, atol=1e-6)
    assert neon.load("runs/python/neon.safetensors", device="cpu").settings == scope["base"].settings


def test_the_small_edm_run_works_as_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With fewer images and steps; the order and the names of files are those of docs/by_hand.md."""
    [commands] = [block for block in blocks("sh", "docs/by_hand.md") if "edm/sample.py" in block]
    commands = fewer(
        commands,
        {
            "--seeds 0-999": "--seeds 0-15",
            "--duration 0.0064": "--duration 0.000256",
            "snapshot-000006.400-kimg": "snapshot-000000.256-kimg",
            "--seeds 50000-51999": "--seeds 50000-50069",
        },
    )
    for name in ("edm", "neon", "neon_merge.py"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    for command in commands.splitlines():
        assert run(command) == 0, command
    printed = capsys.readouterr().out
    scores = re.findall(r"FD_fashion64=([\d.]+)", printed)
    *_, swept, _, merged = scores
    assert float(re.findall(r"^moved ([\d.e+-]+)", printed, re.MULTILINE)[0]) > LEAST_CHANGE
    assert len(scores) == 5 and merged == swept, "the merged file scores as w = 1 of the sweep"


def test_the_page_of_the_library_is_that_of_its_docstrings() -> None:
    made = runpy.run_path(str(ROOT / "docs" / "make_api.py"))
    assert made["PAGE"].read_text() == made["page"](), "run python docs/make_api.py"


def test_every_other_command_names_a_program_that_exists() -> None:
    [block] = [block for block in blocks("sh", "docs/demo.md") if "neon demo" in block]
    commands = block.splitlines()
    assert len(commands) == 4
    for command in commands:
        words = command.split("#")[0].split()
        line = ["python", *words[words.index("-m") :]] if "-m" in words else words  # torchrun's left out
        assert run(" ".join([*line, "--help"])) == 0, command


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_picture_and_file_it_names_is_there(document: Path) -> None:
    text = document.read_text()
    for name in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
        assert (document.parent / name).exists(), name
    for name in re.findall(r"`((?:tests|benchmarks|docs|neon)/[\w./-]+)`", text):
        assert (ROOT / name).exists(), name


def pins() -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if match := re.match(r"([\w.-]+)==([\w.]+)", line):
            found.setdefault(match[1].lower().replace("_", "-"), set()).add(match[2])
    return found


def test_conda_users_get_the_same_versions_as_pip_users() -> None:
    dependencies = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    [by_pip] = [entry["pip"] for entry in dependencies if isinstance(entry, dict)]
    assert by_pip[-1] == "-e ."
    pinned = [line.split("==") for line in by_pip if "==" in line]
    for name, version in pinned:
        assert version in pins()[name.lower().replace("_", "-")], name
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    optional = project["optional-dependencies"]
    lines = [*project["dependencies"], *optional["imm"], *optional["notebook"]]
    wanted = {re.split(r"[>=\[]", line)[0].lower().replace("_", "-") for line in lines}
    assert {name.lower().replace("_", "-") for name, _ in pinned} == wanted
    developers = {re.split(r"[>=]", line)[0] for line in optional["dev"]}
    assert wanted | developers <= pins().keys()
