"""xAR's programs as users run them, on a tiny transformer and autoencoder."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from neon.checkpoint import load_state, open_checkpoint
from neon.cli.command_line import parse, run_program
from neon.merge import merge_files
from neon.model import load_model
from neon.precision import FP32
from tests.programs import (
    ROOT,
    both_at_inference,
    evaluation_goes_on,
    images,
    in_worlds,
    log,
    losses,
    refused,
    run_as_typed,
    same_files,
    same_scores,
    training_goes_on,
    work_in,
    write_real,
)
from tests.tiny import tiny_colour_images, tiny_vae, tiny_xar
from tests.workers import Workers
from xAR.calculate_fid import ScoreXAR
from xAR.encode import EncodeForXAR
from xAR.finetune import PRESETS, TrainXAR
from xAR.recipe import XARRecipe
from xAR.sample import SampleXAR

COMMON = "--vae_path vae.ckpt --flow_steps 3"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two transformers, an autoencoder, features, statistics of real images, and the images."""
    folder = tmp_path_factory.mktemp("files")
    for name, seed in (("base", 0), ("tuned", 1)):
        torch.save(tiny_xar(seed).network.state_dict(), folder / f"{name}.pth")
    torch.save({"model_ema": tiny_xar(1).network.state_dict(), "epoch": 3}, folder / "averaged.pth")
    torch.save(tiny_xar(0, encoder_depth=2).network.state_dict(), folder / "deep.pth")
    torch.save({"model": tiny_vae().state_dict()}, folder / "vae.ckpt")
    broken = tiny_vae().state_dict()
    del broken["decoder.conv_out.weight"]
    torch.save({"model": broken}, folder / "broken.ckpt")
    write_real(folder, tiny_colour_images(60))
    return folder


