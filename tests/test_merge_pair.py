"""Base and self-trained weights as they come: wrapped, nested, tied, quantised; files and sweeps decide alike."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from neon.checkpoint import load_state, open_checkpoint, save_safetensors
from neon.checkpoint.naming import fitted
from neon.cli import app as cli
from neon.errors import RequestError
from neon.merge import LiveMerge, load_self_trained, merge_files, merge_tensor
from neon.model import load_model, save_model
from tests.programs import work_in, write_pair
from tests.tiny import tiny_edm, tiny_var


def network_with_buffers() -> nn.Module:
    """Every layer of torch that keeps floats which are no parameters, and those that look like such."""
    with pytest.warns(FutureWarning):
        norms = [nn.utils.weight_norm(nn.Linear(3, 3)), nn.utils.spectral_norm(nn.Linear(3, 3))]
    modern = [
        nn.utils.parametrizations.weight_norm(nn.Linear(3, 3)),
        nn.utils.parametrizations.spectral_norm(nn.Linear(3, 3)),
    ]
    network = nn.Sequential(nn.BatchNorm1d(3), nn.InstanceNorm1d(3, track_running_stats=True), *norms, *modern)
    prune.l1_unstructured(network.append(nn.Linear(3, 3))[-1], "weight", 2)
    return network


def moved(state: dict[str, torch.Tensor], step: float = 0.3) -> dict[str, torch.Tensor]:
    """Other values for every entry, as after training."""
    return {name: tensor + (step if tensor.is_floating_point() else 1) for name, tensor in state.items()}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(base: dict[str, torch.Tensor], self_trained: dict[str, torch.Tensor]) -> None:
    torch.save(base, "base.pth")
    torch.save(self_trained, "tuned.pth")


@pytest.mark.parametrize("w", [-1.0, 0.7])
def test_a_merged_file_is_what_a_sweep_puts_into_the_network(here: Path, w: float) -> None:
    network = network_with_buffers()
    base = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    write(base, moved(base))
    [report] = merge_files("base.pth", "tuned.pth", [w], "neon.pth")
    LiveMerge(network, base, load_self_trained(network, "base.pth", "tuned.pth")).set(w)
    merged = load_state("neon.pth")
    assert {name for name in merged if not torch.equal(merged[name], network.state_dict()[name])} == set()
    floats = {name for name, buffer in network.named_buffers() if buffer.is_floating_point()}
    assert set(report.buffers) == floats and len(floats) == 9
    assert report.merged_tensors == len([*network.parameters()])


def test_buffers_of_any_name_are_told_by_files_that_neon_wrote(here: Path) -> None:
    model = tiny_var()
    save_model("base.safetensors", model)
    state = {name: tensor.clone() for name, tensor in model.network.state_dict().items()}
    name = "blocks.0.attn.zero_k_bias"
    save_model("tuned.safetensors", model, {**state, name: state[name] + 1, "lvl_1L": state["lvl_1L"]})
    [report] = merge_files("base.safetensors", "tuned.safetensors", [1.0], "neon.safetensors")
    assert name in report.buffers and torch.equal(load_state("neon.safetensors")[name], state[name])
    torch.save({f"module.{key}": tensor for key, tensor in state.items()}, "base.pth")
    [report] = merge_files("base.pth", "tuned.safetensors", [1.0], "neon.pth")
    assert f"module.{name}" in report.buffers
    for said in ("3", "[3]", '["no such name"]', "[" * 10_000, "null"):
        save_safetensors("odd.safetensors", state, {"buffers": said})
        [report] = merge_files("odd.safetensors", "odd.safetensors", [1.0], "neon.pth", overwrite=True)
        assert name not in report.buffers, "told by names"


@pytest.mark.parametrize(
    ("base", "self_trained"),
    [
        ("{}", "module.{}"),
        ("{}", "module._orig_mod.{}"),
        ("module.{}", "{}"),
        ("_orig_mod.module.{}", "module._orig_mod.{}"),
        ("module.{}", "_orig_mod.{}"),
        ("{}", "_fsdp_wrapped_module.{}"),
        ("{}", "model.diffusion_model.{}"),
        ("generator.{}", "{}"),
    ],
)
def test_what_a_wrapper_puts_into_all_names_of_one_file_is_no_difference(
    here: Path, base: str, self_trained: str
) -> None:
    state = {"net.0.weight": torch.ones(4, 4), "net.0.bias": torch.zeros(4), "head.weight": torch.ones(2)}
    write(
        {base.format(name): tensor for name, tensor in state.items()},
        {self_trained.format(name): tensor + 0.5 for name, tensor in reversed(state.items())},
    )
    [report] = merge_files("base.pth", "tuned.pth", [1.0], "neon.pth")
    assert {name: tensor.flatten()[0].item() for name, tensor in torch.load("neon.pth").items()} == {
        base.format("net.0.weight"): 0.5, base.format("net.0.bias"): -0.5, base.format("head.weight"): 0.5,
    }  # fmt: skip
    assert f"tuned.pth: its names differ by the words of a wrapper: {self_trained.format('net.0.weight')}" in " ".join(
        report.warnings
    )


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("encoder.weight", "decoder.weight"),
        ("a.weight b.weight", "module.a.weight b.weight"),
        ("a._orig_mod.x a.x", "a.x b.x"),
        ("weight", "bias"),
    ],
)
def test_other_names_are_those_of_another_network(ours: str, theirs: str) -> None:
    assert fitted(ours.split(), theirs.split()) is None


def test_parts_that_were_compiled_by_themselves_are_found(here: Path) -> None:
    write(
        {"blocks.0.w": torch.ones(1), "w": torch.ones(1)}, {"blocks.0._orig_mod.w": torch.ones(1), "w": torch.zeros(1)}
    )
    merge_files("base.pth", "tuned.pth", [1.0], "neon.pth")
    assert load_state("neon.pth") == {"blocks.0.w": torch.ones(1), "w": torch.full((1,), 2.0)}


def test_the_counter_of_averaged_weights_is_no_part_of_the_network(here: Path) -> None:
    net = nn.Linear(2, 1, bias=False)
    nn.init.constant_(net.weight, 0.5)  # one more and one less are exact
    averaged = torch.optim.swa_utils.AveragedModel(net)
    averaged.update_parameters(net)
    write(net.state_dict(), {name: tensor + 1 for name, tensor in averaged.state_dict().items()})
    merge_files("base.pth", "tuned.pth", [1.0], "neon.pth")
    assert torch.equal(load_state("neon.pth")["weight"], net.weight - 1)


def test_a_model_is_loaded_from_a_file_of_a_wrapped_network(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny_edm()
    save_model("plain.safetensors", model)
    with open_checkpoint("plain.safetensors") as plain:
        about = plain.metadata
    state = {f"module._orig_mod.{name}": tensor for name, tensor in model.network.state_dict().items()}
    save_safetensors("wrapped.safetensors", state, about)
    found = load_model("wrapped.safetensors").network.state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in model.network.state_dict().items())
    assert (
        "wrapped.safetensors: its names differ by the words of a wrapper: module._orig_mod." in capsys.readouterr().err
    )
    save_safetensors("bare.safetensors", {f"module.{k}": v for k, v in tiny_var().network.state_dict().items()}, {})
    assert load_model("bare.safetensors").architecture == "VAR", "recognised by its shapes"


def test_files_that_do_not_fit_are_not_blamed_on_a_key_without_a_choice(here: Path) -> None:
    write({"a": torch.ones(8, 8), "b": torch.ones(3)}, {"a": torch.ones(8), "b": torch.ones(3)})
    with pytest.raises(RequestError, match=r"a \[8, 8\] / \[8\]; both must come from the same network$"):
        merge_files("base.pth", "tuned.pth", [1.0], "neon.pth")
    torch.save({"model": {"a": torch.ones(8)}, "old": {"a": torch.ones(8, 8)}}, "tuned.pth")
    with pytest.raises(RequestError, match=r"tuned\.pth was read at model and has old too: --self_trained_key chooses"):
        merge_files("base.pth", "tuned.pth", [1.0], "neon.pth")
    torch.save({"mine": {"a": torch.ones(8)}, "yours": {"a": torch.ones(8, 8)}}, "tuned.pth")
    with pytest.raises(RequestError, match="present: mine, yours; choose with --self_trained_key"):
        merge_files("base.pth", "tuned.pth", [1.0], "neon.pth")
    assert sorted(path.name for path in here.iterdir()) == ["base.pth", "tuned.pth"]


@pytest.mark.parametrize("output", ["neon.safetensors", "neon.pth"])
def test_quantised_files_are_refused_and_nothing_is_written(here: Path, output: str) -> None:
    base = {"fc.weight": torch.arange(9 << 20).to(torch.uint8), "fc.weight.absmax": torch.ones(2)}
    last = base["fc.weight"].clone()
    last[-1] += 1
    write(base, {**base, "fc.weight": last})
    with pytest.raises(
        RequestError, match=r"base\.pth and tuned\.pth: quantised weights: .*fc\.weight \(torch\.uint8\)"
    ):
        merge_files("base.pth", "tuned.pth", [1.0], output)
    assert not list(here.glob("neon*"))


def test_tied_empty_scalar_strided_and_complex_tensors_are_merged(here: Path) -> None:
    table = torch.arange(12.0).view(3, 4)
    base = {"a": table, "tied": table, "t": table.t(), "none": torch.zeros(0, 3), "one": torch.tensor(2.0),
            "z": torch.tensor([1 + 2j, 3]), "part": table[:, 1]}  # fmt: skip
    trained = {name: tensor.clone() + 1 for name, tensor in base.items()}
    write(base, trained)
    for output in ("neon.pth", "neon.safetensors"):
        merge_files("base.pth", "tuned.pth", [1.5], output)
        merged = load_state(output)
        assert all(torch.equal(merged[name], merge_tensor(base[name], trained[name], 1.5)) for name in base)


@pytest.mark.parametrize(("step", "told"), [(1e-7, True), (1e-3, False)])
def test_weights_that_hardly_moved_are_told_by_merges_and_sweeps(
    here: Path, capsys: pytest.CaptureFixture[str], step: float, told: bool
) -> None:
    network = nn.Linear(40, 40).double()
    write(network.state_dict(), {name: tensor * (1 + step) for name, tensor in network.state_dict().items()})
    [report] = merge_files("base.pth", "tuned.pth", [1.0], "neon.pth")
    load_self_trained(network, "base.pth", "tuned.pth")
    text = "1.0e-07 of the base's norm away from it" if told else "norm away"
    assert (text in " ".join(report.warnings), text in capsys.readouterr().err) == (told, told)


def test_configs_that_no_json_reader_follows_are_compared_as_texts(here: Path) -> None:
    for name, depth in (("base", 100_000), ("tuned", 100_001)):
        about = {"architecture": "edm", "config": "[" * depth}
        save_safetensors(f"{name}.safetensors", {"a": torch.zeros(2)}, about)
    with pytest.raises(RequestError, match=r"differ in config: base\.safetensors has \[\["):
        merge_files("base.safetensors", "tuned.safetensors", [1.0], "neon.safetensors")


@pytest.mark.parametrize("buffers", ['"a"', '{"a": 1}', "5", "[["])
def test_buffers_that_are_no_list_make_no_buffer_of_a_weight(here: Path, buffers: str) -> None:
    for name, value in (("base", 0.0), ("tuned", 1.0)):
        save_safetensors(f"{name}.safetensors", {"a": torch.full((2,), value)}, {"buffers": buffers})
    merge_files("base.safetensors", "tuned.safetensors", [1.0], "neon.safetensors")
    assert load_state("neon.safetensors")["a"].tolist() == [-1.0, -1.0]


# --- sweeps

SWEEP = "--features features.safetensors --device cpu --model mine.py:Mine --set num_steps=2 solver=euler"
NAME = "model.map_label.weight"
MODEL = """
from edm.model import EDM
from tests.tiny import CONFIG
class Mine(EDM):
    config_of = classmethod(lambda cls, checkpoint: CONFIG)
