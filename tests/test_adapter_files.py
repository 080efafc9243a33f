"""Adapter files that neon reads and refuses by itself, without the libraries that write them."""

import json
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from neon import cli
from neon.checkpoint import load_state, open_checkpoint, save_safetensors
from neon.errors import RequestError
from neon.merge import check_same_network, merge_files
from neon.merge.adapters.writing import write_adapter
from neon.merge.pair import open_pair
from tests.programs import write_pair

State = dict[str, torch.Tensor]
PEFT = "base_model.model."


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    return tmp_path


def base_state(dtype: torch.dtype = torch.float32) -> State:
    shapes = {"a.q.weight": (4, 6), "a.q.bias": (4,), "a.k.weight": (5, 5), "c.weight": (4, 3, 3, 3), "n.weight": (4,)}
    return {name: torch.randn(shape).to(dtype) for name, shape in shapes.items()}


def factors(module: str = "a.q", rows: int = 4, columns: int = 6, rank: int = 2) -> State:
    return {f"{module}.lora_A.weight": torch.randn(rank, columns), f"{module}.lora_B.weight": torch.randn(rows, rank)}


def write(adapter: State, config: dict[str, Any] | None = None, base: State | None = None) -> None:
    save_safetensors("base.safetensors", base or base_state(), {})
    Path("lora").mkdir(exist_ok=True)
    save_safetensors("lora/adapter_model.safetensors", {PEFT + name: value for name, value in adapter.items()}, {})
    if config is not None:
        Path("lora/adapter_config.json").write_text(
            json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4, **config})
        )


def merged(adapter: str = "lora", w: float = 1.0) -> State:
    merge_files("base.safetensors", adapter, [w], "neon.safetensors", overwrite=True)
    return load_state("neon.safetensors")


def refusal(adapter: str = "lora") -> str:
    with pytest.raises(RequestError) as caught:
        merge_files("base.safetensors", adapter, [1.0], "neon.safetensors")
    assert "\n" not in str(caught.value) and not Path("neon.safetensors").exists()
    return str(caught.value)


def test_the_update_of_low_precision_weights_is_rounded_once() -> None:
    adapter = {name: 0.02 * value for name, value in factors().items()}
    write(adapter, {}, base_state(torch.bfloat16))
    [report] = merge_files("base.safetensors", "lora", [1.5], "neon.safetensors")
    assert not any("differ in dtype" in text for text in report.warnings)
    base = load_state("base.safetensors")["a.q.weight"]
    down, up = (adapter[f"a.q.lora_{x}.weight"].double() for x in "AB")
    exact = (base.double() - 1.5 * 2 * up @ down).to(torch.bfloat16)
    assert torch.equal(load_state("neon.safetensors")["a.q.weight"], exact)
    with open_pair("base.safetensors", "lora") as pair:
        assert pair.self_trained.dtype("a.q.weight") == torch.float32
        assert pair.self_trained.dtype("n.weight") == torch.bfloat16, "which the adapter leaves as it is"


def test_values_do_not_depend_on_how_they_are_read() -> None:
    base = {"x.weight": torch.randn(3000, 700)}
    write(factors("x", 3000, 700, 2), {}, base)
    with open_pair("base.safetensors", "lora") as pair:
        whole = pair.self_trained.tensor("x.weight").flatten()
        pieces = torch.empty_like(whole)
        for start in range(0, len(whole), 234_567):
            pair.self_trained.read("x.weight", start, pieces[start : start + 234_567])
    assert torch.equal(whole, pieces)


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
@pytest.mark.parametrize("named", ["lora", "lora/adapter_model"])
def test_folders_and_files_with_and_without_an_adapter_s_name(suffix: str, named: str) -> None:
    adapter = factors()
    write(adapter, {})
    if suffix == "bin":
        Path("lora/adapter_model.safetensors").unlink()
        torch.save({PEFT + name.replace("_A.", "_A.mine."): t for name, t in adapter.items()}, "lora/adapter_model.bin")
    exact = (
        load_state("base.safetensors")["a.q.weight"] - 2 * adapter["a.q.lora_B.weight"] @ adapter["a.q.lora_A.weight"]
    )
    torch.testing.assert_close(merged(named if named == "lora" else f"{named}.{suffix}")["a.q.weight"], exact)


