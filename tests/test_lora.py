"""Self-training by LoRA: factors alone are trained, written and scaled in the live network, as PEFT would have it."""

import gc
import importlib.util
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from neon import selftrain
from neon.checkpoint import load_state, open_checkpoint
from neon.cli import app
from neon.cli.recipe import words_of_recipe
from neon.data.images import ArrayDataset
from neon.errors import RequestError
from neon.improve.plan import ImprovePlan
from neon.lora.layers import factors_of, inject, layers_of
from neon.lora.settings import LoRA, check_lora
from neon.lora.trained import LowRank
from neon.merge import load_self_trained
from neon.merge.live import beside
from neon.model import GenerativeModel, load_model, save_model
from neon.noise import ImageNoise
from neon.runtime.distributed import Processes
from neon.selftrain import Snapshot, encoded_once, train
from neon.trained import checkpoint_gradients
from tests.programs import Killed, dies_after, work_in, write_real
from tests.tiny import tiny_colour_images, tiny_edm, tiny_images, tiny_imm, tiny_var, tiny_xar
from tests.workers import Workers

pytest.importorskip("peft")

ONE = Processes()
EVERY = LoRA(rank=2, alpha=3.0, targets=("all",))


def pixel_imm() -> GenerativeModel:
    """A DiT of pixels."""
    return tiny_imm(img_resolution=8, img_channels=3, patch_size=4)


MODELS: dict[str, tuple[Callable[[], GenerativeModel], Callable[[], ArrayDataset]]] = {
    "edm": (tiny_edm, tiny_images),
    "VAR": (tiny_var, tiny_colour_images),
    "xAR": (tiny_xar, tiny_colour_images),
    "imm": (pixel_imm, tiny_colour_images),
}
EACH = pytest.mark.parametrize("name", MODELS)


def trained(name: str, folder: Path, lora: LoRA = EVERY, **more: Any) -> tuple[GenerativeModel, Snapshot]:
    """A model of a kind after three steps, and its last snapshot; its base lies in `folder`."""
    model, dataset = (make() for make in MODELS[name])
    save_model(folder / "base.safetensors", model)
    recipe = replace(model.recipe.with_rampup(0).with_halflife(more.pop("halflife", None)), batch_size=8, lr=1e-2)
    settings = {"num_steps": 3, "snapshot_steps": [2], "recipe": recipe, "seed": 1, "processes": ONE, **more}
    snapshots = train(model, dataset, folder / "run", lora=lora, **settings)
    return model, snapshots[-1]


def loss(name: str, model: GenerativeModel) -> torch.Tensor:
    dataset = MODELS[name][1]()
    examples, labels = dataset.load(range(8))
    noise = ImageNoise(range(8))
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)
        return model.eval().training_loss(model.encode(examples, noise), labels, noise)


