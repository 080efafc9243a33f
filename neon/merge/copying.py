"""What of a model's folder goes into the merged one beside its weights: data that is small, and nothing that runs."""

import os
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from neon.checkpoint.weight_sets import PIPELINE_FILE, WEIGHT_SUFFIXES
from neon.runtime.files import atomic_write, write_json
from neon.runtime.small_json import read_table

CARD = "README.md"
RECIPE_FILE = "merge.yaml"
"""by which a folder was merged"""

_LARGEST = 64_000_000
"""bytes of a file that is no weights: the largest tokenizers have 35 MB"""
_MAX_DEPTH = 8
_COPIED = {
    *("", ".json", ".jsonl", ".txt", ".md", ".yaml", ".yml", ".jinja", ".csv", ".tsv"),
    *(".model", ".tiktoken", ".vocab", ".bpe", ".spm"),  # of tokenizers
    *(".png", ".jpg", ".jpeg", ".webp", ".gif", ".svg", ".pdf"),
}
"""how names of files end that are data and may be copied"""
_LIBRARIES = {"diffusers", "transformers", "stable_diffusion"}
"""whose classes a pipeline names without code of its own; the last is a module of the first"""
_BLOCK = 1 << 20
_DTYPES_OF = ("torch_dtype", "dtype")
"""entries of configurations of transformers"""


@dataclass(frozen=True)
class Survey:
    """What lies in a folder beside the weights that are used."""

    copied: tuple[str, ...]
    """names of files, relative to the folder"""
    left_out: tuple[str, ...]
    """the same of what is not copied, each with the reason"""
    notes: tuple[str, ...]
    """what a user should know, in sentences"""


def survey(folder: Path, components: Collection[str], weights: Collection[Path]) -> Survey:
    """Decide about every file of a folder.

    Hidden files are passed over. Links are followed, as the cache of the Hub has them.

    Args:
        components: names of the sub folders that hold weights which are used.
        weights: the files of weights that are used, with their indices.
    """
    copied, left_out = list[str](), list[str]()
    for path, reason in _walk(folder, folder, frozenset(components), frozenset(weights), ()):
        name = path.relative_to(folder).as_posix()
        if reason is None:
            copied.append(name)
        else:
            left_out.append(f"{name} ({reason})")
    return Survey(tuple(copied), tuple(left_out), tuple(_code_notes(folder, copied)))


def _walk(
    folder: Path, top: Path, components: frozenset[str], weights: frozenset[Path], above: tuple[str, ...]
) -> Iterator[tuple[Path, str | None]]:
    """Every file that is decided about, and why it is not copied; a folder that is left out as a whole is one."""
    here = os.path.realpath(folder)
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        if path.is_dir():
            is_component = folder == top and path.name in components
            if os.path.realpath(path) in (here, *above) or len(above) >= _MAX_DEPTH:
                yield path, "a folder inside itself, or too deep"
            elif not is_component and any(_is_weights(inside) for inside in path.iterdir()):
                yield path, "other weights"
            else:
                yield from _walk(path, top, components, weights, (*above, here))
        elif path not in weights:
            yield path, _reason(path, top)


def _is_weights(path: Path) -> bool:
    return path.suffix in WEIGHT_SUFFIXES or (path.suffix == ".json" and ".index" in path.name)


def _reason(path: Path, top: Path) -> str | None:
    """Why a file is not copied; None: it is."""
    if _is_weights(path):
        return "weights of another format, variant or kind"
    if path.suffix == ".py":
        return "code"
    if path.parent == top and path.name.lower() == CARD.lower():
        return "the base's card"
    if path.parent == top and path.name == RECIPE_FILE:
        return "the recipe that made the base"
    if not path.is_file():
        return "no file, or a link to nothing"
    if path.suffix.lower() not in _COPIED:
        return "not a kind of file that is copied"
    return "too large" if path.stat().st_size > _LARGEST else None


def copy_file(source: Path, target: Path) -> None:
    """Copy what a file holds, whatever links lead to it; errors as `atomic_write`, and OSErrors of reading."""
    with open(source, "rb") as file, atomic_write(target) as out:
        while block := file.read(_BLOCK):
            out.write(block)


def state_dtype(config: Path, dtype: str) -> None:
    """Let a configuration that states the dtype of its weights, and those inside it, state this one."""
    table = read_table(config)
    if _state(table, dtype):
        write_json(config, table)


def _state(table: dict[str, Any], dtype: str) -> bool:
    """Whether a table was changed."""
    stated = [name for name in _DTYPES_OF if isinstance(table.get(name), str) and table[name] != dtype]
    table |= dict.fromkeys(stated, dtype)
    inside = [_state(value, dtype) for value in table.values() if isinstance(value, dict)]
    return bool(stated) or any(inside)


def _code_notes(folder: Path, copied: Collection[str]) -> Iterator[str]:
    """Which configurations among the copied files name code that is not in the two libraries."""
    for name in copied:
        if name.endswith(".json"):
            table = read_table(folder / name)
            named = _own_classes(table) if Path(name).name == PIPELINE_FILE else _auto_map(table)
            if named:
                yield (
                    f"{name} names code of the model's own ({', '.join(named)}): it is copied as data, the code is "
                    "not, and nothing of it was run; to load such a model is to trust that code, wherever it comes from"
                )


def _auto_map(table: dict[str, Any]) -> list[str]:
    """The classes of `auto_map`, and of `custom_pipelines`, that a configuration names."""
    named = list[str]()
    for entry in ("auto_map", "custom_pipelines"):
        found = table.get(entry)
        for value in found.values() if isinstance(found, dict) else [found] if isinstance(found, str) else []:
            named += [text for text in (value if isinstance(value, list) else [value]) if isinstance(text, str)]
    return named[:3]


def _own_classes(table: dict[str, Any]) -> list[str]:
    """The classes of a pipeline, and of its components, that lie in other modules than the libraries'."""
    pairs = {
        name: value
        for name, value in table.items()
        if isinstance(value, list) and len(value) == 2 and all(isinstance(part, str) for part in value)
    }
    own = (
        ".".join(value)
        for name, value in pairs.items()
        if name == "_class_name" or value[0].partition(".")[0] not in _LIBRARIES
    )
    return list(own)[:3]
