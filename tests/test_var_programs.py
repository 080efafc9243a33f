"""VAR's programs as users run them, on a tiny transformer and tokenizer."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from neon.checkpoint import load_state, open_checkpoint
from neon.cli.command_line import run_program
from neon.data.encoded import ExampleSet
from neon.data.images import from_uint8
from neon.merge import merge_files
from neon.metrics import Statistics
from neon.model import load_model, sampler_of
from neon.noise import ImageNoise
from tests.programs import (
    ROOT,
    Killed,
    both_at_inference,
    dies_after,
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
from tests.tiny import tiny_colour_images, tiny_tokenizer, tiny_var
from tests.workers import Workers
from VAR.calculate_fid import ScoreVAR
from VAR.encode import EncodeForVAR
from VAR.finetune import PRESETS, TrainVAR
from VAR.model import TOKENS, VARModel
from VAR.sample import SampleVAR
from VAR.train_tokenizer import TrainTokenizer
from VAR.transformer import VAR

COMMON = "--vae_ckpt vae.pth --top_k 0 --top_p 0"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two transformers, a tokenizer, features, statistics of real images, and the images."""
    folder = tmp_path_factory.mktemp("files")
    for name, seed in (("base", 0), ("tuned", 1)):
        torch.save(tiny_var(seed).network.state_dict(), folder / f"{name}.pth")
    torch.save({"trainer": {"var_wo_ddp": tiny_var(0).network.state_dict()}, "epoch": 3}, folder / "nested.pth")
    torch.save(tiny_var(0, depth=3).network.state_dict(), folder / "deep.pth")
    torch.save(tiny_tokenizer().state_dict(), folder / "vae.pth")
    torch.save(tiny_tokenizer(vocab=24).state_dict(), folder / "other_vae.pth")
    write_real(folder, tiny_colour_images(60))
    Statistics.from_features(torch.rand(20, 7)).save(folder / "wide.npz")
    return folder


