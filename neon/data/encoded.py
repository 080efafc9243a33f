"""Sets of encoded images on disk (tokens, latents): what training consumes, without the encoder's work.

A set is a folder of safetensors shards, each with `examples` [n, ...] and, if there are classes, `labels` [n],
and `examples.json`, written last, which lists them and tells what drew a synthetic set (`neon.data.sampler`). Token
sets take about a hundredth of the space of PNGs.
"""

import contextlib
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import IO, Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from neon.checkpoint import Checkpoint, open_checkpoint, save_safetensors
from neon.checkpoint.safetensors_format import SafetensorsCheckpoint
from neon.data.fingerprint import fingerprint
from neon.data.images import Labelled, TrainingImages
from neon.data.loading import ReadAhead, usual_workers
from neon.data.sampler import SAMPLER, as_sampler
from neon.data.storage import Storage
from neon.errors import RequestError, reason
from neon.runtime.background import Job, on_host
from neon.runtime.blocks import own_blocks, write_blocks
from neon.runtime.distributed import Processes
from neon.runtime.files import is_file_name, write_json
from neon.runtime.run_folder import held_by_main

INDEX_FILE = "examples.json"
LARGEST_INDEX = 1 << 25
"""bytes of the index: 300,000 shards"""
OPEN_SHARDS = 64
"""shards kept open; a system allows about a thousand files"""


def shard_name(first: int) -> str:
    """The file of the examples from index `first` on."""
    return f"examples-{first:08d}.safetensors"


def write_shard(folder: str | os.PathLike[str], first: int, examples: Tensor, labels: Tensor | None) -> None:
    """Write consecutive examples [n, ...] and their classes (int64 [n]) from index `first` on, atomically."""
    tensors = {"examples": examples} if labels is None else {"examples": examples, "labels": labels}
    save_safetensors(Path(folder) / shard_name(first), tensors, {})


def _has_shard(folder: str | os.PathLike[str], block: range) -> bool:
    return (Path(folder) / shard_name(block.start)).exists()


def write_index(
    folder: str | os.PathLike[str],
    shards: Sequence[range],
    image_shape: tuple[int, int, int],
    kind: str,
    sampler: Mapping[str, Any] | None = None,
) -> None:
    """Write `examples.json`; its presence says that the set is complete.

    `kind` names what the examples are, the record `sampler` what drew a synthetic set.
    """
    entries = [{"file": shard_name(shard.start), "count": len(shard)} for shard in shards]
    drawn_by = {} if sampler is None else {SAMPLER: dict(sampler)}
    write_json(Path(folder) / INDEX_FILE, {"kind": kind, "image_shape": image_shape, **drawn_by, "shards": entries})


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
    sampler: Mapping[str, Any] | None = None,
) -> None:
    """Write a set, over all processes: `compute` gives (examples [B, ...], labels int64 [B] or None) of a block.

    Shards that are on the disk already are not computed again, so a killed run goes on where it was.
    """
    folder = Path(folder)

    def computed(block: range) -> list[Job]:
        examples, labels = (None if each is None else on_host(each) for each in compute(block))
        assert examples is not None
        return [lambda: write_shard(folder, block.start, examples(), None if labels is None else labels())]

    every = write_blocks(
        computed,
        num_examples,
        batch_size=batch_size,
        processes=processes,
        title=title,
        is_written=lambda block: _has_shard(folder, block),
        folder=folder,
    )
    processes.on_main(lambda: write_index(folder, every, image_shape, kind, sampler))


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

    read = ReadAhead(
        dataset.load,
        lambda: [block for block in own_blocks(len(dataset), batch_size, processes) if not _has_shard(folder, block)],
        workers=usual_workers(processes, batch_size * math.prod(image_shape)),
        device=processes.device,
    )

    def compute(block: range) -> tuple[Tensor, Tensor | None]:
        images, labels = read(block)
        with torch.no_grad():
            return encode(images.to(processes.device, non_blocking=True)), labels

    _ = dataset.labels  # refused, if it must be, before any work
    record = {**identity, "data": str(dataset.path), "batch_size": batch_size, "kind": kind}
    record["data_fingerprint"] = processes.on_main(lambda: fingerprint(dataset.path))
    with held_by_main(folder, record, processes, fresh=fresh), contextlib.closing(read):
        write_examples(
            compute,
            len(dataset),
            folder,
            kind=kind,
            image_shape=image_shape,
            batch_size=batch_size,
            processes=processes,
            title="encoding",
            sampler=dataset.sampler,
        )


def is_example_set(path: str | os.PathLike[str]) -> bool:
    """Whether `path` is a folder of encoded images, or of images in shards."""
    return (Path(path) / INDEX_FILE).is_file()


def kind_of(path: str | os.PathLike[str]) -> str:
    """What the examples of the set at `path` are, as its index says; a RequestError if that is damaged."""
    return _read_index(Path(path) / INDEX_FILE).kind


