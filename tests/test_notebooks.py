"""The demo's notebook does what it says, with small numbers; and both were committed as one run has left them."""

import json
import re
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

import neon
from tests.notebooks import DEMO, TOY, code_cells, printed, source, texts

SMALL = {"SYNTHETIC": 100, "TRAINED": 128, "CHOOSING": 80, "REPORTING": 80, "WS": (-1, 0, 1), "SEEDS": (1,)}
STEPS = 2
"""of the sampler: a worse one, whose error shows in few images"""
both = pytest.mark.parametrize("notebook", [TOY, DEMO], ids=lambda path: path.stem)


@pytest.fixture(scope="module")
def scope(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """The names that the cells leave behind, all run in another folder, the last ones twice."""
    found: dict = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("notebook"))
        patch.setenv("TQDM_DISABLE", "1")  # as its first cell does, so that nothing of it stays
        matplotlib.use("Agg")
        cells = code_cells(DEMO)
        for number, cell in enumerate([*cells, cells[3], cells[-1]], 1):
            exec(compile(source(cell), f"cell {number}", "exec"), found)
            plt.close("all")
            if number == 1:
                assert SMALL.keys() <= found.keys()
                found.update(SMALL)
            if number == 2:
                found["base"] = found["base"].with_settings(num_steps=STEPS)
        found["FOLDER"] = Path.cwd() / found["FOLDER"]
    return found


def test_ten_cells_make_a_model_that_is_nearer_to_real_images(scope: dict) -> None:
    assert len(code_cells(DEMO)) == 10
    self_trained, base, improved = scope["distances"]
    assert scope["best"] == 1 and improved < base < self_trained
    assert base == scope["fair"] < scope["as_published"]
    reported = [np.mean(row) for row in scope["report"].values()]
    assert reported[1] < reported[0]


def test_the_file_that_it_leaves_is_sampled_as_in_the_notebook(scope: dict) -> None:
    loaded = neon.load(scope["FOLDER"] / "improved.safetensors", device="cpu")
    assert loaded.settings == scope["base"].settings
    drawn = loaded.sample(**scope["same_noise"])
    assert torch.equal(drawn, scope["improved"].sample(**scope["same_noise"]))
    assert not torch.equal(drawn, scope["base"].sample(**scope["same_noise"]))


@both
def test_the_committed_outputs_are_those_of_one_run_from_top_to_bottom(notebook: Path) -> None:
    found = code_cells(notebook)
    assert [cell["execution_count"] for cell in found] == list(range(1, len(found) + 1))
    outputs = [output for cell in found for output in cell["outputs"]]
    assert {output["output_type"] for output in outputs} <= {"execute_result", "display_data", "stream"}
    assert {output["name"] for output in outputs if output["output_type"] == "stream"} == {"stdout"}
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 6


@both
def test_the_distances_that_the_text_quotes_are_those_of_the_outputs(notebook: Path) -> None:
    quoted = re.findall(r"\d\.\d{3}\b", texts(notebook))
    assert len(quoted) >= (12 if notebook == TOY else 0)
    assert {number for number in quoted if number not in printed(notebook)} == set()


@both
def test_a_notebook_is_small_and_names_no_machine_and_no_time(notebook: Path) -> None:
    """After `jupyter execute`: empty the metadata of cells, and keep of the notebook's what is asserted here."""
    text = notebook.read_text()
    assert len(text) < 1_500_000
    for output in (output for cell in code_cells(notebook) for output in cell["outputs"]):
        assert "/" not in "".join(output.get("text", [])) + "".join(output.get("data", {}).get("text/plain", []))
    found = json.loads(text)
    assert {json.dumps(cell["metadata"]) for cell in found["cells"]} == {"{}"}
    assert found["metadata"]["kernelspec"] == {"display_name": "Python 3", "language": "python", "name": "python3"}
    assert found["metadata"]["language_info"] == {"name": "python"}
