"""How the weights of a folder are cut into safetensors files, under the names that transformers and diffusers read."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from neon.checkpoint import Checkpoint, TensorSpec
from neon.checkpoint.safetensors_format import aligned
from neon.checkpoint.weight_sets import SAFETENSORS, WeightSet
from neon.errors import RequestError
from neon.runtime.small_json import read_table

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}
_STEMS = {"pytorch_model": "model", "model": "model", "diffusion_pytorch_model": "diffusion_pytorch_model"}


@dataclass(frozen=True)
class Shard:
    """One file of an output and its tensors, in the order in which it holds them."""

    file: str
    layout: dict[str, TensorSpec]

    @property
    def nbytes(self) -> int:
        return sum(spec.nbytes for spec in self.layout.values())


def parse_size(text: str) -> int:
    """Bytes of a size such as 5GB, 500MB or 2GiB, as the two libraries have it; a RequestError for another text."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]I?)?B?", text.strip().upper())
    size = round(float(match[1]) * _UNITS[match[2] or ""]) if match else 0
    if size < 1:
        raise RequestError(f"--shard-size {text}: expected the most bytes of a file, such as 5GB or 500MB")
    return size


def shards_of(
    base: Checkpoint, weights: WeightSet, size: int | None, specs: Mapping[str, TensorSpec] | None = None
) -> list[Shard]:
    """The files that the weights of a base go into: cut as the base's are, or filled up to `size` bytes each.

    A tensor larger than `size` has a file of its own.

    Args:
        weights: the base's set, which names the files.
        specs: of what is written, by the base's names; by default those of the base.
    """
    written = base.specs if specs is None else specs
    groups = _as_in(base, written) if size is None else _filled(written, size)
    stem = _STEMS.get(weights.stem, weights.stem if weights.format == SAFETENSORS else "model")
    front = f"{stem}.{weights.variant}" if weights.variant else stem
    if len(groups) == 1:
        return [Shard(f"{front}.{SAFETENSORS}", aligned(groups[0]))]
    return [
        Shard(f"{front}-{number:05d}-of-{len(groups):05d}.{SAFETENSORS}", aligned(group))
        for number, group in enumerate(groups, 1)
    ]


def index_name(weights: WeightSet) -> str:
    """How the index of a set of that stem and variant is called as safetensors."""
    variant = f".{weights.variant}" if weights.variant else ""
    return f"{_STEMS.get(weights.stem, weights.stem)}.{SAFETENSORS}.index{variant}.json"


def index_of(shards: list[Shard], metadata: Mapping[str, str]) -> dict[str, Any]:
    """The index of several files: which tensor lies in which, their size in all, and `metadata`."""
    where = {name: shard.file for shard in shards for name in shard.layout}
    size = sum(shard.nbytes for shard in shards)
    return {"metadata": {"total_size": size, **metadata}, "weight_map": dict(sorted(where.items()))}


def size_note(index: Path, nbytes: int) -> str | None:
    """What to tell a user whose index states another size than that of the tensors it lists; None: it does not."""
    metadata = read_table(index).get("metadata")
    stated = metadata.get("total_size") if isinstance(metadata, dict) else None
    if type(stated) not in (int, float) or stated == nbytes:
        return None
    return (
        f"{index} states {stated:,.0f} bytes of weights, and its shards hold {nbytes:,}; unless they were published "
        "so, download them again"
    )


def _as_in(base: Checkpoint, specs: Mapping[str, TensorSpec]) -> list[dict[str, TensorSpec]]:
    groups: dict[str, dict[str, TensorSpec]] = {}
    for name, spec in specs.items():
        groups.setdefault(base.file_of(name).name, {})[name] = spec
    return [groups[file] for file in sorted(groups)]


def _filled(specs: Mapping[str, TensorSpec], size: int) -> list[dict[str, TensorSpec]]:
    groups, filled = [dict[str, TensorSpec]()], 0
    for name, spec in specs.items():
        if groups[-1] and filled + spec.nbytes > size:
            groups.append({})
            filled = 0
        groups[-1][name] = spec
        filled += spec.nbytes
    return groups