@pytest.fixture
def here(files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with the files in it."""
    return work_in(tmp_path, files, monkeypatch)


def run_sample(flags: str) -> int:
    return run_program(SampleVAR, [*COMMON.split(), *flags.split()])


def run_fid(flags: str) -> int:
    usual = f"{COMMON} --fid_stats real.npz --features features.safetensors --device cpu"
    return run_program(ScoreVAR, [*usual.split(), *flags.split()])


def run_finetune(flags: str) -> int:
    return run_program(TrainVAR, ["--vae_ckpt", "vae.pth", *flags.split()])


def run_tokenizer(flags: str) -> int:
    usual = "--data real --outdir out --base_channels 32 --channel_mult 1 1 --patch_nums 1 2 4"
    return run_program(TrainTokenizer, [*usual.split(), *flags.split()])


def scores(flags: str, name: str = "scores.json") -> dict:
    assert run_fid(f"{flags} --json {name}") == 0
    return json.loads(Path(name).read_text())


def test_every_class_is_sampled_equally_often_and_written_down(here: Path) -> None:
    assert run_sample("--var_ckpt base.pth --outdir out.zip --num_images 12 --batch_size 5") == 0
    found, labels = images("out.zip")
    assert found.shape == (12, 3, 8, 8) and labels is not None
    assert sorted(labels.tolist()) == [0] * 4 + [1] * 4 + [2] * 4


def test_tokens_are_those_behind_the_images(here: Path) -> None:
    assert run_sample("--var_ckpt base.pth --outdir pixels --num_images 10 --batch_size 4") == 0
    assert run_sample("--var_ckpt base.pth --outdir tokens --num_images 10 --batch_size 4 --tokens") == 0
    tokens = ExampleSet("tokens", TOKENS)
    drawn, labels = tokens.load(range(10))
    assert drawn.dtype == torch.uint16 and drawn.shape == (10, 21) and tokens.image_shape == (3, 8, 8)
    pixels, expected = images("pixels")
    assert torch.equal(labels, expected)
    tokenizer = tiny_tokenizer()
    decoded = tokenizer.decode(tokenizer.quantize.feature_maps(drawn.to(torch.int64))[-1])
    assert ((decoded + 1) * 127.5 - pixels).abs().max() <= 1.01
    size = sum(file.stat().st_size for file in Path("tokens").glob("*.safetensors"))
    assert size < 10 * 2 * 21 + 3 * 400, "two bytes a token, and headers"


def test_tokens_and_a_merge_with_what_was_trained_on_them_name_the_sampler(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_sample("--var_ckpt base.pth --outdir tokens --num_images 16 --cfg 1.5 --tokens") == 0
    drawn_by = ExampleSet("tokens", TOKENS).sampler
    assert drawn_by is not None and drawn_by["architecture"] == "VAR" and drawn_by["settings"]["guidance"] == 1.5
    assert run_finetune("--var_ckpt base.pth --data tokens --outdir out --bs 8 --total_images 16") == 0
    snapshot = next(Path("out").glob("snapshot*"))
    with open_checkpoint(snapshot) as checkpoint:
        assert sampler_of(checkpoint.metadata) == drawn_by
    merge_files("base.pth", snapshot, [0.5], "neon.safetensors")
    for outdir, guidance, warns in (("same", 1.5, False), ("other", 4.0, True)):
        capsys.readouterr()
        assert run_sample(f"--var_ckpt neon.safetensors --outdir {outdir} --num_images 3 --cfg {guidance}") == 0
        assert ("very different sampler (guidance: 1.5 -> 4)" in capsys.readouterr().err) == warns


def test_an_image_depends_on_its_index_and_seed_only(here: Path) -> None:
    for name, flags in (("one", "--batch_size 1"), ("many", "--batch_size 9"), ("other", "--batch_size 9 --seed 1")):
        assert run_sample(f"--var_ckpt base.pth --outdir {name} --num_images 9 {flags} --tokens") == 0
    one, many, other = (ExampleSet(name, TOKENS).load(range(9)) for name in ("one", "many", "other"))
    assert torch.equal(one[0].int(), many[0].int()) and torch.equal(one[1], many[1])
    assert not torch.equal(other[0].int(), many[0].int())


def test_a_killed_sampling_of_tokens_goes_on(here: Path) -> None:
    flags = "--var_ckpt base.pth --num_images 10 --batch_size 2 --tokens --outdir"
    assert run_sample(f"{flags} whole") == 0
    with dies_after(3, VARModel, "sample_tokens"), pytest.raises(Killed):
        run_sample(f"{flags} killed")
    with dies_after(2, VARModel, "sample_tokens"):
        assert run_sample(f"{flags} killed") == 0
    whole, killed = (ExampleSet(name, TOKENS).load(range(10))[0].int() for name in ("whole", "killed"))
    assert torch.equal(whole, killed)


def test_scores_are_those_of_the_images_and_a_sweep_those_of_merged_files(here: Path) -> None:
    merge_files("nested.pth", "tuned.pth", [0.5], "neon.pth")
    assert load_state("neon.pth", "trainer.var_wo_ddp").keys() == load_state("base.pth").keys(), "the base's nesting"
    flags = "--num_images 24 --batch_size 8 --cfg 1.5"
    sweep = scores(f"--var_ckpt base.pth --self_trained tuned.pth --w 0 0.5 -1 {flags} --precision_recall real")
    values = {entry["w"]: entry["fd_tiny6"] for entry in sweep["sweep"]}
    for w, network in ((0, "base.pth"), (0.5, "neon.pth"), (-1, "tuned.pth")):
        assert values[w] == pytest.approx(scores(f"--var_ckpt {network} {flags}")["fd_tiny6"], rel=1e-6)
    assert sweep["settings"]["guidance"] == 1.5 and sweep["label_rule"].startswith("every class")
    other = scores(f"--var_ckpt base.pth {flags} --images_for selection")
    assert other["fd_tiny6"] != values[0]


def test_two_networks_sample_at_once(here: Path) -> None:
    both_at_inference(
        run_sample, scores, "--num_images 24 --batch_size 8 --cfg 1.5 --var_ckpt", "base.pth", "tuned.pth"
    )
    run = "--num_images 9 --batch_size 4 --tokens"
    assert run_sample(f"{run} --outdir alone --var_ckpt tuned.pth") == 0
    assert run_sample(f"{run} --outdir tokens --var_ckpt base.pth --self_trained tuned.pth --sims -1") == 0
    alone, tokens = (ExampleSet(name, TOKENS).load(range(9))[0].int() for name in ("alone", "tokens"))
    assert torch.equal(alone, tokens)


def test_a_killed_evaluation_goes_on(here: Path) -> None:
    evaluation_goes_on(scores, "--var_ckpt base.pth --N 20 --batch_size 4")


RUN = "--batch 8 --batch_gpu 4 --total_images 64 --save_interval 24 --target_lr 1e-3"


@pytest.mark.parametrize("kind", ["pixels", "tokens"])
def test_self_training_lowers_the_loss_on_its_set_and_survives_a_kill(here: Path, kind: str) -> None:
    extra = "--tokens" if kind == "tokens" else ""
    assert run_sample(f"--var_ckpt base.pth --outdir set --num_images 24 --batch_size 8 {extra}") == 0
    flags = f"--var_ckpt base.pth --data set --state_every 0.000001 {RUN} --outdir"
    names = training_goes_on(run_finetune, flags)
    assert [name[9:19] for name in names] == ["000000.024", "000000.048", "000000.064"]
    rates = [entry["lr"] for entry in log("whole")]
    assert rates == pytest.approx([1e-3 * seen / 64 for seen in range(0, 64, 8)])
    assert load_model(Path("whole", names[-1])).config == load_model("base.pth").config


def test_training_from_scratch_learns(here: Path) -> None:
    flags = "--data real --depth 2 --width 32 --heads 2 --classes 3 --patch_nums 1 2 4 --constant_lr --outdir run"
    budget = "--batch 20 --batch_gpu 20 --total_images 2000 --save_interval 100000 --target_lr 5e-3"
    assert run_finetune(f"{flags} {budget}") == 0
    found = losses("run")
    assert sum(found[-10:]) < 0.8 * sum(found[:10])


def test_a_tokenizer_is_trained_and_recognised(here: Path) -> None:
    flags = "--data real --outdir run --vocab 16 --code_channels 4 --base_channels 32 --channel_mult 1 2"
    budget = "--patch_nums 1 2 4 --batch 20 --total_images 800 --lr 3e-3"
    assert run_program(TrainTokenizer, f"{flags} {budget}".split()) == 0
    found = losses("run")
    assert found[-1] < 0.5 * found[0]
    [snapshot] = Path("run").glob("snapshot*")
    model = tiny_var()
    model.use_autoencoder(snapshot)
    noise = ImageNoise(range(2))
    assert model.sample(noise, model.labels(range(2), noise), model.default_settings).shape == (2, 3, 8, 8)


def test_a_set_is_encoded_once_and_trained_on(here: Path) -> None:
    flags = "--vae_ckpt vae.pth --data real --outdir tokens --patch_nums 1 2 4 --batch_size 16"
    assert run_program(EncodeForVAR, flags.split()) == 0
    tokens, labels = ExampleSet("tokens", TOKENS).load(range(60))
    real, expected = images("real")
    assert torch.equal(tokens.to(torch.int64), tiny_tokenizer().tokens(from_uint8(real)))
    assert torch.equal(labels, expected)
    assert run_finetune(f"--var_ckpt base.pth --data tokens --outdir run {RUN}") == 0
    assert run_program(EncodeForVAR, flags.replace("--data real", "--data tokens").split()) == 2


def test_published_files_are_recognised_whatever_their_nesting(here: Path) -> None:
    for name, key in (("base.pth", ""), ("nested.pth", "trainer.var_wo_ddp")):
        with open_checkpoint(name) as checkpoint:
            assert checkpoint.key == key
        model = load_model(name)
        assert model.architecture == "VAR" and model.config["transformer"]["depth"] == 2
        for ours, theirs in zip(model.network.parameters(), tiny_var(0).network.parameters(), strict=True):
            assert torch.equal(ours, theirs)


def test_the_presets_are_the_published_runs() -> None:
    rows = {name: (p.batch, p.target_lr, p.total_images, p.save_interval) for name, p in PRESETS.items()}
    assert rows == {"d16": (768, 1e-5, 7_500_000, 250_000), "d36": (24, 1e-6, 3_001_000, 200_000)}


SAMPLE = "--var_ckpt base.pth --outdir out --num_images 4"
SCORE = "--var_ckpt base.pth --num_images 12"
TRAIN = f"--var_ckpt base.pth --data real --outdir out {RUN}"


@pytest.mark.parametrize(
    ("run", "flags", "message"),
    [
        (run_sample, f"{SAMPLE} --model_depth 16", "--model_depth 16: base.pth has 2 blocks"),
        (run_sample, f"{SAMPLE} --img_size 256", "--img_size 256: base.pth makes images of 8 pixels"),
        (run_sample, f"{SAMPLE} --vae_ckpt base.pth", "a transformer, not a tokenizer"),
        (run_sample, f"{SAMPLE} --vae_ckpt missing.pth", "missing.pth: no such file"),
        (run_sample, f"{SAMPLE} --vae_ckpt other_vae.pth", "a tokenizer of 24 codes"),
        (run_sample, "--var_ckpt vae.pth --outdir out --num_images 4", "and none recognises it"),
        (run_sample, f"{SAMPLE} --class 3", "--class 3: out of range"),
        (run_sample, f"{SAMPLE} --top_k -1", "top_k"),
        (run_sample, f"{SAMPLE} --top_p 1.5", "top_p"),
        (run_sample, f"{SAMPLE} --cfg -1", "guidance"),
        (run_sample, f"{SAMPLE} --temperature 0", "temperature"),
        (run_sample, f"{SAMPLE} --num_images 0", "--num_images 0: expected at least 1"),
        (run_sample, f"{SAMPLE} --tokens --more_smooth", "no tokens"),
        (run_sample, f"{SAMPLE} --seed -1", "--seed is -1"),
        (run_fid, f"{SCORE} --ref wide.npz", "wide.npz: statistics of 7 features, but tiny6 has 6"),
        (run_fid, f"{SCORE} --self_trained deep.pth --w 1", "deep.pth"),
        (run_finetune, f"{TRAIN} --target_lr 0", "--target_lr 0.0: expected a positive number"),
        (run_finetune, f"{TRAIN} --batch_gpu 3", "micro-batches of 3"),
        (run_finetune, TRAIN.replace("--data real", "--data files"), "expected a folder or zip of images"),
        (run_tokenizer, "--batch 0", "--batch 0: expected at least 1"),
        (run_tokenizer, "--lr -1", "lr is -1.0; expected a positive number"),
    ],
)  # fmt: skip
def test_a_wrong_request_is_one_line_and_leaves_nothing(
    here: Path, capsys: pytest.CaptureFixture[str], run: Callable[[str], int], flags: str, message: str
) -> None:
    refused(run(flags), message, here, capsys)


def test_statistics_of_another_resolution_are_refused(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With a network of published geometry, the tokenizer as small as can be."""
    network = VAR(depth=1, width=32, heads=1, classes=3, vocab=16, code_channels=4)
    torch.save(network.state_dict(), "in256.pth")
    tokenizer = tiny_tokenizer(channel_mult=[1, 1, 1, 1, 1], patch_nums=network.patch_nums)
    torch.save(tokenizer.state_dict(), "in256_vae.pth")
    Path("adm_in512_stats.npz").symlink_to("real.npz")
    flags = (
        "--var_ckpt in256.pth --vae_ckpt in256_vae.pth --num_images 2 --img_size 256 --fid_stats adm_in512_stats.npz"
    )
    assert run_fid(flags) == 2
    assert "statistics of 512 pixels by their name, but images have 256" in capsys.readouterr().err


def test_a_missing_tokenizer_is_told_with_the_command_that_fetches_it(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_program(SampleVAR, f"{SAMPLE}".split()) == 2
    error = capsys.readouterr().err
    assert "vae_ch160v4096z32.pth" in error and "hf download FoundationVision/var" in error and "--vae_ckpt" in error


@pytest.fixture(scope="module")
def runs(files: Path, tmp_path_factory: pytest.TempPathFactory, workers: Workers) -> dict[int, Path]:
    """What the programs leave behind with 1, 2 and 3 processes of one thread each."""
    return in_worlds("var_driver", files, tmp_path_factory, workers)


@pytest.mark.parametrize("world_size", [2, 3])
def test_the_number_of_processes_changes_no_image_no_score_and_no_weight(
    runs: dict[int, Path], world_size: int
) -> None:
    one, many = runs[1], runs[world_size]
    same_files(one, many, "set/*.png", "tokens/examples*", "training/snapshot*")
    same_scores(one, many)


def test_the_published_command_runs_as_typed(files: Path, tmp_path: Path) -> None:
    """Only the number of processes and images, paths and the feature network differ from the published line."""
    (tmp_path / "VAR").symlink_to(ROOT / "VAR")
    for name in ("base.pth", "real.npz", "features.safetensors"):
        (tmp_path / name).symlink_to(files / name)
    (tmp_path / "vae_ch160v4096z32.pth").symlink_to(files / "vae.pth")
    command = (
        "VAR/VAR_imagenet_256/calculate_fid.py --var_ckpt base.pth --num_images 12 --batch_size 64 --img_size 8 "
        "--fid_stats real.npz --features features.safetensors --top_k 10"
    )
    run_as_typed(command, tmp_path, "VAR/VAR_imagenet_256")
