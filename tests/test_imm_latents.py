"""IMM's autoencoder is found, read and checked; sets of latents of every kind hold the same."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from imm.encode import EncodeForIMM
from imm.latents import MOMENTS, LatentSet, open_set
from imm.vae import LatentScale, load_codec, weights_file
from neon.checkpoint import load_state
from neon.cli.command_line import run_program
from neon.data import encoded as examples
from neon.data.encoded import ExampleSet
from neon.data.images import ImageDataset, write_images, write_labels
from neon.errors import RequestError
from neon.nn.autoencoder import decoded_at_once
from tests.programs import ROOT, Killed, dies_after, same_files
from tests.tiny import save_sd_vae, tiny_sd_vae

SAFETENSORS, BIN = "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin"
IMAGES = torch.randint(0, 256, (10, 3, 16, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
SQUARE = IMAGES[..., :16]
LABELS = [3, 1, 2, 0, 3, 1, 0, 2, 1, 0]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny autoencoder, as diffusers writes it."""
    folder = tmp_path_factory.mktemp("vae")
    save_sd_vae(folder)
    return folder


@pytest.fixture
def vae(saved: Path, tmp_path: Path) -> Path:
    """A copy of it that a test may spoil."""
    return shutil.copytree(saved, tmp_path / "vae")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Square images of four classes, as a set."""
    folder = tmp_path_factory.mktemp("images")
    write_images(folder, range(len(SQUARE)), SQUARE)
    write_labels(folder, LABELS, len(SQUARE))
    return folder


@pytest.fixture
def no_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A working directory, and a cache of Hugging Face, with nothing in them."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    yield


def test_the_published_autoencoder_has_the_tensors_of_its_file() -> None:
    from diffusers.models import AutoencoderKL

    manifest = json.loads((ROOT / "tests/golden/imm/manifest_sd_vae.json").read_text())
    meta = manifest.pop("_meta")
    with torch.device("meta"):
        built = AutoencoderKL.from_config(json.loads(meta["note"].partition("config: ")[2])).state_dict()
    assert {name: ([*value.shape], f"{value.dtype}") for name, value in built.items()} == {
        name: (shape, f"torch.{dtype}") for name, (shape, dtype) in manifest.items()
    }
    assert sum(value.numel() for value in built.values()) == meta["total_parameters"]


@torch.no_grad()
def test_images_become_latents_and_images_again() -> None:
    codec = tiny_sd_vae()
    moments = codec.moments(IMAGES)
    draw = torch.randn(10, 4, 2, 4)
    latents = codec.scale.latents(moments, draw)
    decoded = codec.decode(latents)
    assert (moments.shape, latents.shape, codec.downsampling) == ((10, 8, 2, 4), (10, 4, 2, 4), 8)
    assert decoded.shape == IMAGES.shape and decoded.dtype == torch.uint8
    mean, std = moments.chunk(2, dim=1)
    torch.testing.assert_close(LatentScale().raw(latents), mean + std * draw)
    alone = torch.cat([codec.decode(latent[None]) for latent in latents])
    assert (alone.int() - decoded.int()).abs().max() <= 1, "an image depends on its own latent only"


def test_raw_latents_of_imagenet_become_ones_of_half_a_unit() -> None:
    scale, count = LatentScale(), 100_000
    mean, std = (torch.tensor(raw).reshape(1, 4, 1, 1) for raw in (scale.raw_mean, scale.raw_std))
    draw = torch.randn(count, 4, 1, 1, generator=torch.Generator().manual_seed(0))
    latents = scale.latents(torch.cat([mean, std], dim=1), draw)
    assert latents.std(dim=0).sub(0.5).abs().max() < 0.01 and latents.mean(dim=0).abs().max() < 0.01


def test_the_depth_of_an_autoencoder_says_how_far_it_reduces(tmp_path: Path) -> None:
    save_sd_vae(tmp_path, tiny_sd_vae(levels=2))
    codec = load_codec(tmp_path, "cpu")
    assert codec.downsampling == 2 and codec.moments(SQUARE).shape[2:] == (8, 8)


def as_bin(vae: Path) -> None:
    torch.save(load_state(vae / SAFETENSORS), vae / BIN)
    (vae / SAFETENSORS).unlink()


def with_old_names(vae: Path) -> None:
    """As diffusers named the parts of attention when the published file was made."""
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    state = load_state(vae / SAFETENSORS)
    for now, then in old.items():
        state = {name.replace(f".{now}.", f".{then}."): tensor for name, tensor in state.items()}
    assert sum("proj_attn" in name for name in state) == 4
    torch.save(state, vae / BIN)
    (vae / SAFETENSORS).unlink()


def with_another_bin(vae: Path) -> None:
    (vae / BIN).write_bytes(b"not read, because there are safetensors")


def with_a_config_of_its_time(vae: Path) -> None:
    """Without what was added since, and with what was dropped."""
    config = json.loads((vae / "config.json").read_text())
    known = ("block_out_channels", "down_block_types", "up_block_types", "norm_num_groups", "latent_channels")
    dropped = {"_diffusers_version": "0.4.2", "retired": None}
    (vae / "config.json").write_text(json.dumps({name: config[name] for name in known} | dropped))


@pytest.mark.parametrize("change", [as_bin, with_old_names, with_another_bin, with_a_config_of_its_time])
def test_every_spelling_of_the_weights_is_read(vae: Path, change: Callable[[Path], None]) -> None:
    change(vae)
    codec, expected = load_codec(vae, "cpu"), tiny_sd_vae()
    assert torch.equal(codec.moments(IMAGES), expected.moments(IMAGES))
    assert not codec.training and not any(parameter.requires_grad for parameter in codec.parameters())


def test_half_precision_moves_pixels_by_a_level_and_says_nothing(
    saved: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    latents = 0.5 * torch.randn(9, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    whole, half = (load_codec(saved, "cpu", dtype).decode(latents).float() for dtype in (None, torch.float16))
    assert 0 < (whole - half).abs().mean() < 0.2
    assert capfd.readouterr() == ("", "")


class Runs:
    """What a hostile file would do to whoever unpickles it."""

    def __reduce__(self) -> tuple:
        return os.mkdir, ("executed",)


def hostile(vae: Path) -> None:
    torch.save({"encoder.conv_in.weight": Runs()}, vae / BIN)
    (vae / SAFETENSORS).unlink()


def cut_off(vae: Path) -> None:
    (vae / SAFETENSORS).write_bytes((vae / SAFETENSORS).read_bytes()[:-100])


def incomplete(vae: Path) -> None:
    state = load_state(vae / SAFETENSORS)
    del state["quant_conv.bias"]
    torch.save(state, vae / BIN)
    (vae / SAFETENSORS).unlink()


def configured(**changes: object) -> Callable[[Path], None]:
    def change(vae: Path) -> None:
        config = vae / "config.json"
        config.write_text(json.dumps({**json.loads(config.read_text()), **changes}))

    return change


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda vae: (vae / "config.json").unlink(), "found a folder without it; expected the folder of an autoenc"),
        (lambda vae: (vae / "config.json").write_text("<html>"), "config.json: not the config of an autoencoder"),
        (lambda vae: (vae / "config.json").write_text("[]"), "config.json: not the config of an autoencoder"),
        (lambda vae: (vae / "config.json").write_text("[" * 100_000), "config.json: not the config of an autoencoder"),
        (configured(layers_per_block=10**7), "far more tensors"),
        (configured(block_out_channels=[8, 8, 8, 2**40]), "the weights do not fit the model|not the config of"),
        (configured(norm_num_groups=0), "config.json: not the config of an autoencoder"),
        (configured(_class_name="UNet2DModel"), "UNet2DModel with 4 latent channels; expected AutoencoderKL with 4"),
        (configured(latent_channels=16), "AutoencoderKL with 16 latent channels; expected AutoencoderKL with 4"),
        (configured(block_out_channels=[8, 8, 8, 16]), r"the weights do not fit the model .* of another shape"),
        (configured(down_block_types=["Sideways"] * 4), "config.json: not the config of an autoencoder .*Sideways"),
        (lambda vae: (vae / SAFETENSORS).unlink(), "no weights; expected diffusion_pytorch_model.safetensors or"),
        (incomplete, "1 missing: quant_conv.bias"),
        (cut_off, SAFETENSORS),
        (hostile, BIN),
    ],
)  # fmt: skip
def test_a_broken_folder_is_refused_by_name(
    vae: Path, monkeypatch: pytest.MonkeyPatch, spoil: Callable[[Path], None], message: str
) -> None:
    monkeypatch.chdir(vae)
    spoil(vae)
    with pytest.raises(RequestError, match=message):
        load_codec(vae, "cpu")
    assert not Path("executed").exists()


def test_a_file_in_place_of_the_folder_is_refused(vae: Path) -> None:
    with pytest.raises(RequestError, match=f"{SAFETENSORS}: found a file; expected the folder of an autoencoder"):
        weights_file(vae / SAFETENSORS)


@pytest.mark.parametrize("place", ["imm/pretrained", "pretrained", "checkpoints"])
def test_the_autoencoder_is_found_where_it_usually_lies(no_cache: None, vae: Path, place: str) -> None:
    shutil.copytree(vae, f"{place}/sd-vae-ft-ema")
    assert weights_file(None) == Path(place, "sd-vae-ft-ema", SAFETENSORS)


def test_a_missing_autoencoder_is_told_with_the_command_that_fetches_it(no_cache: None) -> None:
    with pytest.raises(RequestError) as raised:
        weights_file(None)
    for said in (
        "looked for imm/pretrained/sd-vae-ft-ema, pretrained/sd-vae-ft-ema, checkpoints/sd-vae-ft-ema, ",
        "hub/models--stabilityai--sd-vae-ft-ema",
        "`hf download stabilityai/sd-vae-ft-ema --local-dir imm/pretrained/sd-vae-ft-ema`",
        "--vae_path",
    ):
        assert said in str(raised.value)


def test_the_cache_of_hugging_face_is_looked_in_and_nothing_slow_imported(vae: Path, tmp_path: Path) -> None:
    cache = tmp_path / "home/hub/models--stabilityai--sd-vae-ft-ema"
    (cache / "refs").mkdir(parents=True)
    (cache / "refs/main").write_text("0123abcd")
    shutil.copytree(vae, cache / "snapshots/0123abcd")
    code = "import sys; from imm.vae import weights_file; print(weights_file(None), 'diffusers' in sys.modules)"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment |= {"HF_HOME": str(tmp_path / "home"), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    found = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert found.stdout.split() == [str(cache / "snapshots/0123abcd" / SAFETENSORS), "False"], found.stderr


def test_a_missing_package_is_told_with_the_command_that_installs_it(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "diffusers.models", None)
    with pytest.raises(RequestError, match=r"needs the package diffusers .* `pip install 'neon-extrapolation\[imm\]'`"):
        load_codec(saved, "cpu")


def publish(latents: torch.Tensor, folder: Path) -> None:
    """Write latents as IMM's own tool does, here a few per subfolder, with LABELS."""
    names = [f"{i // 4:05d}/img-mean-std-{i:08d}.npy" for i in range(len(latents))]
    for name, latent in zip(names, latents.numpy(), strict=True):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        np.save(folder / name, latent)
    (folder / "dataset.json").write_text(
        json.dumps({"labels": [list(pair) for pair in zip(names, LABELS, strict=True)]})
    )


