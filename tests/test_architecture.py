"""The documents that explain the code name functions, files and rooms that exist."""

import importlib
import re
from functools import reduce
from pathlib import Path

import pytest

from tests.test_layers import HEIGHT

ROOT = Path(__file__).parent.parent
NAMES = re.findall(
    r"`((?:neon_diffusers|neon|edm|VAR|xAR|imm)(?:\.\w+)*(?::[\w.]+)?)`", (ROOT / "docs/architecture.md").read_text()
)


def test_the_trips_pass_functions() -> None:
    assert sum(":" in name for name in NAMES) > 50


@pytest.mark.parametrize("name", sorted(set(NAMES)))
def test_a_function_of_a_trip_exists(name: str) -> None:
    module, _, path = name.partition(":")
    reduce(getattr, path.split(".") if path else [], importlib.import_module(module))


def test_contributing_says_what_each_room_is_for() -> None:
    table = re.findall(r"^\| `(\w+)/?`", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE)
    assert sorted(table) == sorted(HEIGHT)
