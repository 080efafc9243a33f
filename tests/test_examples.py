"""Sets of encoded images: any index from any shard, and one line for what does not fit."""

from pathlib import Path

import pytest
import torch

from neon.data.encoded import INDEX_FILE, OPEN_SHARDS, ExampleSet, is_example_set, shard_name, write_examples
from neon.errors import RequestError
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
