"""The commands of docs/merging.md work as they stand there."""

import re
from pathlib import Path

import pytest
import torch

from neon.checkpoint import load_state
from tests.hub_server import only_this, serving
from tests.programs import ROOT
from tests.test_own_model import run
from tests.test_readme import GIVEN, MERGED, write_given

pytest.importorskip("transformers", reason="needs Python 3.11 and the extra huggingface")
peft = pytest.importorskip("peft", reason="needs Python 3.11 and the extra huggingface")
diffusers = pytest.importorskip("diffusers", reason="needs the extra imm or huggingface")

COMMANDS = "".join(re.findall(r"```sh\n(.*?)```", (ROOT / "docs" / "merging.md").read_text(), re.DOTALL)).splitlines()


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.fixture(scope="module")
def walked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which the commands of the document ran, on small models."""
    from tests.test_merge_folders import gpt2, moved, pipeline

    folder = tmp_path_factory.mktemp("models")
    write_given(folder)
    pipe = pipeline()
    pipe.save_pretrained(folder / "pipeline")
    moved(pipe.transformer)
    pipe.save_pretrained(folder / "pipeline-tuned")
    gpt2().save_pretrained(folder / "model", max_shard_size="60KB")
    gpt2().half().save_pretrained(folder / "model", variant="fp16")
    moved(gpt2()).save_pretrained(folder / "model-tuned")
    torch.save(moved(gpt2()).state_dict(), folder / "model-tuned" / "pytorch_model.bin")
    config = peft.LoraConfig(r=4, target_modules=["c_attn"], init_lora_weights=False, fan_in_fan_out=True)
    peft.get_peft_model(gpt2(), config).save_pretrained(folder / "model-lora")
    with serving() as hub, pytest.MonkeyPatch.context() as patch:
        only_this(hub, tmp_path_factory.mktemp("hf"), patch)
        patch.setenv("HF_TOKEN", "hf_of_nobody")
        for name in ("model", "model-tuned"):
            hub.repositories[f"someone/{name}"] = {file.name: file.read_bytes() for file in (folder / name).iterdir()}
        patch.chdir(folder)
        for command in COMMANDS:
            assert run(command) == 0, command
        assert hub.repositories["someone/model-neon"].keys() == names_in(folder / "model-neon-of-the-hub")
    return folder


def test_every_command_of_the_document_has_run(walked: Path) -> None:
    given = {"pipeline", "pipeline-tuned", "model", "model-tuned", "model-lora", *GIVEN}
    written = {path.name for path in walked.iterdir()} - given
    assert written == {
        *("pipeline-neon", "pipeline-neon-0.5", "pipeline-neon-1", "pipeline-neon-1.5"),
        *("model-neon", "model-in-one-file", "model-neon-fp16", "report.json", "model-neon.safetensors"),
        *("model-neon-of-lora", "neon-lora", "neon-lora-rank-8", "adapter.json", "neon-lora-pipeline"),
        *("diff.json", "model-neon-32", "model-neon-bf16"),
        *("model-neon-by-name", "kit.yaml", "model-neon-again", "model-neon-half"),
        "model-neon-of-the-hub",
        *MERGED,
    }


def test_the_same_weights_lie_in_shards_in_one_file_and_in_a_file_alone(walked: Path) -> None:
    shards, alone = load_state(walked / "model-neon"), load_state(walked / "model-neon.safetensors")
    one = load_state(walked / "model-in-one-file" / "model.safetensors")
    assert shards.keys() == alone.keys() == one.keys()
    assert all(torch.equal(shards[name], alone[name]) and torch.equal(shards[name], one[name]) for name in shards)


def test_a_library_opens_what_was_written(walked: Path) -> None:
    merged = diffusers.DiffusionPipeline.from_pretrained(walked / "pipeline-neon-1")
    assert type(merged) is diffusers.DiTPipeline


def test_the_adapter_of_a_lora_is_the_model_that_it_was_merged_into(walked: Path) -> None:
    from transformers import AutoModelForCausalLM

    def opened(name: str) -> torch.nn.Module:
        return AutoModelForCausalLM.from_pretrained(walked / name, dtype=torch.float32).eval()

    words = torch.arange(6)[None]
    with torch.no_grad():
        merged = opened("model-neon-of-lora")(words).logits
        base = opened("model")
        assert not torch.allclose(base(words).logits, merged, atol=1e-3)
        adapted = peft.PeftModel.from_pretrained(base, walked / "neon-lora").eval()
        torch.testing.assert_close(adapted(words).logits, merged, rtol=1e-4, atol=1e-5)
