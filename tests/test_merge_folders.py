"""Folders as transformers and diffusers write them: merged, opened by the same library, compared with float64."""

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from neon.checkpoint import load_state, open_checkpoint, save_safetensors
from neon.checkpoint.common import read_values
from neon.cli import app as cli
from neon.errors import RequestError, WorkError
from neon.merge import merge_folders
from neon.merge.shards import parse_size
from neon.runtime.files import sha256_file

transformers = pytest.importorskip("transformers", reason="needs Python 3.11 and the extra huggingface")
diffusers = pytest.importorskip("diffusers", reason="needs the extra imm or huggingface")

NEW = ("README.md", "merge.yaml")
"""what a merged folder has that its base lacks"""


def moved(model: nn.Module) -> nn.Module:
    """The model with other weights, as after training."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += (0.05 * torch.randn(parameter.shape, generator=generator)).to(parameter.dtype)
    return model


def gpt2(**changes: Any) -> nn.Module:
    """GPT-2, whose head is its embedding."""
    torch.manual_seed(0)
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 32, "vocab_size": 200, "n_positions": 16}
    config = transformers.GPT2Config(bos_token_id=0, eos_token_id=0, **sizes | changes)
    return transformers.GPT2LMHeadModel(config)


def llama() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=100,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).to(torch.bfloat16)


def unet() -> nn.Module:
    torch.manual_seed(0)
    return diffusers.UNet2DModel(
        sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip


def pipeline() -> Any:
    torch.manual_seed(0)
    transformer = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=2, sample_size=8,
        num_embeds_ada_norm=10, norm_num_groups=2,
    )  # fmt: skip
    vae = diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4)
    return diffusers.DiTPipeline(transformer, vae, diffusers.DDIMScheduler())


def exact(base: nn.Module, self_trained: nn.Module, w: float) -> dict[str, torch.Tensor]:
    """The merge in float64, rounded once; buffers are the base's."""
    theirs, parameters = self_trained.state_dict(), dict(base.named_parameters(remove_duplicate=False))
    return {
        name: ((1 + w) * b.double() - w * theirs[name].double()).to(b.dtype) if name in parameters else b
        for name, b in base.state_dict().items()
    }


def assert_is(found: nn.Module, expected: Mapping[str, torch.Tensor]) -> None:
    """Every weight is within one rounding of the exact value: neon computes in float32."""
    state = found.state_dict()
    assert state.keys() == expected.keys()
    for name, tensor in expected.items():
        assert state[name].dtype == tensor.dtype
        if tensor.dtype == torch.float32:
            torch.testing.assert_close(state[name], tensor, rtol=0, atol=2**-22, msg=name)
        else:
            assert torch.equal(state[name], tensor), name


def neon(*arguments: object) -> int:
    return cli.main([str(argument) for argument in arguments])


def merge(base: Path, self_trained: Path, output: Path, *more: object, w: float = 1) -> int:
    return neon("merge", "--base", base, "--self-trained", self_trained, "-w", w, "--output", output, *more)


def refusal(capsys: pytest.CaptureFixture[str], base: Path, self_trained: Path, output: Path, *more: object) -> str:
    """The one line by which a merge is refused, which leaves nothing behind."""
    before = sorted(output.parent.iterdir())
    assert merge(base, self_trained, output, *more) == 2
    assert sorted(output.parent.iterdir()) == before
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("neon merge: ")]
    [line] = [line for line in said if "warning" not in line]
    return line


