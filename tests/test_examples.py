"""Sets of encoded images: any index from any shard, and one line for what does not fit."""

import json
import os
import time
from pathlib import Path

import pytest
import torch

from neon.data.encoded import (
    INDEX_FILE,
    OPEN_SHARDS,
    ExampleSet,
    is_example_set,
    shard_name,
    write_examples,
    write_shard,
)
from neon.errors import RequestError, WorkError
from neon.runtime.distributed import Processes


def write(folder: Path, count: int = 100, with_labels: bool = True) -> torch.Tensor:
    values = torch.arange(count * 3, dtype=torch.int32).reshape(count, 3)

    def compute(block: range) -> tuple[torch.Tensor, torch.Tensor | None]:
        part = slice(block.start, block.stop)
        return values[part].to(torch.uint16), torch.arange(count)[part] % 7 if with_labels else None

    write_examples(
        compute, count, folder, kind="toys", image_shape=(3, 8, 8), batch_size=1, processes=Processes(), title="writing"
    )
    return values


def test_examples_are_read_in_any_order_from_more_shards_than_may_be_open(tmp_path: Path) -> None:
    values = write(tmp_path, 2 * OPEN_SHARDS)
    dataset = ExampleSet(tmp_path, "toys")
    order = torch.randperm(len(values), generator=torch.Generator().manual_seed(0)).tolist()
    found, labels = dataset.load(order)
    assert len(dataset) == len(values) and dataset.image_shape == (3, 8, 8) and dataset.encoded
    assert torch.equal(found.to(torch.int32), values[order]) and torch.equal(labels, torch.tensor(order) % 7)


def test_a_set_without_classes_has_none(tmp_path: Path) -> None:
    write(tmp_path, 5, with_labels=False)
    dataset = ExampleSet(tmp_path, "toys")
    assert dataset.labels is None and dataset.load([3])[1] is None


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    write(tmp_path, 5)
    assert is_example_set(tmp_path)
    with pytest.raises(RequestError, match="a set of toys; this model trains on games"):
        ExampleSet(tmp_path, "games")
    (tmp_path / shard_name(3)).unlink()
    with pytest.raises(RequestError, match=r"examples-00000003\.safetensors: no such file"):
        ExampleSet(tmp_path, "toys")
    (tmp_path / INDEX_FILE).write_text("[]")
    with pytest.raises(RequestError, match="not the index of a set"):
        ExampleSet(tmp_path, "toys")
    (tmp_path / INDEX_FILE).unlink()
    assert not is_example_set(tmp_path)
    with pytest.raises(RequestError, match="expected a set of encoded images that was finished"):
        ExampleSet(tmp_path, "toys")


SHARD = shard_name(0)


def index(**changes: object) -> str:
    """An index of one shard with one example, changed."""
    return json.dumps({"kind": "toys", "image_shape": [3, 8, 8], "shards": [{"file": SHARD, "count": 1}]} | changes)


@pytest.mark.parametrize(
    "content",
    [
        "null",
        "[" * 100_000,
        "\udcff",
        '{"kind": "toys"}',
        index(image_shape=[3, 8]),
        index(image_shape=[3, 8, True]),
        index(image_shape=[3, 8, 1e400]),
        index(image_shape="abc"),
        index(shards=[]),
        index(shards=None),
        index(shards=[SHARD]),
        index(shards=[{"file": SHARD, "count": -1}]),
        index(shards=[{"file": SHARD, "count": "1"}]),
        index(shards=[{"file": f"../{SHARD}", "count": 1}]),
        index(shards=[{"file": ["x"], "count": 1}]),
        index(shards=[{"file": "nul\0", "count": 1}]),
        index(shards=[{"file": "\ud800", "count": 1}]),
        index(shards=[{"file": SHARD, "count": 1}] * 2),
    ],
    ids=lambda content: content[-40:],
)
def test_a_damaged_index_is_refused_by_name(tmp_path: Path, content: str) -> None:
    write(tmp_path, 1)
    ExampleSet(tmp_path, "toys")
    (tmp_path / INDEX_FILE).write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(RequestError, match=r"examples\.json: not the index of a set"):
        ExampleSet(tmp_path, "toys")


def test_an_index_of_a_gigabyte_is_not_read(tmp_path: Path) -> None:
    write(tmp_path, 1)
    os.truncate(tmp_path / INDEX_FILE, 1 << 30)
    with pytest.raises(RequestError, match=r"examples\.json cannot be read \(1073741824 bytes"):
        ExampleSet(tmp_path, "toys")


@pytest.mark.parametrize(
    ("examples", "labels", "message"),
    [
        (torch.zeros(1, 4), torch.zeros(1, dtype=torch.int64), "of another shape or kind than those of"),
        (torch.zeros(1, 3), torch.zeros(1, dtype=torch.int64), "of another shape or kind than those of"),
        (torch.zeros(1, 3, dtype=torch.uint16), None, "of another shape or kind than those of"),
        (torch.zeros(1, 3, dtype=torch.uint16), torch.zeros(1), "expected int64"),
        (torch.zeros(1, 3, dtype=torch.uint16), torch.zeros(2, dtype=torch.int64), "expected int64"),
        (torch.zeros(1, 3, dtype=torch.uint16), torch.tensor([-1]), "label -1 is negative"),
    ],
)
def test_a_shard_unlike_the_others_is_refused_by_name(
    tmp_path: Path, examples: torch.Tensor, labels: torch.Tensor | None, message: str
) -> None:
    write(tmp_path, 3)
    write_shard(tmp_path, 1, examples, labels)
    with pytest.raises(RequestError, match=rf"{shard_name(1)}: .*{message}"):
        ExampleSet(tmp_path, "toys")


def test_a_shard_that_vanishes_while_others_are_written_is_missed(tmp_path: Path) -> None:
    def compute(block: range) -> tuple[torch.Tensor, None]:
        if block.start == 2:
            while not (tmp_path / SHARD).exists():  # written in the background
                time.sleep(0.01)
            (tmp_path / SHARD).unlink()
        return torch.zeros(1, 3), None

    with pytest.raises(WorkError, match="images 0 to 0 were written and some are gone, in 1 of 3 batches"):
        write_examples(
            compute, 3, tmp_path, kind="toys", image_shape=(3, 8, 8), batch_size=1, processes=Processes(), title=""
        )
    assert not is_example_set(tmp_path)