@pytest.fixture
def here(files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with the files in it."""
    return work_in(tmp_path, files, monkeypatch)


def run_sample(flags: str) -> int:
    return run_program(SampleXAR, [*COMMON.split(), *flags.split()])


def run_fid(flags: str) -> int:
    usual = f"{COMMON} --fid_stats real.npz --features features.safetensors --device cpu"
    return run_program(ScoreXAR, [*usual.split(), *flags.split()])


def run_finetune(flags: str) -> int:
    return run_program(TrainXAR, ["--vae_path", "vae.ckpt", *flags.split()])


def scores(flags: str, name: str = "scores.json") -> dict:
    assert run_fid(f"{flags} --json {name}") == 0
    return json.loads(Path(name).read_text())


def test_exactly_as_many_images_as_asked_for_of_every_class_alike(here: Path) -> None:
    assert run_sample("--model_ckpt base.pth --outdir out.zip --num_images 13 --batch_size 5") == 0
    found, labels = images("out.zip")
    assert found.shape == (13, 3, 8, 8) and labels is not None
    assert all(labels.tolist().count(label) >= 4 for label in range(3))


def test_images_may_be_counted_per_class_as_in_the_published_scripts(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_sample("--model_ckpt base.pth --outdir out --per_class_count 2") == 0
    assert "out: 6 images in all" in capsys.readouterr().out
    labels = images("out")[1]
    assert labels is not None and sorted(labels.tolist()) == [0, 0, 1, 1, 2, 2]
    assert run_sample("--model_ckpt base.pth --outdir few --num_images 2") == 0
    assert "2 images in all, fewer than the 3 classes" in capsys.readouterr().err


def test_an_image_depends_on_its_index_and_seed_only(here: Path) -> None:
    for name, flags in (("one", "--batch_size 1"), ("many", "--batch_size 9"), ("other", "--batch_size 9 --seed 1")):
        assert run_sample(f"--model_ckpt base.pth --outdir {name} --num_images 9 {flags}") == 0
    one, many, other = (images(name)[0].int() for name in ("one", "many", "other"))
    assert (one - many).abs().max() <= 1 and not torch.equal(other, many)


def test_a_sweep_scores_what_merged_files_score(here: Path) -> None:
    merge_files("base.pth", "averaged.pth", [0.5], "neon.pth")
    flags = "--num_images 24 --batch_size 8 --cfg 1.5"
    sweep = scores(f"--model_ckpt base.pth --self_trained averaged.pth --w 0 0.5 -1 {flags} --precision_recall real")
    values = {entry["w"]: entry["fd_tiny6"] for entry in sweep["sweep"]}
    for w, network in ((0, "base.pth"), (0.5, "neon.pth"), (-1, "tuned.pth")):
        assert values[w] == pytest.approx(scores(f"--model_ckpt {network} {flags}")["fd_tiny6"], rel=1e-6)
    merged = load_state("neon.pth")
    assert torch.equal(merged["mask"], load_state("base.pth")["mask"]), "its minus infinities are copied"


def test_two_networks_sample_at_once(here: Path) -> None:
    both_at_inference(run_sample, scores, "--num_images 24 --batch_size 8 --model_ckpt", "base.pth", "averaged.pth")


def test_a_killed_evaluation_goes_on(here: Path) -> None:
    evaluation_goes_on(scores, "--model_ckpt base.pth --N 20 --batch_size 4")


RUN = "--batch 8 --batch_gpu 4 --total_images 64 --save_interval 24 --lr 1e-3 --warmup_epochs 2"


def test_self_training_writes_averaged_and_raw_weights_and_survives_a_kill(here: Path) -> None:
    assert run_sample("--model_ckpt base.pth --outdir set --num_images 24 --batch_size 8") == 0
    flags = f"--model_ckpt base.pth --data set --state_every 0.000001 --ema_rate 0.9 {RUN} --outdir"
    names = training_goes_on(run_finetune, flags)
    assert [name[9:19] for name in names] == ["000000.024", "000000.048", "000000.064"]
    rates = [entry["lr"] for entry in log("whole")]
    assert rates == pytest.approx([1e-3 * min(seen / 24 / 2, 1) for seen in range(0, 64, 8)])
    base = load_state("base.pth")
    for name in names:
        averaged, raw = load_state(Path("whole", name)), load_state(Path("whole", f"raw-{name}"))
        moved = [
            sum((state[n] - base[n]).norm() for n in ("pred.weight", "z_proj.weight")) for state in (averaged, raw)
        ]
        assert 0 < moved[0] < moved[1], "the average lags"
    with open_checkpoint(Path("whole", names[-1])) as checkpoint:
        assert checkpoint.metadata["weights"] == "averaged"


def test_training_on_kept_latents_is_training_on_the_images(here: Path) -> None:
    encode = "--vae_path vae.ckpt --data real --outdir latents --img_size 8"
    assert run_program(EncodeForXAR, encode.split()) == 0
    for data in ("real", "latents"):
        assert run_finetune(f"--model_ckpt base.pth --data {data} --outdir {data}-run {RUN}") == 0
    assert losses("real-run") == pytest.approx(losses("latents-run"), rel=1e-4)
    assert run_program(EncodeForXAR, encode.replace("8", "16").split()) == 2


def test_small_images_are_learnt_without_an_autoencoder(here: Path) -> None:
    flags = "--data real --pixel_patch 2 --grid 4 --width 32 --heads 2 --depth 1 --classes 3 --outdir run"
    budget = "--batch 20 --batch_gpu 20 --total_images 3000 --save_interval 100000 --lr 3e-3 --warmup_epochs 0"
    assert run_finetune(f"{flags} {budget} --ema_rate 0.9 --attn_dropout 0 --proj_dropout 0") == 0
    found = losses("run")
    assert sum(found[-20:]) < 0.8 * sum(found[:20])
    [last] = Path("run").glob("snapshot*")
    assert run_sample(f"--model_ckpt {last} --outdir out --num_images 3") == 0
    assert images("out")[0].shape == (3, 3, 8, 8)


def test_published_files_are_recognised_whatever_their_nesting(here: Path) -> None:
    for name, seed in (("base.pth", 0), ("averaged.pth", 1)):
        model = load_model(name)
        assert model.architecture == "xAR" and model.config["transformer"]["grid"] == 4
        for ours, theirs in zip(model.network.parameters(), tiny_xar(seed).network.parameters(), strict=True):
            assert torch.equal(ours, theirs)


def test_the_presets_are_the_published_runs() -> None:
    rows = {name: (p.batch, p.lr, p.warmup_epochs, p.save_interval) for name, p in PRESETS.items()}
    assert rows == {"xar_base": (256, 1e-6, 250, 250_000), "xar_large": (256, 1e-6, 10_000, 250_000)}


@pytest.mark.parametrize(("preset", "published"), [("xar_base", 250), ("xar_large", 10_000)])
@pytest.mark.parametrize("count", [30_000, 750_000])
def test_a_preset_warms_up_over_the_published_images_whatever_the_set(preset: str, published: int, count: int) -> None:
    words = f"--preset {preset} --model_ckpt a --data b --outdir c".split()
    command = parse(TrainXAR, words, "finetune.py")
    assert isinstance(command, TrainXAR)
    model = SimpleNamespace(precision=FP32)
    recipe = command.recipe(model, command.plan(model), range(count))  # type: ignore[arg-type]
    for seen in (250_112, 3_750_144):
        assert recipe.lr_at(seen) == pytest.approx(1e-6 * seen / 29_952 / published)
    if count == 30_000:
        assert recipe.facts() == XARRecipe(warmup_epochs=published).facts()


def test_epochs_that_are_given_are_those_of_the_set() -> None:
    words = ["--warmup_epochs", "10", "--model_ckpt", "a", "--data", "b", "--outdir", "c"]
    command = parse(TrainXAR, words, "finetune.py")
    assert isinstance(command, TrainXAR)
    model = SimpleNamespace(precision=FP32)
    recipe = command.with_given(command.recipe(model, command.plan(model), range(750_000)))  # type: ignore[arg-type]
    assert recipe.rampup_kimg == pytest.approx(10 * 749.824)


def test_losses_in_float16_are_scaled_as_torch_does_by_default() -> None:
    """Which is what the published self-training does."""
    scaler, recipe = torch.amp.GradScaler("cpu"), XARRecipe()
    assert (recipe.first_scale, recipe.scale_steps) == (scaler.get_scale(), scaler.get_growth_interval())
    assert recipe.largest_scale is None


def test_guidance_below_one_is_one_and_said_so(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, cfg in (("half", "0.5"), ("one", "1")):
        assert run_sample(f"--model_ckpt base.pth --outdir {name} --num_images 4 --cfg {cfg}") == 0
    assert capsys.readouterr().err.count("the same as 1") == 1
    assert torch.equal(images("half")[0], images("one")[0])


SAMPLE = "--model_ckpt base.pth --outdir out --num_images 4"


@pytest.mark.parametrize(
    ("run", "flags", "message"),
    [
        (run_sample, f"{SAMPLE} --model xar_large", "--model xar_large: base.pth is a network of width 32"),
        (run_sample, f"{SAMPLE} --img_size 256", "--img_size 256: base.pth makes images of 8 pixels"),
        (run_sample, f"{SAMPLE} --vae_path base.pth", "a transformer, not an autoencoder"),
        (run_sample, f"{SAMPLE} --vae_path missing.ckpt", "missing.ckpt: no such file"),
        (run_sample, f"{SAMPLE} --vae_path broken.ckpt", "decoder.conv_out.weight"),
        (run_sample, "--model_ckpt vae.ckpt --outdir out --num_images 4", "and none recognises it"),
        (run_sample, f"{SAMPLE} --flow_steps 2", "expected at least 3"),
        (run_sample, f"{SAMPLE} --class 3", "--class 3: out of range"),
        (run_sample, f"{SAMPLE} --num_images 0", "--num_images 0: expected at least 1"),
        (run_sample, f"{SAMPLE} --per_class_count 2", "--num_images and --per_class_count: both say the same"),
        (run_sample, "--model_ckpt base.pth --outdir out --per_class_count 0", "--per_class_count 0: expected at"),
        (run_sample, "--model_ckpt base.pth --outdir out", "--num_images: not given; say how many in all"),
        (run_fid, "--model_ckpt base.pth --num_images 12 --self_trained deep.pth --w 1", "deep.pth"),
        (run_finetune, f"--data real --outdir out {RUN} --model xar_tiny", "--model xar_tiny: unknown; expected"),
        (run_finetune, f"--model_ckpt base.pth --data real --outdir out {RUN} --lr 0", "--lr 0.0: expected a"),
        (run_finetune, f"--model_ckpt base.pth --data real --outdir out {RUN} --ema_rate 1", "--ema_rate 1.0"),
    ],
)  # fmt: skip
def test_a_wrong_request_is_one_line_and_leaves_nothing(
    here: Path, capsys: pytest.CaptureFixture[str], run: Callable[[str], int], flags: str, message: str
) -> None:
    refused(run(flags), message, here, capsys)


def test_a_missing_autoencoder_is_told_with_the_command_that_fetches_it(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_program(SampleXAR, SAMPLE.split()) == 2
    error = capsys.readouterr().err
    assert "kl16.ckpt" in error and "hf download xwen99/mar-vae-kl16" in error and "--vae_path" in error


@pytest.fixture(scope="module")
def runs(files: Path, tmp_path_factory: pytest.TempPathFactory, workers: Workers) -> dict[int, Path]:
    """What the programs leave behind with 1, 2 and 3 processes of one thread each."""
    return in_worlds("xar_driver", files, tmp_path_factory, workers)


@pytest.mark.parametrize("world_size", [2, 3])
def test_the_number_of_processes_changes_no_image_no_score_and_no_weight(
    runs: dict[int, Path], world_size: int
) -> None:
    one, many = runs[1], runs[world_size]
    same_files(one, many, "set/*.png", "training/*snapshot*")
    same_scores(one, many)


def test_the_published_command_runs_as_typed(files: Path, tmp_path: Path) -> None:
    """Only the number of processes and images, paths, sizes of the tiny model and the feature network differ."""
    (tmp_path / "xAR").symlink_to(ROOT / "xAR")
    command = (
        f"xAR/calculate_fid.py --model_ckpt {files}/base.pth --cfg 2.3 --vae_path {files}/vae.ckpt --num_images 12 "
        f"--batch_size 64 --flow_steps 4 --img_size 8 --fid_stats {files}/real.npz "
        f"--features {files}/features.safetensors"
    )
    run_as_typed(command, tmp_path, "xAR")
