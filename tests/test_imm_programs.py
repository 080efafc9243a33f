"""IMM's programs as users run them, on tiny networks of latents and of pixels."""

import json
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from imm.calculate_fid import ScoreIMM
from imm.encode import EncodeForIMM
from imm.finetune import IMMPlan, TrainIMM
from imm.model import IMM
from imm.sample import SampleIMM
from imm.vae import weights_file
from neon.checkpoint import load_state
from neon.cli.command_line import run_program
from neon.data.images import ArrayDataset, write_images, write_labels
from neon.merge import merge_files
from neon.model import load_model, save_model
from neon.selftrain import snapshot_steps
from tests.pickles import write_imm_pickle
from tests.programs import (
    ROOT,
    both_at_inference,
    evaluation_goes_on,
    images,
    in_worlds,
    losses,
    refused,
    run_as_typed,
    same_files,
    same_scores,
    training_goes_on,
    work_in,
    write_real,
)
from tests.tiny import save_sd_vae, tiny_colour_images, tiny_imm
from tests.workers import Workers


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Networks of latents and of pixels, an autoencoder, features, statistics of real images, and the images."""
    folder = tmp_path_factory.mktemp("files")
    for name, seed in (("base", 0), ("tuned", 1)):
        model = tiny_imm(seed)
        write_imm_pickle(folder / f"{name}.pkl", model.network, model.config["network"])
        torch.save(model.network.state_dict(), folder / f"{name}.pth")
    torch.save(tiny_imm(0, depth=2).network.state_dict(), folder / "deep.pth")
    pixels = {"img_resolution": 16, "img_channels": 3, "patch_size": 4}
    save_model(folder / "pixels.safetensors", tiny_imm(0, **pixels))
    save_model(folder / "plain.safetensors", tiny_imm(0, **pixels, label_dim=0, num_classes=0))
    save_sd_vae(folder / "vae")
    small = tiny_colour_images(60)
    real = ArrayDataset(F.interpolate(small.images, scale_factor=2), small.labels, small.path)
    write_real(folder, real)
    write_images(folder / "unlabelled", range(8), real.images[:8])
    write_labels(folder / "unlabelled", None, 8)
    return folder


@pytest.fixture
def here(files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with the files in it."""
    return work_in(tmp_path, files, monkeypatch)


def run_sample(flags: str) -> int:
    return run_program(SampleIMM, ["--vae_path", "vae", "--device", "cpu", *flags.split()])


def run_fid(flags: str) -> int:
    usual = "--vae_path vae --fid_stats real.npz --features features.safetensors --device cpu"
    return run_program(ScoreIMM, [*usual.split(), *flags.split()])


def run_finetune(flags: str) -> int:
    return run_program(TrainIMM, ["--vae_path", "vae", "--device", "cpu", *flags.split()])


def scores(flags: str, name: str = "scores.json") -> dict:
    assert run_fid(f"{flags} --json {name}") == 0
    return json.loads(Path(name).read_text())


def test_as_many_images_of_each_class_as_asked_for(here: Path) -> None:
    assert run_sample("--network_pkl base.pkl --outdir out.zip --per_class_count 4 --batch_size 5") == 0
    found, labels = images("out.zip")
    assert found.shape == (12, 3, 16, 16) and labels is not None
    assert sorted(labels.tolist()) == [0] * 4 + [1] * 4 + [2] * 4


def test_an_image_depends_on_its_index_and_seed_only(here: Path) -> None:
    for name, flags in (("one", "--batch_size 1"), ("many", "--batch_size 9"), ("other", "--batch_size 9 --seed 1")):
        assert run_sample(f"--network_pkl base.pkl --outdir {name} --num_images 9 {flags} --num_steps 2") == 0
    one, many, other = (images(name)[0].int() for name in ("one", "many", "other"))
    assert (one - many).abs().max() <= 1 and not torch.equal(other, many)