def config_and_weights(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


@pytest.fixture
def gpts(tmp_path: Path) -> Path:
    """GPT-2 in shards, before and after, of different sizes."""
    gpt2().save_pretrained(tmp_path / "base", max_shard_size="60KB")
    moved(gpt2()).save_pretrained(tmp_path / "tuned", max_shard_size="100KB")
    return tmp_path


@pytest.fixture(scope="module")
def written_pipes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pipes")
    pipe = pipeline()
    pipe.save_pretrained(folder / "base")
    moved(pipe.transformer)
    pipe.save_pretrained(folder / "tuned")
    return folder


@pytest.fixture
def pipes(written_pipes: Path, tmp_path: Path) -> Path:
    """A DiT pipeline before and after its transformer was trained."""
    for name in ("base", "tuned"):
        shutil.copytree(written_pipes / name, tmp_path / name)
    return tmp_path


@pytest.mark.parametrize("make", [gpt2, llama, unet])
@pytest.mark.parametrize("size", ["30KB", "1GB"])
def test_a_model_is_merged_and_opened_by_its_library(tmp_path: Path, make: Callable[[], Any], size: str) -> None:
    base, self_trained = make(), moved(make())
    base.save_pretrained(tmp_path / "base", max_shard_size=size)
    self_trained.save_pretrained(tmp_path / "tuned", max_shard_size="1GB")
    assert merge(tmp_path / "base", tmp_path / "tuned", tmp_path / "neon", w=1.5) == 0
    assert config_and_weights(tmp_path / "neon") == sorted([*config_and_weights(tmp_path / "base"), *NEW])
    options = {"torch_dtype": base.dtype} if make is unet else {"dtype": base.dtype}
    merged = type(base).from_pretrained(tmp_path / "neon", **options)
    assert_is(merged, exact(base, self_trained, 1.5))


def test_files_carry_the_provenance_and_the_library_s_format(gpts: Path) -> None:
    assert merge(gpts / "base", gpts / "tuned", gpts / "neon") == 0
    index = json.loads((gpts / "neon" / "model.safetensors.index.json").read_text())
    base = json.loads((gpts / "base" / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == base["weight_map"]
    assert index["metadata"]["total_size"] == base["metadata"]["total_size"]
    for file in set(index["weight_map"].values()):
        with open_checkpoint(gpts / "neon" / file) as shard:
            assert {"total_size": index["metadata"]["total_size"], **shard.metadata} == index["metadata"]
    assert index["metadata"]["format"] == "pt" and float(index["metadata"]["w"]) == 1
    assert index["metadata"]["base_sha256"] == sha256_file(gpts / "base" / "model.safetensors.index.json")
    card = (gpts / "neon" / "README.md").read_text()
    assert index["metadata"]["self_trained_sha256"] in card and "w = 1" in card


def test_several_w_are_several_folders_cut_as_asked_for(gpts: Path) -> None:
    reports = merge_folders(gpts / "base", gpts / "tuned", [0, -1], gpts / "neon_{w}", shard_size="80KB")
    assert [Path(report.output).name for report in reports] == ["neon_0", "neon_-1"]
    for report, model in zip(reports, [gpt2(), moved(gpt2())], strict=True):
        assert len(list(Path(report.output).glob("model-*-of-00002.safetensors"))) == 2
        merged = transformers.GPT2LMHeadModel.from_pretrained(report.output)
        assert all(torch.equal(t, model.state_dict()[name]) for name, t in merged.state_dict().items())
    [whole] = merge_folders(gpts / "base", gpts / "tuned", [1], gpts / "neon-1.5", shard_size="1GB")
    assert config_and_weights(Path(whole.output)) == [
        "README.md", "config.json", "generation_config.json", "merge.yaml", "model.safetensors"
    ]  # fmt: skip


def test_every_value_is_read_once_whatever_the_number_of_w(gpts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = list[tuple[Path, int]]()

    def counted(file: Any, offset: int, out: torch.Tensor, path: Path, name: str) -> None:
        if out.numel() > 256:
            read.append((path, offset))
        read_values(file, offset, out, path, name)

    monkeypatch.setattr("neon.checkpoint.safetensors_format.read_values", counted)
    merge_folders(gpts / "base", gpts / "tuned", [0.5, 1, 2], gpts / "neon_{w}")
    assert len(read) == len(set(read)) > 0


@pytest.mark.parametrize(("text", "size"), [("5GB", 5 * 10**9), ("1.5 kb", 1500), ("2GiB", 2**31), ("7", 7)])
def test_sizes_of_shards_are_read_as_the_libraries_write_them(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "0", "-1GB", "GB", "5 parsecs", "1e9", "nan"])
def test_other_sizes_are_refused(text: str) -> None:
    with pytest.raises(RequestError, match="--shard-size"):
        parse_size(text)


# Tied weights, formats, variants


def torch_folder(folder: Path, model: Any, name: str = "pytorch_model.bin") -> Path:
    """A folder as older releases wrote it: a torch file, tied weights under both names."""
    folder.mkdir()
    (folder / "config.json").write_text(model.config.to_json_string())
    torch.save(model.state_dict(), folder / name)
    return folder


@pytest.mark.parametrize("side", ["base", "tuned", "both"])
def test_weights_that_one_format_leaves_out_since_they_are_tied_are_merged(
    gpts: Path, side: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, model in (("base", gpt2()), ("tuned", moved(gpt2()))):
        if side in (name, "both"):
            shutil.rmtree(gpts / name)
            torch_folder(gpts / name, model)
    assert merge(gpts / "base", gpts / "tuned", gpts / "neon") == 0
    assert ("lm_head.weight = transformer.wte.weight" in capsys.readouterr().err) == (side != "both")
    assert not list((gpts / "neon").glob("*.bin"))
    assert_is(transformers.GPT2LMHeadModel.from_pretrained(gpts / "neon"), exact(gpt2(), moved(gpt2()), 1))


def test_a_matrix_of_three_names_is_merged_once_for_all(tmp_path: Path) -> None:
    def t5() -> Any:
        torch.manual_seed(0)
        sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2, "vocab_size": 50}
        return transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes))

    t5().save_pretrained(tmp_path / "base")
    torch_folder(tmp_path / "tuned", moved(t5()))
    assert merge(tmp_path / "base", tmp_path / "tuned", tmp_path / "neon") == 0
    merged = transformers.T5ForConditionalGeneration.from_pretrained(tmp_path / "neon")
    assert_is(merged, exact(t5(), moved(t5()), 1))


@pytest.mark.parametrize("side", ["base", "tuned"])
def test_a_head_of_its_own_is_no_tied_one(gpts: Path, side: str, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(gpts / side)
    model = gpt2(tie_word_embeddings=False)
    assert not torch.equal(model.state_dict()["lm_head.weight"], model.state_dict()["transformer.wte.weight"])
    torch_folder(gpts / side, model)
    assert "lm_head.weight" in refusal(capsys, gpts / "base", gpts / "tuned", gpts / "neon")


def test_a_tie_that_training_cut_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch_folder(tmp_path / "base", gpt2())
    torch_folder(tmp_path / "tuned", gpt2(tie_word_embeddings=False))
    assert merge(tmp_path / "base", tmp_path / "tuned", tmp_path / "neon") == 0
    words = "and not in pytorch_model.bin: transformer.wte.weight = lm_head.weight; each is merged by itself"
    assert words in capsys.readouterr().err


def test_constants_are_not_taken_for_tied_and_masks_not_for_weights(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    state = {f"h.{n}.ln.bias": torch.zeros(4) for n in range(2)} | {"h.0.w": torch.randn(4, 4, generator=generator)}
    mask = {"h.0.attn.bias": torch.tril(torch.ones(4, 4)).view(1, 1, 4, 4), "position_ids": torch.arange(4)}
    torch.save(state | mask, tmp_path / "base.pth")
    save_safetensors(tmp_path / "tuned.safetensors", {name: t + 1 for name, t in state.items()}, {})
    args = ["merge", "--base", tmp_path / "base.pth", "--self-trained", tmp_path / "tuned.safetensors", "-w", 1]
    assert neon(*args, "--output", tmp_path / "neon.safetensors") == 0
    merged = load_state(tmp_path / "neon.safetensors")
    assert torch.equal(merged["h.0.attn.bias"], mask["h.0.attn.bias"])
    assert torch.equal(merged["h.1.ln.bias"], torch.full((4,), -1.0))
    del state["h.1.ln.bias"]
    save_safetensors(tmp_path / "tuned.safetensors", {name: t + 1 for name, t in state.items()}, {})
    assert neon(*args, "--output", tmp_path / "other.safetensors") == 2


def test_variants_and_formats_that_are_not_used_are_left_out_by_name(
    gpts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    half = gpt2().half()
    half.save_pretrained(gpts / "base", variant="fp16", max_shard_size="60KB")
    moved(half).save_pretrained(gpts / "tuned", variant="fp16")
    torch.save(gpt2().state_dict(), gpts / "base" / "pytorch_model.bin")
    for name in ("flax_model.msgpack", "tf_model.h5", "modeling_gpt.py", "training.pickle", "model.onnx"):
        (gpts / "base" / name).write_bytes(b"x")
    (gpts / "base" / "onnx").mkdir()
    (gpts / "base" / "onnx" / "model.onnx").write_bytes(b"x")
    (gpts / "base" / "1_Pooling").mkdir()
    (gpts / "base" / "1_Pooling" / "config.json").write_text("{}")
    (gpts / "base" / "README.md").write_text("---\nlicense: mit\ntags: [art]\n---\n# Base\n")
    assert merge(gpts / "base", gpts / "tuned", gpts / "neon") == 0
    out = capsys.readouterr().out
    for name in (
        *("model.safetensors.index.fp16.json", "pytorch_model.bin", "tf_model.h5", "flax_model.msgpack"),
        *("modeling_gpt.py (code)", "training.pickle", "model.onnx", "onnx (other weights)", "README.md"),
    ):
        assert f"left out      {name}" in out
    written = config_and_weights(gpts / "neon")
    assert {Path(name).suffix for name in written} == {".json", ".md", ".yaml", ".safetensors"}
    assert "1_Pooling/config.json" in written and not [name for name in written if "fp16" in name]
    card = (gpts / "neon" / "README.md").read_text()
    assert "license: mit" in card and "- art" in card and "modeling\\_gpt.py" in card
    assert merge(gpts / "base", gpts / "tuned", gpts / "half", "--variant", "fp16") == 0
    merged = transformers.GPT2LMHeadModel.from_pretrained(gpts / "half", variant="fp16", dtype=torch.float16)
    assert_is(merged, exact(gpt2().half(), moved(gpt2().half()), 1))
    assert "it has" in refusal(capsys, gpts / "base", gpts / "tuned", gpts / "x", "--variant", "bf16")


def test_shards_of_torch_become_shards_of_safetensors(gpts: Path) -> None:
    base = gpts / "bin"
    base.mkdir()
    shutil.copy(gpts / "base" / "config.json", base)
    where = {}
    for number, file in enumerate(sorted((gpts / "base").glob("*.safetensors")), 1):
        name, state = f"pytorch_model-{number:05d}-of-00003.bin", load_state(file)
        torch.save(state, base / name)
        where |= dict.fromkeys(state, name)
    (base / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    assert merge(base, gpts / "tuned", gpts / "neon") == 0
    assert len(list((gpts / "neon").glob("model-*-of-00003.safetensors"))) == 3
    assert_is(transformers.GPT2LMHeadModel.from_pretrained(gpts / "neon"), exact(gpt2(), moved(gpt2()), 1))


# Pipelines


def opened(folder: Path) -> Any:
    return diffusers.DiTPipeline.from_pretrained(folder)


@pytest.mark.parametrize("self_trained", ["tuned", "tuned/transformer",
                                          "tuned/transformer/diffusion_pytorch_model.safetensors"])  # fmt: skip
def test_the_component_that_differs_or_fits_is_merged(pipes: Path, self_trained: str) -> None:
    assert merge(pipes / "base", pipes / self_trained, pipes / "neon", w=0.5) == 0
    base, tuned, merged = (opened(pipes / name) for name in ("base", "tuned", "neon"))
    assert_is(merged.transformer, exact(base.transformer, tuned.transformer, 0.5))
    assert_is(merged.vae, base.vae.state_dict())
    assert type(merged.scheduler) is diffusers.DDIMScheduler
    assert config_and_weights(pipes / "neon") == sorted([*config_and_weights(pipes / "base"), *NEW])


def test_components_are_named_where_none_or_several_differ(pipes: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = refusal(capsys, pipes / "base", pipes / "base", pipes / "neon")
    assert "no component differs (transformer, vae compared)" in line
    pipe = opened(pipes / "tuned")
    moved(pipe.vae).save_pretrained(pipes / "tuned" / "vae")
    line = refusal(capsys, pipes / "base", pipes / "tuned", pipes / "neon")
    assert "several components differ: transformer, vae" in line and "--component" in line
    assert "it has transformer, vae" in refusal(
        capsys, pipes / "base", pipes / "tuned", pipes / "neon", "--component", "unet"
    )
    assert merge(pipes / "base", pipes / "tuned", pipes / "one", "--component", "vae") == 0
    assert merge(pipes / "base", pipes / "tuned", pipes / "two", "--component", "vae", "transformer") == 0
    base = opened(pipes / "base")
    for name, changed in (("one", ("vae",)), ("two", ("vae", "transformer"))):
        merged = opened(pipes / name)
        for part in ("vae", "transformer"):
            ours, theirs = getattr(base, part), getattr(pipe, part)
            assert_is(getattr(merged, part), exact(ours, theirs, 1) if part in changed else ours.state_dict())


def test_a_component_in_another_format_is_written_as_safetensors(pipes: Path) -> None:
    vae = pipes / "base" / "vae"
    torch.save(load_state(vae), vae / "diffusion_pytorch_model.bin")
    (vae / "diffusion_pytorch_model.safetensors").unlink()
    assert merge(pipes / "base", pipes / "tuned", pipes / "neon") == 0
    assert_is(opened(pipes / "neon").vae, opened(pipes / "tuned").vae.state_dict())


def test_a_snapshot_of_the_cache_is_links_to_blobs(pipes: Path) -> None:
    for name in ("base", "tuned"):
        blobs = pipes / "cache" / name / "blobs"
        blobs.mkdir(parents=True)
        for number, file in enumerate(path for path in (pipes / name).rglob("*") if path.is_file()):
            digest = sha256_file(file) if file.suffix == ".safetensors" else f"{number:040d}"
            shutil.move(file, blobs / digest)
            file.symlink_to(blobs / digest)
    assert merge(pipes / "base", pipes / "tuned", pipes / "neon") == 0
    assert not any(path.is_symlink() for path in (pipes / "neon").rglob("*"))
    base, tuned, merged = (opened(pipes / name) for name in ("base", "tuned", "neon"))
    assert_is(merged.transformer, exact(base.transformer, tuned.transformer, 1))


def test_nothing_that_a_folder_names_is_run(pipes: Path, gpts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mark = pipes / "ran"
    code = f"open({str(mark)!r}, 'w')\nclass Evil: pass\n"
    index = json.loads((pipes / "base" / "model_index.json").read_text())
    for name in ("evil.py", "pipeline.py", "transformer/evil.py"):
        (pipes / "base" / name).write_text(code)
    index |= {"_class_name": ["pipeline", "Evil"], "transformer": ["evil", "Evil"], "scheduler": ["os", "system"]}
    (pipes / "base" / "model_index.json").write_text(json.dumps(index))
    config = json.loads((pipes / "base" / "transformer" / "config.json").read_text())
    config["auto_map"] = {"AutoModel": "evil.Evil"}
    (pipes / "base" / "transformer" / "config.json").write_text(json.dumps(config))
    assert merge(pipes / "base", pipes / "tuned", pipes / "neon") == 0
    warnings = capsys.readouterr().err
    assert "pipeline.Evil" in warnings and "os.system" in warnings and "transformer/config.json names code" in warnings
    assert not mark.exists() and not list((pipes / "neon").rglob("*.py"))
    assert json.loads((pipes / "neon" / "model_index.json").read_text()) == index


# Bad input, one line each


def change(file: Path, **entries: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | entries))


def point_to(folder: Path, shard: str) -> None:
    """Let the base's index say that its first tensor lies elsewhere."""
    index = folder / "base" / INDEX
    where = json.loads(index.read_text())["weight_map"]
    change(index, weight_map=where | {next(iter(where)): shard})


def forget_a_shard(folder: Path) -> None:
    index = folder / "base" / INDEX
    where = json.loads(index.read_text())["weight_map"]
    change(index, weight_map={name: file for name, file in where.items() if file != max(where.values())})


def remove(folder: Path, *patterns: str) -> None:
    for pattern in patterns:
        for path in folder.glob(pattern):
            path.unlink()


def copy_first_shard(folder: Path, name: str) -> None:
    shutil.copy(next((folder / "base").glob("*-00001-*")), folder / "base" / name)


def cut(folder: Path) -> None:
    file = next((folder / "tuned").glob("*-00001-*"))
    file.write_bytes(file.read_bytes()[:-5])


def resize(folder: Path) -> None:
    shutil.rmtree(folder / "tuned")
    torch_folder(folder / "tuned", gpt2(vocab_size=201))


def make_pipeline(folder: Path) -> None:
    shutil.copytree(folder / "base", folder / "tuned" / "text_encoder")
    (folder / "tuned" / "model_index.json").write_text("{}")


def quantise(folder: Path) -> None:
    quantised = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    change(folder / "base" / "config.json", quantization_config=quantised)


INDEX = "model.safetensors.index.json"
BAD: dict[str, Callable[[Path], object]] = {
    "its shard model-00002-of-00003.safetensors is not beside it": lambda folder: remove(folder, "base/*-00002-*"),
    "no index that says which belong together": lambda folder: remove(folder, "base/*.index.json", "base/*-00002-*"),
    "does not list model-00003-of-00003.safetensors": forget_a_shard,
    "which cannot lie beside it": lambda folder: point_to(folder, "../tuned/model-00001-of-00002.safetensors"),
    "no weight_map in JSON": lambda folder: (folder / "base" / INDEX).write_text("{"),
    "two sets of weights under one name": lambda folder: copy_first_shard(folder, "model.safetensors"),
    "weights of two models": lambda folder: copy_first_shard(folder, "diffusion_pytorch_model.safetensors"),
    "quantised (quantization_config: bitsandbytes)": quantise,
    "truncated": cut,
    "different shapes": resize,
    "holds no weights": lambda folder: remove(folder, "base/model*"),
    "a pipeline, and": make_pipeline,
}
"""what to do to good folders, by the words of the refusal"""


@pytest.mark.parametrize("words", BAD)
def test_bad_folders_are_refused_in_one_line(gpts: Path, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    BAD[words](gpts)
    assert words in refusal(capsys, gpts / "base", gpts / "tuned", gpts / "neon")


def test_an_index_of_another_size_is_warned_of(gpts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    index = gpts / "base" / "model.safetensors.index.json"
    index.write_text(index.read_text().replace('"total_size": 1', '"total_size": 9'))
    assert merge(gpts / "base", gpts / "tuned", gpts / "neon") == 0
    assert "states 929,536 bytes" in capsys.readouterr().err


def test_an_output_is_not_written_over_another_folder(gpts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, tuned = gpts / "base", gpts / "tuned"
    (gpts / "neon").mkdir()
    assert "this folder exists" in refusal(capsys, base, tuned, gpts / "neon")
    (gpts / "neon" / "thesis.txt").write_text("mine")
    assert "no model" in refusal(capsys, base, tuned, gpts / "neon", "--overwrite")
    assert "is the input" in refusal(capsys, base, tuned, base, "--overwrite")
    assert "lies in it" in refusal(capsys, base, tuned, tuned / "neon")
    assert "lies in it or holds it" in refusal(capsys, base, tuned, gpts, "--overwrite")
    (gpts / "file").write_text("")
    assert "a file or a link" in refusal(capsys, base, tuned, gpts / "file", "--overwrite")
    assert "unknown output format" in refusal(capsys, base, tuned, gpts / "neon.safetensor")
    assert "--component: is of folders" in refusal(capsys, base, tuned, gpts / "a.pth", "--component", "unet")
    assert "nowhere: cannot be read (No such file" in refusal(capsys, gpts / "nowhere", tuned, gpts / "new")
    assert "no such file" in refusal(capsys, base, gpts / "nowhere", gpts / "new")
    assert "no pipeline" in refusal(capsys, base, tuned, gpts / "new", "--component", "unet")
    assert merge(base, tuned, gpts / "new") == 0
    (gpts / "new" / "old.txt").write_text("")
    assert merge(base, tuned, gpts / "new", "--overwrite", w=2) == 0
    assert not (gpts / "new" / "old.txt").exists() and "w = 2" in (gpts / "new" / "README.md").read_text()
    assert not [path for path in gpts.iterdir() if path.name.startswith(".")]


def test_a_full_disk_leaves_nothing(gpts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("neon.checkpoint.safetensors_format.SafetensorsWriter.write", full)
    with pytest.raises(WorkError, match="the disk is full"):
        merge_folders(gpts / "base", gpts / "tuned", [1], gpts / "neon")
    assert sorted(path.name for path in gpts.iterdir()) == ["base", "tuned"]


KILLED = """
import sys, time
import neon.merge.folders as folders
def wait(*_): print("waiting", flush=True); time.sleep(60)
folders.folder_card = wait
folders.merge_folders(*sys.argv[1:3], [1.0], sys.argv[3])
"""


def test_a_killed_merge_leaves_no_folder_and_the_next_one_clears_up(gpts: Path) -> None:
    arguments = [str(gpts / name) for name in ("base", "tuned", "neon")]
    process = subprocess.Popen([sys.executable, "-c", KILLED, *arguments], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "waiting\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert sorted(path.name for path in gpts.iterdir()) == [".neon.partial", "base", "tuned"]
    merge_folders(gpts / "base", gpts / "tuned", [1], gpts / "neon")
    assert sorted(path.name for path in gpts.iterdir()) == ["base", "neon", "tuned"]


# neon inspect


def test_inspect_shows_a_model_and_every_set_of_weights(gpts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gpt2().half().save_pretrained(gpts / "base", variant="fp16")
    capsys.readouterr()
    assert neon("inspect", gpts / "base", "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["class"], facts["used"], facts["format"]) == ("GPT2LMHeadModel", "model.safetensors", "shards")
    assert facts["sha256"] == sha256_file(gpts / "base" / INDEX)
    assert len(facts["tensors"]) == 28 and facts["parameters"] == 32384
    sets = facts["sets"]
    assert {name: (len(one["files"]), one["variant"]) for name, one in sets.items()} == {
        "model.safetensors": (3, ""),
        "model.fp16.safetensors": (1, "fp16"),
    }
    assert neon("inspect", gpts / "base") == 0
    shown = capsys.readouterr().out
    assert "set           model.fp16.safetensors: 1 file," in shown and "transformer.wte.weight" in shown


def test_inspect_shows_the_components_of_a_pipeline(pipes: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert neon("inspect", pipes / "base", "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["format"], facts["class"]) == ("pipeline", "DiTPipeline")
    assert {name: part["class"] for name, part in facts["components"].items()} == {
        "transformer": "DiTTransformer2DModel",
        "vae": "AutoencoderKL",
    }
    assert neon("inspect", pipes / "base") == 0
    shown = capsys.readouterr().out
    assert "component     transformer\nclass         DiTTransformer2DModel\n" in shown
    assert "used          diffusion_pytorch_model.safetensors (safetensors)" in shown
    (pipes / "base" / "vae" / "diffusion_pytorch_model.safetensors").write_bytes(b"<html>")
    assert neon("inspect", pipes / "base") == 2


def test_a_folder_of_several_sets_is_read_as_its_library_does(gpts: Path) -> None:
    gpt2().half().save_pretrained(gpts / "base", variant="fp16")
    torch.save({"transformer.wte.weight": torch.zeros(1)}, gpts / "base" / "pytorch_model.bin")
    assert torch.equal(load_state(gpts / "base")["transformer.wte.weight"], gpt2().state_dict()["lm_head.weight"])
