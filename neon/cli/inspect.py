"""`neon inspect`: what a checkpoint, the folder of a model or a pipeline holds; nothing stored in it is executed."""

import json as json_module
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import tyro

from neon.cli.flags import Key
from neon.errors import RequestError, reason, shown

if TYPE_CHECKING:
    from neon.checkpoint.weight_sets import WeightSet


@dataclass(frozen=True, kw_only=True)
class Inspect:
    """Show what a checkpoint, a LoRA, or the folder of a model or pipeline holds; nothing stored in it is executed.

    Example: neon inspect neon_w1.safetensors
    """

    file: tyro.conf.Positional[Path]
    """checkpoint of any readable format, or folder"""
    key: Key = None
    """nesting of the state dict, such as model_ema; chosen and printed if not given"""
    json: bool = False
    """print JSON"""

    def __call__(self) -> None:
        facts = self._facts()
        if self.json:
            print(json_module.dumps(facts, indent=2))
        elif "components" in facts:
            _show_pipeline(facts)
        else:
            _show(facts)

    def _facts(self) -> dict[str, Any]:
        from neon.checkpoint.weight_sets import PIPELINE_FILE, component_sets, sets_in

        if not self.file.is_dir():
            return _facts_of(self.file, self.key)
        try:
            if (self.file / PIPELINE_FILE).is_file():
                return _pipeline_facts(self.file, component_sets(self.file), self.key)
            sets = sets_in(self.file)
        except OSError as error:
            raise RequestError(f"{self.file}: cannot be read ({reason(error)}); check its permissions") from error
        return _model_facts(self.file, sets, self.key) if sets else _facts_of(self.file, self.key)


def _pipeline_facts(folder: Path, sets: Mapping[str, "list[WeightSet]"], key: str | None) -> dict[str, Any]:
    """What a pipeline is, and each of its components as `_model_facts`."""
    from neon.checkpoint.weight_sets import PIPELINE_FILE

    components = {name: _model_facts(folder / name, found, key) for name, found in sets.items()}
    return {
        "file": str(folder),
        "format": "pipeline",
        "class": _class_in(folder / PIPELINE_FILE),
        "bytes": sum(facts["bytes"] for facts in components.values()),
        "parameters": sum(facts["parameters"] for facts in components.values()),
        "components": components,
    }


def _model_facts(folder: Path, sets: Sequence["WeightSet"], key: str | None) -> dict[str, Any]:
    """What the weights of a folder are that are used, of what class its configuration is, and which sets it holds."""
    from neon.checkpoint.weight_sets import usual_set

    used = usual_set(folder, sets)
    facts = _facts_of(used.path, key)
    tensors = facts.pop("tensors")
    return {
        **facts,
        "file": str(folder),
        "class": _class_in(folder / "config.json"),
        "used": used.name,
        "sets": {
            one.name: {
                "format": one.format,
                "variant": one.variant,
                "files": {file.name: file.stat().st_size for file in one.files},
                "bytes": sum(file.stat().st_size for file in one.files),
            }
            for one in sets
        },
        "tensors": tensors,
    }


def _class_in(config: Path) -> str | None:
    """The class that a configuration names, of diffusers or transformers."""
    from neon.runtime.small_json import read_table

    table = read_table(config)
    named = table.get("_class_name") or table.get("architectures")
    return ".".join(map(str, named)) if isinstance(named, list) else named if isinstance(named, str) else None


def _show(facts: dict[str, Any]) -> None:
    facts = dict(facts)
    tensors, metadata, sets = facts.pop("tensors"), facts.pop("metadata"), facts.pop("sets", {})
    facts["key"] = facts["key"] or "(the file itself)"
    facts["candidates"] = ", ".join(name or "(the file itself)" for name in facts["candidates"])
    if "adapter" in facts:
        from neon.merge.adapters.facts import adapter_text

        facts["adapter"] = adapter_text(facts["adapter"])
    for name, value in facts.items():
        if value is not None:
            print(shown(f"{name:<13} {value:,}" if isinstance(value, int) else f"{name:<13} {value}"))
    _show_sets(sets)
    for name, value in metadata.items():
        if name not in (*facts, "buffers", "lora_adapter_metadata"):  # as many names as a network has layers
            print(shown(f"{name:<13} {value}"))
    print(f"tensors       {len(tensors)}")
    names = {name: shown(name) for name in tensors}
    width = max(map(len, names.values()))
    for name, tensor in tensors.items():
        print(f"  {names[name]:<{width}}  {tensor['dtype']:<9} {tensor['shape']}")


