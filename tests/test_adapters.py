"""LoRA adapters as the self-trained side: what PEFT, diffusers and kohya's scripts write, against PEFT's own merge."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from neon import cli
from neon.checkpoint import load_state
from neon.merge import merge_files
from neon.merge.adapters.writing import write_adapter

pytest.importorskip("peft", reason="needs Python 3.11 and the extra huggingface")
pytest.importorskip("diffusers", reason="needs the extra imm or huggingface")
pytest.importorskip("transformers", reason="needs Python 3.11 and the extra huggingface")

from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

W = 1.3
TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "conv1", "proj_in"]


def gpt2() -> torch.nn.Module:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=16, n_head=2, vocab_size=40, n_positions=12)).eval()


def llama() -> torch.nn.Module:
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "vocab_size": 40,
    }
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
    "conv1d": (gpt2, {"r": 4, "lora_alpha": 6, "target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}),
    "embedding": (gpt2, {"r": 4, "lora_alpha": 6, "target_modules": ["wpe", "c_attn"], "fan_in_fan_out": True}),
    "biases": (gpt2, {"r": 2, "lora_alpha": 2, "target_modules": ["c_attn"], "bias": "all", "fan_in_fan_out": True}),
    "their biases": (gpt2, {"r": 2, "target_modules": ["c_attn"], "bias": "lora_only", "fan_in_fan_out": True}),
    "biased factors": (gpt2, {"r": 2, "target_modules": ["c_attn"], "lora_bias": True, "fan_in_fan_out": True}),
    "patterns": (
        llama,
        {
            "r": 4, "lora_alpha": 8, "target_modules": "all-linear", "use_rslora": True, "rank_pattern": {"q_proj": 2},
            "alpha_pattern": {"layers.1.mlp.up_proj": 3, "model.layers.0.self_attn.v_proj": 1},
        },
    ),
    "whole modules": (llama, {"r": 4, "target_modules": ["q_proj"], "modules_to_save": ["lm_head", "norm"]}),
    "convolutions": (unet, {"r": 3, "lora_alpha": 5, "target_modules": TARGETS}),
    "DoRA": (llama, {"r": 4, "target_modules": ["q_proj", "up_proj"], "use_dora": True}),
    "DoRA of convolutions": (unet, {"r": 4, "target_modules": ["conv1", "to_q"], "use_dora": True}),
    "DoRA of Conv1D": (gpt2, {"r": 4, "target_modules": ["c_attn", "c_proj"], "use_dora": True}),
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


# --- the formats of diffusers and kohya


def unet_with_adapter(folder: Path, **config: Any) -> torch.nn.Module:
    """A U-Net saved in `folder`/base, and with an adapter that is trained."""
    unet().save_pretrained(folder / "base")
    model = unet()
    model.add_adapter(LoraConfig(**{"r": 3, "lora_alpha": 5, "target_modules": TARGETS, **config}))
    train(model)
    return model.eval()


def merged_outputs(folder: Path, adapter: Path, w: float = -1.0) -> torch.Tensor:
    return outputs(merged_model(folder, unet, adapter, w))


def as_kohya(state: dict[str, torch.Tensor], alpha: float) -> dict[str, torch.Tensor]:
    """The tensors of a PEFT adapter of a U-Net under the names of kohya's scripts."""
    found = {}
    for name, tensor in state.items():
        module, part = name.split(".lora_")
        front = f"lora_unet_{module.replace('.', '_')}"
        found[f"{front}.lora_{'down' if part[0] == 'A' else 'up'}.weight"] = tensor
        found[f"{front}.alpha"] = torch.tensor(alpha)
    return found


def as_old_diffusers(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same under the names of diffusers' attention processors."""
    found = {}
    for name, tensor in state.items():
        module, part = name.split(".lora_")
        front, _, word = module.replace(".to_out.0", ".to_out").rpartition(".")
        found[f"unet.{front}.processor.{word}_lora.{'down' if part[0] == 'A' else 'up'}.weight"] = tensor
    return found


ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]