def test_a_preset_is_its_settings_and_guidance_may_be_set_beside_it(here: Path) -> None:
    run = "--network_pkl base.pkl --num_images 4 --outdir"
    assert run_sample(f"{run} preset --preset 2_steps_cfg1.5_pushforward_uniform") == 0
    assert run_sample(f"{run} flags --num_steps 2 --cfg_scale 1.5") == 0
    assert run_sample(f"{run} more --preset 2_steps_cfg1.5_pushforward_uniform --cfg 3") == 0
    preset, flags, more = (images(name)[0] for name in ("preset", "flags", "more"))
    assert torch.equal(preset, flags) and not torch.equal(preset, more)


@pytest.mark.parametrize("flags", ["--restart", "--discretization edm", "--mid_nt 20 5 0.5"])
def test_other_samplers_give_other_images(here: Path, flags: str) -> None:
    run = "--network_pkl pixels.safetensors --num_images 6 --cfg_scale 1 --num_steps 4"
    assert run_sample(f"{run} --outdir usual") == 0 and run_sample(f"{run} {flags} --outdir other") == 0
    assert not torch.equal(images("usual")[0], images("other")[0])


def test_a_sweep_scores_what_merged_files_score(here: Path) -> None:
    merge_files("base.pkl", "tuned.pth", [0.5], "neon.pkl")
    flags = "--num_images 24 --batch_size 8 --num_steps 2 --cfg_scale 2"
    sweep = scores(f"--network_pkl base.pkl --self_trained tuned.pth --w 0 0.5 -1 {flags} --precision_recall real")
    values = {entry["w"]: entry["fd_tiny6"] for entry in sweep["sweep"]}
    for w, network in ((0, "base.pkl"), (0.5, "neon.pkl"), (-1, "tuned.pkl")):
        assert values[w] == pytest.approx(scores(f"--model_ckpt {network} {flags}")["fd_tiny6"], rel=1e-6)
    assert sweep["temb_type"] == "stride" and sweep["settings"]["guidance"] == 2


def test_a_pickle_trained_in_half_precision_fits_its_base_and_is_sampled_as_the_user_says(here: Path) -> None:
    tuned = tiny_imm(1)
    write_imm_pickle(here / "half.pkl", tuned.network, {**tuned.config["network"], "mixed_precision": "fp16"})
    merge_files("base.pkl", "half.pkl", [0.5], "neon.pkl")
    for name, flags in (("half", ""), ("tuned", ""), ("bf16", "--precision bf16")):
        network = "tuned" if name == "tuned" else "half"
        assert run_sample(f"--network_pkl {network}.pkl --outdir {name} --num_images 4 --num_steps 2 {flags}") == 0
    half, full, brief = (images(name)[0].int() for name in ("half", "tuned", "bf16"))
    assert torch.equal(half, full) and not torch.equal(full, brief) and (full - brief).abs().max() < 20


def test_two_networks_sample_at_once(here: Path) -> None:
    both_at_inference(
        run_sample, scores, "--num_images 24 --batch_size 8 --num_steps 2 --network_pkl", "base.pkl", "tuned.pkl"
    )


def test_a_killed_evaluation_goes_on(here: Path) -> None:
    evaluation_goes_on(scores, "--network_pkl pixels.safetensors --N 20 --batch_size 4 --num_steps 1")


RUN = "--batch 8 --batch_gpu 4 --total_images 64 --save_interval 24 --lr 1e-3"


def test_self_training_writes_averages_raw_weights_and_copies_and_survives_a_kill(here: Path) -> None:
    flags = f"--network_pkl base.pkl --data real --state_every 0.000001 --ema_rate 0.9 {RUN} --outdir"
    names = training_goes_on(run_finetune, flags)
    assert [name[9:19] for name in names] == ["000000.024", "000000.048", "000000.064"]
    base = load_state("base.pkl")
    for name in names:
        averaged, raw = load_state(Path("whole", name)), load_state(Path("whole", f"raw-{name}"))
        moved = [sum((state[n] - base[n]).norm() for n in base) for state in (averaged, raw)]
        assert 0 < moved[0] < moved[1], "the average lags"
        assert not torch.equal(averaged["model.pos_embed"], base["model.pos_embed"]), "positions are trained too"
    copy = load_state("whole/network-snapshot-000000.pkl")
    assert copy.keys() == base.keys() and any(not torch.equal(copy[name], base[name]) for name in base)
    merge_files("base.pkl", Path("whole", names[-1]), [1.0], "neon.pkl")