def test_names_may_lack_or_have_a_first_word() -> None:
    for base, module in (("transformer.{}", "a.q"), ("{}", "transformer.a.q"), ("model.net.{}", "a.q")):
        state = {base.format(name): tensor for name, tensor in base_state().items()}
        write(factors(module), {}, state)
        name = base.format("a.q.weight")
        assert not torch.equal(merged()[name], state[name])
    [report] = merge_files("base.safetensors", "lora", [1.0], "again.safetensors")
    assert "a.q.weight is read as model.net.a.q.weight" in " ".join(report.warnings)
    twice = {f"{front}.{name}": tensor for front in ("ema", "net") for name, tensor in base_state().items()}
    write(factors(), {}, twice)
    Path("neon.safetensors").unlink()
    assert "in two places, ema.a.q.weight and net.a.q.weight" in refusal()


def test_a_tucker_decomposed_convolution_is_merged() -> None:
    save_safetensors("base.safetensors", base_state(), {})
    down, mid, up = torch.randn(2, 3, 1, 1), torch.randn(2, 2, 3, 3), torch.randn(4, 2, 1, 1)
    parts = {"lora_down.weight": down, "lora_mid.weight": mid, "lora_up.weight": up, "alpha": torch.tensor(1.0)}
    save_safetensors("tucker.safetensors", {f"lora_unet_c.{name}": tensor for name, tensor in parts.items()}, {})
    x = torch.randn(1, 3, 8, 8)
    conv = torch.nn.functional.conv2d
    exact = conv(x, load_state("base.safetensors")["c.weight"]) - 0.5 * conv(conv(conv(x, down), mid), up)
    torch.testing.assert_close(conv(x, merged("tucker.safetensors")["c.weight"]), exact, rtol=1e-4, atol=1e-5)


def test_kohya_s_names_of_one_layout_fit_a_base_of_the_other() -> None:
    layers = {
        "conv_in": "input_blocks.0.0",
        "down_blocks.0.resnets.0.conv1": "input_blocks.1.0.in_layers.2",
        "down_blocks.0.resnets.1.conv2": "input_blocks.2.0.out_layers.3",
        "down_blocks.0.downsamplers.0.conv": "input_blocks.3.0.op",
        "down_blocks.1.resnets.0.conv_shortcut": "input_blocks.4.0.skip_connection",
        "down_blocks.1.attentions.1.ff.net.0.proj": "input_blocks.5.1.ff.net.0.proj",
        "mid_block.attentions.0.proj_in": "middle_block.1.proj_in",
        "mid_block.resnets.1.time_emb_proj": "middle_block.2.emb_layers.1",
        "up_blocks.0.attentions.2.proj_out": "output_blocks.2.1.proj_out",
        "up_blocks.0.upsamplers.0.conv": "output_blocks.2.2.conv",
        "up_blocks.2.resnets.1.conv2": "output_blocks.7.0.out_layers.3",
        "time_embedding.linear_2": "time_embed.2",
        "conv_out": "out.2",
    }
    for own, other, front in ((0, 1, ""), (1, 0, "model.diffusion_model.")):
        pairs = [pair[::-1] if own else pair for pair in layers.items()]
        base = {f"{front}{ours}.weight": torch.zeros(3 + n, 2) for n, (ours, _) in enumerate(pairs)}
        save_safetensors("base.safetensors", base, {})
        adapter = {}
        for number, (_, theirs) in enumerate(pairs):
            key = f"lora_unet_{theirs.replace('.', '_')}"
            adapter |= {f"{key}.lora_down.weight": torch.ones(1, 2), f"{key}.lora_up.weight": torch.ones(3 + number, 1)}
            adapter[f"{key}.alpha"] = torch.tensor(1.0 + number)
        save_safetensors("kohya.safetensors", adapter, {})
        assert [float(value.unique()) for value in merged("kohya.safetensors", -1.0).values()] == [
            1.0 + number for number in range(len(pairs))
        ], other


KINDS = {
    "LoHa": {"lora_unet_a_q.hada_w1_a": (4, 2)},
    "LoKr": {"lora_unet_a_q.lokr_w1": (2, 2)},
    "(IA)3": {PEFT + "a.q.ia3_l": (4, 1)},
    "VeRA": {PEFT + "a.q.vera_lambda_b": (4,)},
    "OFT": {"lora_unet_a_q.oft_blocks": (2, 2, 2)},
}