@pytest.mark.parametrize("form", ["metadata", "pipeline", "alpha", "kohya", "processors", "lora.down"])
def test_files_of_diffusers_and_kohya_are_read(tmp_path: Path, form: str) -> None:
    plain = form in ("processors", "lora.down")  # which have no alpha
    targets = ATTENTION if plain else TARGETS
    model = unet_with_adapter(tmp_path, target_modules=targets, lora_alpha=3 if plain else 5)
    state = {name: tensor.contiguous() for name, tensor in get_peft_model_state_dict(model).items()}
    adapter = tmp_path / "adapter.safetensors"
    if form == "metadata":
        adapter = tmp_path / "adapter"
        model.save_lora_adapter(adapter)
    elif form == "pipeline":
        adapter = tmp_path / "adapter"
        other = {f"text_model.encoder.layers.0.q.lora_{x}.weight": torch.ones(2, 2) for x in "AB"}
        StableDiffusionPipeline.save_lora_weights(
            adapter, unet_lora_layers=state, text_encoder_lora_layers=other,
            unet_lora_adapter_metadata=model.peft_config["default"].to_dict(),
        )  # fmt: skip
    elif form == "alpha":
        alphas = {f"unet.{name.split('.lora_')[0]}.alpha": torch.tensor(5.0) for name in state}
        save_file({**{f"unet.{name}": tensor for name, tensor in state.items()}, **alphas}, adapter)
    elif form == "kohya":
        save_file(as_kohya(state, 5), adapter)
    elif form == "processors":
        save_file(as_old_diffusers(state), adapter)
    else:
        names = {"lora_A": "lora.down", "lora_B": "lora.up"}
        save_file({n.replace(old, names[old]): t for n, t in state.items() for old in names if old in n}, adapter)
    [report] = merge_files(base_file(tmp_path), adapter, [-1.0], tmp_path / "whole.safetensors")
    told = "text_encoder of it not used" in " ".join(report.warnings)
    assert told == (form == "pipeline")
    torch.testing.assert_close(merged_outputs(tmp_path, adapter), outputs(model), rtol=1e-4, atol=1e-5)


def reopened(path: Path) -> torch.nn.Module:
    """A U-Net with the adapter at `path`, as diffusers loads it at scale 1."""
    state, alphas, metadata = StableDiffusionPipeline.lora_state_dict(str(path), return_lora_metadata=True)
    model = unet()
    StableDiffusionPipeline.load_lora_into_unet(state, alphas, model, metadata=metadata)
    return model.eval()


