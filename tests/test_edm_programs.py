"""edm/sample.py, edm/finetune.py and edm/calculate_fid.py, as users run them, on a tiny network."""

import dataclasses
import errno
import json
import threading
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from edm import calculate_fid, finetune, sample
from edm.finetune import PRESETS, tick_steps
from edm.settings import EDMSettings
from neon import sampling
from neon.checkpoint import load_state, open_checkpoint
from neon.cli import app as cli
from neon.cli.command_line import parse, run_program, seed_list
from neon.data.images import write_images
from neon.errors import RequestError
from neon.evaluate import features as rows
from neon.evaluate import run as evaluation
from neon.merge import merge_files
from neon.metrics import Statistics
from neon.model import load_model, save_model
from tests import pickles
from tests.programs import (
    ROOT,
    Killed,
    both_at_inference,
    dies_after,
    ends_with_score,
    images,
    in_worlds,
    losses,
    refused,
    same_files,
    same_scores,
    torchrun,
    training_goes_on,
    work_in,
    write_real,
)
from tests.tiny import tiny_edm, tiny_images
from tests.workers import Workers

SAMPLER = "--num_steps 3"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and a self-trained network, features, statistics of real images, and the images."""
    folder = tmp_path_factory.mktemp("files")
    for name, seed in (("base", 0), ("tuned", 1)):
        network = tiny_edm(seed).network
        pickled = pickles.snapshot(network, tiny_edm(seed).config["network"])
        (folder / f"{name}.pkl").write_bytes(pickles.dumps(pickled))
        save_model(folder / f"{name}.safetensors", load_model(folder / f"{name}.pkl"))
    save_model(folder / "wide.safetensors", tiny_edm(0, model_channels=16))
    save_model(folder / "unconditional.safetensors", tiny_edm(0, label_dim=0))
    real = tiny_images(60)
    write_real(folder, real)
    for name, size in (("mixed", 9), ("corrupt", 8)):
        write_images(folder / name, range(6), real.images[:6])
        write_images(folder / name, [4], torch.zeros(1, 1, 8, size, dtype=torch.uint8))
    broken = folder / "corrupt" / "00000004.png"
    broken.write_bytes(broken.read_bytes()[:40])
    return folder


@pytest.fixture
def here(files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with the files in it."""
    return work_in(tmp_path, files, monkeypatch)


def run_sample(flags: str) -> int:
    return run_program(sample.SampleEDM, flags.split())


def run_fid(flags: str) -> int:
    usual = f"--ref real.npz --features features.safetensors {SAMPLER} --device cpu"
    return run_program(calculate_fid.ScoreEDM, [*usual.split(), *flags.split()])


def run_finetune(flags: str) -> int:
    return run_program(finetune.TrainEDM, flags.split())


def scores(flags: str, name: str = "scores.json") -> dict:
    assert run_fid(f"{flags} --json {name}") == 0
    return json.loads(Path(name).read_text())


# Sampling


def test_a_conditional_network_draws_a_class_per_image_and_writes_it_down(here: Path) -> None:
    assert run_sample(f"--network_pkl base.pkl --outdir out --seeds 0-29 {SAMPLER}") == 0
    found, labels = images("out")
    assert found.shape == (30, 1, 8, 8) and labels is not None and set(labels.tolist()) == {0, 1, 2}
    assert run_sample(f"--network_pkl base.pkl --outdir ones --seeds 0-9 --class 1 {SAMPLER}") == 0
    of_class, ones = images("ones")
    assert ones is not None and ones.tolist() == [1] * 10
    same = labels[:10] == 1
    assert torch.equal(of_class[same], found[:10][same]) and not torch.equal(of_class[~same], found[:10][~same])


