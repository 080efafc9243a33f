"""Which weights of a base an adapter changes: layers found by names, checked by shapes, with scales of the config."""

import difflib
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import torch

from neon.checkpoint import Checkpoint, TensorSpec
from neon.checkpoint.common import listing
from neon.errors import RequestError
from neon.merge.adapters.layers import Change, Dense, LoRA, conv1d_words, layouts, word_of
from neon.merge.adapters.names import Config, Contents, Layer
from neon.merge.adapters.places import Place, candidates, read_as

_OTHER_BASE = "the adapter is of another base, name the one that it was trained on"
_FACTORS = {"down", "up", "mid", "embedding_down", "embedding_up", "magnitude"}


@dataclass
class Matched:
    """What an adapter changes of its base."""

    changes: dict[str, Change] = field(default_factory=dict)
    """by name in the base"""
    notes: list[str] = field(default_factory=list)
    """what a user should know, in sentences"""


def match(path: Path, file: Checkpoint, contents: Contents, base: Checkpoint) -> Matched:
    """What the adapter `file` (of the user's `path`) changes of `base`.

    Of the components of an adapter those that the base has are used; the notes name the others.

    Raises:
        RequestError: a layer matches no weight of the base, or one of another shape; factors are incomplete; the config
            does not say what the tensors do.
    """
    return _Matcher(path, file, contents, base).matched()


