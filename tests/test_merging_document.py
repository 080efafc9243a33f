"""The commands of docs/merging.md work as they stand there."""

import re
from pathlib import Path

import pytest
import torch

from neon.checkpoint import load_state
from tests.programs import ROOT
from tests.test_own_model import run

pytest.importorskip("transformers", reason="needs Python 3.11 and the extra huggingface")
diffusers = pytest.importorskip("diffusers", reason="needs the extra imm or huggingface")

COMMANDS = "".join(re.findall(r"```sh\n(.*?)```", (ROOT / "docs" / "merging.md").read_text(), re.DOTALL)).splitlines()


@pytest.fixture(scope="module")
def walked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which the commands of the document ran, on small models."""
    from tests.test_merge_folders import gpt2, moved, pipeline

    folder = tmp_path_factory.mktemp("models")
    pipe = pipeline()
    pipe.save_pretrained(folder / "pipeline")
    moved(pipe.transformer)
    pipe.save_pretrained(folder / "pipeline-tuned")
    gpt2().save_pretrained(folder / "model", max_shard_size="60KB")
    gpt2().half().save_pretrained(folder / "model", variant="fp16")
    moved(gpt2()).save_pretrained(folder / "model-tuned")
    torch.save(moved(gpt2()).state_dict(), folder / "model-tuned" / "pytorch_model.bin")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for command in COMMANDS:
            assert run(command) == 0, command
    return folder


def test_every_command_of_the_document_has_run(walked: Path) -> None:
    written = {path.name for path in walked.iterdir()} - {"pipeline", "pipeline-tuned", "model", "model-tuned"}
    assert written == {
        *("pipeline-neon", "pipeline-neon-0.5", "pipeline-neon-1", "pipeline-neon-1.5"),
        *("model-neon", "model-in-one-file", "model-neon-fp16", "report.json", "model-neon.safetensors"),
    }


def test_the_same_weights_lie_in_shards_in_one_file_and_in_a_file_alone(walked: Path) -> None:
    shards, alone = load_state(walked / "model-neon"), load_state(walked / "model-neon.safetensors")
    one = load_state(walked / "model-in-one-file" / "model.safetensors")
    assert shards.keys() == alone.keys() == one.keys()
    assert all(torch.equal(shards[name], alone[name]) and torch.equal(shards[name], one[name]) for name in shards)


def test_a_library_opens_what_was_written(walked: Path) -> None:
    merged = diffusers.DiffusionPipeline.from_pretrained(walked / "pipeline-neon-1")
    assert type(merged) is diffusers.DiTPipeline