def encode(data: Path, outdir: Path, vae: Path, flags: str = "--img_size 16") -> int:
    words = ["--data", data, "--outdir", outdir, "--vae_path", vae, "--batch_size", "4", "--device", "cpu"]
    return run_program(EncodeForIMM, [*map(str, words), *flags.split()])


def test_published_folders_and_zips_and_our_sets_hold_the_same(images: Path, saved: Path, tmp_path: Path) -> None:
    assert encode(images, tmp_path / "ours", saved) == 0
    ours = ExampleSet(tmp_path / "ours", MOMENTS)
    latents, _ = ours.load(range(len(ours)))
    torch.testing.assert_close(latents, tiny_sd_vae().moments(SQUARE))
    publish(latents, tmp_path / "theirs")
    shutil.make_archive(str(tmp_path / "zipped"), "zip", tmp_path / "theirs")
    for name in ("ours", "theirs", "zipped.zip"):
        found = open_set(tmp_path / name)
        assert len(found) == 10 and found.encoded and found.image_shape == (3, 16, 16)
        assert found.labels is not None and found.labels.tolist() == LABELS
        some, labels = found.load([7, 0, 9])
        assert torch.equal(some, latents[[7, 0, 9]]) and some.dtype == torch.float32
        assert labels is not None and labels.tolist() == [2, 3, 0]