def test_snapshots_of_another_time_embedding_open_with_it(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    short = "--data real --batch 8 --total_images 8 --temb_type identity"
    for base in ("base.pkl", "base.pth"):
        assert run_finetune(f"--network_pkl {base} --outdir of-{base} {short}") == 0
        snapshots = list(Path(f"of-{base}").glob("*snapshot*"))
        assert [load_model(snapshot).network.temb_type for snapshot in snapshots] == ["identity"] * 2, "one is the raw"
    assert "base.pkl: flags changed the network" in capsys.readouterr().err
    [snapshot] = Path("of-base.pth").glob("snapshot*")
    merge_files("base.pth", snapshot, [1.0], "neon.safetensors")
    assert load_model("neon.safetensors").network.temb_type == "identity", "a bare base does not say it"


def published_zip(path: Path, moments: torch.Tensor, labels: list[int] | None) -> None:
    """Write latents as the published tool keeps them."""
    with zipfile.ZipFile(path, "w") as archive:
        names = [f"{index // 1000:05d}/img-mean-std-{index:08d}.npy" for index in range(len(moments))]
        for name, entry in zip(names, moments.numpy(), strict=True):
            with archive.open(name, "w") as file:
                np.save(file, entry)
        if labels is not None:
            pairs = [list(pair) for pair in zip(names, labels, strict=True)]
            archive.writestr("dataset.json", json.dumps({"labels": pairs}))


def test_training_on_latents_ours_or_published_is_training_on_the_images(here: Path) -> None:
    encode = "--vae_path vae --data real --outdir kept --img_size 16"
    assert run_program(EncodeForIMM, encode.split()) == 0
    pixels, labels = images("real")
    assert labels is not None
    model = tiny_imm()
    model.use_autoencoder(weights_file("vae"))
    published_zip(Path("latents.zip"), model.encode(pixels, None), labels.tolist())  # type: ignore[arg-type]
    for data, vae in (("real", "vae"), ("kept", "nowhere"), ("latents.zip", "nowhere")):
        flags = f"--network_pkl base.pkl --data {data} --outdir {data}-run {RUN} --vae_path {vae}"
        assert run_finetune(flags) == 0, "latents need no autoencoder"
        assert losses(f"{data}-run") == pytest.approx(losses("real-run"), rel=1e-3)


def test_pixels_are_learnt_from_scratch(here: Path) -> None:
    flags = "--data real --outdir run --model DiT --width 32 --depth 1 --heads 2 --patch_size 4 --lr 3e-3 --k 6"
    assert run_finetune(f"{flags} --batch 24 --batch_gpu 24 --total_images 4800 --save_interval 100000") == 0
    found = losses("run")
    assert np.mean(found[-40:]) < 0.8 * np.mean(found[:20])


def test_a_unet_is_told_of_augmentation_and_samples_in_few_steps(here: Path) -> None:
    flags = "--data real --outdir run --model SongUNet --width 8 --depth 1 --channel_mult 1 1 --f_type simple_edm"
    assert run_finetune(f"{flags} --eps 0.006 --augment 0.12 --batch 8 --total_images 16 --save_interval 100") == 0
    [last] = Path("run").glob("snapshot*")
    state = load_state(last)
    assert state["model.map_augment.weight"].shape == (8, 9) and "model.map_layer0_s.weight" in state
    assert run_sample(f"--network_pkl {last} --outdir out --num_images 3 --cfg_scale 1 --mid_nt 1.4") == 0
    assert images("out")[0].shape == (3, 3, 16, 16)
    assert run_finetune(f"--network_pkl {last} --data real --outdir more --batch 8 --total_images 8") == 0
    record = json.loads(Path("more/run.json").read_text())
    assert record["augment"] == 0.12, "a network that is told of augmentations is trained with them"


def test_published_files_are_recognised(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("base.pkl", "base.pth"):
        model = load_model(name)
        assert isinstance(model, IMM) and model.num_classes == 3 and model.network.temb_type == "stride"
        for ours, theirs in zip(model.network.parameters(), tiny_imm().network.parameters(), strict=True):
            assert torch.equal(ours, theirs)
    assert run_sample("--network_pkl base.pth --outdir plain --num_images 3 --num_steps 2") == 0
    assert "taken as ts_a2 (--temb_type stride)" in capsys.readouterr().err
    assert run_sample("--network_pkl base.pkl --outdir told --num_images 3 --num_steps 2") == 0
    assert "ts_a2" not in capsys.readouterr().err
    assert run_sample("--network_pkl base.pth --outdir other --num_images 3 --num_steps 2 --temb_type identity") == 0
    assert torch.equal(images("plain")[0], images("told")[0])
    assert not torch.equal(images("plain")[0], images("other")[0])


def test_the_embedded_source_of_a_pickle_is_never_run(here: Path) -> None:
    with pytest.raises(Exception):  # noqa: B017 - whatever it raises: it would run
        pickle.loads(Path("base.pkl").read_bytes())
    assert run_sample("--network_pkl base.pkl --outdir out --num_images 1 --num_steps 1") == 0


def test_the_plan_is_the_published_run() -> None:
    plan = IMMPlan()
    steps = snapshot_steps(plan.batch, plan.total_images, plan.save_interval)
    assert steps == [*range(200, 11_801, 200), 11_801] and (plan.batch, plan.lr) == (512, 1e-6)


SAMPLE = "--network_pkl base.pkl --outdir out --num_images 4"


@pytest.mark.parametrize(
    ("run", "flags", "message"),
    [
        (run_sample, f"{SAMPLE} --preset 8_steps_cfg1.5_pushforward_uniform --num_steps 4",
         "--num_steps 4: contradicts --preset 8_steps_cfg1.5_pushforward_uniform, which has 8"),
        (run_sample, f"{SAMPLE} --preset 3_steps", "--preset 3_steps: unknown; expected one of 1_steps"),
        (run_sample, f"{SAMPLE} --num_steps 0", "num_steps is 0; expected at least 1"),
        (run_sample, f"{SAMPLE} --mid_nt 1 2", "mid_nt"),
        (run_sample, f"{SAMPLE} --per_class_count 2", "--num_images and --per_class_count: both say"),
        (run_sample, f"{SAMPLE} --img_size 256", "--img_size 256: base.pkl makes images of 16 pixels"),
        (run_sample, f"{SAMPLE} --class 3", "--class 3: out of range"),
        (run_sample, f"{SAMPLE} --vae_path missing", "missing: found nothing; expected the folder of an autoencoder"),
        (run_sample, "--network_pkl plain.safetensors --outdir out --num_images 2 --cfg_scale 2",
         "--cfg_scale 2: plain.safetensors is unconditional"),
        (run_sample, "--network_pkl plain.safetensors --outdir out --num_images 2 "
         "--preset 1_steps_cfg1.5_pushforward_uniform", "plain.safetensors is unconditional; use 1_step"),
        (run_fid, "--network_pkl base.pth --num_images 12 --self_trained deep.pth --w 1", "deep.pth"),
        (run_finetune, f"--network_pkl base.pkl --data unlabelled --outdir out {RUN}", "unlabelled: no labels"),
        (run_finetune, f"--network_pkl base.pkl --data wide.zip --outdir out {RUN}",
         "wide.zip: images are (3, 32, 32)"),
        (run_finetune, f"--network_pkl pixels.safetensors --data wide.zip --outdir out {RUN}", "a set of latents"),
        (run_finetune, f"--network_pkl base.pkl --data bare.zip --outdir out {RUN}", "bare.zip: no labels"),
        (run_finetune, f"--network_pkl base.pkl --data real --outdir out {RUN} --lr 0", "--lr 0.0: expected a"),
        (run_finetune, f"--network_pkl base.pkl --data real --outdir out {RUN} --batch 6", "a multiple of 4"),
        (run_finetune, f"--network_pkl base.pkl --data real --outdir out {RUN} --augment 0.1", "--augment 0.1: the"),
        (run_finetune, f"--data real --outdir out {RUN} --heads 7", "no such network can be built"),
    ],
)  # fmt: skip
def test_a_wrong_request_is_one_line_and_leaves_nothing(
    here: Path, capsys: pytest.CaptureFixture[str], run: Callable[[str], int], flags: str, message: str
) -> None:
    published_zip(here / "wide.zip", torch.ones(8, 8, 4, 4), [0, 1] * 4)
    published_zip(here / "bare.zip", torch.ones(8, 8, 2, 2), None)
    refused(run(flags), message, here, capsys)


def test_the_two_published_networks_are_not_mistaken_for_each_other(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "imagenet256_s_a1.pth").symlink_to("base.pth")
    (here / "imagenet256_ts_a2.pkl").symlink_to("base.pkl")
    run = "--outdir out --num_images 2 --num_steps 1 --network_pkl"
    assert run_sample(f"{run} imagenet256_s_a1.pth") == 2
    assert "by its name this is s_a1, whose temb_type is identity" in capsys.readouterr().err
    assert run_sample(f"{run} imagenet256_ts_a2.pkl --temb_type identity") == 2
    assert "by its name this is ts_a2" in capsys.readouterr().err
    assert run_sample(f"{run} imagenet256_s_a1.pth --temb_type identity") == 0
    assert run_sample(f"{run} imagenet256_ts_a2.pkl --fresh") == 0


def test_a_missing_autoencoder_is_told_with_the_command_that_fetches_it(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(here / "cache"))
    assert run_program(SampleIMM, SAMPLE.split()) == 2
    error = capsys.readouterr().err
    assert "sd-vae-ft-ema" in error and "hf download stabilityai/sd-vae-ft-ema" in error and "--vae_path" in error


@pytest.fixture(scope="module")
def runs(files: Path, tmp_path_factory: pytest.TempPathFactory, workers: Workers) -> dict[int, Path]:
    """What the programs leave behind with 1, 2 and 3 processes of one thread each."""
    return in_worlds("imm_driver", files, tmp_path_factory, workers)


@pytest.mark.parametrize("world_size", [2, 3])
def test_the_number_of_processes_changes_no_image_no_score_and_no_weight(
    runs: dict[int, Path], world_size: int
) -> None:
    one, many = runs[1], runs[world_size]
    same_files(one, many, "set/*.png", "latents/*.safetensors", "training/*snapshot*")
    same_scores(one, many)


@pytest.mark.parametrize(
    "flags",
    [
        "--network_pkl {files}/base.pkl --fid_stats {files}/real.npz --num_steps 8 --cfg_scale 1.8 --num_images 12",
        "--model_ckpt {files}/base.pth --num_images 12 --batch_size 64 --img_size 16 --fid_stats {files}/real.npz",
    ],
)
def test_the_published_commands_run_as_typed(files: Path, tmp_path: Path, flags: str) -> None:
    """Only the number of processes and images, paths, sizes of the tiny model and the feature network differ."""
    (tmp_path / "imm").mkdir()
    for file in (ROOT / "imm").glob("*.py"):
        (tmp_path / "imm" / file.name).symlink_to(file)
    (tmp_path / "imm" / "pretrained").mkdir()
    (tmp_path / "imm" / "pretrained" / "sd-vae-ft-ema").symlink_to(files / "vae")
    flags = f"{flags} --features {{files}}/features.safetensors".format(files=files)
    run_as_typed(f"imm/calculate_fid.py {flags}", tmp_path, "imm")
