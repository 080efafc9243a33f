"""Which sets of weights lie in the folder of a transformers or diffusers model, told by the names of its files.

A set is one state dict: `model.safetensors`, or shards with their index, of one variant (`model.fp16.safetensors`) and
one format. Both libraries read one set of a folder, safetensors before bin, and so does Neon.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from neon.errors import RequestError
from neon.runtime.files import PIPELINE_FILE, weight_map

SAFETENSORS = "safetensors"
DENOISERS = ("unet", "transformer")
"""what the component of a pipeline is called that is trained: the network that takes the noise away"""
WEIGHT_SUFFIXES = {
    *(".safetensors", ".bin", ".pth", ".pt", ".ckpt", ".pkl", ".h5", ".msgpack", ".onnx", ".onnx_data", ".gguf"),
    *(".ggml", ".tflite", ".ot", ".npz", ".mlmodel", ".engine", ".pdparams"),
}
"""how names of files of weights end, readable here or not"""

_ADAPTERS = ("adapter_model", "pytorch_lora_weights")
_STEM = r"(?P<stem>model|pytorch_model|diffusion_pytorch_model)"
_FORMAT = r"(?P<format>safetensors|bin)"
# The variant stands before the number of the shard, or after it in files of older releases.
_FILE = re.compile(
    rf"{_STEM}(?:\.(?P<variant>\w+))?(?:-(?P<number>\d{{5}})-of-(?P<count>\d{{5}}))?(?:\.(?P<late>\w+))?\.{_FORMAT}"
)
_INDEX = re.compile(rf"{_STEM}\.{_FORMAT}(?:\.(?P<variant>\w+))?\.index(?:\.(?P<late>\w+))?\.json")


def pipeline_of(path: Path) -> Path | None:
    """The folder of the pipeline that `path` is, or is the denoiser's file or folder in; None: of none."""
    inside = path.absolute() if path.is_dir() else path.absolute().parent
    if inside.name in DENOISERS:
        return inside.parent if (inside.parent / PIPELINE_FILE).is_file() else None
    # Old pipelines have the denoiser's files beside the index; a file beside the folder of one is another.
    other = path.is_file() and any((inside / name).is_dir() for name in DENOISERS)
    return inside if (inside / PIPELINE_FILE).is_file() and not other else None


@dataclass(frozen=True)
class WeightSet:
    """Files of a folder that are one state dict."""

    folder: Path
    stem: str
    """of its names: `model`, `pytorch_model` or `diffusion_pytorch_model`, else that of a lone file"""
    variant: str
    """such as `fp16`; "" is the default"""
    format: str
    """"safetensors" or "bin", else what a lone file ends in"""
    index: Path | None
    files: tuple[Path, ...]
    """its shards or its one file"""

    @property
    def path(self) -> Path:
        """What opens it: its index or file, or the folder of shards without an index."""
        if self.index is not None:
            return self.index
        return self.files[0] if len(self.files) == 1 else self.folder

    @property
    def name(self) -> str:
        """What to call it beside others of its folder."""
        return ".".join(filter(None, (self.stem, self.variant, self.format)))

    @property
    def all_files(self) -> tuple[Path, ...]:
        """Everything that goes where the set goes: its files and its index."""
        return self.files if self.index is None else (*self.files, self.index)


def sets_in(folder: Path) -> list[WeightSet]:
    """The sets of weights in a folder under the names that the two libraries write, by name; none: no such files.

    Shards that an index does not name belong to no set, unless their count is that of its shards.

    Raises:
        RequestError: the folder cannot hold what its names say: an index is damaged or lacks shards of its set, a file
            stands beside an index of the same set, or shards are not all there.
        OSError: the folder cannot be read.
    """
    files: dict[tuple[str, str, str], list[tuple[Path, re.Match[str]]]] = {}
    indices: dict[tuple[str, str, str], list[Path]] = {}
    for path in sorted(path for path in folder.iterdir() if path.is_file() or path.is_symlink()):
        if match := _FILE.fullmatch(path.name):
            files.setdefault(_key(match), []).append((path, match))
        elif match := _INDEX.fullmatch(path.name):
            indices.setdefault(_key(match), []).append(path)
    return [_set_of(folder, key, indices.get(key, []), files.get(key, [])) for key in sorted({*files, *indices})]


def _key(match: re.Match[str]) -> tuple[str, str, str]:
    return match["stem"], match["variant"] or match["late"] or "", match["format"]