def _show_sets(sets: dict[str, Any]) -> None:
    for name, one in sets.items():
        count = len(one["files"])
        print(shown(f"set           {name}: {count} file{'s' if count > 1 else ''}, {one['bytes']:,} bytes"))


def _show_pipeline(facts: dict[str, Any]) -> None:
    """A pipeline without the names of its tensors, which `neon inspect` of a component's folder shows."""
    for name in ("file", "format", "class", "bytes", "parameters"):
        value = facts[name]
        if value is not None:
            print(shown(f"{name:<13} {value:,}" if isinstance(value, int) else f"{name:<13} {value}"))
    for name, part in facts["components"].items():
        dtypes = ", ".join(sorted({tensor["dtype"] for tensor in part["tensors"].values()}))
        print()
        print(shown(f"component     {name}"))
        print(shown(f"class         {part['class'] or '(not said)'}"))
        print(shown(f"used          {part['used']} ({part['format']}), {part['parameters']:,} parameters, {dtypes}"))
        print(f"sha256        {part['sha256']}")
        _show_sets(part["sets"])


def _facts_of(path: Path, key: str | None) -> dict[str, Any]:
    from neon.runtime.files import sha256_file

    read = _read_header(path, key) or _read_checkpoint(path, key)
    return {
        "file": str(path),
        "format": read.format,
        "bytes": sum(file.stat().st_size for file in read.files),
        "sha256": sha256_file(path),
        "architecture": read.described.get("architecture"),
        "config": read.described.get("config"),
        "key": read.key,
        "candidates": list(read.candidates),
        "parameters": sum(math.prod(t["shape"]) for t in read.tensors.values() if "float" in t["dtype"]),
        "metadata": read.metadata,
        **({} if read.adapter is None else {"adapter": read.adapter}),
        "tensors": read.tensors,
    }


def _read_header(path: Path, key: str | None) -> "_Contents | None":
    """That of a safetensors file that says of what architecture it is, without torch; None: another file."""
    from neon.checkpoint.header import METADATA, dtype_name, entries_in_order, is_safetensors, read_header

    if key or not path.is_file():
        return None
    with open(path, "rb") as file:
        if not is_safetensors(file.read(16)):
            return None
    try:
        header, _ = read_header(path)
    except RequestError:  # or it begins like one
        return None
    metadata: dict[str, str] = header.get(METADATA, {})
    if "architecture" not in metadata:
        return None
    tensors = {
        name: {"shape": entry["shape"], "dtype": dtype_name(path, name, entry["dtype"])}
        for name, entry in entries_in_order(header)
    }
    return _Contents((path,), "safetensors", "", ("",), metadata, metadata, tensors)


def _read_checkpoint(path: Path, key: str | None) -> "_Contents":
    from neon.checkpoint import open_checkpoint
    from neon.merge.adapters import weights_of
    from neon.merge.adapters.facts import adapter_facts
    from neon.model import described

    with open_checkpoint(weights_of(path), key) as checkpoint:
        tensors = {
            name: {"shape": list(spec.shape), "dtype": str(spec.dtype).removeprefix("torch.")}
            for name, spec in checkpoint.specs.items()
        }
        return _Contents(
            checkpoint.files,
            checkpoint.format,
            checkpoint.key,
            checkpoint.candidates,
            checkpoint.metadata,
            described(checkpoint),
            tensors,
            adapter_facts(checkpoint, path),
        )


class _Contents(NamedTuple):
    """What `neon inspect` reads in a checkpoint."""

    files: Sequence[Path]
    format: str
    key: str
    candidates: Sequence[str]
    metadata: dict[str, str]
    """as the file has it"""
    described: dict[str, str]
    """with architecture and config, if they are recognised"""
    tensors: dict[str, dict[str, Any]]
    """shape and dtype by name"""
    adapter: dict[str, Any] | None = None
    """of a LoRA: its kind, ranks, alphas and targets"""