def test_a_zip_holds_what_a_folder_holds_and_nothing_unfinished_stays(here: Path) -> None:
    for name in ("out", "out.zip"):
        assert run_sample(f"--network_pkl base.pkl --outdir {name} --seeds 3-12 --batch 4 {SAMPLER}") == 0
    for a, b in zip(images("out"), images("out.zip"), strict=True):
        assert torch.equal(a, b)
    assert [path.name for path in here.glob("out.zip*")] == ["out.zip"]
    before = Path("out.zip").read_bytes()
    assert run_sample(f"--network_pkl base.pkl --outdir out.zip --seeds 3-12 --batch 4 --fresh {SAMPLER}") == 0
    assert Path("out.zip").read_bytes() == before, "equal sets are equal bytes"


def test_another_batch_size_moves_images_by_rounding_only(here: Path) -> None:
    for batch in (2, 7):
        assert run_sample(f"--network base.pkl --outdir b{batch} --seeds 0-13 --batch_size {batch} --steps 3") == 0
    (a, labels_a), (b, labels_b) = images("b2"), images("b7")
    assert torch.equal(labels_a, labels_b)
    assert (a.int() - b.int()).abs().max() <= 1


def test_an_image_is_its_seeds_whatever_the_others_are(here: Path) -> None:
    assert run_sample(f"--network_pkl base.pkl --outdir many --seeds 0-9 --batch 1 {SAMPLER}") == 0
    assert run_sample(f"--network_pkl base.pkl --outdir few --seeds 7,2-3 --batch 1 {SAMPLER}") == 0
    assert torch.equal(images("few")[0], images("many")[0][[7, 2, 3]])


def test_a_killed_sampling_run_goes_on_where_it_was(here: Path) -> None:
    flags = f"--network_pkl base.pkl --seeds 0-19 --batch 4 {SAMPLER} --outdir"
    assert run_sample(f"{flags} whole") == 0
    with dies_after(3, sampling, "sample_block"), pytest.raises(Killed):
        run_sample(f"{flags} killed")
    with dies_after(2, sampling, "sample_block"):
        assert run_sample(f"{flags} killed") == 0, "two of five blocks were left"
    for a, b in zip(images("whole"), images("killed"), strict=True):
        assert torch.equal(a, b)


def test_two_networks_extrapolate_their_outputs(here: Path) -> None:
    for g in ("0", "-1", "0.5"):
        flags = f"--network_pkl base.pkl --gnet tuned.pkl --gnet_scale {g} --outdir g{g} --seeds 0-5 {SAMPLER}"
        assert run_sample(flags) == 0
    for network in ("base", "tuned"):
        assert run_sample(f"--network_pkl {network}.pkl --outdir {network} --seeds 0-5 {SAMPLER}") == 0
    first, second, extrapolated = (images(name)[0].int() for name in ("g0", "g-1", "g0.5"))
    assert (first - images("base")[0].int()).abs().max() <= 1, "the first network alone, in float32"
    assert (second - images("tuned")[0].int()).abs().max() <= 1
    assert not torch.equal(extrapolated, first)


def test_two_networks_sample_at_once(here: Path) -> None:
    both_at_inference(
        run_sample, scores, "--num_steps 3 --seeds 0-23 --batch_size 8 --network", "base.pkl", "tuned.safetensors"
    )


def test_the_ablation_sampler_with_its_own_choices_is_another_sampler(here: Path) -> None:
    base = "--network_pkl base.pkl --seeds 0-5"
    for name, flags in (("edm", ""), ("same", "--disc edm"), ("ve", "--disc ve --schedule ve --solver euler")):
        assert run_sample(f"{base} --outdir {name} {SAMPLER} {flags}") == 0
    assert (images("edm")[0].int() - images("same")[0].int()).abs().max() <= 1
    assert not torch.equal(images("edm")[0], images("ve")[0])


@pytest.mark.parametrize(
    ("flags", "levels"),
    [
        ("", (0.002, 80.0)),
        ("--sigma_max 70", (0.002, 70.0)),
        ("--disc ve", (0.02, 100.0)),
        ("--disc ve --sigma_min 0.002", (0.002, 100.0)),
        ("--disc ve --sigma_min 0.002 --sigma_max 80", (0.002, 80.0)),
        ("--disc iddpm --sigma_max 80", (0.002, 80.0)),
        ("--schedule vp --sigma_max 80", (0.002, 80.0)),
    ],
)
def test_noise_levels_that_are_given_are_taken_whatever_they_are(flags: str, levels: tuple[float, float]) -> None:
    command = parse(sample.SampleEDM, f"--network_pkl a --outdir b {flags}".split(), "sample.py")
    assert command.sampler().sigma_range() == levels  # type: ignore[attr-defined]


