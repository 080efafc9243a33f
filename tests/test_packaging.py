"""The wheel holds the packages and their data, nothing of the repository, and works where it is installed."""

import os
import re
import subprocess
import sys
from collections.abc import Iterable
from email.parser import HeaderParser
from pathlib import Path
from zipfile import ZipFile

import pytest

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