class ExampleSet(Labelled):
    """Encoded images of a folder, read from its shards as they are asked for.

    Raises:
        RequestError: the index or a shard is missing, damaged or does not fit.
    """

    encoded = True
    expected_instead: ClassVar[str] = "this model trains on {kind}, or on images"
    """what messages say of a set of another kind"""

    def __init__(self, path: str | os.PathLike[str], kind: str) -> None:
        """Open the set; `kind` is what the model trains on."""
        self.path = Path(path)
        index = _read_index(self.path / INDEX_FILE)
        if index.kind != kind:
            raise RequestError(f"{self.path}: a set of {index.kind}; {self.expected_instead.format(kind=kind)}")
        self.image_shape = index.image_shape
        self.sampler = index.sampler
        self._files = list(index.shards)
        self._starts = np.cumsum([0, *index.shards.values()])
        self._offsets: list[int] = []
        """where in their files the examples begin"""
        labels, layouts = [], set()
        for name, count in index.shards.items():
            file = self.path / name
            with open_checkpoint(file) as shard:
                is_whole = isinstance(shard, SafetensorsCheckpoint) and "examples" in shard.specs
                if not is_whole or shard.shape("examples")[:1] != (count,):
                    raise RequestError(f"{file}: not the {count} examples that {INDEX_FILE} promises")
                assert isinstance(shard, SafetensorsCheckpoint)
                self._offsets.append(shard.offset("examples"))
                layouts.add((shard.shape("examples")[1:], shard.dtype("examples"), "labels" in shard.specs))
                if len(layouts) > 1:
                    raise RequestError(
                        f"{file}: its examples are of another shape or kind than those of {self._files[0]}"
                    )
                if "labels" in shard.specs:
                    labels.append(_shard_labels(file, shard, count))
        [(self._shape, self._dtype, _)] = layouts
        self._open = lru_cache(OPEN_SHARDS)(self._opened)
        self.labels = torch.cat(labels) if labels else None

    def __len__(self) -> int:
        return int(self._starts[-1])

    def examples(self, indices: Sequence[int]) -> Tensor:
        """The examples [B, ...] at `indices`, as stored."""
        chosen = np.asarray(indices)
        shards = np.searchsorted(self._starts, chosen, side="right") - 1
        rows = (chosen - self._starts[shards]).tolist()
        found = torch.empty(len(chosen), *self._shape, dtype=self._dtype)
        buffers = found.view(len(chosen), -1).view(torch.uint8).numpy()
        for shard, row, buffer in zip(shards.tolist(), rows, buffers, strict=True):
            self._read(shard, row, buffer)
        return found

    def _opened(self, shard: int) -> IO[bytes]:
        return open(self.path / self._files[shard], "rb", buffering=0)

    def _read(self, shard: int, row: int, out: np.ndarray) -> None:
        """Fill `out` with the bytes of an example."""
        try:
            # At a position of its own: readers ahead are copies of this process, and share the file's.
            count = os.preadv(self._open(shard).fileno(), [out.data], self._offsets[shard] + row * out.nbytes)
            if count < out.nbytes:
                raise OSError("it ends early")
        except OSError as error:
            file = self.path / self._files[shard]
            raise RequestError(f"{file}: cannot be read any more ({reason(error)})") from error


@dataclass(frozen=True)
class _Index:
    """What `examples.json` says: kind of the examples, shape of the images, examples in each shard, what drew them."""

    kind: str
    image_shape: tuple[int, int, int]
    shards: dict[str, int]
    sampler: dict[str, Any] | None


def _read_index(file: Path) -> _Index:
    if not file.is_file():
        raise RequestError(f"{file}: no such file; expected a set of encoded images that was finished")
    try:
        content = json.loads(Storage(file.parent, "encoded images").read(file.name, LARGEST_INDEX))
        channels, height, width = map(_count, content["image_shape"])
        shards = {_file_name(shard["file"]): _count(shard["count"]) for shard in content["shards"]}
        if not shards or len(shards) < len(content["shards"]):
            raise ValueError("it lists no shards, or one twice")
        return _Index(str(content["kind"]), (channels, height, width), shards, as_sampler(content.get(SAMPLER)))
    except RequestError:
        raise
    except (ValueError, TypeError, LookupError, RecursionError, MemoryError) as error:
        found = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
        raise RequestError(f"{file}: not the index of a set of encoded images ({found}); make it again") from None


def _count(value: Any) -> int:
    if type(value) is not int or not 1 <= value < 1 << 40:
        raise ValueError(f"{value!r:.40} is no count")
    return value


def _file_name(value: Any) -> str:
    if not is_file_name(value):
        raise ValueError(f"{value!r:.40} is no name of a file beside it")
    return value


def _shard_labels(file: Path, shard: Checkpoint, count: int) -> Tensor:
    """The labels int64 [count] of an open shard."""
    if (shard.shape("labels"), shard.dtype("labels")) != ((count,), torch.int64):
        raise RequestError(
            f"{file}: its labels are {shard.dtype('labels')} {list(shard.shape('labels'))}, expected int64 [{count}]"
        )
    labels = shard.tensor("labels")
    if labels.min() < 0:
        raise RequestError(f"{file}: label {int(labels.min())} is negative")
    return labels