def test_images_are_opened_as_images(images: Path, tmp_path: Path) -> None:
    shutil.make_archive(str(tmp_path / "images"), "zip", images)
    for path in (images, tmp_path / "images.zip"):
        found = open_set(path)
        assert isinstance(found, ImageDataset) and torch.equal(found.load([4])[0], SQUARE[[4]])


def test_subfolders_of_latents_are_no_classes(tmp_path: Path) -> None:
    publish(torch.randn(10, 8, 2, 2), tmp_path)
    (tmp_path / "dataset.json").unlink()
    assert LatentSet(tmp_path).labels is None


SECOND = "00000/img-mean-std-00000001.npy"


def cut_second(folder: Path) -> None:
    (folder / SECOND).write_bytes((folder / SECOND).read_bytes()[:-10])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (cut_second, f"{SECOND} cannot be read as latents"),
        (lambda folder: (folder / SECOND).write_bytes(b""), f"{SECOND} cannot be read as latents"),
        (lambda folder: np.save(folder / SECOND, np.array([Runs()])), f"{SECOND} cannot be read as latents"),
        (lambda folder: np.save(folder / SECOND, np.zeros((8, 2, 2), int)), r"int64 .*, expected float32 \[8, h, w\]"),
        (lambda folder: np.save(folder / SECOND, np.zeros((4, 2, 2))), r"float64 .*\(4, 2, 2\), expected float32 \[8"),
        (lambda folder: np.save(folder / SECOND, np.zeros((8, 2, 3))), r"is \(8, 2, 3\) .* latents of one size"),
        (lambda folder: (folder / "dataset.json").write_text('{"labels": []}'), "no label for 10 of 10 latents"),
    ],
)  # fmt: skip
def test_a_broken_set_of_latents_is_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spoil: Callable[[Path], None], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    publish(torch.randn(10, 8, 2, 2), tmp_path)
    spoil(tmp_path)
    with pytest.raises(RequestError, match=message):
        open_set(tmp_path).load(range(10))
    assert not Path("executed").exists()


