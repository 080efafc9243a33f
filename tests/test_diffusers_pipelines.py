"""Pipelines of diffusers: opened by an allow-list of classes, sampled as the library does, and nothing of them runs."""

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers")

import diffusers

from neon.errors import RequestError
from neon.model import GenerativeModel, load_model, open_autoencoder, save_model
from neon.noise import ImageNoise
from neon_diffusers.loss import min_snr_weight
from tests import pipelines

SEEDS = (3, 4, 5)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("pipelines")
    return {
        "pixels": pipelines.pixels(root / "pixels"),
        "classes of pixels": pipelines.pixels(root / "classes", classes=pipelines.CLASSES),
        "dit": pipelines.dit(root / "dit"),
    }


def opened(path: Path, **arguments: Any) -> GenerativeModel:
    model = load_model(path, **arguments)
    open_autoencoder(model, None)
    return model


def images(
    model: GenerativeModel, seeds: tuple[int, ...] = SEEDS, labels: Any = (0, 1, 2), **changed: Any
) -> torch.Tensor:
    settings = replace(model.default_settings, **{"num_steps": 3, **changed})
    return model.sample(ImageNoise(seeds), torch.tensor(labels) if model.num_classes else None, settings)


KINDS = ("pixels", "classes of pixels", "dit")


@pytest.mark.parametrize("kind", KINDS)
def test_a_snapshot_finds_all_of_its_pipeline_again(kind: str, folders: dict[str, Path], tmp_path: Path) -> None:
    model = opened(folders[kind])
    save_model(tmp_path / "snapshot.safetensors", model)
    again = opened(tmp_path / "snapshot.safetensors")
    assert again.config == model.config
    assert torch.equal(images(again), images(model))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scheduler", ["DDIMScheduler", "DDPMScheduler"])
def test_an_image_is_the_same_in_any_batch(kind: str, scheduler: str, folders: dict[str, Path]) -> None:
    model = opened(folders[kind])
    alone = [images(model, (seed,), (label,), scheduler=scheduler) for label, seed in enumerate(SEEDS)]
    assert torch.equal(torch.cat(alone), images(model, scheduler=scheduler))


@pytest.mark.parametrize("name", ["DDIMPipeline", "DDPMPipeline"])
def test_images_are_those_of_the_library_for_the_same_generators(name: str, folders: dict[str, Path]) -> None:
    pipe = getattr(diffusers, name).from_pretrained(folders["pixels"])
    pipe.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    theirs = pipe(len(SEEDS), generator=generators, num_inference_steps=3, output_type="np").images
    ours = images(opened(folders["pixels"]), scheduler=type(pipe.scheduler).__name__)
    assert torch.equal(ours, torch.from_numpy((theirs * 255).round()).permute(0, 3, 1, 2).byte())


