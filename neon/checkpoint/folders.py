"""Weights in several files: an index of shards, a folder of shards; and a folder that holds one file of weights."""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from neon.checkpoint.common import Checkpoint, listing
from neon.checkpoint.weight_sets import DENOISERS, PIPELINE_FILE, sets_in, usual_set
from neon.errors import RequestError
from neon.runtime.files import weight_map

_INDEX = "*.index.json"
_SUFFIXES = (".safetensors", ".pth", ".pt", ".ckpt", ".bin", ".pkl")
_SHARD = re.compile(r"(.+)-(\d+)-of-(\d+)(\.\w+)")


class ShardedCheckpoint(Checkpoint):
    """Several open files as one."""

    format = "shards"

    def __init__(self, path: Path, shards: Sequence[Checkpoint], holder: Mapping[str, Checkpoint]) -> None:
        """`holder`: of each tensor, the shard that it lies in."""
        self._shards = shards
        self._holder = holder
        same = set.intersection(*(set(shard.metadata.items()) for shard in shards))
        super().__init__(path, {name: shard.specs[name] for name, shard in holder.items()}, metadata=dict(sorted(same)))

    @property
    def files(self) -> tuple[Path, ...]:
        return tuple(shard.path for shard in self._shards)

    def file_of(self, name: str) -> Path:
        return self._holder[name].path

    def read(self, name: str, start: int, out: torch.Tensor) -> None:
        self._holder[name].read(name, start, out)

    def close(self) -> None:
        for shard in self._shards:
            shard.close()


def is_index(head: bytes) -> bool:
    """Whether a file that begins with `head` can be an index of shards, which is JSON."""
    return head.lstrip().startswith(b"{")


def file_in(folder: Path) -> Path | list[Path]:
    """What of a folder is to be opened: its one file of weights, an index of shards, or shards that are all there.

    Of several sets of weights under the names of transformers or diffusers, the one that they read. Of a pipeline, that
    of its denoiser.

    Raises:
        RequestError: there is nothing of the kind in it, or more than one.
    """
    indices = sorted(folder.glob(_INDEX))
    if len(indices) == 1:
        return indices[0]
    files = sorted(file for file in folder.iterdir() if file.suffix in _SUFFIXES and file.is_file())
    if len(files) == 1 and not indices:
        return files[0]
    parts = [_SHARD.fullmatch(file.name) for file in files]
    if files and not indices and all(parts):
        sets = {(part[1], part[3], part[4]) for part in parts if part}
        numbers = {int(part[2]) for part in parts if part}
        if len(sets) == 1:
            [(_, count, _)] = sets
            if len(files) == int(count) and numbers == set(range(1, len(files) + 1)):
                return files
            raise RequestError(f"{folder}: holds {len(files)} of {int(count)} shards; download the others too")
    if standard := sets_in(folder):
        used = usual_set(folder, standard)
        return used.path if used.path != folder else list(used.files)
    if (folder / PIPELINE_FILE).is_file():
        denoisers = [folder / name for name in DENOISERS if (folder / name).is_dir()]
        if len(denoisers) == 1:
            return file_in(denoisers[0])
        raise RequestError(
            f"{folder}: a diffusers pipeline with {'both' if denoisers else 'neither'} of {' and '.join(DENOISERS)}; "
            "name the folder of one of its models, inside it"
        )
    found = listing([file.name for file in (*indices, *files)], first=8)
    raise RequestError(
        f"{folder}: expected a checkpoint file, or a folder with one or with the shards of one, found a folder with "
        f"{found}; name the file inside it"
    )


def open_index(path: Path, open_file: Callable[[Path], Checkpoint]) -> Checkpoint:
    """The shards of an index (`*.index.json`), of which it says what lies in which.

    Raises:
        RequestError: it is no index, a shard is missing, or does not hold what the index says.
    """
    try:
        where = weight_map(path)
    except ValueError as error:
        raise RequestError(
            f"{path}: {error}; expected an index of shards, as model.safetensors.index.json, or a file of weights"
        ) from None
    return _opened(path, _shards_of(path, where), open_file, where)


def _shards_of(path: Path, where: Mapping[str, str]) -> list[Path]:
    files = [path.parent / name for name in sorted(set(where.values()))]
    for file in files:
        if not file.is_file():
            raise RequestError(f"{path}: its shard {file.name} is not beside it; download all of them")
    return files


def open_shards(path: Path, files: Sequence[Path], open_file: Callable[[Path], Checkpoint]) -> Checkpoint:
    """The shards in the folder `path`; a RequestError if they cannot be one checkpoint."""
    return _opened(path, files, open_file, None)


def _opened(
    path: Path, files: Sequence[Path], open_file: Callable[[Path], Checkpoint], where: Mapping[str, str] | None
) -> Checkpoint:
    shards: list[Checkpoint] = []
    try:
        for file in files:
            shards.append(open_file(file))
        holder: dict[str, Checkpoint] = {}
        for shard in shards:
            for name in shard.specs:
                if where is not None and where.get(name) != shard.path.name:
                    continue
                if name in holder:
                    raise RequestError(f"{path}: {holder[name].path.name} and {shard.path.name} both hold {name}")
                holder[name] = shard
        lacking = [name for name in where or () if name not in holder]
        if lacking:
            raise RequestError(f"{path}: its shards do not hold {listing(lacking)}; download them again")
        return ShardedCheckpoint(path, shards, holder)
    except BaseException:
        for shard in shards:
            shard.close()
        raise
