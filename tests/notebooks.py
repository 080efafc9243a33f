"""The notebooks at the root: their cells, and what was committed as their outputs."""

import json
from pathlib import Path

ROOT = Path(__file__).parent.parent
TOY, DEMO = ROOT / "toy_appendix.ipynb", ROOT / "demo.ipynb"


def code_cells(path: Path) -> list[dict]:
    return _cells(path, "code")


def texts(path: Path) -> str:
    """All that stands between its cells of code."""
    return "\n".join(map(source, _cells(path, "markdown")))


def _cells(path: Path, kind: str) -> list[dict]:
    return [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == kind]


def source(cell: dict) -> str:
    return "".join(cell["source"])


def printed(path: Path) -> str:
    """All that its cells have printed."""
    return "".join("".join(output.get("text", [])) for cell in code_cells(path) for output in cell["outputs"])