def test_what_is_no_set_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for path, message in ((tmp_path / "empty", "expected images"), (tmp_path / "nowhere", "images or latents")):
        with pytest.raises(RequestError, match=message):
            open_set(path)


def test_a_killed_encoding_goes_on(images: Path, saved: Path, tmp_path: Path) -> None:
    assert encode(images, tmp_path / "whole", saved) == 0
    with dies_after(2, examples, "write_shard"), pytest.raises(Killed):
        encode(images, tmp_path / "killed", saved)
    with dies_after(2, examples, "write_shard"):
        assert encode(images, tmp_path / "killed", saved) == 0
    assert len([*(tmp_path / "whole").glob("*.safetensors")]) == 3
    same_files(tmp_path / "whole", tmp_path / "killed", "*.safetensors")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--img_size 32", "images are (3, 16, 16) (C, H, W); expected (3, 32, 32)"),
        ("--img_size 20", "--img_size 20: expected a multiple of 8"),
        ("--img_size 16 --batch_size 0", "--batch_size 0: expected at least 1"),
    ],
)
def test_a_wrong_request_is_one_line_and_leaves_nothing(
    images: Path, saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: str, message: str
) -> None:
    assert encode(images, tmp_path / "out", saved, flags) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("side", "device", "expected"), [(256, "cpu", 8), (256, "cuda", 32), (512, "cuda", 8), (1024, "cuda", 8)]
)
def test_a_gpu_decodes_as_many_images_at_once_as_have_the_same_pixels(side: int, device: str, expected: int) -> None:
    assert decoded_at_once(side, torch.device(device)) == expected
