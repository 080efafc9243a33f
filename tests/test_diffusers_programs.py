"""Pipelines of diffusers through the commands of any model: from a folder to a folder that the library opens."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

pytest.importorskip("diffusers")

import diffusers

import neon
from neon.checkpoint import load_state, open_checkpoint
from neon.cli import app as cli
from neon.library.improving import Improved
from neon.model import load_model, save_model
from tests import pipelines
from tests.programs import (
    evaluation_goes_on,
    images,
    in_worlds,
    losses,
    same_files,
    training_goes_on,
    work_in,
    write_real,
)
from tests.tiny import tiny_colour_images, tiny_edm
from tests.workers import Workers

PLAN = {
    "num_synthetic": 32, "training_images": 96, "batch": 16, "lr": 3e-2, "snapshots": 1, "select_images": 64,
    "blocks": 3, "limit": 6, "tune_sampler": False, "baselines": False, "batch_size": 32, "w": (0.0, 2.0),
}  # fmt: skip


def run(command: str) -> int:
    """The exit code of a command of `neon`, in this process."""
    return cli.main(command.split())


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pipelines over pixels and over latents, weights some way from those of the latter, and real images."""
    folder = tmp_path_factory.mktemp("files")
    pipelines.pixels(folder / "pixels")
    model = load_model(pipelines.dit(folder / "dit"))
    moved = {name: tensor + 0.05 * torch.randn_like(tensor) for name, tensor in model.network.state_dict().items()}
    save_model(folder / "tuned.safetensors", model, moved)
    save_model(folder / "edm.safetensors", tiny_edm(0))
    write_real(folder, tiny_colour_images(60))
    return folder


