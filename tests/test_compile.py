"""`--compile`: the same images and trainings to rounding, each shape compiled once, names of weights as they were.

By dynamo alone, which is what may fail on code of ours; what a compiler makes of its graphs is benchmarks/gpu.sh's.
"""

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from neon.checkpoint import load_state
from neon.cli.app import main
from neon.data.images import ArrayDataset, write_images, write_labels
from neon.errors import RequestError
from neon.lora.settings import LoRA
from neon.model import GenerativeModel, save_model
from neon.runtime import compiling
from neon.runtime.compiling import check_compiler
from neon.runtime.distributed import Processes
from neon.sampling import sample_block
from neon.selftrain import train
from tests.tiny import tiny_edm, tiny_images, tiny_imm, tiny_sd_vae, tiny_var, tiny_xar

CPU = torch.device("cpu")


def with_decoder() -> GenerativeModel:
    model = tiny_imm()
    model.set_codec(tiny_sd_vae(2))
    return model


MODELS: dict[str, tuple[Any, dict[str, Any], int]] = {
    "edm": (tiny_edm, {"num_steps": 3}, 1),
    "VAR": (lambda: tiny_var(drop_path_max=0.0), {}, 4),
    "xAR": (tiny_xar, {"num_steps": 3}, 7),
    "imm": (with_decoder, {"num_steps": 2}, 2),
}
"""how it is built and sampled, and how many graphs that makes: VAR's scales and decoder, xAR's cells and decoder"""


@pytest.fixture(autouse=True)
def without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Programs run as dynamo has read them."""
    monkeypatch.setattr(compiling, "BACKEND", "eager")
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("name", MODELS)
def test_images_are_the_same_and_no_shape_is_compiled_twice(name: str) -> None:
    build, settings, graphs = MODELS[name]
    model = build()
    settings = replace(model.default_settings, **settings)
    names = list(model.network.state_dict())

    def images() -> torch.Tensor:
        return sample_block(model, range(2), range(2), settings, Processes())[0]

    expected = images()
    model.compile_parts()
    counters.clear()
    for _ in range(2):
        assert (images().int() - expected.int()).abs().max() <= 1
        assert counters["stats"]["unique_graphs"] == graphs
    assert not counters["graph_break"]
    assert list(model.network.state_dict()) == names


def trained(folder: Path, name: str, *, steps: int = 2, **arguments: Any) -> dict[str, torch.Tensor]:
    """The weights after `steps` steps from the same start, in `folder`."""
    model = MODELS[name][0]()
    count = 4 * steps
    images = torch.randint(
        0, 256, (8, *model.image_shape), generator=torch.Generator().manual_seed(0), dtype=torch.uint8
    )
    [*_, last] = train(
        model, ArrayDataset(images, torch.arange(8) % 3, Path("images")), folder, num_steps=steps,
        snapshot_steps=[1], recipe=replace(model.recipe, batch_size=4, lr=1e-3), seed=0, processes=Processes(),
        micro_batch=4, **arguments,
    )  # fmt: skip
    assert last.images_seen == count
    return load_state(last.path)


@pytest.mark.parametrize("name", MODELS)
def test_a_compiled_training_ends_where_the_other_does(name: str, tmp_path: Path) -> None:
    expected = trained(tmp_path / "eager", name)
    found = trained(tmp_path / "compiled", name, compile_network=True)
    assert counters["stats"]["unique_graphs"] >= 1, "nothing was compiled"
    assert not counters["graph_break"]
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        torch.testing.assert_close(found[key], tensor, atol=1e-6, rtol=1e-5)


def test_factors_are_trained_and_a_run_goes_on_without(tmp_path: Path) -> None:
    lora = LoRA(rank=2, alpha=2.0, targets=("attn.proj", "fc1"))
    expected = trained(tmp_path / "eager", "VAR", lora=lora)
    trained(tmp_path / "run", "VAR", steps=1, lora=lora, compile_network=True)
    found = trained(tmp_path / "run", "VAR", lora=lora)
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        torch.testing.assert_close(found[key], tensor, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("device", "found", "message"),
    [
        ("cpu", None, "--compile: needs a C++ compiler, and there is no g++"),
        ("cuda", None, "--compile: needs a C compiler, and there is no gcc or clang"),
        ("cpu", "nothing-of-this-name", "there is no nothing-of-this-name"),
    ],
)
def test_without_a_compiler_it_is_refused(
    device: str, found: str | None, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiling, "BACKEND", "inductor")
    monkeypatch.setattr(compiling, "find_spec", lambda name: name)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    for variable in ("CC", "CXX"):
        monkeypatch.delenv(variable, raising=False)
        if found:
            monkeypatch.setenv(variable, found)
    with pytest.raises(RequestError, match=message.replace("+", r"\+")):
        check_compiler(torch.device(device))


def test_the_command_refuses_before_it_samples_or_trains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(compiling, "BACKEND", "inductor")
    monkeypatch.setenv("CXX", "no-such-compiler")
    save_model("base.safetensors", tiny_edm())
    images = tiny_images(8)
    write_images("set", range(8), images.images)
    write_labels("set", images.labels, 8)
    common = "--network base.safetensors --device cpu --compile"
    for words in (
        f"sample {common} --num_images 2 --outdir out",
        f"selftrain {common} --data set --total_images 8 --outdir run",
    ):
        assert main(words.split()) == 2
        [line] = capsys.readouterr().err.splitlines()
        assert "--compile: needs a C++ compiler, and there is no no-such-compiler" in line
    assert not Path("out").exists()