@EACH
def test_factors_alone_are_trained_and_a_snapshot_is_the_network_with_them(name: str, tmp_path: Path) -> None:
    model, snapshot = trained(name, tmp_path)
    base = load_state(tmp_path / "base.safetensors")
    live = {key.replace(".base_layer.", "."): tensor for key, tensor in model.network.state_dict().items()}
    assert all(torch.equal(live[key], tensor) for key, tensor in base.items())
    with open_checkpoint(snapshot.path) as file:
        assert all(".lora_A." in key or ".lora_B." in key for key in file.specs)
        assert json.loads(file.metadata["lora"]) == {"rank": 2, "alpha": 3.0, "targets": ["all"]}
        assert json.loads(file.metadata["training"])["lora"]["rank"] == 2
    reopened = MODELS[name][0]()
    state = load_self_trained(reopened.network, tmp_path / "base.safetensors", snapshot.path)
    before = loss(name, reopened)
    reopened.network.load_state_dict(state)
    torch.testing.assert_close(loss(name, reopened), loss(name, model), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(before, loss(name, model), rtol=1e-4)
    weights = [key for key, _ in reopened.network.named_parameters()]
    change = sum(float((state[key].double() - base[key].double()).square().sum()) for key in weights)
    norm = sum(float(base[key].double().square().sum()) for key in weights)
    assert snapshot.moved() == pytest.approx((change / norm) ** 0.5, rel=1e-4)


@pytest.mark.parametrize("name", ["VAR", "imm"])
def test_peft_opens_a_snapshot_and_merges_it_to_the_same_weights(name: str, tmp_path: Path) -> None:
    from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict
    from peft.tuners.lora import LoraLayer

    _, snapshot = trained(name, tmp_path, replace(EVERY, targets=("attn.proj", "fc1")))
    ours, network = MODELS[name][0]().network, MODELS[name][0]().network
    state = load_self_trained(ours, tmp_path / "base.safetensors", snapshot.path)
    with open_checkpoint(snapshot.path) as file:
        config = json.loads(file.metadata["lora_adapter_metadata"])
    inject_adapter_in_model(LoraConfig(**config), network)
    assert not set_peft_model_state_dict(network, load_state(snapshot.path)).unexpected_keys
    layers = {key: layer for key, layer in network.named_modules() if isinstance(layer, LoraLayer)}
    assert layers
    for key, layer in layers.items():
        layer.merge()  # type: ignore[operator]
        torch.testing.assert_close(layer.base_layer.weight, state[f"{key}.weight"], rtol=1e-6, atol=1e-7)


def test_what_a_run_holds_is_as_large_as_the_factors(tmp_path: Path) -> None:
    model, _ = trained("edm", tmp_path, replace(EVERY, rank=1), halflife=0.1)
    state = torch.load(tmp_path / "run" / "training-state.pt", weights_only=True)
    factors = sum(tensor.numel() for tensor in state["network"].values())
    assert factors < sum(p.numel() for p in model.network.parameters()) / 3
    assert sum(tensor.numel() for tensor in state["average"]) == factors
    moments = [entry["exp_avg"].numel() for entry in state["optimizer"]["state"].values()]
    assert sum(moments) == factors


def test_a_killed_run_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    (tmp_path / "whole").mkdir()
    (tmp_path / "killed").mkdir()
    _, whole = trained("edm", tmp_path / "whole", halflife=0.05)
    with dies_after(2, selftrain.TrainingRun, "one_step"), pytest.raises(Killed):
        trained("edm", tmp_path / "killed", halflife=0.05)
    _, killed = trained("edm", tmp_path / "killed", halflife=0.05)
    assert killed.path.read_bytes() == whole.path.read_bytes()


def test_first_factors_belong_to_the_seed() -> None:
    def first(seed: int) -> list[torch.Tensor]:
        torch.rand(seed + 1)  # of the global generator nothing depends
        layers = inject(tiny_edm().network, EVERY, seed)
        assert not any(factors_of(layer)[1].any() for layer in layers.values())
        return [factors_of(layer)[0].detach() for layer in layers.values()]

    before = torch.random.get_rng_state()
    one, again, other = first(1), first(1), first(2)
    assert all(map(torch.equal, one, again)) and not any(map(torch.equal, one, other))
    torch.random.set_rng_state(before)
    inject(tiny_edm().network, EVERY, 0)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_targets_are_ends_of_names_and_usual_ones_belong_to_the_architecture() -> None:
    network = tiny_var().network
    assert list(layers_of(network, ("attn.proj", "head"))) == ["blocks.0.attn.proj", "blocks.1.attn.proj", "head"]
    for name, (make, _) in MODELS.items():
        model = make()
        assert bool(model.lora_targets) == (name != "edm")
        assert layers_of(model.network, model.lora_targets or ("all",))
    with pytest.raises(RequestError, match=r"--lora_targets proj, k: matches no .* such as word_embed, .*ada_lin.1"):
        layers_of(network, ("attn.proj", "proj, k"))
    attention = nn.ModuleDict({"a": nn.MultiheadAttention(8, 2), "b": nn.Linear(8, 8), "c": nn.Embedding(3, 8)})
    assert list(layers_of(attention, ("all",))) == ["b"], "what is read past its layer, and tables, take no factors"


def test_layers_that_the_loss_does_not_call_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny_edm()
    model.network.extra = nn.Linear(4, 4)
    recipe = replace(model.recipe.with_rampup(0), batch_size=8)
    train(
        model, tiny_images(), tmp_path, num_steps=2, snapshot_steps=[1], recipe=recipe, seed=0, processes=ONE,
        lora=EVERY,
    )  # fmt: skip
    assert capsys.readouterr().err.count("1 of 48 layers with factors do not move, for the loss does not call") == 1


def test_a_network_is_swept_without_a_copy_of_it(tmp_path: Path) -> None:
    _, snapshot = trained("imm", tmp_path, replace(EVERY, targets=("qkv",)))
    model = load_model(tmp_path / "base.safetensors")

    def held() -> int:
        gc.collect()
        objects = (one for one in gc.get_objects() if isinstance(one, torch.Tensor))
        tensors = [one for one in objects if not isinstance(one, FakeTensor)]  # which a compilation leaves
        return sum({one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in tensors}.values())

    before, size = held(), sum(4 * p.numel() for p in model.network.parameters())
    base_file = tmp_path / "base.safetensors"
    weights = beside(model.network, base_file, snapshot.path, copied=lambda: pytest.fail("copied"))
    live = weights.live()
    live.set(1.5)
    assert held() - before < size / 10
    second = weights.second()
    assert held() - before < size / 2, "the second network shares what the factors leave alone"
    full = load_self_trained(model.network, tmp_path / "base.safetensors", snapshot.path)
    assert all(torch.equal(tensor, full[key]) for key, tensor in second.state_dict().items())
    base = load_state(tmp_path / "base.safetensors")
    assert all(torch.equal(tensor, base[key]) for key, tensor in model.network.state_dict().items())


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A DiT, its LoRA and the weights that this makes, real images, features and statistics."""
    folder = tmp_path_factory.mktemp("files")
    _, snapshot = trained("imm", folder)
    snapshot.path.rename(folder / "lora.safetensors")
    (folder / "run").rename(folder / "training")
    model = load_model(folder / "base.safetensors")
    with open_checkpoint(folder / "lora.safetensors") as file:
        said = {name: file.metadata[name] for name in ("images_seen", "moved")}
    state = load_self_trained(model.network, folder / "base.safetensors", folder / "lora.safetensors")
    save_model(folder / "full.safetensors", model, state, said)
    write_real(folder, tiny_colour_images(60))
    save_model(folder / "edm.safetensors", tiny_edm())
    (folder / "grey").mkdir()
    write_real(folder / "grey", tiny_images(60))
    return folder


@pytest.fixture
def here(files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return work_in(tmp_path, files, monkeypatch)


TUNE = (
    "tune --base base.safetensors --select-stats real.npz --features features.safetensors --num-images 20 "
    "--report-images 20 --set num_steps=1 guidance=1 --device cpu --no-tune-sampler --grid -0.9 0"
)


def distances(folder: str) -> dict[str, float]:
    lines = map(json.loads, Path(folder, "evaluations.jsonl").read_text().splitlines())
    return {entry["name"]: entry["distance"] for entry in lines}


def test_a_choice_over_a_lora_is_that_over_the_weights_it_makes(here: Path) -> None:
    from peft import PeftModel

    from neon.tune import outcome

    for kind in ("lora", "full"):
        helps = mock.PropertyMock(return_value=True)  # so that a merge is written
        with mock.patch.object(outcome.Outcome, "helps", helps):
            assert app.main([*TUNE.split(), "--self-trained", f"{kind}.safetensors", "--out", kind]) == 0
    assert distances("lora") == pytest.approx(distances("full"), rel=1e-6)
    lora, full = (load_state(Path(kind, "improved.safetensors")) for kind in ("lora", "full"))
    assert json.loads(Path("lora/tune.json").read_text())["w"] == -0.9, "towards the images that it was trained on"
    for name, tensor in full.items():
        torch.testing.assert_close(lora[name], tensor, rtol=1e-6, atol=1e-7)
    network = load_model("base.safetensors").network
    merged = PeftModel.from_pretrained(network, "lora/improved-lora").merge_and_unload()
    for name, tensor in merged.state_dict().items():
        torch.testing.assert_close(tensor, lora[name], rtol=1e-5, atol=1e-6)


IMPROVE = (
    "improve edm.safetensors --real grey/real.npz --features grey/features.safetensors --num_steps 2 --set "
    "solver=euler --num_synthetic 16 --training_images 64 --batch 8 --lr 1e-2 --lr_rampup 0 --ema 0 --select_images 20 "
    "--report_images 20 --limit 3 --sampler_scores 1 --no-baselines --processes 1 --device cpu --lora_rank 2"
)


def test_a_whole_run_trains_factors_and_records_what_it_did(here: Path) -> None:
    assert app.main([*IMPROVE.split(), "--out", "run"]) == 0
    run = json.loads(Path("run/run.json").read_text())
    assert run["recipe"]["lora_rank"] == 2 and "lora_alpha" not in run["recipe"]
    assert "LoRA of rank 2 (alpha 2) on every linear layer" in Path("run/report.html").read_text()
    gained = json.loads(Path("run/tune.json").read_text())["recommended"] == "neon"
    assert Path("run/improved.safetensors").exists() == Path("run/improved-lora").exists() == gained
    assert "--lora_rank=2" in words_of_recipe(app.command("improve"), ["--recipe", "run/run.json"])


def test_merges_to_look_at_come_as_adapters_too(here: Path) -> None:
    command = "improve edm.safetensors --num_steps 2 --num_synthetic 8 --training_images 16 --batch 8 --lr 1e-2"
    command += " --lr_rampup 0 --ema 0 --processes 1 --device cpu --lora_rank 2 --out merges"
    assert app.main(command.split()) == 0
    adapters = sorted(path.name for path in Path("merges").glob("*-lora"))
    assert adapters == ["improved-0.5-lora", "improved-1-lora", "improved-1.5-lora"]
    network = load_model("edm.safetensors").network
    by_adapter = load_self_trained(network, "edm.safetensors", "merges/improved-1-lora")
    for name, tensor in load_state("merges/improved-1.safetensors").items():
        torch.testing.assert_close(by_adapter[name], tensor, rtol=1e-5, atol=1e-6)
    base = load_state("edm.safetensors")
    assert any(not torch.equal(tensor, base[name]) for name, tensor in by_adapter.items())


def test_two_processes_train_to_the_bits_of_one(here: Path, workers: Workers) -> None:
    flags = (
        "selftrain --network edm.safetensors --data grey/real --batch 8 --batch_gpu 2 --total_images 16 --lr 1e-2 "
        "--device cpu --lora_rank 2 --outdir"
    )
    assert app.main([*flags.split(), "alone"]) == 0
    workers.run("neon.cli.app:main", [*flags.split(), "two"], folder=here, world_size=2)
    [alone], [two] = (list(Path(run).glob("snapshot-*")) for run in ("alone", "two"))
    assert alone.read_bytes() == two.read_bytes()
    with pytest.raises(RequestError, match="holds a LoRA, factors beside the layers of a base, and no network"):
        load_model(alone)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--lora_rank 0", "--lora_rank 0: expected at least 1"),
        ("--lora_alpha 2", "--lora_alpha: goes with --lora_rank"),
        ("--lora_targets to_q", "--lora_targets: goes with --lora_rank"),
        ("--lora_rank 2 --lora_alpha nan", "--lora_alpha nan: expected a positive number"),
        ("--lora_rank 2 --lora_targets to_q", "--lora_targets to_q: matches no linear layer or convolution"),
    ],
)
def test_what_cannot_be_meant_is_refused_in_one_line(
    here: Path, capsys: pytest.CaptureFixture[str], flags: str, message: str
) -> None:
    words = f"selftrain --network edm.safetensors --data grey/real --total_images 16 --outdir run --device cpu {flags}"
    assert app.main(words.split()) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not Path("run").exists()


def test_a_missing_peft_is_told_before_any_work() -> None:
    with mock.patch.object(importlib.util, "find_spec", return_value=None):
        check_lora(None, None, ())
        with pytest.raises(RequestError, match=r"needs PEFT, .*\[huggingface\]' or \[diffusers\], with Python 3.11"):
            ImprovePlan(lora_rank=4)


def test_a_run_without_lora_is_recorded_as_before_there_was_one() -> None:
    names = {"lora_rank", "lora_alpha", "lora_targets", "gradient_checkpointing", "parallel"}
    assert not names & ImprovePlan(parallel="ddp").facts().keys()
    assert ImprovePlan(lora_rank=4, lora_targets=("qkv",)).facts()["lora_targets"] == ("qkv",)
    assert not {"parallel", "workers"} & ImprovePlan(parallel="ddp", workers=2).facts().keys()
    with pytest.raises(RequestError, match="--workers -1: expected 0 to 256"):
        ImprovePlan(workers=-1)


def test_images_are_encoded_once_where_a_model_says_that_it_draws_nothing(tmp_path: Path) -> None:
    model, images = tiny_edm(), tiny_images(20)
    (tmp_path / "images").mkdir()
    dataset = ArrayDataset(images.images, images.labels, tmp_path / "images")
    assert encoded_once(model, dataset, tmp_path / "none", ONE) is dataset and not (tmp_path / "none").exists()
    with mock.patch.object(type(model), "example_kind", "pixels"):
        first = encoded_once(model, dataset, tmp_path / "set", ONE)
        with mock.patch.object(model, "encode", side_effect=AssertionError):
            second = encoded_once(model, dataset, tmp_path / "set", ONE)
    expected = model.encode(dataset.examples(range(20)), ImageNoise(range(20)))
    assert first.encoded and torch.equal(first.examples(range(20)), expected)
    assert torch.equal(second.examples(range(20)), expected)


def test_diffusers_opens_a_snapshot_of_a_pipelines_network(tmp_path: Path) -> None:
    pytest.importorskip("diffusers")
    from diffusers import UNet2DConditionModel

    def unet() -> nn.Module:
        torch.manual_seed(0)
        return UNet2DConditionModel(
            sample_size=8, block_out_channels=(8,), layers_per_block=1, norm_num_groups=4, cross_attention_dim=8,
            attention_head_dim=4, down_block_types=("CrossAttnDownBlock2D",), up_block_types=("UpBlock2D",),
        )  # fmt: skip

    model: Any = SimpleNamespace(network=unet(), architecture="any", config={}, component="unet")
    run = LowRank(model, replace(EVERY, targets=("to_q", "conv1")), 0, tells_moved=True)
    with torch.no_grad():
        for parameter in run.parameters:
            parameter.add_(0.1)
    run.save(tmp_path / "snapshot.safetensors", run.parameters, {})
    checkpoint_gradients(model)
    inputs = torch.randn(2, 4, 8, 8), torch.tensor([3, 500]), torch.randn(2, 5, 8)
    live = model.network(*inputs).sample
    live.sum().backward()
    assert all(parameter.grad is not None for parameter in run.parameters)
    opened = unet().eval()
    opened.load_lora_adapter(tmp_path / "snapshot.safetensors", prefix="unet")
    torch.testing.assert_close(opened(*inputs).sample, live, rtol=1e-4, atol=1e-5)
    base = unet()
    base.save_pretrained(tmp_path / "unet")
    state = load_self_trained(base, tmp_path / "unet", tmp_path / "snapshot.safetensors")
    base.load_state_dict(state)
    torch.testing.assert_close(base(*inputs).sample, live, rtol=1e-4, atol=1e-5)