"""


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The usual pair, and the same nested, wrapped and under other keys."""
    folder = tmp_path_factory.mktemp("files")
    write_pair(folder)
    base, tuned = (load_state(folder / f"{name}.safetensors") for name in ("base", "tuned"))
    wrapped = {f"module.{name}": tensor for name, tensor in tuned.items()}
    torch.save({"model_ema": base, "model": tuned}, folder / "nested.pth")
    torch.save({"state_dict": wrapped}, folder / "wrapped.pth")
    torch.save({"theirs": tuned, "model_ema": base}, folder / "theirs.pth")
    (folder / "mine.py").write_text(MODEL)
    return folder


PAIRS = [
    ("nested.pth", "tuned.safetensors", "--key model_ema"),
    ("nested.pth", "wrapped.pth", ""),
    ("nested.pth", "theirs.pth", "--key model_ema --self_trained_key theirs"),
]


@pytest.mark.parametrize(("base", "self_trained", "flags"), PAIRS)
def test_merges_and_sweeps_take_the_same_pairs(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, base: str, self_trained: str, flags: str
) -> None:
    work_in(tmp_path, files, monkeypatch)
    pair = f"--base {base} --self-trained {self_trained} {flags}"
    assert cli.main(f"merge {pair} -w 1 --output neon.safetensors".split()) == 0
    reference = merge_tensor(*(load_state(f"{name}.safetensors")[NAME] for name in ("base", "tuned")), 1.0)
    assert torch.equal(load_state("neon.safetensors")[NAME], reference)
    config = "--ref real.npz --num_images 20"
    scored = f"evaluate --network {base} --self_trained {self_trained} {flags} --w 1 {config} {SWEEP} --json sweep.json"
    assert cli.main(scored.split()) == 0
    assert cli.main(f"evaluate --network neon.safetensors {config} {SWEEP} --json file.json".split()) == 0
    sweep, file = (json.loads(Path(name).read_text())["fd_tiny6"] for name in ("sweep.json", "file.json"))
    assert sweep == file
    assert cli.main(f"align {pair} --stats real.npz --num-images 20 {SWEEP}".split()) == 0
    tune = f"tune {pair} --select-stats real.npz --num-images 20 --report-images 20 --grid 1 --out run {SWEEP}"
    assert cli.main(tune.split()) == 0


def test_a_key_of_self_trained_weights_needs_these(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    network = f"--network {files / 'base.safetensors'} --ref {files / 'real.npz'} --num_images 20"
    assert cli.main(f"evaluate {network} --self_trained_key ema".split()) == 2
    assert "--self_trained_key: goes with --self_trained" in capsys.readouterr().err