@pytest.mark.parametrize("kind", KINDS)
def test_other_kinds_of_adapters_are_refused_by_name(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    write(factors(), {})
    save_safetensors("other.safetensors", {name: torch.ones(shape) for name, shape in KINDS[kind].items()}, {})
    assert f"an adapter of the kind {kind} (" in refusal("other.safetensors")
    assert cli.main(["inspect", "other.safetensors"]) == 0
    assert f"not read: other.safetensors: an adapter of the kind {kind}" in capsys.readouterr().out


CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "kind": ({"peft_type": "IA3"}, "an adapter of the kind 'IA3', and only LORA is read"),
    "meaning": ({"target_parameters": ["x"]}, "a LoRA with target_parameters"),
    "start": (
        {"init_lora_weights": "pissa_niter_4"},
        "init_lora_weights is 'pissa_niter_4', which changes the base too",
    ),
    "rank 0": ({"r": 0}, "rank 0; expected an r of 1 or more"),
    "rank": ({"r": 3}, "says rank 3 of a.q, and base_model.model.a.q.lora_A.weight has 2"),
    "alpha": ({"lora_alpha": "8"}, "lora_alpha of a.q is '8'; expected a number"),
    "pattern": ({"alpha_pattern": {"(": 2}}, "the pattern '(' is no regular expression"),
    "endless": ({"alpha_pattern": {"(a|a.|.)*x": 2}}, "the pattern '(a|a.|.)*x' may take forever to match"),
    "no table": ({"rank_pattern": [1]}, "rank_pattern is no table of names and numbers"),
    "target": ({"target_modules": ["q", "k"]}, "target_modules names k, which base.safetensors has"),
    "whole": ({"modules_to_save": ["n"]}, "modules_to_save names n, which base.safetensors has"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_that_says_something_else_is_refused_in_one_line(name: str) -> None:
    config, expected = CONFIGS[name]
    write(factors(), config)
    said = refusal()
    assert said.startswith("lora/adapter_config.json: ") and expected in said


@pytest.mark.parametrize("text", ["", "[]", "{", "[" * 100_000, "nonsense"])
def test_a_config_that_is_none_is_refused(text: str) -> None:
    write(factors(), {})
    Path("lora/adapter_config.json").write_text(text)
    assert "lora/adapter_config.json: no table in JSON" in refusal()


def test_names_of_classes_in_a_config_are_text() -> None:
    """auto_mapping makes PEFT import a module; here nothing is imported and nothing looked up."""
    mapping = {"base_model_class": "Evil", "parent_library": "os"}
    write(factors(), {"auto_mapping": mapping, "auto_map": {"AutoModel": "evil.Evil"}, "megatron_core": "evil.core"})
    Path("evil.py").write_text("raise SystemExit('it ran')")
    assert set(merged()) == set(base_state())


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch ran",)


def test_a_pickle_that_names_what_runs_is_refused_and_nothing_runs() -> None:
    write(factors(), {})
    Path("lora/adapter_model.safetensors").unlink()
    with zipfile.ZipFile("lora/adapter_model.bin", "w") as file:
        file.writestr("archive/data.pkl", pickle.dumps({"x": Evil()}))
        file.writestr("archive/version", "3")
    assert "system" in refusal()
    Path("lora/adapter_model.bin").write_bytes(pickle.dumps({"x": Evil()}))
    assert "system" in refusal()
    assert not Path("ran").exists()


def test_factors_that_are_not_finite_are_refused() -> None:
    write({**factors(), "a.q.lora_B.weight": torch.full((4, 2), torch.nan)}, {})
    assert "the factors of a.q are not all finite" in refusal()
    with pytest.raises(RequestError, match="not all finite"):
        write_adapter("base.safetensors", "lora", 1.0, "neon")
    assert not Path("neon").exists()


MISFITS: dict[str, tuple[State, str]] = {
    "name": (factors("a.v"), "its layer a.v is no weight of base.safetensors, which has a."),
    "shape": (
        factors("a.q", 4, 7),
        "its layer a.q is made for [2, 7] x [4, 2], and a.q.weight of base.safetensors is [4, 6]",
    ),
    "rank 0": (factors(rank=0), "a.q has rank 0 (base_model.model.a.q.lora_A.weight is [0, 6])"),
    "half": ({"a.q.lora_A.weight": torch.ones(2, 6)}, "a.q has base_model.model.a.q.lora_A.weight and no factor 'up'"),
    "whole": ({**factors(), "n.weight": torch.ones(5)}, "its layer n.weight is made for [5], and n.weight of"),
    "unknown": ({**factors(), "m.weight": torch.ones(5)}, "its layer m.weight is no weight of base.safetensors"),
    "bias": ({**factors(), "a.q.lora_B.bias": torch.ones(5)}, "a.q.lora_B.bias [5] is for a.q.bias"),
    "nothing": ({"n.weight": torch.ones(4)}, "no factors of a LoRA in it"),
    "alpha": ({**factors(), "n.alpha": torch.ones(())}, "n has base_model.model.n.alpha and no factor 'down'"),
    "twice": (
        {**factors(), "a.q.lora_A.other.weight": torch.ones(2, 6)},
        "are the same part of one layer; expected one adapter in the file",
    ),
    "DoRA": ({**factors(), "a.q.lora_magnitude_vector": torch.ones(6)}, "is a DoRA that is not by outputs (4)"),
}


@pytest.mark.parametrize("name", MISFITS)
def test_adapters_that_do_not_fit_the_base_are_refused_with_both_names(name: str) -> None:
    adapter, expected = MISFITS[name]
    write(adapter, {})
    assert expected in refusal()


def test_a_folder_without_its_other_half_is_refused() -> None:
    write(factors(), None)
    assert "adapter_config.json is not beside it, which says the scale of a PEFT adapter" in refusal()
    write(factors(), {})
    Path("lora/adapter_model.safetensors").unlink()
    assert "lora: holds adapter_config.json and no weights" in refusal()


def test_a_quantised_base_is_refused_with_the_word() -> None:
    write(factors(), {}, {**base_state(), "a.q.weight": torch.ones(4, 6, dtype=torch.int8)})
    assert "base.safetensors: a.q.weight is quantised (torch.int8)" in refusal()


def test_full_states_with_factors_in_them_are_merged_as_they_are() -> None:
    state = {**base_state(), **factors()}
    save_safetensors("base.safetensors", state, {})
    save_safetensors("tuned.safetensors", {name: tensor + 1 for name, tensor in state.items()}, {})
    assert torch.allclose(merged("tuned.safetensors")["a.q.lora_A.weight"], state["a.q.lora_A.weight"] - 1)


def test_inspect_tells_kind_ranks_alphas_and_targets(capsys: pytest.CaptureFixture[str]) -> None:
    adapter = {**factors(), **factors("a.k", 5, 5, 3), "n.weight": torch.ones(4)}
    write(adapter, {"rank_pattern": {"k": 3}})
    assert cli.main(["inspect", "lora"]) == 0
    told = "LoRA (peft): 2 layers, rank 2 (1 layers), 3 (1 layers), alpha 4, targets k, q, 1 tensors whole"
    assert told in capsys.readouterr().out
    assert cli.main(["inspect", "lora", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)["adapter"]
    assert facts["ranks"] == {"2": 1, "3": 1} and facts["alphas"] == {"4": 2} and facts["format"] == "peft"
    assert cli.main(["inspect", "base.safetensors", "--json"]) == 0
    assert "adapter" not in json.loads(capsys.readouterr().out)


# --- writing


def as_adapter(flags: str) -> int:
    return cli.main(f"merge --base base.safetensors --self-trained lora -w 1 --as-adapter {flags}".split())


def test_an_adapter_of_an_adapter_is_read_as_the_merge(capsys: pytest.CaptureFixture[str]) -> None:
    adapter = {**factors(), **factors("a.k", 5, 5, 3), "n.weight": torch.ones(4), "a.q.lora_B.bias": torch.ones(4)}
    write(adapter, {"rank_pattern": {"k": 3}, "use_rslora": True})
    full = merged()
    assert as_adapter("--output neon --json report.json") == 0
    assert "the adapter's own factors" in capsys.readouterr().out
    for name, value in merged("neon", -1.0).items():
        torch.testing.assert_close(value, full[name])
    with open_checkpoint("neon/adapter_model.safetensors") as file:
        assert file.metadata["w"] == "1.0" and file.metadata["self_trained"] == "lora"
    config = json.loads(Path("neon/adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] and config["rank_pattern"] == config["alpha_pattern"]
    assert json.loads(Path("report.json").read_text())["ranks"] == {"a.q.weight": 2, "a.k.weight": 3}


def test_the_same_adapter_is_written_every_time() -> None:
    save_safetensors("base.safetensors", base_state(), {})
    save_safetensors("tuned.safetensors", {name: t + torch.randn(t.shape) for name, t in base_state().items()}, {})
    for name in ("one", "two"):
        report = write_adapter("base.safetensors", "tuned.safetensors", 0.5, name, rank=2)
    one, two = (Path(name, "adapter_model.safetensors").read_bytes() for name in ("one", "two"))
    assert one == two
    assert not report.exact and 0.3 < report.kept < 1
    assert set(report.layers) == {"a.q.weight", "a.k.weight", "c.weight"} and set(report.whole) == {
        "a.q.bias",
        "n.weight",
    }
    assert sorted(path.name for path in Path().iterdir()) == ["base.safetensors", "one", "tuned.safetensors", "two"]


def test_a_network_of_the_first_release_becomes_an_adapter_under_diffusers_names() -> None:
    front = "model.diffusion_model."
    names = ["input_blocks.3.0.op", "input_blocks.4.1.proj_in", "output_blocks.2.1.conv"]
    base = {f"{front}{name}.weight": torch.randn(4, 4) for name in names}
    save_safetensors("base.safetensors", base, {})
    save_safetensors("tuned.safetensors", {name: tensor + torch.eye(4) for name, tensor in base.items()}, {})
    write_adapter("base.safetensors", "tuned.safetensors", -1.0, "neon", rank=4, adapter_format="diffusers")
    modules = [
        "down_blocks.0.downsamplers.0.conv",
        "down_blocks.1.attentions.0.proj_in",
        "up_blocks.0.upsamplers.0.conv",
    ]
    with open_checkpoint("neon/pytorch_lora_weights.safetensors") as file:
        assert {name.rpartition(".lora_")[0] for name in file.specs} == {f"unet.{module}" for module in modules}
    for name, value in merged("neon", -1.0).items():
        torch.testing.assert_close(value, base[name] + torch.eye(4), rtol=1e-5, atol=1e-5)


REFUSED = {
    "--output neon -w 1 2": "-w 1 2: --as-adapter writes one",
    "--output neon -w 0": "w = 0 is the base: no adapter is needed",
    "--output neon --rank 4": "--rank 4: lora is an adapter, whose ranks are kept",
    "--output neon.safetensors": "neon.safetensors: an adapter of this format is a folder",
    "--output neon --adapter-format kohya": "neon: an adapter of this format is one file",
    "--output lora": "lora: is or holds the input",
    "--output lora --overwrite": "lora: is or holds the input lora/adapter_model.safetensors",
    "--output there": "there: a folder is to be written, and this is a file",
}


@pytest.mark.parametrize("flags", REFUSED)
def test_adapters_that_cannot_be_written_are_refused(flags: str, capsys: pytest.CaptureFixture[str]) -> None:
    write(factors(), {})
    Path("there").write_text("")
    before = sorted(Path().iterdir())
    assert as_adapter(flags) == 2
    assert REFUSED[flags] in capsys.readouterr().err
    assert sorted(Path().iterdir()) == before


def test_flags_of_adapters_go_with_as_adapter(capsys: pytest.CaptureFixture[str]) -> None:
    write(factors(), {})
    pair = "merge --base base.safetensors --self-trained lora -w 1 --output neon.safetensors"
    assert cli.main(f"{pair} --rank 3".split()) == 2
    assert "--rank: goes with --as-adapter" in capsys.readouterr().err
    assert as_adapter("--output neon") == 0
    assert as_adapter("--output neon --overwrite") == 0
    Path("neon/notes.txt").touch()
    assert as_adapter("--output neon --overwrite") == 2
    assert "neon: will not be replaced" in capsys.readouterr().err


# --- sweeps


def test_a_sweep_over_an_adapter_is_that_over_its_merge(here: Path) -> None:
    write_pair(here)
    base = load_state("base.safetensors")
    name = next(name for name, t in base.items() if t.dim() == 2 and name.endswith(".weight"))
    adapter = {n: 0.1 * t for n, t in factors(name.removesuffix(".weight"), *base[name].shape).items()}
    Path("lora").mkdir()
    save_safetensors("lora/adapter_model.safetensors", {PEFT + n: t for n, t in adapter.items()}, {})
    Path("lora/adapter_config.json").write_text('{"peft_type": "LORA", "r": 2, "lora_alpha": 2}')
    check_same_network("base.safetensors", "lora")
    merge_files("base.safetensors", "lora", [1.0], "neon.safetensors")
    flags = "--features features.safetensors --device cpu --ref real.npz --num_images 20 --json"
    flags = f"--set num_steps=2 solver=euler {flags}"
    assert cli.main(f"evaluate --network base.safetensors --self_trained lora --w 1 {flags} sweep.json".split()) == 0
    assert cli.main(f"evaluate --network neon.safetensors {flags} file.json".split()) == 0
    sweep, file = (json.loads(Path(name).read_text()) for name in ("sweep.json", "file.json"))
    scores = {key for key in file if key.startswith("fd")}
    assert scores and all(sweep[key] == file[key] for key in scores)
    tune = (
        "--select-stats real.npz --num-images 20 --report-images 20 --grid 1 --out run --set num_steps=2 solver=euler"
    )
    tune = f"tune --base base.safetensors --self-trained lora {tune} --features features.safetensors --device cpu"
    assert cli.main(tune.split()) == 0
