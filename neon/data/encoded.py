"""Sets of encoded images on disk (tokens, latents): what training consumes, without the encoder's work.

A set is a folder of safetensors shards, each with `examples` [n, ...] and, if there are classes, `labels` [n],
and `examples.json`, written last, which lists them. Token sets take about a hundredth of the space of PNGs.
"""

import contextlib
import json
import os
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from neon.checkpoint import open_checkpoint, save_safetensors
from neon.data.fingerprint import fingerprint
from neon.data.images import ImageDataset, TrainingImages
from neon.errors import RequestError
from neon.runtime.blocks import write_blocks
from neon.runtime.distributed import Processes
from neon.runtime.files import write_json
from neon.runtime.run_folder import run_folder

INDEX_FILE = "examples.json"
OPEN_SHARDS = 64
"""shards kept open; a system allows about a thousand files"""


def shard_name(first: int) -> str:
    """The file of the examples from index `first` on."""
    return f"examples-{first:08d}.safetensors"


def write_shard(folder: str | os.PathLike[str], first: int, examples: Tensor, labels: Tensor | None) -> None:
    """Write consecutive examples [n, ...] and their classes (int64 [n]) from index `first` on, atomically."""
    tensors = {"examples": examples} if labels is None else {"examples": examples, "labels": labels}
    save_safetensors(Path(folder) / shard_name(first), tensors, {})


def write_index(
    folder: str | os.PathLike[str], shards: Sequence[range], image_shape: tuple[int, int, int], kind: str
) -> None:
    """Write `examples.json`; its presence says that the set is complete. `kind` names what the examples are."""
    entries = [{"file": shard_name(shard.start), "count": len(shard)} for shard in shards]
    write_json(Path(folder) / INDEX_FILE, {"kind": kind, "image_shape": image_shape, "shards": entries})


def write_examples(
    compute: Callable[[range], tuple[Tensor, Tensor | None]],
    num_examples: int,
    folder: str | os.PathLike[str],
    *,
    kind: str,
    image_shape: tuple[int, int, int],
    batch_size: int,
    processes: Processes,
    title: str,
) -> None:
    """Write a set, over all processes: `compute` gives (examples [B, ...], labels int64 [B] or None) of a block.

    Shards that are on the disk already are not computed again, so a killed run goes on where it was.
    """
    folder = Path(folder)
    every = write_blocks(
        lambda block: write_shard(folder, block.start, *compute(block)),
        num_examples,
        batch_size=batch_size,
        processes=processes,
        title=title,
        is_written=lambda block: (folder / shard_name(block.start)).exists(),
    )
    processes.on_main(lambda: write_index(folder, every, image_shape, kind))


def encode_set(
    encode: Callable[[Tensor], Tensor],
    dataset: TrainingImages,
    folder: str | os.PathLike[str],
    *,
    kind: str,
    image_shape: tuple[int, int, int],
    batch_size: int,
    processes: Processes,
    identity: dict[str, Any],
    fresh: bool,
) -> None:
    """Encode all images of `dataset` into a set: `encode` takes uint8 [B, C, H, W] on the device of the process.

    `identity` is what the result is determined by, beside the images.

    Raises:
        RequestError: the images have another shape, or `folder` holds something else.
    """
    if tuple(dataset.image_shape) != image_shape:
        raise RequestError(f"{dataset.path}: images are {dataset.image_shape} (C, H, W); expected {image_shape}")

    def compute(block: range) -> tuple[Tensor, Tensor | None]:
        images, labels = dataset.load(block)
        with torch.no_grad():
            return encode(images.to(processes.device)), labels

    record = {**identity, "data": str(dataset.path), "batch_size": batch_size, "kind": kind}

    def hold_folder() -> None:
        record["data_fingerprint"] = fingerprint(dataset.path)
        stack.enter_context(run_folder(folder, record, fresh=fresh))

    with contextlib.ExitStack() as stack:
        processes.on_main(hold_folder)
        write_examples(
            compute,
            len(dataset),
            folder,
            kind=kind,
            image_shape=image_shape,
            batch_size=batch_size,
            processes=processes,
            title="encoding",
        )


def is_example_set(path: str | os.PathLike[str]) -> bool:
    """Whether `path` is a folder of encoded images."""
    return (Path(path) / INDEX_FILE).is_file()


class ExampleSet:
    """Encoded images of a folder, read from its shards as they are asked for.

    Raises:
        RequestError: the index or a shard is missing or does not fit.
    """

    encoded = True

    def __init__(self, path: str | os.PathLike[str], kind: str) -> None:
        """Open the set; `kind` is what the model trains on."""
        self.path = Path(path)
        index = self._read_index()
        if index["kind"] != kind:
            raise RequestError(f"{self.path}: a set of {index['kind']}; this model trains on {kind}, or on images")
        channels, height, width = index["image_shape"]
        self.image_shape = (channels, height, width)
        labels, starts = [], [0]
        for entry in index["shards"]:
            file = self.path / entry["file"]
            with open_checkpoint(file) as shard:
                if "examples" not in shard.specs or shard.shape("examples")[:1] != (entry["count"],):
                    raise RequestError(f"{file}: not the {entry['count']} examples that {INDEX_FILE} promises")
                if "labels" in shard.specs:
                    labels.append(shard.tensor("labels"))
            starts.append(starts[-1] + entry["count"])
        self._files, self._starts = [entry["file"] for entry in index["shards"]], np.array(starts)
        self._open = lru_cache(OPEN_SHARDS)(lambda shard: safe_open(self.path / self._files[shard], framework="pt"))
        self.labels = torch.cat(labels) if labels else None
        if self.labels is not None and len(self.labels) != len(self):
            raise RequestError(f"{self.path}: {len(self.labels)} labels for {len(self)} examples")

    def __len__(self) -> int:
        return int(self._starts[-1])

    def load(self, indices: Sequence[int]) -> tuple[Tensor, Tensor | None]:
        """(examples [B, ...] as stored, int64 [B] or None) at `indices`."""
        chosen = np.asarray(indices)
        shards = np.searchsorted(self._starts, chosen, side="right") - 1
        rows = [
            self._open(int(shard)).get_slice("examples")[int(row) : int(row) + 1]
            for shard, row in zip(shards, chosen - self._starts[shards], strict=True)
        ]
        return torch.cat(rows), None if self.labels is None else self.labels[torch.as_tensor(chosen)]

    def _read_index(self) -> dict[str, Any]:
        file = self.path / INDEX_FILE
        try:
            index = json.loads(file.read_text())
            if missing := {"kind", "image_shape", "shards"} - index.keys():
                raise ValueError(f"it lacks {sorted(missing)}")
        except FileNotFoundError:
            raise RequestError(f"{file}: no such file; expected a set of encoded images that was finished") from None
        except (ValueError, AttributeError) as error:
            raise RequestError(f"{file}: not the index of a set of encoded images ({error}); make it again") from None
        return index


def images_or_examples(path: Path, kind: str) -> TrainingImages:
    """The set at `path`: encoded examples of a `kind`, or images."""
    return ExampleSet(path, kind) if is_example_set(path) else ImageDataset(path)
