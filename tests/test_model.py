"""Finding an architecture, saving a model, and loading it again."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from edm.model import EDM
from neon.checkpoint import save_safetensors
from neon.errors import RequestError
from neon.model import architecture, load_model, save_model
from tests.tiny import tiny_edm


def test_an_architecture_is_found_by_the_name_it_registered() -> None:
    assert architecture("edm") is EDM


def test_a_model_of_your_own_is_named_by_file_and_class(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("from edm.model import EDM\nclass Mine(EDM):\n    pass\n")
    assert architecture(f"{tmp_path / 'mine.py'}:Mine").__name__ == "Mine"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("edn", "expected one of diffusers, edm"),
        ("nowhere.py:Mine", "no file nowhere.py"),
        (f"{__file__}:Path", "no subclass"),
    ],
)
def test_an_unknown_architecture_is_refused(name: str, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        architecture(name)


STRANGERS = {
    "a module without the class": ({"__init__.py": "", "model.py": "class Other: pass\n"}, "model.py"),
    "a class of the same name": ({"__init__.py": "", "model.py": "class EDM: pass\n"}, "model.py"),
    "a module that expects more of its own": ({"__init__.py": "", "model.py": "import edm.utils\n"}, "__init__.py"),
}
"""files of a folder edm/, and which of them is named"""


@pytest.mark.parametrize("stranger", STRANGERS)
def test_a_stranger_of_the_same_name_is_named(stranger: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files, named = STRANGERS[stranger]
    (tmp_path / "edm").mkdir()
    for name, text in files.items():
        (tmp_path / "edm" / name).write_text(text)
    for name in [name for name in sys.modules if name.partition(".")[0] == "edm"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(RequestError, match=rf"'edm': {tmp_path}/edm/{named} comes first .* out of PYTHONPATH"):
        architecture("edm")


def test_a_command_names_a_stranger_in_one_line(tmp_path: Path) -> None:
    """As Python meets it: a folder on PYTHONPATH, before the installed package."""
    (tmp_path / "edm").mkdir()
    for name in ("__init__.py", "model.py"):
        (tmp_path / "edm" / name).touch()
    save_safetensors(tmp_path / "bare.safetensors", tiny_edm().network.state_dict(), {})
    done = subprocess.run(
        [sys.executable, "-m", "neon.cli", "inspect", "bare.safetensors"],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(tmp_path)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2
    [line] = done.stderr.splitlines()
    assert f"{tmp_path}/edm/model.py comes first" in line


def test_a_saved_model_loads_with_the_same_weights_ready_to_sample(tmp_path: Path) -> None:
    model = tiny_edm()
    save_model(tmp_path / "model.safetensors", model)
    loaded = load_model(tmp_path / "model.safetensors")
    for name, tensor in model.network.state_dict().items():
        assert torch.equal(loaded.network.state_dict()[name], tensor)
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


def test_a_file_that_does_not_name_its_architecture_is_refused(tmp_path: Path) -> None:
    save_safetensors(tmp_path / "bare.safetensors", tiny_edm().network.state_dict(), {})
    with pytest.raises(RequestError, match="which architecture"):
        load_model(tmp_path / "bare.safetensors")


def test_weights_of_another_network_are_refused_with_both_lists(tmp_path: Path) -> None:
    model = tiny_edm()
    state = model.network.state_dict()
    state["model.extra"] = torch.zeros(1)
    del state["model.map_layer0.bias"]
    state["model.map_layer0.weight"] = torch.zeros(2, 2)
    save_model(tmp_path / "model.safetensors", model, state)
    with pytest.raises(RequestError, match=r"1 missing: model.map_layer0.bias; 1 not in the model: model.extra; 1 of"):
        load_model(tmp_path / "model.safetensors")