class _Matcher:
    def __init__(self, path: Path, file: Checkpoint, contents: Contents, base: Checkpoint) -> None:
        self.path, self.file, self.contents, self.base = path, file, contents, base
        self.conv1d = conv1d_words(base.specs)

    def matched(self) -> Matched:
        if not self.contents.layers:
            raise RequestError(f"{self.path}: no factors of a LoRA in it; expected lora_A and lora_B of some layers")
        for layer in self.contents.layers:
            self._check_factors(layer)
        components = self._components()
        places = {component: self._place(keys) for component, keys in components.items()}
        used = self._used(places)
        found = Matched()
        for component in used:
            keys, place = components[component], places[component]
            for key, layer in keys.items():
                self._add(found.changes, layer, place.names[key])
            if note := read_as(place.names, self.contents.style == "kohya"):
                found.notes.append(f"{self.path}: {note}")
        if others := [component for component in components if component not in used]:
            found.notes.append(f"{self.path}: {listing(others)} of it not used: {self.base.path} holds {listing(used)}")
        self._check_targets()
        return found

    def _components(self) -> dict[str, dict[str, Layer]]:
        """By component, the layers by the name of a tensor that the base should have for them."""
        found: dict[str, dict[str, Layer]] = {}
        for layer in self.contents.layers:
            key = layer.module if layer.flat else f"{layer.module}.weight"
            found.setdefault(layer.component, {})[key] = layer
        for layer in self.contents.whole:
            found.setdefault(layer.component, {})[layer.module] = layer
        return found

    def _place(self, keys: Mapping[str, Layer]) -> Place:
        """The best place for the names of a component: with the most names, the fewest words put in or left out."""
        flat = any(layer.flat for layer in keys.values())
        best: Place | None = None
        for names in candidates(list(keys), list(self.base.specs), flat):
            fit = {key for key, name in names.items() if self._fits(keys[key], self.base.specs[name])}
            place = Place(names, fit, [key for key in keys if key not in names])
            if best is None or (len(fit), len(names)) > (len(best.shapes_fit), len(best.names)):
                best = place
            elif place.is_whole and best.is_whole and names != best.names:
                one, other = (next(iter(p.names.values())) for p in (best, place))
                raise RequestError(
                    f"{self.path}: its layers fit {self.base.path} in two places, {one} and {other}; merge into a file "
                    "that holds one network only"
                )
        return best or Place({}, (), list(keys))

    def _used(self, places: Mapping[str, Place]) -> list[str]:
        """The components that the base has; a RequestError if none is, or one is only in part."""
        whole = [component for component, place in places.items() if place.is_whole]
        partly = [c for c, place in places.items() if c not in whole and 2 * len(place.shapes_fit) > len(place.names)]
        if not whole or any(places[component].shapes_fit for component in partly):
            most = max(partly or places, key=lambda component: len(places[component].names))
            raise self._misfit(most, places[most])
        held = [name for component in whole for name in places[component].names.values()]
        if len(set(held)) < len(held):  # of one network, such as both text encoders of a pipeline
            named = [component for component in whole if component in self.base.path.parts[-2:]]
            if len(named) != 1:
                raise RequestError(
                    f"{self.path}: {listing(whole)} of it all fit {self.base.path}; expected one of these as the name "
                    "of its folder, put the base into such a folder"
                )
            return named
        return whole

    def _misfit(self, component: str, place: Place) -> RequestError:
        layers = self._components()[component]
        if place.lacking:
            key = place.lacking[0]
            near = difflib.get_close_matches(key, islice(self.base.specs, 5000), 3, 0) or list(self.base.specs)
            text = f"its layer {layers[key]} is no weight of {self.base.path}, which has {listing(near)}"
        else:
            key = next(key for key in place.names if key not in place.shapes_fit)
            name = place.names[key]
            text = (
                f"its layer {layers[key]} is made for {self._shape_text(layers[key])}, and {name} of {self.base.path} "
                f"is {list(self.base.specs[name].shape)}"
            )
        count = len(place.lacking) + len(place.names) - len(place.shapes_fit)
        more = f" ({count} layers of {len(layers)} do not fit)" if count > 1 else ""
        return RequestError(f"{self.path}: {text}{more}; {_OTHER_BASE}")

    def _parts(self, layer: Layer) -> Mapping[str, TensorSpec]:
        return {part: self.file.specs[name] for part, name in self.contents.layers[layer].items()}

    def _shape_text(self, layer: Layer) -> str:
        if layer in self.contents.whole:
            return str(list(self.file.specs[self.contents.whole[layer]].shape))
        parts = self._parts(layer)
        return " x ".join(str(list(spec.shape)) for part, spec in parts.items() if "alpha" not in part)

    def _fits(self, layer: Layer, spec: TensorSpec) -> bool:
        if layer in self.contents.whole:
            return self.file.specs[self.contents.whole[layer]].shape == spec.shape
        parts = self._parts(layer)
        if "diff" in parts:
            return parts["diff"].shape == spec.shape
        return bool(layouts(parts, spec.shape)) if parts.keys() & _FACTORS else True

    def _check_factors(self, layer: Layer) -> None:
        """Refuse a layer of which a factor is missing or empty."""
        parts = self._parts(layer)
        if parts.keys() & {"diff", "diff_b"} and not parts.keys() & _FACTORS:
            return
        front = _front_of(parts)
        if lacking := [part for part in (f"{front}down", f"{front}up") if part not in parts]:
            raise RequestError(
                f"{self.path}: {layer} has {listing(self.contents.layers[layer].values())} and no factor "
                f"{lacking[0]!r}; expected both, download the file again"
            )
        if 0 in (shape := parts[f"{front}down"].shape) or not shape:
            raise RequestError(
                f"{self.path}: {layer} has rank 0 ({self.contents.layers[layer][f'{front}down']} is {list(shape)}); "
                "expected 1 or more, train or download the adapter again"
            )

    def _add(self, changes: dict[str, Change], layer: Layer, name: str) -> None:
        """What a layer changes of the base's tensor `name`, and of the bias beside it."""
        if not self.base.specs[name].dtype.is_floating_point and layer not in self.contents.whole:
            raise RequestError(
                f"{self.base.path}: {name} is quantised ({self.base.specs[name].dtype}), nothing can be added to it; "
                "name the base as it was before it was quantised"
            )
        if layer in self.contents.whole:
            changes[name] = Dense(self.contents.whole[layer])
            return
        parts = self.contents.layers[layer]
        lora = self._lora(layer, parts, name) if parts.keys() & _FACTORS else None
        if lora is not None:
            changes[name] = lora
        elif "diff" in parts:
            changes[name] = Dense(parts["diff"], 1.0)
        for part, scale in (("up_bias", lora.scale if lora else 1.0), ("diff_b", 1.0)):
            if part in parts:
                bias = f"{name.removesuffix('.weight')}.bias"
                if self.base.specs.get(bias, TensorSpec((), torch.uint8)).shape != self.file.shape(parts[part]):
                    raise RequestError(
                        f"{self.path}: {parts[part]} {list(self.file.shape(parts[part]))} is for {bias}, which "
                        f"{self.base.path} has not in this shape; {_OTHER_BASE}"
                    )
                changes[bias] = Dense(parts[part], scale)

    def _lora(self, layer: Layer, parts: Mapping[str, str], name: str) -> LoRA:
        specs = self._parts(layer)
        down = f"{_front_of(specs)}down"
        rank = specs[down].shape[0]
        config = self.contents.configs.get(layer.component, self.contents.configs.get(""))
        if config is not None and "alpha" not in parts and (told := config.rank(layer.module)) != rank:
            raise RequestError(
                f"{config.source}: says rank {told} of {layer}, and {parts[down]} has {rank}; expected the "
                "config that was written with the weights"
            )
        both = layouts(specs, self.base.specs[name].shape)
        by_columns = both[0] if len(both) == 1 else self._is_conv1d(name, config)
        lora = LoRA(layer, parts, self._scale(layer, parts, rank, config), rank, by_columns)
        outputs = specs[down.replace("down", "up")].shape[0]
        if lora.has_magnitude and math.prod(self.file.shape(parts["magnitude"])) != outputs:
            raise RequestError(
                f"{self.path}: {parts['magnitude']} {list(self.file.shape(parts['magnitude']))} is a DoRA that is not "
                f"by outputs ({outputs}), which is not read; merge it by the program that trained it"
            )
        return lora

    def _is_conv1d(self, name: str, config: Config | None) -> bool:
        """Whether a square weight is stored [in, out]."""
        if self.conv1d:
            return word_of(name) in self.conv1d
        return config is not None and config.entries.get("fan_in_fan_out") is True

    def _scale(self, layer: Layer, parts: Mapping[str, str], rank: int, config: Config | None) -> float:
        if "alpha" in parts:
            values = self.file.tensor(parts["alpha"])
            scale = float(values.flatten()[0]) / rank if values.numel() == 1 else math.nan
        else:
            scale = 1.0 if config is None else config.scale(layer.module, rank)
        if not math.isfinite(scale):
            raise RequestError(f"{self.path}: the alpha of {layer} is no finite number; download the file again")
        return scale

    def _check_targets(self) -> None:
        """Refuse a file that lacks layers which its config names, and the base has."""
        config = self.contents.configs.get("")
        if config is None or config.entries.get("exclude_modules"):
            return
        modules = [layer.module for layer in self.contents.layers]
        whole = [layer.module.rpartition(".")[0] for layer in self.contents.whole]
        for entry, held in (("target_modules", modules), ("modules_to_save", whole)):
            names = config.entries.get(entry)
            if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
                continue
            for name in names:
                weight = f"{name}.weight"
                in_base = any(one == weight or one.endswith(f".{weight}") for one in self.base.specs)
                if in_base and not any(one == name or one.endswith(f".{name}") for one in held):
                    raise RequestError(
                        f"{config.source}: {entry} names {name}, which {self.base.path} has, and {self.file.path} has "
                        "nothing for it; expected the weights that were written with the config"
                    )


def _front_of(parts: Collection[str]) -> str:
    """What the factors of a table are called in front."""
    return "embedding_" if "embedding_down" in parts or "embedding_up" in parts else ""