@pytest.mark.parametrize("form", ["diffusers", "kohya", "peft"])
@pytest.mark.parametrize("given", ["diffusers", "kohya"])
def test_adapters_written_in_every_format_are_the_merge_in_diffusers(tmp_path: Path, form: str, given: str) -> None:
    model = unet_with_adapter(tmp_path, rank_pattern={"conv1": 2}, alpha_pattern={"to_k": 1})
    model.save_lora_adapter(tmp_path / "given")
    adapter = tmp_path / "given"
    if given == "kohya":
        write_adapter(base_file(tmp_path), adapter, -1.0, tmp_path / "given.safetensors", adapter_format="kohya")
        adapter = tmp_path / "given.safetensors"
    output = tmp_path / ("neon.safetensors" if form == "kohya" else "neon")
    report = write_adapter(base_file(tmp_path), adapter, W, output, adapter_format=form)
    assert report.exact and set(report.ranks.values()) == {2, 3}
    expected = merged_outputs(tmp_path, tmp_path / "given", W)
    model = PeftModel.from_pretrained(unet(), output).eval() if form == "peft" else reopened(output)
    torch.testing.assert_close(outputs(model), expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(outputs(model), outputs(unet()), atol=1e-3)


@pytest.mark.parametrize("form", ["diffusers", "kohya"])
def test_what_a_format_cannot_hold_is_told_with_its_share(
    tmp_path: Path, form: str, capsys: pytest.CaptureFixture[str]
) -> None:
    full_pair(tmp_path, unet)
    tuned = next((tmp_path / "tuned").glob("*.safetensors"))
    output = tmp_path / ("neon.safetensors" if form == "kohya" else "neon")
    flags = f"--base {base_file(tmp_path)} --self-trained {tuned} -w 1 --output {output} --as-adapter --rank 4"
    assert cli.main(f"merge {flags} --adapter-format {form} --json {tmp_path}/report.json".split()) == 0
    said, report = capsys.readouterr(), json.loads((tmp_path / "report.json").read_text())
    assert "the format cannot hold what changes in" in said.err and "of the update's norm is lost" in said.err
    assert f"kept          {report['kept']:.2%}" in said.out
    # The shares are those of the weights that the library makes of the file.
    model, states = reopened(output), [unet().state_dict(), load_file(tuned)]
    model.fuse_lora()
    wanted = {name: states[0][name] - states[1][name] for name in states[0]}
    realised = {name.replace(".base_layer", ""): value for name, value in model.state_dict().items()}
    off = {name: (realised[name] - states[0][name] - update).norm() for name, update in wanted.items()}
    total = torch.stack([update.norm() for update in wanted.values()]).norm()
    assert (1 - (torch.stack([*off.values()]).norm() / total) ** 2).sqrt().item() == pytest.approx(report["kept"], 1e-3)
    name = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.weight"
    share = (1 - (off[name] / wanted[name].norm()) ** 2).sqrt().item()
    best = torch.linalg.svdvals(wanted[name])
    assert share == pytest.approx(report["layers"][name], 1e-3)
    assert share == pytest.approx((best[:4].norm() / best.norm()).item(), 1e-3)


def test_names_of_the_first_release_mean_what_diffusers_reads_them_as(tmp_path: Path) -> None:
    """The layout of SDXL, whose adapters kohya's scripts write under these names."""
    build = lambda: UNet2DConditionModel(  # noqa: E731
        sample_size=8, block_out_channels=(8, 8, 8), layers_per_block=2, norm_num_groups=4, cross_attention_dim=8,
        attention_head_dim=4, down_block_types=("DownBlock2D", *["CrossAttnDownBlock2D"] * 2),
        up_block_types=(*["CrossAttnUpBlock2D"] * 2, "UpBlock2D"),
    ).eval()  # fmt: skip
    torch.manual_seed(0)
    base = build()
    base.save_pretrained(tmp_path / "base")
    modules = [f"input_blocks.{n}.1" for n in (4, 5, 7, 8)] + ["middle_block.1"]
    modules += [f"output_blocks.{n}.1" for n in range(6)]
    adapter = {}
    for module in modules:
        front = f"lora_unet_{module}.transformer_blocks.0.attn1.to_q".replace(".", "_")
        adapter |= {f"{front}.lora_down.weight": torch.randn(2, 8), f"{front}.lora_up.weight": torch.randn(8, 2)}
        adapter[f"{front}.alpha"] = torch.tensor(1.0)
    save_file(adapter, tmp_path / "kohya.safetensors")
    state, alphas = StableDiffusionXLPipeline.lora_state_dict(
        str(tmp_path / "kohya.safetensors"), unet_config=base.config
    )
    StableDiffusionXLPipeline.load_lora_into_unet(state, alphas, base)
    base.fuse_lora()
    neon = merge_files(base_file(tmp_path), tmp_path / "kohya.safetensors", [-1.0], tmp_path / "neon.safetensors")
    merged = load_file(neon[0].output)
    fused = {name.replace(".base_layer", ""): value for name, value in base.state_dict().items()}
    changed = [name for name in merged if not torch.equal(merged[name], load_file(base_file(tmp_path))[name])]
    assert len(changed) == len(modules)
    for name in merged:
        torch.testing.assert_close(merged[name], fused[name], rtol=1e-5, atol=1e-6)


def test_an_adapter_of_a_pipeline_is_merged_into_its_component(tmp_path: Path) -> None:
    from tests.test_merge_folders import pipeline

    pipe = pipeline()
    pipe.save_pretrained(tmp_path / "pipeline")
    base = copy.deepcopy(pipe.transformer)
    config = LoraConfig(r=2, target_modules=["to_q", "proj_out_1", "proj"], init_lora_weights=False)
    get_peft_model(pipe.transformer, config).save_pretrained(tmp_path / "lora")
    pair = f"--base {tmp_path}/pipeline --self-trained {tmp_path}/lora -w 1"
    assert cli.main(f"merge {pair} --output {tmp_path}/neon".split()) == 0
    assert cli.main(f"merge {pair} --output {tmp_path}/neon-lora --as-adapter".split()) == 0
    merged = type(pipe).from_pretrained(tmp_path / "neon").transformer.state_dict()
    before = base.state_dict()["proj_out_1.weight"].clone()
    adapted = PeftModel.from_pretrained(base, tmp_path / "neon-lora").merge_and_unload().state_dict()
    assert not torch.equal(before, adapted["proj_out_1.weight"])
    for name, value in merged.items():
        torch.testing.assert_close(value, adapted[name], rtol=1e-4, atol=1e-5)


def test_a_merge_is_what_peft_makes_at_a_negative_weight(tmp_path: Path) -> None:
    _, peft = made(tmp_path, "patterns")
    for module in peft.modules():
        if isinstance(getattr(module, "scaling", None), dict):
            module.scaling = {name: -W * scale for name, scale in module.scaling.items()}
    exact = peft.merge_and_unload().state_dict()
    merge_files(base_file(tmp_path), tmp_path / "adapter", [W], tmp_path / "neon.safetensors")
    for name, value in load_file(tmp_path / "neon.safetensors").items():
        torch.testing.assert_close(value, exact[name], rtol=1e-5, atol=1e-7)


def test_an_adapter_of_a_dora_is_truncated(tmp_path: Path) -> None:
    made(tmp_path, "DoRA")
    report = write_adapter(base_file(tmp_path), tmp_path / "adapter", W, tmp_path / "neon", rank=24)
    assert not report.exact and report.kept == pytest.approx(1, abs=1e-5)
    expected = merged_model(tmp_path, llama, tmp_path / "adapter", W)
    reopened = PeftModel.from_pretrained(llama(), tmp_path / "neon").eval()
    torch.testing.assert_close(outputs(reopened), outputs(expected), rtol=1e-4, atol=1e-5)
