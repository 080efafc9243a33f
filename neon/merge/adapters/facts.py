"""What `neon inspect` tells of an adapter, without its base."""

import math
from collections import Counter
from pathlib import Path
from typing import Any

from neon.checkpoint import Checkpoint
from neon.errors import RequestError
from neon.merge.adapters.names import Contents, Layer, is_adapter, read_contents


def adapter_facts(file: Checkpoint, path: Path) -> dict[str, Any] | None:
    """Kind, format, ranks, alphas and targets of an adapter as JSON; None: the file holds none.

    Of an adapter that cannot be read the kind says why.
    """
    if not is_adapter(file.specs):
        return None
    try:
        contents = read_contents(file, path)
        return {
            "kind": "DoRA" if any("magnitude" in parts for parts in contents.layers.values()) else "LoRA",
            "format": contents.style,
            "components": sorted({layer.component for layer in contents.layers} - {""}),
            "layers": len(contents.layers),
            "ranks": _counted(_rank(file, parts) for parts in contents.layers.values()),
            "alphas": _counted(_alpha(file, contents, layer, parts) for layer, parts in contents.layers.items()),
            "targets": sorted({_target(layer) for layer in contents.layers}),
            "whole_tensors": len(contents.whole),
        }
    except RequestError as error:
        return {"kind": f"not read: {error}"}


def adapter_text(facts: dict[str, Any]) -> str:
    """The facts as one line."""
    if "format" not in facts:
        return str(facts["kind"])
    parts = f" of {', '.join(facts['components'])}" if facts["components"] else ""
    whole = f", {facts['whole_tensors']} tensors whole" if facts["whole_tensors"] else ""
    return (
        f"{facts['kind']} ({facts['format']}){parts}: {facts['layers']} layers, rank {_text(facts['ranks'])}, "
        f"alpha {_text(facts['alphas'])}, targets {', '.join(facts['targets'])}{whole}"
    )


def _counted(values: Any) -> dict[str, int]:
    """How many layers have each value."""
    return dict(sorted(Counter(f"{value:g}" for value in values if value is not None).items()))


def _text(counts: dict[str, int]) -> str:
    if len(counts) == 1:
        return next(iter(counts))
    return ", ".join(f"{value} ({count} layers)" for value, count in counts.items()) or "not told"


def _rank(file: Checkpoint, parts: dict[str, str]) -> int | None:
    name = parts.get("down", parts.get("embedding_down"))
    shape = () if name is None else file.shape(name)
    return shape[0] if shape else None


def _alpha(file: Checkpoint, contents: Contents, layer: Layer, parts: dict[str, str]) -> float | None:
    """What the file or the config says; else the rank, which makes the scale 1."""
    rank = _rank(file, parts)
    if "alpha" in parts:
        values = file.tensor(parts["alpha"])
        return float(values.flatten()[0]) if values.numel() == 1 else math.nan
    config = contents.configs.get(layer.component, contents.configs.get(""))
    return rank if config is None else config.alpha(layer.module)


def _target(layer: Layer) -> str:
    """The last words of a layer's name, as configs name targets; all of a name that has no dots."""
    if layer.flat:
        return layer.component
    words = layer.module.split(".")
    return ".".join(words[-2:] if words[-1].isdecimal() else words[-1:])
