"""Files that are almost valid: every reader takes them or refuses them in one line, in little memory and time.

`python benchmarks/fuzz.py` gives each reader many more; a fault there prints the command that makes its input again.
"""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.programs import ROOT
from tests.workers import LIMIT_SECONDS, start

EACH = 80
READERS = ["images", "encoded", "statistics", "torch", "pickles", "safetensors", "shards", "model", "features",
           "training", "scores", "download", "report"]  # fmt: skip


def fuzz(figures: Path) -> None:
    sys.path.insert(0, str(ROOT / "benchmarks"))
    from fuzz import main

    main(inputs=EACH * len(READERS), json_file=figures)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What became of the inputs of each reader, in a process of their own, whose memory is theirs."""
    figures = tmp_path_factory.mktemp("fuzz") / "fuzz.json"
    process = start(fuzz, figures)
    process.join(LIMIT_SECONDS)
    assert process.exitcode is not None and figures.exists()
    rows = {row["reader"]: row for row in json.loads(figures.read_text())["readers"]}
    assert list(rows) == READERS
    return rows


@pytest.mark.parametrize("name", READERS)
def test_a_file_that_is_almost_valid_is_read_or_refused(outcomes: dict[str, Any], name: str) -> None:
    row = outcomes[name]
    assert row["faults"] == []
    assert row["inputs"] == EACH
    assert row["refused"] > EACH / 10, "the inputs are no longer changed where it matters"