def test_a_full_disk_keeps_the_finished_part_for_the_next_run(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save, written = Image.Image.save, []

    def fills_up(self: Image.Image, file: object, **keywords: object) -> None:
        if len(written) == 6:
            raise OSError(errno.ENOSPC, "No space left on device")
        written.append(file)
        save(self, file, **keywords)

    flags = f"--network_pkl base.pkl --outdir out --seeds 0-9 --batch 5 {SAMPLER}"
    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, "save", fills_up)
        assert run_sample(flags) == 1
    assert "the disk is full" in capsys.readouterr().err
    assert [path.name for path in sorted(here.glob("out/*.p*"))] == [f"{i:08d}.png" for i in range(6)]
    assert run_sample(flags) == 0
    assert run_sample(flags.replace("out ", "whole ")) == 0
    assert torch.equal(images("out")[0], images("whole")[0])


# Scores


def test_the_last_line_is_the_score_and_json_has_the_protocol(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = scores("--network_pkl base.pkl --seeds 0-39 --batch_size 16 --precision_recall real --nearest_k 3")
    printed = capsys.readouterr()
    last = printed.out.splitlines()[-1]
    assert last.startswith(f"FD_tiny6={found['fd_tiny6']:.6f}  KD_tiny6={found['kd_tiny6']:.5f}+-")
    assert last.endswith("40 images  (conditional, 3 steps)")
    expected = {"metric": "fd_tiny6", "num_images": 40, "seeds": "0-39", "batch_size": 16, "nearest_k": 3, "w": None}
    assert expected.items() <= found.items()
    assert found["settings"]["num_steps"] == 3 and found["uint8_rule"].startswith("truncate")
    assert found["images_per_second"] == pytest.approx(40 / found["seconds"])
    assert not list(here.glob("runs/*")), "a finished evaluation leaves no state"


def test_scores_are_those_of_the_images_that_sampling_writes(here: Path) -> None:
    assert run_sample(f"--network_pkl base.pkl --outdir out.zip --seeds 5-44 --batch 16 {SAMPLER}") == 0
    fid = "fid out.zip real --features features.safetensors --precision_recall --json a.json"
    assert cli.main(fid.split()) == 0
    stored = json.loads(Path("a.json").read_text())
    direct = scores("--network_pkl base.pkl --seeds 5-44 --max_batch_size 16 --precision_recall real")
    for name in ("fd_tiny6", "precision", "recall", "density", "coverage"):
        # Features in batches of another size differ by roundings: 7e-8 of the distance on some processors, 0 on others.
        assert direct[name] == pytest.approx(stored[name], rel=1e-6)


def test_statistics_of_images_are_a_reference(here: Path) -> None:
    assert cli.main(["stats", "real", "out.npz", "--features", "features.safetensors", "--batch_size", "7"]) == 0
    a, b = Statistics.load("out.npz"), Statistics.load("real.npz")
    assert a.count == 60 and abs(a.mu - b.mu).max() < 1e-5
    assert cli.main(["fid", "out.npz", "real.npz", "--json", "a.json"]) == 0
    assert json.loads(Path("a.json").read_text())["fd_tiny6"] < 1e-6


def test_a_score_of_fewer_images_than_features_shows_few_digits_and_warns(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Statistics.from_features(torch.rand(6, 6, generator=torch.Generator().manual_seed(0))).save("few.npz")
    assert cli.main(["fid", "few.npz", "real.npz", "--json", "a.json"]) == 0
    out, err = capsys.readouterr()
    exact = json.loads(Path("a.json").read_text())["fd_6"]
    assert out == f"FD_6={exact:.3g}  6 images\n" and len(str(exact)) > 10
    assert "few.npz: 6 images for 6 features: the covariance is singular" in err and "real.npz:" not in err


def test_a_sweep_scores_what_merged_files_score(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    merge_files("base.pkl", "tuned.safetensors", [0.5], "neon.pkl")
    flags = "--seeds 0-29 --batch_size 8"
    sweep = scores(f"--network_pkl base.pkl --self_trained tuned.safetensors --w 0 0.5 -1 {flags}")
    values = {entry["w"]: entry["fd_tiny6"] for entry in sweep["sweep"]}
    for w, network in ((0, "base.pkl"), (0.5, "neon.pkl"), (-1, "tuned.pkl")):
        assert values[w] == pytest.approx(scores(f"--network_pkl {network} {flags}")["fd_tiny6"], rel=1e-6)
    assert sweep["fd_tiny6"] == min(values.values())
    assert "the lowest of 3 on these seeds" in capsys.readouterr().out


def test_scores_of_two_networks_are_shown_at_their_scale_and_kept_apart_from_those_of_merges(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = "--network_pkl base.pkl --seeds 0-15 --batch_size 8 --run_dir mine --self_trained tuned.pkl"
    with dies_after(3, rows, "sample_block"), pytest.raises(Killed):
        run_fid(f"{flags} --sims 1.25 0")
    assert run_fid(f"{flags} --w 0") == 2, "a folder is of one or the other"
    assert "combination" in capsys.readouterr().err
    assert run_fid(f"{flags} --sims 1.25 0") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("sims=1.25  FD_tiny6=") and lines[1].startswith("sims=0     FD_tiny6=")
    assert "  sims=" in lines[2] and "w=" not in "".join(lines)
    assert {"1.25", "0.0"} == json.loads(Path("mine/scores.json").read_text()).keys()


def test_a_published_second_network_is_the_self_trained_one(here: Path) -> None:
    run = f"--network_pkl base.pkl --seeds 0-7 {SAMPLER} --S_churn 2"
    assert run_sample(f"{run} --outdir gnet --gnet tuned.pkl --gnet_scale 0.5") == 0
    assert run_sample(f"{run} --outdir sims --self_trained tuned.safetensors --sims 0.5") == 0
    neon = "sample --network base.safetensors --self_trained tuned.safetensors --sims 0.5 --outdir neon --num_images 8"
    assert cli.main([*neon.split(), "--set", "num_steps=3"]) == 0
    assert torch.equal(images("gnet")[0], images("sims")[0])
    record = json.loads(Path("sims/run.json").read_text())
    assert record["sims"] == 0.5 and record["self_trained_sha256"] and record["gnet_scale"] is None
    assert not {"sims", "self_trained_sha256"} & json.loads(Path("gnet/run.json").read_text()).keys()
    assert json.loads(Path("neon/run.json").read_text())["sims"] == 0.5


@pytest.mark.parametrize("sweep", [None, "w", "sims"])
def test_a_killed_evaluation_goes_on_where_it_was(
    here: Path, monkeypatch: pytest.MonkeyPatch, sweep: str | None
) -> None:
    flags = "--network_pkl base.pkl --seeds 0-39 --batch_size 8 --precision_recall real"
    flags += f" --self_trained tuned.pkl --{sweep} 0 1" if sweep else ""
    whole = scores(flags, "whole.json")
    monkeypatch.setattr(evaluation, "SAVE_EVERY_SECONDS", 0.0)
    blocks = 5 * (2 if sweep else 1)
    done = blocks - 2
    with dies_after(done, rows, "sample_block"), pytest.raises(Killed):
        run_fid(flags)
    with dies_after(blocks - done, rows, "sample_block"):
        continued = scores(flags, "continued.json")
    for found in (whole, continued):
        for entry in (found, *found.get("sweep", [])):
            del entry["seconds"], entry["images_per_second"]
    assert whole == continued


def test_a_half_finished_evaluation_can_be_forgotten(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation, "SAVE_EVERY_SECONDS", 0.0)
    flags = "--network_pkl base.pkl --seeds 0-39 --batch_size 8 --run_dir runs/mine"
    with dies_after(3, rows, "sample_block"), pytest.raises(Killed):
        run_fid(flags)
    assert run_fid(flags.replace("0-39", "0-31")) == 2, "a run with other settings lies there"
    with dies_after(4, rows, "sample_block"), pytest.raises(Killed):
        run_fid(f"{flags} --fresh")
    assert run_fid(flags) == 0
    assert [path.name for path in Path("runs/mine").glob("*.*")] != []
    assert json.loads(Path("runs/mine/scores.json").read_text())["None"]["num_images"] == 40


@pytest.fixture
def server(files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The files behind http."""
    monkeypatch.setenv("NEON_CACHE", str(tmp_path / "cache"))

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, format: str, *arguments: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(files))) as http:
        thread = threading.Thread(target=http.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{http.server_port}"
        http.shutdown()
        thread.join()


def test_network_and_statistics_may_be_addresses(here: Path, server: str, capsys: pytest.CaptureFixture[str]) -> None:
    local = scores("--network_pkl base.pkl --seeds 0-9")
    capsys.readouterr()
    flags = f"--network_pkl {server}/base.pkl --ref {server}/real.npz --seeds 0-9 --features features.safetensors"
    arguments = [*flags.split(), *SAMPLER.split(), "--json", "remote.json"]
    assert run_program(calculate_fid.ScoreEDM, arguments) == 0
    assert f"downloading {server}/base.pkl" in capsys.readouterr().err
    assert json.loads(Path("remote.json").read_text())["fd_tiny6"] == local["fd_tiny6"]


def test_published_settings_that_do_not_fit_are_warned_of(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_fid("--network_pkl base.pkl --seeds 0-11") == 0
    error = capsys.readouterr().err
    assert "warning: scoring the default" not in error
    assert run_sample(f"--network_pkl base.pkl --outdir a --seeds 0-1 {SAMPLER}") == 0
    assert "warning" not in capsys.readouterr().err, "nothing is published of a network of our own"
    from edm import published

    row = dataclasses.replace(
        next(iter(published.PUBLISHED.values())),
        name="toy",
        network=tiny_edm().config["network"],
        settings=EDMSettings(num_steps=40),
    )
    monkeypatch.setattr(published, "PUBLISHED", {"toy": row})
    assert run_sample(f"--network_pkl base.pkl --outdir b --seeds 0-1 {SAMPLER}") == 0
    assert "warning: toy sampled with num_steps 3 and not 40" in capsys.readouterr().err


def test_defaults_that_do_not_reproduce_published_scores_are_warned_of(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_fid("--network_pkl missing.pkl --self_trained tuned.pkl --w 1") == 2
    error = capsys.readouterr().err
    assert "published FIDs are of 50,000" in error and "choose w on others" in error


# Training


def test_snapshots_appear_at_the_published_budgets() -> None:
    cifar = [n * 512 // 1000 for n in tick_steps(512, 6, 50, 10)]
    assert cifar == [50, 551, 1053, 1555, 2057, 2558, 3060, 3562, 4064, 4566, 5067, 5569, 6000]
    ffhq = [n * 256 // 1000 for n in tick_steps(256, 3, 50, 5)]
    assert ffhq == [50, 301, 551, 802, 1053, 1304, 1555, 1806, 2057, 2308, 2558, 2809, 3000]
    assert tick_steps(512, 6, 50, 10)[-1] == tick_steps(256, 3, 50, 5)[-1] == 11719


def test_the_presets_are_the_published_runs() -> None:
    rows = {name: (p.batch, p.lr, p.augment, p.duration, p.tick, p.snap) for name, p in PRESETS.items()}
    cifar = (512, 1e-4, 0.12, 6, 50, 10)
    assert rows == {"cifar10-cond": cifar, "cifar10-uncond": cifar, "ffhq": (256, 4e-6, 0.15, 3, 50, 5)}


TINY_RUN = (
    "--data real --duration 0.000064 --batch 16 --batch_gpu 8 --tick 0.016 --snap 2 --lr_rampup 0.00005 --ema 0.0001"
)


def test_self_training_a_pickle_writes_safetensors_and_copies_of_it(here: Path) -> None:
    assert run_finetune(f"--transfer base.pkl --outdir run --augment 0 {TINY_RUN}") == 0
    names = sorted(path.name for path in Path("run").glob("*snapshot*"))
    assert names == [
        *("network-snapshot-000000.pkl",),
        *(f"snapshot-{kimg}-kimg.safetensors" for kimg in ("000000.016", "000000.048", "000000.064")),
    ]
    trained = load_state("run/snapshot-000000.064-kimg.safetensors")  # of a thousand images the last, as published
    copied, base = load_state("run/network-snapshot-000000.pkl"), load_state("base.pkl")
    assert copied.keys() == base.keys() == trained.keys()
    assert any(not torch.equal(load_state("run/snapshot-000000.064-kimg.safetensors")[n], base[n]) for n in base)
    with open_checkpoint("run/network-snapshot-000000.pkl") as copy:
        assert copy.format == "pickle"
    assert all(torch.equal(copied[name], trained[name]) for name in copied)


def test_a_killed_training_goes_on_to_the_same_bits_and_writes_every_snapshot(here: Path) -> None:
    flags = f"--transfer base.safetensors --augment 0 --dropout 0.1 --state_every 0.000001 {TINY_RUN} --outdir"
    assert len(training_goes_on(run_finetune, flags, killed_after=2)) == 3


def test_a_network_is_trained_from_scratch_with_augmentation(here: Path) -> None:
    flags = f"{TINY_RUN.replace('0.000064', '0.0016')} --outdir run --cond --cbase 8 --cres 1 1 --num_blocks 1"
    assert run_finetune(f"{flags} --attn_resolutions 4 --augment 0.12 --dropout 0 --lr 2e-3") == 0
    found = losses("run")
    assert sum(found[-20:]) < 0.7 * sum(found[:20])
    last = sorted(Path("run").glob("snapshot*"))[-1]
    model = load_model(last)
    assert model.num_classes == 3 and model.config["network"]["augment_dim"] == 9
    assert run_sample(f"--network_pkl {last} --outdir out --seeds 0-3 {SAMPLER}") == 0


# What can be wrong with a request


SAMPLE = "--network_pkl base.pkl --outdir out"
SCORE = "--network_pkl base.pkl --seeds 0-19"
TRAIN = f"--outdir out {TINY_RUN}"


@pytest.mark.parametrize(
    ("run", "flags", "message"),
    [
        (run_sample, f"{SAMPLE} --seeds 5-1", "--seeds 5-1: the range 5-1 runs backwards"),
        (run_sample, f"{SAMPLE} --seeds a", "--seeds a: 'a' is no seed"),
        (run_sample, f"{SAMPLE} --seeds 1,1", "named twice"),
        (run_sample, f"{SAMPLE} --num_steps 1", "num_steps is 1; expected at least 2"),
        (run_sample, f"{SAMPLE} --num_steps x", "num"),
        (run_sample, f"{SAMPLE} --sigma_min 5 --sigma_max 2", "expected 0 < sigma_min < sigma_max"),
        (run_sample, f"{SAMPLE} --disc ve --sigma_min 200", "expected 0 < sigma_min < sigma_max"),
        (run_sample, f"{SAMPLE} --class 3", "--class 3: out of range; the network knows classes 0 to 2"),
        (run_sample, "--network_pkl unconditional.safetensors --outdir out --class 0", "the network is unconditional"),
        (run_sample, "--network_pkl missing.pkl --outdir out", "missing.pkl: no such file"),
        (run_sample, f"{SAMPLE} --batch 0", "expected at least 1"),
        (run_sample, f"{SAMPLE} --device cuda", "needs a GPU of its own and there are 0"),
        (run_sample, f"{SAMPLE} --gnet tuned.pkl", "--gnet and --gnet_scale go together"),
        (run_sample, f"{SAMPLE} --gnet unconditional.safetensors --gnet_scale 1", "expected networks of the same data"),
        (run_sample, f"{SAMPLE} --gnet tuned.pkl --gnet_scale nan", "--gnet_scale nan: expected a finite number"),
        (run_sample, f"{SAMPLE} --gnet a --gnet_scale 1 --self_trained b --sims 1", "leave one of them out"),
        (run_sample, f"{SAMPLE} --sims 1", "--sims: needs the second network; name it with --self_trained"),
        (run_sample, f"{SAMPLE} --self_trained tuned.pkl", "--self_trained: add --sims G"),
        (run_sample, f"{SAMPLE} --self_trained_key ema", "--self_trained_key: goes with --self_trained"),
        (run_sample, f"{SAMPLE} --self_trained tuned.pkl --sims inf", "--sims inf: expected a finite number"),
        (run_sample, f"{SAMPLE} --self_trained wide.safetensors --sims 1", "wide.safetensors"),
        (run_sample, "--network_pkl base.pkl --outdir real", "no run of ours"),
        (run_fid, f"{SCORE} --ref missing.npz", "missing.npz: no such file"),
        (run_fid, f"{SCORE} --ref wide.npz", "wide.npz: statistics of 7 features, but tiny6 has 6"),
        (run_fid, f"{SCORE} --ref keys.npz", "no array mu or sigma"),
        (run_fid, f"{SCORE} --w 1", "name it with --self_trained"),
        (run_fid, f"{SCORE} --self_trained tuned.pkl", "add --w"),
        (run_fid, f"{SCORE} --self_trained tuned.pkl --w one", "--w one: not a number"),
        (run_fid, f"{SCORE} --self_trained wide.safetensors --w 1", "wide.safetensors"),
        (run_fid, f"{SCORE} --self_trained tuned.pkl --w 1 --sims 1", "--w and --sims: one merges the weights"),
        (run_fid, f"{SCORE} --sims 1", "--sims: needs the second network; name it with --self_trained"),
        (run_fid, f"{SCORE} --self_trained tuned.pkl --sims nan", "--sims nan: expected a finite number"),
        (run_fid, f"{SCORE} --self_trained tuned.pkl --sims 1 1.0", "--sims 1 1.0: a value is given twice"),
        (run_fid, f"{SCORE} --self_trained wide.safetensors --sims 1", "wide.safetensors"),
        (run_fid, f"{SCORE} --precision_recall mixed", "expected images of one size"),
        (run_fid, f"{SCORE} --precision_recall corrupt", "00000004.png cannot be read as an image"),
        (run_fid, f"{SCORE} --precision_recall real --nearest_k 60", "k must be in 1..N-1"),
        (run_fid, f"{SCORE} --features base.pkl", "not a feature network"),
        (run_fid, f"{SCORE} --class -1", "out of range"),
        (run_finetune, f"{TRAIN} --transfer base.pkl --preset ffhq", "--preset ffhq: is of a unconditional network"),
        (run_finetune, f"{TRAIN} --preset ffhq", "--transfer"),
        (run_finetune, f"{TRAIN} --transfer base.pkl --augment 0.1", "--augment 0"),
        (run_finetune, f"{TRAIN} --transfer base.pkl --augment 2", "expected a probability"),
        (run_finetune, f"{TRAIN} --transfer base.pkl --augment 0 --lr 0", "--lr 0.0: expected a positive number"),
        (run_finetune, f"{TRAIN} --transfer base.pkl --augment 0 --batch_gpu 3", "micro-batches of 3"),
        (run_finetune, f"{TRAIN} --cond --cbase 7 --cres 1 --augment 0", "14 channels cannot be normalised"),
        (run_finetune, f"{TRAIN.replace('real', 'mixed')} --augment 0", "expected images of one size"),
    ],
)  # fmt: skip
def test_a_wrong_request_is_one_line_and_leaves_nothing(
    here: Path, capsys: pytest.CaptureFixture[str], run: Callable[[str], int], flags: str, message: str
) -> None:
    if "cuda" in flags and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    Statistics.from_features(torch.rand(20, 7)).save("wide.npz")
    np.savez("keys.npz", mean=np.zeros(3))
    refused(run(flags), message, here, capsys)


def test_seed_lists_are_read_as_published() -> None:
    assert seed_list("1,2,5-10") == [1, 2, 5, 6, 7, 8, 9, 10]
    for wrong in ("", "1,", "1-", "-3", "1--2", "0x1", "1.5"):
        with pytest.raises(RequestError, match="--seeds"):
            seed_list(wrong)


def test_the_published_command_runs_as_typed_under_torchrun(here: Path) -> None:
    """Only the number of processes, paths, seeds and the feature network differ from the published line."""
    command = (
        f"{ROOT}/edm/calculate_fid.py --network_pkl base.pkl --ref real.npz "
        "--seeds 0-9 --max_batch_size 256 --num_steps 18 --features features.safetensors --json scores.json"
    )
    ends_with_score(torchrun(1, command, here, f"{ROOT / 'edm'}:{ROOT}"))


# Processes


@pytest.fixture(scope="module")
def runs(files: Path, tmp_path_factory: pytest.TempPathFactory, workers: Workers) -> dict[int, Path]:
    """What the programs leave behind with 1, 2 and 3 processes of one thread each, and what they say."""
    return in_worlds("edm_driver", files, tmp_path_factory, workers)


@pytest.mark.parametrize("world_size", [2, 3])
def test_the_number_of_processes_changes_no_image_no_score_and_no_weight(
    runs: dict[int, Path], world_size: int
) -> None:
    one, many = runs[1], runs[world_size]
    same_files(one, many, "set/*.png", "set/dataset.json", "training/*snapshot*")
    assert len([*one.glob("set/*.png")]) == 13 and len([*one.glob("training/*snapshot*")]) == 4
    same_scores(one, many, "precision", "recall", "density", "coverage")


@pytest.mark.parametrize("world_size", [2, 3])
def test_gradients_summed_in_any_order_differ_by_rounding(runs: dict[int, Path], world_size: int) -> None:
    one, many = (load_state(next((runs[n] / "summed").glob("snapshot*"))) for n in (1, world_size))
    moved = load_state(next((runs[1] / "training").glob("snapshot*")))
    for name in one:
        if "qkv.bias" not in name:  # the gradient of a key's bias is zero but for rounding
            torch.testing.assert_close(one[name], many[name], rtol=0, atol=2e-6)
    assert any(not torch.equal(one[name], moved[name]) for name in one)


def test_what_one_process_finds_wrong_is_said_once_and_ends_all(runs: dict[int, Path]) -> None:
    for out in runs.values():
        lines = [line for line in (out / "stderr").read_text().splitlines() if "cannot be read as an image" in line]
        assert len(lines) == 1 and "00000004.png" in lines[0]
        assert not [path for path in (out / "wrong").rglob("*") if path.is_file()]


def refused_in_every_process(flags: str) -> None:
    assert run_program(sample.SampleEDM, flags.split()) == 2


def test_more_processes_than_images_are_refused_in_one_line(files: Path, tmp_path: Path, workers: Workers) -> None:
    flags = f"--network_pkl {files}/base.pkl --outdir out --seeds 5 {SAMPLER} --device cpu"
    workers.run("tests.test_edm_programs:refused_in_every_process", flags, folder=tmp_path, world_size=2)
    assert not (tmp_path / "out").exists()
    [line] = (tmp_path / "stderr").read_text().splitlines()
    assert "2 processes for 1 images" in line


def test_a_signal_to_one_process_stops_all_of_them(tmp_path: Path, workers: Workers) -> None:
    workers.run("tests.test_signals:stop_one_of_two", str(tmp_path / "run"), folder=tmp_path, world_size=2)
    assert "train: stopped; the same command goes on from step 3 of 12\n" in (tmp_path / "stderr").read_text()
    assert torch.load(tmp_path / "run" / "training-state.pt")["step"] == 3
