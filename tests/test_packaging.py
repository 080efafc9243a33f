"""The wheel holds the packages and their data, nothing of the repository, and works where it is installed."""

import os
import re
import runpy
import subprocess
import sys
from collections.abc import Iterable
from email.parser import HeaderParser
from pathlib import Path
from zipfile import ZipFile

import pytest
import yaml

import neon

ROOT = Path(__file__).parent.parent
PACKAGES = ("neon", "edm", "VAR", "xAR", "imm", "neon_diffusers")
SCRIPT = ".data/scripts/download_models.sh"
TOP_LEVEL = {*PACKAGES, "neon_merge"}


def pip(*arguments: str | Path, cwd: Path) -> None:
    command = [sys.executable, "-m", "pip", *arguments, "--quiet", "--disable-pip-version-check", "--no-deps"]
    done = subprocess.run([*command, "--no-index"], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from the whole checkout, tests and benchmarks in sight, which is not written to; without a network."""
    checkout, built = tmp_path_factory.mktemp("checkout"), tmp_path_factory.mktemp("wheel")
    for path in ROOT.iterdir():
        if path.name != "build" and path.suffix != ".egg-info":  # a build writes these beside pyproject.toml
            (checkout / path.name).symlink_to(path)
    pip("wheel", "--no-build-isolation", "--wheel-dir", built, checkout, cwd=checkout)
    [found] = built.iterdir()
    return found


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("installed")
    pip("install", "--target", folder, wheel, cwd=folder)
    return folder


def files(names: Iterable[str]) -> set[str]:
    return {name for name in names if ".dist-info/" not in name and not name.endswith(SCRIPT)}


@pytest.mark.slow
def test_the_wheel_is_named_after_the_project_and_says_what_it_is(wheel: Path) -> None:
    assert wheel.name == f"neon_extrapolation-{neon.__version__}-py3-none-any.whl"
    with ZipFile(wheel) as archive:
        [name] = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        metadata = HeaderParser().parsestr(archive.read(name).decode())
    assert metadata["Name"] == "neon-extrapolation"
    assert metadata["License-Expression"] == "MIT"
    for field in ("Author", "Summary", "Keywords", "Classifier", "Project-URL", "License-File"):
        assert metadata[field], field


@pytest.mark.slow
def test_the_long_description_is_the_readme_without_relative_links(wheel: Path) -> None:
    with ZipFile(wheel) as archive:
        [name] = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        metadata = HeaderParser().parsestr(archive.read(name).decode())
    assert metadata["Description-Content-Type"] == "text/markdown"
    description = metadata.get_payload()
    assert description.lstrip().startswith("# Neon") and relative_links(description) == []


def relative_links(text: str) -> list[str]:
    return re.findall(r"""\]\((?![a-z]+:|\#)([^)]*)\)|(?:src|srcset|href)="(?![a-z]+:|\#)([^"]*)\"""", text)


def test_links_of_the_long_description_lead_into_the_repository_of_a_release() -> None:
    made = runpy.run_path(str(ROOT / "setup.py"))["with_absolute_links"]
    text = (
        "a ![picture](docs/a.png) and [page](docs/a.md#part) of [paper](https://arxiv.org/abs/1), [below](#x)\n"
        '<a href="docs/b.md"><img width="9" src="docs/b.png" alt="b"></a>'
    )
    there = "https://example.org/neon"
    assert made(text, f"{there}/") == (
        f"a ![picture]({there}/raw/HEAD/docs/a.png) and [page]({there}/blob/HEAD/docs/a.md#part) of "
        "[paper](https://arxiv.org/abs/1), [below](#x)\n"
        f'<a href="{there}/blob/HEAD/docs/b.md"><img width="9" src="{there}/raw/HEAD/docs/b.png" alt="b"></a>'
    )
    assert made(text, "") == "a  and page of [paper](https://arxiv.org/abs/1), [below](#x)\n"
    readme = (ROOT / "README.md").read_text()
    assert relative_links(readme) and relative_links(made(readme, there)) == relative_links(made(readme, "")) == []


def test_the_citation_is_of_this_version_and_the_paper() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert (citation["version"], citation["license"]) == (neon.__version__, "MIT")
    assert "2510.03597" in citation["preferred-citation"]["url"]


def test_the_workflow_calls_what_a_new_machine_must_pass_and_its_actions_are_pinned() -> None:
    [job] = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"].values()
    assert job["steps"][-1] == {"run": ".ci/run"} and os.access(ROOT / ".ci/run", os.X_OK)
    used = [step["uses"] for step in job["steps"] if "uses" in step]
    assert used and all(re.fullmatch(r"actions/[\w-]+@[0-9a-f]{40}", action) for action in used)


def test_hooks_are_tools_of_the_environment_and_fetch_nothing() -> None:
    [repository] = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert repository["repo"] == "local"
    assert {hook["language"] for hook in repository["hooks"]} == {"system"}
    assert {hook["entry"].split()[0] for hook in repository["hooks"]} == {".venv/bin/ruff", ".venv/bin/mypy"}


def test_the_image_is_given_all_that_the_package_is_built_of() -> None:
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert all((ROOT / name).exists() for name in kept)
    assert kept >= {
        *PACKAGES,
        "neon_merge.py",
        "download_models.sh",
        "pyproject.toml",
        "setup.py",
        "README.md",
        "LICENSE",
    }


@pytest.mark.slow
def test_the_wheel_holds_the_packages_and_nothing_else(wheel: Path) -> None:
    with ZipFile(wheel) as archive:
        names = files(archive.namelist())
    assert {name.split("/")[0].removesuffix(".py") for name in names} == TOP_LEVEL


@pytest.mark.slow
def test_the_wheel_holds_every_file_of_the_packages(wheel: Path) -> None:
    """The weights, images and statistics of the demo, the mark of typed packages, and all modules."""
    with ZipFile(wheel) as archive:
        names = files(archive.namelist())
    of_checkout = {
        str(path.relative_to(ROOT))
        for package in PACKAGES
        for path in (ROOT / package).rglob("*" if package == "neon" else "*.py")  # others may hold downloaded weights
        if path.is_file() and path.suffix != ".pyc" and not path.name.startswith(".")
    }
    assert "neon/py.typed" in names and "neon/demo/base.safetensors" in names
    assert names == of_checkout | {"neon_merge.py"}


@pytest.mark.slow
def test_what_is_installed_runs_without_the_checkout(installed: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(installed), "OMP_NUM_THREADS": "1"}

    def run(*command: str | Path) -> str:
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    origins = "import neon, edm, VAR, xAR, imm, neon_merge; print(neon.__version__)\n"
    origins += "for module in (neon, edm, VAR, xAR, imm, neon_merge): print(module.__file__)"
    version, *found = run(sys.executable, "-c", origins).split()
    assert version == neon.__version__
    assert all(Path(file).is_relative_to(installed) for file in found)
    base = installed / "neon/demo/base.safetensors"
    assert "architecture" in run(installed / "bin/neon", "inspect", base)
    assert "cifar10-32x32.npz" in run("bash", installed / "bin/download_models.sh", "--list")


def test_nobody_is_told_to_install_the_other_project_named_neon() -> None:
    """In no document, message or comment; what `neon doctor` advises is asserted in tests/test_doctor.py."""
    texts = [
        *ROOT.glob("*.*"),
        *(ROOT / "docs").rglob("*.*"),
        *(f for name in PACKAGES for f in (ROOT / name).rglob("*")),
    ]
    read = [f for f in texts if f.suffix in {".md", ".py", ".sh", ".toml", ".yml"} and f.name != "doctor.py"]
    advice = re.compile(r"""install\s[^`\n]*?(?<![\w./-])["']?neon(?:\[|["'`\s]|$)""", re.MULTILINE)
    assert advice.search("pip install -U 'neon[imm]'") and not advice.search("pip install 'neon-extrapolation[imm]'")
    assert len(read) > 100 and [f.name for f in read if advice.search(f.read_text())] == []
