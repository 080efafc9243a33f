"""Images in shards: what `neon sample --format shards` writes, all commands read as they read the same PNG files."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from neon import sampling
from neon.checkpoint import load_state
from neon.cli.app import main
from neon.data.encoded import INDEX_FILE, shard_name, write_index, write_shard
from neon.data.images import TrainingImages
from neon.data.shards import IMAGES, ImageShards, open_images, write_image_shards
from neon.errors import RequestError
from neon.runtime.distributed import Processes
from tests.programs import Killed, dies_after, write_pair
from tests.tiny import tiny_colour_images

SAMPLE = "sample --network base.safetensors --num_images 21 --batch_size 8 --num_steps 2 --device cpu --outdir"


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base and real images, and the same synthetic set as files and in shards."""
    folder = tmp_path_factory.mktemp("shards")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        write_pair(folder)
        assert main([*SAMPLE.split(), "png"]) == 0
        with dies_after(2, sampling, "sample_block"), pytest.raises(Killed):
            main([*SAMPLE.split(), "shards", "--format", "shards"])
        assert not Path("shards", INDEX_FILE).exists()
        with dies_after(1, sampling, "sample_block"):
            assert main([*SAMPLE.split(), "shards", "--format", "shards"]) == 0
    return folder


def test_shards_hold_the_images_of_files_laid_out_alike(work: Path) -> None:
    files, shards = open_images(work / "png"), open_images(work / "shards")
    assert isinstance(shards, ImageShards) and len(shards) == 21 and shards.image_shape == files.image_shape
    same(shards, files, [20, 3, 3, 9])
    assert shards.sampler == files.sampler is not None
    colours = tiny_colour_images(9)

    def compute(block: range) -> tuple[torch.Tensor, None]:
        return colours.images[block.start : block.stop], None

    write_image_shards(
        compute, 9, work / "colours", image_shape=colours.image_shape, batch_size=4, processes=Processes(), title=""
    )
    found = open_images(work / "colours")
    assert torch.equal(found.examples(range(9)), colours.images) and found.labels is None and found.texts is None
    assert found.examples([1, 2]).is_contiguous(memory_format=torch.channels_last)


def same(a: TrainingImages, b: TrainingImages, indices: list[int]) -> None:
    for one, other in zip(a.load(indices), b.load(indices), strict=True):
        assert one is not None and other is not None
        assert torch.equal(one, other) and one.stride() == other.stride()


def test_commands_read_both_alike(
    work: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(work)
    scores = []
    for images in ("png", "shards"):
        assert main(f"fid {images} real --features features.safetensors --precision_recall --device cpu".split()) == 0
        scores.append(capsys.readouterr().out.splitlines()[-1])
        training = f"selftrain --network base.safetensors --data {images} --outdir self-{images} --total_images 16"
        assert main([*training.split(), "--batch", "8", "--device", "cpu"]) == 0
    assert scores[0] == scores[1]
    first, second = (load_state(next(Path(f"self-{images}").glob("snapshot*"))) for images in ("png", "shards"))
    assert all(torch.equal(first[name], second[name]) for name in first)
    capsys.readouterr()
    assert main([*SAMPLE.split(), "shards"]) == 2
    assert "format is 'shards', now None" in capsys.readouterr().err
    assert main([*SAMPLE.split(), "set.zip", "--format", "shards"]) == 2
    assert "set.zip: shards are kept in a folder; leave .zip off" in capsys.readouterr().err


def test_prompts_are_kept_beside_shards(tmp_path: Path) -> None:
    def compute(block: range) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.zeros(len(block), 3, 8, 8, dtype=torch.uint8), torch.tensor(list(block))

    write_image_shards(
        compute, 3, tmp_path, texts=["a cat", "a dog", "a cat"], image_shape=(3, 8, 8), batch_size=2,
        processes=Processes(), title="",
    )  # fmt: skip
    assert ImageShards(tmp_path).texts == ["a cat", "a dog", "a cat"]
    for text, message in (("[]\n", "has no file_name"), ("", "no text for '00000000.png'")):
        (tmp_path / "metadata.jsonl").write_text(text)
        with pytest.raises(RequestError, match=rf"metadata\.jsonl: .*{message}"):
            _ = ImageShards(tmp_path).texts


HOSTILE: dict[str, Callable[[Path], object]] = {
    "holds no images|expected images": lambda folder: write_index(folder, [range(2)], (3, 8, 8), "VAR tokens"),
    "torch.float32.*expected images, uint8": lambda folder: write_shard(folder, 0, torch.zeros(2, 8, 8, 3), None),
    r"\[8, 8, 4\]; expected images": lambda folder: write_shard(folder, 0, pixels(8, 8, 4), None),
    r"\[3, 8, 8\]; expected images": lambda folder: write_shard(folder, 0, pixels(3, 8, 8), None),
    "not the 2 examples": lambda folder: write_shard(folder, 0, pixels(8, 8, 3)[:1], None),
    r"examples-00000000\.safetensors": lambda folder: (folder / shard_name(0)).write_bytes(b"\xff" * 64),
    "not the index": lambda folder: (folder / INDEX_FILE).write_text('{"kind": "images"}'),
}


def pixels(*shape: int) -> torch.Tensor:
    return torch.zeros(2, *shape, dtype=torch.uint8)


@pytest.mark.parametrize("message", HOSTILE)
def test_shards_that_hold_something_else_are_refused(tmp_path: Path, message: str) -> None:
    write_shard(tmp_path, 0, pixels(8, 8, 3), None)
    write_index(tmp_path, [range(2)], (3, 8, 8), IMAGES)
    assert len(open_images(tmp_path)) == 2
    HOSTILE[message](tmp_path)
    with pytest.raises(RequestError, match=message):
        open_images(tmp_path)


def test_a_shard_that_was_cut_off_since_is_named(tmp_path: Path) -> None:
    write_shard(tmp_path, 0, pixels(8, 8, 3), None)
    write_index(tmp_path, [range(2)], (3, 8, 8), IMAGES)
    images, file = open_images(tmp_path), tmp_path / shard_name(0)
    file.write_bytes(file.read_bytes()[:-10])
    assert images.examples([0]).shape == (1, 3, 8, 8)
    with pytest.raises(RequestError, match=r"examples-00000000\.safetensors: cannot be read any more \(it ends early"):
        images.examples([1])