@pytest.fixture
def here(files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with the files in it."""
    return work_in(tmp_path, files, monkeypatch)


@pytest.fixture(scope="module")
def improved(files: Path, tmp_path_factory: pytest.TempPathFactory) -> Improved:
    """A run on pixels whose real images are samples of the merge at w = 1, so that this is best."""
    folder = tmp_path_factory.mktemp("improved")
    base = neon.load(files / "pixels", device="cpu").with_settings(num_steps=2)
    merges = neon.improve_model(base, folder / "merges", **PLAN)
    wanted = neon.load(folder / "merges" / "improved-1", device="cpu")
    assert wanted.settings == base.settings
    assert torch.equal(wanted.sample(4), neon.load(merges.weights[1], device="cpu").sample(4))
    neon.sample_set(wanted, 100, folder / "real", seed=7)
    with torch.random.fork_rng():
        assert run(f"features {folder}/real {folder}/few.safetensors --task random --dim 6") == 0
    return neon.improve_model(base, folder / "run", real=folder / "real", features=folder / "few.safetensors", **PLAN)


def test_the_improved_pipeline_is_one_of_the_library(improved: Improved) -> None:
    assert improved.path is not None and [path.name for path in improved.weights] == [
        "improved.safetensors",
        "improved",
    ]
    pipe = diffusers.DiffusionPipeline.from_pretrained(improved.folder / "improved")
    pipe.set_progress_bar_config(disable=True)
    weights = load_state(improved.path)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in pipe.unet.state_dict().items())
    generator = neon.load(improved.folder / "improved", device="cpu")
    assert generator.settings.num_steps == 2, "it says its sampler"
    seeds = neon.noise.image_seeds(neon.noise.Purpose.SYNTHETIC, 0, 3)
    draws = [torch.Generator().manual_seed(seed) for seed in seeds]
    theirs = pipe(3, draws, num_inference_steps=2, output_type="np").images
    assert torch.equal(generator.sample(3), torch.from_numpy((theirs * 255).round()).permute(0, 3, 1, 2).byte())


def test_a_lora_of_the_denoiser_is_one_that_peft_puts_on_it(here: Path) -> None:
    peft = pytest.importorskip("peft")
    base = neon.load("pixels", device="cpu").with_settings(num_steps=2)
    merges = neon.improve_model(base, "run", **{**PLAN, "lora_rank": 2})
    [snapshot] = here.glob("run/self-training/snapshot*")
    assert (
        run(f"merge --base pixels --self_trained {snapshot} -w 1 --output lora --as-adapter --adapter-format peft") == 0
    )
    unet = diffusers.UNet2DModel.from_pretrained("pixels/unet")
    adapted = peft.PeftModel.from_pretrained(unet, "lora").merge_and_unload()
    torch.testing.assert_close(dict(adapted.state_dict()), load_state(merges.weights[1]), rtol=1e-3, atol=1e-4)
    whole = diffusers.UNet2DModel.from_pretrained("run/improved-1/unet").state_dict()
    torch.testing.assert_close(dict(whole), load_state(merges.weights[1]), rtol=0, atol=0)


def test_the_card_and_the_text_name_both_forms(improved: Improved) -> None:
    card = (improved.folder / "README.md").read_text()
    assert "`improved.safetensors`, SHA-256" in card and "`improved`, SHA-256" in card
    assert "improved.safetensors" in improved.text and str(improved.folder / "improved") in improved.text


@pytest.fixture(scope="module")
def worlds(files: Path, tmp_path_factory: pytest.TempPathFactory, workers: Workers) -> dict[int, Path]:
    return in_worlds("diffusers_driver", files, tmp_path_factory, workers)


@pytest.mark.parametrize("world_size", [2, 3])
def test_any_number_of_processes_gives_the_same(worlds: dict[int, Path], world_size: int) -> None:
    one, many = worlds[1], worlds[world_size]
    same_files(one, many, "set/*.png", "set/dataset.json", "training/snapshot*")


def run_selftrain(flags: str) -> int:
    return run(f"selftrain {flags}")


def scores(flags: str) -> dict:
    usual = "--ref real.npz --features features.safetensors --json scores.json"
    assert run(f"evaluate {usual} {flags}") == 0
    return json.loads(Path("scores.json").read_text())


def test_killed_runs_go_on(here: Path) -> None:
    flags = "--network dit --data real --batch 12 --total_images 48 --save_interval 24 --lr 1e-3 --outdir"
    assert len(training_goes_on(run_selftrain, flags, killed_after=3)) == 2
    evaluation_goes_on(scores, "--network dit --num_images 20 --batch_size 4 --set num_steps=2 --run_dir evaluation")


def test_the_loss_may_weigh_timesteps(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = "--network pixels --data grey --batch 4 --total_images 8 --outdir"
    assert run("sample --network pixels --num_images 8 --outdir grey --set num_steps=2") == 0
    for name, loss in (("usual", ""), ("weighed", " --loss min_snr=0.001")):
        assert run_selftrain(f"{flags} {name}{loss}") == 0
    assert losses("weighed")[0] < losses("usual")[0]
    for loss, said in (("min_snr=0", "a positive number"), ("gamma=5", "expected min_snr"), ("min_snr", "NAME=NUMBER")):
        assert run_selftrain(f"{flags} out --loss {loss}") == 2
        assert said in capsys.readouterr().err
    assert run("selftrain --network edm.safetensors --data grey --total_images 8 --outdir out --loss min_snr=5") == 2
    assert "has no settings" in capsys.readouterr().err


def test_a_pipeline_is_merged_as_a_folder_and_sampled_from_there(here: Path) -> None:
    assert run("merge --base dit --self_trained tuned.safetensors -w 1 --output merged") == 0
    assert run("merge --base dit --self_trained tuned.safetensors -w 1 --output merged.safetensors") == 0
    for name in ("merged", "merged.safetensors"):
        assert run(f"sample --network {name} --num_images 3 --outdir of-{name} --set num_steps=2") == 0
    assert torch.equal(images("of-merged")[0], images("of-merged.safetensors")[0])
    with open_checkpoint("merged") as merged:
        assert "config" not in merged.metadata, "the folder says what it is"
    diffusers.DiTPipeline.from_pretrained("merged")


def test_a_pipeline_that_was_moved_is_asked_for(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pipelines.dit(here / "here")
    assert run("sample --network here --num_images 2 --outdir a --set num_steps=2") == 0
    save_model("snapshot.safetensors", load_model("here"))
    (here / "here").rename(here / "there")
    assert run("sample --network snapshot.safetensors --num_images 2 --outdir b --set num_steps=2") == 2
    assert f"{here}/here: not there" in capsys.readouterr().err
    command = "sample --network snapshot.safetensors --vae there --num_images 2 --outdir b --set num_steps=2"
    assert run(command) == 0
    assert torch.equal(images("a")[0], images("b")[0])


REFUSED: dict[str, tuple[str, str]] = {
    "steps": ("--set num_steps=1001", "expected at most 1000"),
    "scheduler": ("--set scheduler=RePaintScheduler", "expected one of DDPMScheduler"),
    "eta": ("--set scheduler=DDPMScheduler eta=0.5", "only DDIMScheduler"),
    "spacing": ("--set spacing=wide", "leading"),
    "few for PNDM": ("--set scheduler=PNDMScheduler num_steps=1", "with 1 steps"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_settings_that_make_no_sense_are_one_line(what: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags, said = REFUSED[what]
    assert run(f"sample --network pixels --num_images 2 --outdir out {flags}") == 2
    assert said in capsys.readouterr().err


def test_images_that_are_not_finite_are_said(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = load_model("dit")
    broken = {name: torch.full_like(tensor, torch.inf) for name, tensor in model.network.state_dict().items()}
    save_model("broken.safetensors", model, broken)
    assert run("sample --network broken.safetensors --num_images 2 --outdir out --set num_steps=2") == 1
    assert "not finite" in capsys.readouterr().err and not list(here.glob("out/*.png"))


def renamed(state: dict[str, torch.Tensor], new: Callable[[str], str]) -> dict[str, torch.Tensor]:
    return {new(name): tensor for name, tensor in state.items()}


def test_names_of_before_2023_are_read_and_kept(here: Path) -> None:
    folder = pipelines.pixels(here / "old")
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    state = load_state(file)

    def before(name: str) -> str:
        for now, then in old.items():
            name = name.replace(f".{now}.", f".{then}.") if ".attentions." in name else name
        return name

    file.unlink()
    torch.save(renamed(state, before), file.with_suffix(".bin"))
    model = load_model(folder)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.network.state_dict().items())
    save_model("moved.safetensors", model, {name: tensor + 1 for name, tensor in state.items()})
    assert run("merge --base old --self_trained moved.safetensors -w 1 --output merged") == 0
    merged = diffusers.DDIMPipeline.from_pretrained("merged").unet.state_dict()
    torch.testing.assert_close(dict(merged), {name: tensor - 1 for name, tensor in state.items()})