def test_guided_images_are_those_of_the_library(tmp_path: Path) -> None:
    folder = pipelines.dit(tmp_path / "dit")
    pipe = diffusers.DiTPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    null = pipelines.CLASSES  # the library takes 1000 for none, whatever the number of classes
    tensor = torch.tensor

    def patched(values: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        return tensor([null] * len(values) if values == [1000] * len(SEEDS) else values, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "tensor", patched)
        generators = [torch.Generator().manual_seed(seed) for seed in SEEDS]
        theirs = pipe([0, 1, 2], 2.5, generators, 3, output_type="np").images
    ours = images(opened(folder), guidance=2.5)
    assert torch.equal(ours, torch.from_numpy((theirs * 255).round()).permute(0, 3, 1, 2).byte())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_the_loss_is_the_error_of_what_the_scheduler_asks_for(
    kind: str, prediction: str, folders: dict[str, Path]
) -> None:
    model = opened(folders[kind])
    config = json.loads(json.dumps(model.config))
    config["components"]["scheduler"][2]["prediction_type"] = prediction
    model = type(model)(config)
    model.network.load_state_dict(opened(folders[kind]).network.state_dict())
    open_autoencoder(model, None)
    x = torch.randint(0, 256, (2, *model.image_shape), dtype=torch.uint8)
    labels = torch.tensor([0, 1])
    examples = model.encode(x, ImageNoise(SEEDS[:2]))
    terms = model.training_loss(examples, labels, ImageNoise(SEEDS[:2]))
    assert terms.shape == (2,)
    alone = [model.training_loss(examples[i : i + 1], labels[i : i + 1], ImageNoise(SEEDS[i : i + 1])) for i in (0, 1)]
    torch.testing.assert_close(terms, torch.cat(alone))
    weighted = type(model)(config, loss={"min_snr": 1e-30})  # so little that nothing is left
    weighted.network, weighted.kind = model.network, model.kind
    assert weighted.training_loss(examples, labels, ImageNoise(SEEDS[:2])).max() < 1e-10


@pytest.mark.parametrize("kind", KINDS)
def test_two_networks_sample_together(kind: str, folders: dict[str, Path]) -> None:
    model, second = opened(folders[kind]), opened(folders[kind])
    for parameter in second.network.parameters():
        parameter.mul_(1.2)
    assert torch.equal(images(model.combine(second.network, 0.0)), images(model))
    assert torch.equal(images(model.combine(second.network, -1.0)), images(second))
    assert not torch.equal(images(model.combine(second.network, 0.5)), images(model))


@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_is_of_the_network_alone(kind: str, folders: dict[str, Path]) -> None:
    for scheduler in ("DDIMScheduler", "UniPCMultistepScheduler"):
        whole = images(opened(folders[kind]), scheduler=scheduler).int()
        half = images(opened(folders[kind], precision="bf16"), scheduler=scheduler).int()
        assert 0 < (whole - half).abs().float().mean() < 8


def test_network_calls_are_counted(folders: dict[str, Path]) -> None:
    model = opened(folders["dit"])
    usual = replace(model.default_settings, num_steps=5)
    counts = {"DDIMScheduler": 5, "HeunDiscreteScheduler": 9, "PNDMScheduler": 14}
    for name, steps in counts.items():
        assert model.calls(replace(usual, scheduler=name)) == 2 * steps
        assert model.calls(replace(usual, scheduler=name, guidance=1.0)) == steps
    assert model.calls(replace(usual, num_steps=5000)) is None


def test_a_library_that_is_missing_is_one_line(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("diffusers", "diffusers.models"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(RequestError, match=r"neon-extrapolation\[diffusers\]"):
        load_model(folders["pixels"])


def test_a_pipeline_of_the_hub_is_called_by_its_name_and_commit(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "models--someone--faces" / "snapshots" / ("0" * 40)
    shutil.copytree(folders["dit"], folder)
    assert load_model(folder).config["place"] == f"hf:someone/faces@{'0' * 40}"


def test_min_snr_weighs_noise_and_velocity_as_errors_of_the_image() -> None:
    alphas = torch.tensor([0.0, 0.5, 0.99], dtype=torch.float64)
    snr = alphas / (1 - alphas)
    of_image = min_snr_weight(alphas, "sample", 5.0)
    torch.testing.assert_close(of_image, snr.clamp(max=5.0))
    torch.testing.assert_close(min_snr_weight(alphas, "epsilon", 5.0)[1:], (of_image / snr)[1:])
    torch.testing.assert_close(min_snr_weight(alphas, "v_prediction", 5.0), of_image / (snr + 1))
    assert min_snr_weight(alphas, "epsilon", 5.0)[0] == 1


def edited(folder: Path, target: Path, file: str, change: Callable[[dict[str, Any]], object]) -> Path:
    """A copy of a pipeline, of which `file` is changed."""
    shutil.copytree(folder, target)
    table = json.loads((target / file).read_text())
    change(table)
    (target / file).write_text(json.dumps(table))
    return target


HOSTILE: dict[str, tuple[str, Callable[[dict[str, Any]], object], str]] = {
    "a pipeline of its own": (
        "model_index.json", lambda index: index.update(_class_name=["pipe", "Mine"]), "somebody's own",
    ),
    "a class that is not served": (
        "model_index.json", lambda index: index.update(_class_name="AudioLDMPipeline"), "served are DDPMPipeline",
    ),
    "a module of its own": (
        "model_index.json", lambda index: index.update(unet=["evil", "UNet2DModel"]), "evil.UNet2DModel, code",
    ),
    "another module beside it": (
        "model_index.json", lambda index: index.update(more=["evil", "Thing"]), "evil.Thing, code",
    ),
    "another denoiser": (
        "model_index.json", lambda index: index.update(unet=["diffusers", "UNet3DConditionModel"]), "UNet2DModel is",
    ),
    "a scheduler that trains nothing": (
        "model_index.json", lambda index: index.update(scheduler=["diffusers", "KarrasVeScheduler"]), "KarrasVe",
    ),
    "auto_map": (
        "unet/config.json", lambda config: config.update(auto_map={"AutoModel": "evil.Model"}), "evil.Model",
    ),
    "another prediction": (
        "scheduler/scheduler_config.json", lambda config: config.update(prediction_type="flow"), "prediction_type",
    ),
    "blocks that nobody has": (
        "unet/config.json", lambda config: config.update(down_block_types=["os.system"] * 2), "can be built",
    ),
    "no size": ("unet/config.json", lambda config: config.update(sample_size=None), "sample_size"),
}  # fmt: skip


@pytest.mark.parametrize("what", HOSTILE)
def test_what_is_not_served_is_named_and_nothing_of_it_runs(
    what: str, folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, change, said = HOSTILE[what]
    folder = edited(folders["pixels"], tmp_path / "hostile", file, change)
    ran = tmp_path / "ran"
    for name in ("evil", "pipe", "pipeline"):
        (folder / f"{name}.py").write_text(f"open({str(ran)!r}, 'w')")
    monkeypatch.syspath_prepend(str(folder))
    with pytest.raises(RequestError, match=said) as error:
        load_model(folder)
    assert str(folder) in str(error.value)
    assert not ran.exists()


class Runs:
    """What a pickle runs that is loaded without care."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self.path), "w")


def test_a_pickle_that_runs_something_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "pickled"
    shutil.copytree(folders["pixels"], folder)
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    state = opened(folders["pixels"]).network.state_dict()
    weights.unlink()
    torch.save(state, weights.with_suffix(".bin"))
    assert torch.equal(images(opened(folder)), images(opened(folders["pixels"])))  # read by our reader
    torch.save({**state, "x": Runs(tmp_path / "ran")}, weights.with_suffix(".bin"))
    with pytest.raises(RequestError, match="refused"):
        load_model(folder)
    assert not (tmp_path / "ran").exists()
