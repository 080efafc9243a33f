"""Imports go down only: from the command line over the flow to files and processes; no architecture knows another."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ARCHITECTURES = ("edm", "VAR", "xAR", "imm", "neon_diffusers")
PROGRAMS = ("sample", "finetune", "calculate_fid", "encode", "flags", "train_tokenizer")
"""files of an architecture that may use the command line's rooms"""
LAYERS = (
    ("errors",),
    ("runtime", "nn", "noise", "precision"),
    ("checkpoint", "data"),
    ("recipe", "published", "tunable"),
    ("model", "settings"),
    ("metrics", "merge", "sampling"),
    ("trained", "lora"),
    ("selftrain", "evaluate"),
    ("report",),
    ("tune",),
    ("improve",),
    ("demo", "toy", "library"),
    ("cli",),
)
"""the rooms of neon/, from the lowest: each may use those below it and beside it"""
HEIGHT = {room: height for height, rooms in enumerate(LAYERS) for room in rooms}


def imports(file: Path) -> Iterator[tuple[str, ...]]:
    """The modules that a file imports, as parts of their names; `from neon import x` counts as neon.x."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (tuple(name.name.split(".")) for name in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            module = tuple(node.module.split("."))
            yield from ((*module, name.name) for name in node.names) if len(module) == 1 else (module,)


def rooms_used(file: Path) -> set[str]:
    return {parts[1] for parts in imports(file) if parts[0] == "neon" and len(parts) > 1 and parts[1] in HEIGHT}


def files(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def test_every_room_of_neon_has_a_layer() -> None:
    rooms = {path.stem for path in (ROOT / "neon").iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert rooms - {"__init__"} == set(HEIGHT)


@pytest.mark.parametrize("file", files("neon"), ids=lambda path: str(path.relative_to(ROOT)))
def test_a_module_of_neon_imports_from_its_own_layer_and_below(file: Path) -> None:
    room = file.relative_to(ROOT / "neon").with_suffix("").parts[0]
    if room == "__init__":
        return
    above = {used for used in rooms_used(file) if HEIGHT[used] > HEIGHT[room]}
    assert not above
    assert not {parts[0] for parts in imports(file)} & {*ARCHITECTURES, "tests", "benchmarks"}


@pytest.mark.parametrize(
    "file", [f for name in ARCHITECTURES for f in files(name)], ids=lambda p: "/".join(p.parts[-2:])
)
def test_an_architecture_knows_no_other_and_its_model_no_command_line(file: Path) -> None:
    own = file.relative_to(ROOT).parts[0]
    assert not {parts[0] for parts in imports(file)} & {*ARCHITECTURES} - {own}
    if file.stem not in PROGRAMS:
        assert not rooms_used(file) & {"cli", "tune", "report", "demo", "toy"}
