"""A self-training moves the weights, however small its budget, and says how far: through every door."""

import dataclasses
import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from imm.recipe import IMMRecipe
from neon.checkpoint import load_state, open_checkpoint
from neon.cli import app
from neon.data.images import ArrayDataset
from neon.merge import LEAST_CHANGE
from neon.model import architecture, load_model, save_model
from neon.recipe import Recipe, beta_of, halflife_of
from neon.selftrain import Snapshot
from tests import pickles
from tests.pickles import write_imm_pickle
from tests.programs import log, work_in, write_real
from tests.test_help import program, run
from tests.test_own_model import CONFIG, FLOW
from tests.tiny import (
    save_sd_vae,
    tiny_colour_images,
    tiny_edm,
    tiny_images,
    tiny_imm,
    tiny_tokenizer,
    tiny_vae,
    tiny_var,
    tiny_xar,
)
from VAR.recipe import VARRecipe
from xAR.recipe import XARRecipe

EDM_RECIPE = Recipe(lr_rampup_kimg=10_000, ema_halflife_kimg=500, budget_images=6_000_000)
PUBLISHED: dict[str, tuple[Recipe, int]] = {
    "EDM": (EDM_RECIPE, 6_000_000),
    "VAR": (VARRecipe(), 7_500_000),
    "xAR": (XARRecipe(), 7_500_000),
    "IMM": (IMMRecipe(), 6_042_112),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_recipe_is_the_published_one_from_the_published_budget_on(name: str) -> None:
    recipe, budget = PUBLISHED[name]
    assert recipe.budget_images == budget
    assert recipe.scaled_to(budget) is recipe and recipe.scaled_to(2 * budget) is recipe


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_shorter_run_gets_the_same_shares_of_ramp_and_average(name: str) -> None:
    recipe, budget = PUBLISHED[name]
    for share in (0.5, 1e-3):
        short = recipe.scaled_to(round(share * budget))
        assert short.rampup_kimg == pytest.approx(share * recipe.rampup_kimg, rel=0.01)
        if recipe.halflife_kimg is None:
            assert short.halflife_kimg is None
        else:
            assert short.halflife_kimg == pytest.approx(share * recipe.halflife_kimg, rel=0.01)
        for at in (0.1, 0.7, 1.0):
            assert short.lr_at(round(at * share * budget)) == pytest.approx(recipe.lr_at(round(at * budget)), rel=1e-3)


def test_a_recipe_without_a_budget_is_never_scaled() -> None:
    recipe = Recipe(lr_rampup_kimg=10_000, ema_halflife_kimg=500)
    assert recipe.scaled_to(1) is recipe


def test_the_budget_of_a_recipe_does_not_make_another_run_of_it() -> None:
    """So that the states of runs that began before there was one are still theirs."""
    assert EDM_RECIPE.facts() == dataclasses.replace(EDM_RECIPE, budget_images=None).facts()
    assert "budget_images" not in EDM_RECIPE.facts() and "lr_rampup_kimg" in EDM_RECIPE.facts()


def test_decay_per_step_and_half_life_are_two_spellings() -> None:
    assert halflife_of(0.5, 1000) == pytest.approx(1.0)
    assert beta_of(halflife_of(0.9999, 256), 256) == pytest.approx(0.9999)
    assert halflife_of(0.0, 8) is None and beta_of(None, 8) == 0


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the examples of the programs name, tiny."""
    folder = tmp_path_factory.mktemp("files")
    edm = tiny_edm()
    (folder / "base.pkl").write_bytes(pickles.dumps(pickles.snapshot(edm.network, edm.config["network"])))
    torch.save(tiny_var().network.state_dict(), folder / "var_d16.pth")
    torch.save(tiny_tokenizer().state_dict(), folder / "vae.pth")
    torch.save(tiny_xar().network.state_dict(), folder / "xAR-B.pth")
    torch.save({"model": tiny_vae().state_dict()}, folder / "kl.ckpt")
    imm = tiny_imm()
    write_imm_pickle(folder / "imagenet256_ts_a2.pkl", imm.network, imm.config["network"])
    save_sd_vae(folder / "sd")
    small = tiny_colour_images(60)
    large = ArrayDataset(F.interpolate(small.images, scale_factor=2), small.labels, small.path)
    for name, images in (("grey", tiny_images(60)), ("coloured", small), ("large", large)):
        (folder / name).mkdir()
        write_real(folder / name, images)
    return folder


@pytest.fixture
def here(files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with the files in it."""
    return work_in(tmp_path, files, monkeypatch)


IMAGES = "--batch 8 --total_images 64"
EXAMPLES = {
    "edm/finetune.py": ("grey/real", "--batch 8 --duration 0.000064 --augment 0"),
    "VAR/finetune.py": ("coloured/real", f"{IMAGES} --vae_ckpt vae.pth"),
    "xAR/finetune.py": ("coloured/real", f"{IMAGES} --vae_path kl.ckpt"),
    "imm/finetune.py": ("large/real", f"{IMAGES} --vae_path sd"),
}
"""images of the size that the tiny network makes, and what makes the example short"""


def example(name: str) -> list[str]:
    """The words of the example in the help of a program, less its name."""
    text = " ".join((program(name).__doc__ or "").split())
    words = shlex.split(re.search(r"Example: (.*)$", text)[1])  # type: ignore[index]
    return words[words.index(name) + 1 :]


def finetune(name: str, more: str = "", out: str = "run") -> int:
    """Run the example of a program on few images, into the folder `out`."""
    images, short = EXAMPLES[name]
    words = [*example(name), *short.split(), "--device", "cpu", *more.split()]
    for flag, value in (("--data", images), ("--outdir", out)):
        words[words.index(flag) + 1] = value
    return run(name, *words)


def moved(base: str, folder: str = "run", **kind: Any) -> float:
    """|theta_s - theta_r| / |theta_r| of the last snapshot in a folder, computed here."""
    last = load_state(max(Path(folder).glob("snapshot-*.safetensors")))
    before = {name: p.double() for name, p in load_model(base, **kind).network.named_parameters()}
    difference = sum((last[name].double() - p).square().sum() for name, p in before.items())
    return float((difference / sum(p.square().sum() for p in before.values())).sqrt())


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_example_of_a_program_moves_the_weights_and_says_how_far(
    here: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    assert finetune(name) == 0
    shown = capsys.readouterr()
    [line] = [line for line in shown.out.splitlines() if line.startswith("64 of the published ")]
    assert ("(--lr_rampup)" in line) == (name != "imm/finetune.py") and ("(--ema)" in line) == (name[:3] != "VAR")
    words = example(name)
    found = moved(next(words[at + 1] for at, word in enumerate(words) if word in BASES))
    assert found > LEAST_CHANGE and "warning: run/" not in shown.err
    [told] = re.findall(r"^moved ([\d.e+-]+)", shown.out, re.MULTILINE)
    assert float(told) == pytest.approx(found, rel=0.05)
    assert log("run")[-1]["moved"] == pytest.approx(float(told), rel=0.01)
    with open_checkpoint(max(Path("run").glob("snapshot-*"))) as snapshot:
        assert float(snapshot.metadata["moved"]) == pytest.approx(float(told), rel=0.01)


BASES = ("--transfer", "--var_ckpt", "--model_ckpt", "--network_pkl")


@pytest.mark.parametrize(
    ("name", "flags", "expected"),
    [
        ("edm/finetune.py", "--lr_rampup 0.00002 --ema 0.0001", {"lr_rampup_kimg": 0.02, "ema_halflife_kimg": 0.1}),
        ("edm/finetune.py", "--lr_rampup 0 --ema 0", {"lr_rampup_kimg": 0.0, "ema_halflife_kimg": None}),
        ("VAR/finetune.py", "--lr_rampup 0.02 --lr 1e-3", {"total_images": 20, "lr": 1e-3}),
        ("VAR/finetune.py", "--constant_lr --ema 0.1", {"total_images": 0, "ema_halflife_kimg": 0.1}),
        ("xAR/finetune.py", "--warmup_epochs 3 --ema_rate 0.9", {"warmup_epochs": 3.0, "ema_rate": 0.9}),
        ("xAR/finetune.py", "--lr_rampup 0.112 --ema 0.008", {"warmup_epochs": 2.0, "ema_rate": 0.5}),
        ("imm/finetune.py", "--ema_beta 0.9 --lr_rampup 0.02", {"ema_beta": 0.9, "lr_rampup_kimg": 0.02}),
        ("imm/finetune.py", "--ema 0", {"ema_beta": 0.0}),
    ],
)
def test_ramp_and_average_that_are_given_are_taken_as_they_are(
    here: Path, capsys: pytest.CaptureFixture[str], name: str, flags: str, expected: dict[str, Any]
) -> None:
    assert finetune(name, flags) == 0
    recipe = json.loads(Path("run/run.json").read_text())["recipe"]
    assert {field: recipe[field] for field in expected} == pytest.approx(expected)
    line = next((line for line in capsys.readouterr().out.splitlines() if "of the published" in line), "")
    for flag in ("--lr_rampup", "--ema"):
        assert flag not in line or flag not in flags


def test_the_generic_door_shortens_too_and_takes_the_same_flags(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_model("edm.safetensors", tiny_edm())
    command = "selftrain --network edm.safetensors --data grey/real --batch 8 --total_images 64 --device cpu --outdir"
    assert app.main([*command.split(), "short"]) == 0
    out = capsys.readouterr().out
    assert "64 of the published 6,000,000 images: the learning rate rises over 107 images instead of 10,000,000" in out
    assert moved("edm.safetensors", "short") > 1e-3
    assert app.main([*command.split(), "given", "--lr_rampup", "0.02", "--ema", "0"]) == 0
    assert "of the published" not in capsys.readouterr().out
    recipe = json.loads(Path("given/run.json").read_text())["recipe"]
    assert (recipe["lr_rampup_kimg"], recipe["ema_halflife_kimg"]) == (0.02, None)


def test_a_model_of_your_own_keeps_its_constants_unless_they_have_a_budget(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_model("flow.safetensors", architecture(FLOW)({**CONFIG, "image_shape": [1, 8, 8]}))
    command = f"selftrain --model {FLOW} --network flow.safetensors --data grey/real --batch 8 --total_images 32 "
    assert app.main(f"{command} --outdir run --device cpu".split()) == 0
    out = capsys.readouterr().out
    assert "of the published" not in out and moved("flow.safetensors", kind=FLOW) > LEAST_CHANGE


def test_weights_that_stay_are_told_with_the_flags_that_move_them(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert finetune("edm/finetune.py", "--lr 1e-9") == 0
    [line] = [line for line in capsys.readouterr().err.splitlines() if "warning: run/" in line]
    assert "raise --duration or --lr, or lower --lr_rampup and --ema" in line


def test_a_finished_run_says_again_how_far_it_moved(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):
        assert finetune("VAR/finetune.py") == 0
    first, second = re.findall(r"^moved .*$", capsys.readouterr().out, re.MULTILINE)
    assert first == second


def test_a_snapshot_that_does_not_say_how_far_it_moved_says_none(tmp_path: Path) -> None:
    save_model(tmp_path / "old.safetensors", tiny_edm())
    assert Snapshot(images_seen=8, path=tmp_path / "old.safetensors").moved() is None


@pytest.mark.parametrize(
    ("name", "flags", "message"),
    [
        ("edm/finetune.py", "--lr_rampup -1", "--lr_rampup -1.0: expected 0 (none) or more"),
        ("imm/finetune.py", "--ema inf", "--ema inf: expected 0 (none) or more"),
        ("VAR/finetune.py", "--constant_lr --lr_rampup 1", "--constant_lr and --lr_rampup: both say the same"),
        ("xAR/finetune.py", "--warmup_epochs 1 --lr_rampup 1", "--warmup_epochs and --lr_rampup: both say the same"),
        ("xAR/finetune.py", "--ema_rate 0.9 --ema 1", "--ema_rate and --ema: both say the same"),
        ("imm/finetune.py", "--ema_rate 0.9 --ema 1", "--ema_rate and --ema: both say the same"),
        ("edm/finetune.py", "--batch_gpu 0", "in micro-batches of 0: expected the micro-batch to divide the batch"),
        ("edm/finetune.py", "--duration inf", "--duration inf: expected a positive number"),
        ("edm/finetune.py", "--duration 1e-9", "--duration 1e-09: is less than an image"),
        ("edm/finetune.py", "--dropout 2", "--dropout 2.0: expected 0 to 1"),
        ("edm/finetune.py", "--ls 0", "--ls 0.0: expected a positive number"),
        ("VAR/finetune.py", "--weight_decay -1", "--weight_decay -1.0: expected 0 or more"),
        ("xAR/finetune.py", "--attn_dropout 2", "--attn_dropout 2.0: expected 0 to 1"),
        ("xAR/finetune.py", "--grad_clip nan", "--grad_clip nan: expected a positive number"),
        ("imm/finetune.py", "--label_dropout -1", "--label_dropout -1.0: expected 0 to 1"),
        ("imm/finetune.py", "--a nan", "a is nan; expected a finite number"),
        ("imm/finetune.py", "--matrix_size 0", "--matrix_size 0: expected at least 1"),
        # A network from scratch, beside a base that is another
        ("edm/finetune.py", "--arch adm", "--arch adm: is of a network from scratch, and base.pkl is built with"),
        ("edm/finetune.py", "--cres 1,2", "--cres 1 2: is of a network from scratch, and base.pkl is built with"),
        ("edm/finetune.py", "--fp16", "--fp16 True: is of a network from scratch"),
        ("edm/finetune.py", "--cond=0", "--cond False: is of a network from scratch, and base.pkl is built with True"),
        ("VAR/finetune.py", "--depth 16", "--depth 16: is of a network from scratch, and var_d16.pth is built with 2"),
        ("VAR/finetune.py", "--saln", "--shared_adaln True: is of a network from scratch"),
        ("xAR/finetune.py", "--pixel_patch 2", "--pixel_patch 2: is of a network from scratch"),
        ("xAR/finetune.py", "--grid 16", "--grid 16: is of a network from scratch, and xAR-B.pth is built with 4"),
        ("imm/finetune.py", "--model SongUNet", "--model SongUNet: is of a network from scratch"),
        ("imm/finetune.py", "--width 384", "--width 384: is of a network from scratch"),
        ("imm/finetune.py", "--channel_mult 1 1", "--channel_mult 1 1: is of a network from scratch"),
    ],
)
def test_what_cannot_be_meant_is_refused_in_one_line(
    here: Path, capsys: pytest.CaptureFixture[str], name: str, flags: str, message: str
) -> None:
    assert finetune(name, flags) == 2
    [line] = capsys.readouterr().err.splitlines()[-1:]
    assert message in line
    assert not list(here.rglob("*snapshot*"))


@pytest.mark.parametrize(
    ("name", "flags"),
    [
        ("edm/finetune.py", "--cond=1 --arch=ddpmpp --precond=edm --cbase=8 --cres=1,1 --fp16=0 --num_blocks 1"),
        ("VAR/finetune.py", "--depth=2 --saln=0 --patch_nums 1 2 4"),
        ("xAR/finetune.py", "--width 32 --depth 1"),
        ("imm/finetune.py", "--model DiT --width 64 --heads 1 --dropout 0"),
    ],
)
def test_flags_that_say_what_the_base_is_are_let_pass(here: Path, name: str, flags: str) -> None:
    """As the published commands have them."""
    assert finetune(name, f"{flags} --batch_gpu 4") == 0


@pytest.mark.parametrize(
    ("name", "flags", "message"),
    [
        ("xAR/finetune.py", "--model xar_small --width 64 --vae_path kl.ckpt", "--width: --model xar_small says it"),
        ("imm/finetune.py", "--model SongUNet --heads 2", "--heads: a network SongUNet takes none"),
        ("edm/finetune.py", "--cbase 0", "no such network can be built"),
        ("imm/finetune.py", "--model DiT_S_8 --depth 2", "--depth: a network DiT_S_8 takes none"),
    ],
)
def test_sizes_without_effect_are_refused(
    here: Path, capsys: pytest.CaptureFixture[str], name: str, flags: str, message: str
) -> None:
    assert run(name, *f"--data coloured/real --outdir run {flags}".split()) == 2
    assert message in capsys.readouterr().err
