"""LoRA adapters as the self-trained side: what PEFT, diffusers and kohya's scripts write, against PEFT's own merge."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from neon import cli
from neon.checkpoint import load_state
from neon.errors import RequestError
from neon.merge import merge_files
from neon.merge.adapters.writing import write_adapter

pytest.importorskip("peft")
pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from diffusers import UNet2DConditionModel
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

W = 1.3
TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "conv1", "proj_in"]


def gpt2() -> torch.nn.Module:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=16, n_head=2, vocab_size=40, n_positions=12)).eval()


def llama() -> torch.nn.Module:
    torch.manual_seed(0)
    sizes = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, vocab_size=40)
    return LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=2, max_position_embeddings=32)).eval()


def unet() -> torch.nn.Module:
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4, cross_attention_dim=8,
        attention_head_dim=4, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    ).eval()  # fmt: skip


def train(model: torch.nn.Module) -> None:
    """Move what the adapter may train, as training would."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)


CONFIGS = {
    "conv1d": (gpt2, dict(r=4, lora_alpha=6, target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True)),
    "embedding": (gpt2, dict(r=4, lora_alpha=6, target_modules=["wpe", "c_attn"], fan_in_fan_out=True)),
    "biases": (gpt2, dict(r=2, lora_alpha=2, target_modules=["c_attn"], bias="all", fan_in_fan_out=True)),
    "their biases": (gpt2, dict(r=2, target_modules=["c_attn"], bias="lora_only", fan_in_fan_out=True)),
    "biased factors": (gpt2, dict(r=2, target_modules=["c_attn"], lora_bias=True, fan_in_fan_out=True)),
    "patterns": (
        llama,
        dict(
            r=4, lora_alpha=8, target_modules="all-linear", use_rslora=True, rank_pattern={"q_proj": 2},
            alpha_pattern={"layers.1.mlp.up_proj": 3, "model.layers.0.self_attn.v_proj": 1},
        ),
    ),
    "whole modules": (llama, dict(r=4, target_modules=["q_proj"], modules_to_save=["lm_head", "norm"])),
    "convolutions": (unet, dict(r=3, lora_alpha=5, target_modules=TARGETS)),
    "DoRA": (llama, dict(r=4, target_modules=["q_proj", "up_proj"], use_dora=True)),
    "DoRA of convolutions": (unet, dict(r=4, target_modules=["conv1", "to_q"], use_dora=True)),
    "DoRA of Conv1D": (gpt2, dict(r=4, target_modules=["c_attn", "c_proj"], use_dora=True, fan_in_fan_out=True)),
}  # fmt: skip


def made(folder: Path, name: str) -> tuple[torch.nn.Module, Any]:
    """A model saved in `folder`/base, an adapter of it trained and saved in `folder`/adapter; both models."""
    build, config = CONFIGS[name]
    base = build()
    base.save_pretrained(folder / "base")
    peft = get_peft_model(build(), LoraConfig(**config)).eval()
    train(peft)
    peft.save_pretrained(folder / "adapter")
    return base, peft


def base_file(folder: Path) -> Path:
    return next((folder / "base").glob("*.safetensors"))


@pytest.mark.parametrize("name", CONFIGS)
def test_a_merge_of_a_peft_adapter_is_that_of_its_merged_weights(tmp_path: Path, name: str) -> None:
    base, peft = made(tmp_path, name)
    merge_files(base_file(tmp_path), tmp_path / "adapter", [W, -1.0], tmp_path / "neon_{w}.safetensors")
    before = {key: value.double() for key, value in base.state_dict().items()}
    after = {key: value.double() for key, value in peft.double().merge_and_unload().state_dict().items()}
    for w in (W, -1.0):
        neon = load_state(tmp_path / f"neon_{w:g}.safetensors")
        for key, value in neon.items():
            exact = before[key] - w * (after[key] - before[key])
            torch.testing.assert_close(value.double(), exact, rtol=1e-6, atol=2e-8)
        assert any(not torch.equal(neon[key].double(), before[key]) for key in neon)


# --- adapters written


def outputs(model: torch.nn.Module) -> torch.Tensor:
    torch.manual_seed(3)
    with torch.no_grad():
        if hasattr(model.config, "cross_attention_dim"):
            return model(torch.randn(2, 4, 8, 8), 7, torch.randn(2, 3, 8)).sample
        return model(torch.randint(0, 40, (2, 6))).logits


def merged_model(folder: Path, build: Any, self_trained: Path, w: float) -> torch.nn.Module:
    """The model with the merge of files in it."""
    merge_files(base_file(folder), self_trained, [w], folder / "full.safetensors")
    model = build()
    missing, unexpected = model.load_state_dict(load_file(folder / "full.safetensors"), strict=False)
    assert not unexpected and all("lm_head" in name for name in missing)
    return model


LINEAR = [name for name in CONFIGS if "DoRA" not in name]


@pytest.mark.parametrize("name", LINEAR)
def test_an_adapter_written_from_an_adapter_is_the_merge(tmp_path: Path, name: str) -> None:
    made(tmp_path, name)
    report = write_adapter(base_file(tmp_path), tmp_path / "adapter", W, tmp_path / "neon")
    assert report.exact and report.kept == 1 and not report.lost
    expected = merged_model(tmp_path, CONFIGS[name][0], tmp_path / "adapter", W)
    reopened = PeftModel.from_pretrained(CONFIGS[name][0](), tmp_path / "neon").eval()
    torch.testing.assert_close(outputs(reopened), outputs(expected), rtol=1e-4, atol=1e-5)
    base = CONFIGS[name][0]()
    assert not torch.allclose(outputs(reopened), outputs(base), atol=1e-3)


def full_pair(folder: Path, build: Any) -> None:
    """A model and one that differs from it in every weight, as after training."""
    model = build()
    model.save_pretrained(folder / "base")
    train(model)
    model.save_pretrained(folder / "tuned")


@pytest.mark.parametrize("build", [gpt2, llama, unet])
def test_an_adapter_of_full_rank_is_the_merge_of_two_networks(tmp_path: Path, build: Any) -> None:
    full_pair(tmp_path, build)
    tuned = next((tmp_path / "tuned").glob("*.safetensors"))
    report = write_adapter(base_file(tmp_path), tuned, W, tmp_path / "neon", rank=80)
    assert report.kept == pytest.approx(1, abs=1e-5) and not report.lost
    expected = merged_model(tmp_path, build, tuned, W)
    reopened = PeftModel.from_pretrained(build(), tmp_path / "neon").eval()
    torch.testing.assert_close(outputs(reopened), outputs(expected), rtol=1e-4, atol=2e-5)