def _set_of(
    folder: Path, key: tuple[str, str, str], indices: list[Path], files: list[tuple[Path, re.Match[str]]]
) -> WeightSet:
    single = [path for path, match in files if match["number"] is None]
    shards = {path: match["count"] for path, match in files if match["number"] is not None}
    if len(indices) + len(single) > 1:
        names = ", ".join(path.name for path in (*single, *indices))
        raise RequestError(
            f"{folder}: {names} are two sets of weights under one name, and libraries differ in which they read; "
            "move one of them away"
        )
    if single:
        return WeightSet(folder, *key, None, tuple(single))
    if not indices:
        counts = set(shards.values())
        if len(counts) > 1 or len(shards) != int(next(iter(counts))):
            raise RequestError(
                f"{folder}: holds {', '.join(path.name for path in shards)} and no index that says which belong "
                f"together; download all shards and their index, {key[0]}.{key[2]}.index.json, or name the file inside "
                "it that is meant"
            )
        return WeightSet(folder, *key, None, tuple(shards))
    return WeightSet(folder, *key, indices[0], _indexed(indices[0], shards))


def _indexed(index: Path, shards: dict[Path, str]) -> tuple[Path, ...]:
    """The shards of an index; a RequestError if one is not there, or one of theirs is not in the index."""
    try:
        listed = sorted(set(weight_map(index).values()))
    except ValueError as error:
        raise RequestError(f"{index}: {error}; download it again") from None
    paths = [index.parent / name for name in listed]
    for path in paths:
        if not path.is_file():
            raise RequestError(f"{index}: its shard {path.name} is not beside it; download all of them")
    counts = {shards[path] for path in paths if path in shards}
    for path, count in shards.items():
        if path not in paths and count in counts:
            raise RequestError(
                f"{index}: does not list {path.name}, which by its name is one of its {int(count)} shards; download "
                "the index and its shards again"
            )
    return tuple(paths)


def lone_set(folder: Path) -> WeightSet | None:
    """A folder's only file of weights, whatever its name, as a set; None: there is none, several, or an adapter."""
    files = [path for path in sorted(folder.iterdir()) if path.suffix in WEIGHT_SUFFIXES and path.is_file()]
    if len(files) != 1 or files[0].stem in _ADAPTERS:
        return None
    return WeightSet(folder, files[0].stem, "", files[0].suffix[1:], None, (files[0],))


def usual_set(folder: Path, sets: Sequence[WeightSet], variant: str | None = None) -> WeightSet:
    """The set of a folder that is used: the default variant, or its only one; safetensors before bin.

    Args:
        variant: the one to use instead; "" asks for the default.

    Raises:
        RequestError: it is not there, or several sets could be meant.
    """
    variants = list(dict.fromkeys(one.variant for one in sets))
    if variant is None and "" not in variants and len(variants) > 1:
        there = ", ".join(variants)
        raise RequestError(
            f"{folder}: holds the variants {there} and no default; choose with --variant where a command has it, "
            "or name the file"
        )
    wanted = variant if variant is not None else "" if "" in variants else variants[0]
    found = [one for one in sets if one.variant == wanted]
    if not found:
        there = ", ".join(name or "the default one" for name in variants)
        raise RequestError(f"{folder}: no weights of the variant {wanted or '(default)'!r}; it has {there}")
    if len({one.stem.startswith("diffusion") for one in found}) > 1:
        names = ", ".join(one.name for one in found)
        raise RequestError(f"{folder}: holds weights of two models: {names}; move one of them away")
    return next((one for one in found if one.format == SAFETENSORS), found[0])


def component_sets(folder: Path) -> dict[str, list[WeightSet]]:
    """The sets of each component of a model, by name: of the sub folders of a pipeline that hold weights; of another
    model, of the folder itself, called "".

    Raises:
        RequestError: there are no weights in it, or as `sets_in`.
        OSError: a folder cannot be read.
    """
    if (folder / PIPELINE_FILE).is_file():
        inside = (path for path in sorted(folder.iterdir()) if path.is_dir() and not path.name.startswith("."))
        found = {path.name: sets for path in inside if (sets := sets_in(path))}
        if not found:
            raise RequestError(f"{folder}: a pipeline ({PIPELINE_FILE}) without weights in its sub folders")
        return found
    sets = sets_in(folder)
    if not sets and (lone := lone_set(folder)):
        sets = [lone]
    if not sets:
        raise RequestError(
            f"{folder}: holds no weights; expected model.safetensors, pytorch_model.bin, "
            "diffusion_pytorch_model.safetensors, shards with their index, or a pipeline with model_index.json"
        )
    return {"": sets}
