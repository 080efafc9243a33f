"""The formats that an adapter is written in: names of tensors, the config beside them, and what they can hold whole."""

import json
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Collection, Mapping
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from neon.merge.adapters.names import CONFIG_ENTRY, DIFFUSERS_FILE, PEFT_FRONT, Layer, Style
from neon.merge.adapters.unet_names import FRONT, other_names
from neon.merge.adapters.update import Factors, is_table

_COMPONENTS = ("unet", "transformer", "transformer_2", "text_encoder", "text_encoder_2", "text_encoder_3", "prior")
_KOHYA = {"text_encoder": "lora_te", "text_encoder_2": "lora_te2", "text_encoder_3": "lora_te3"}  # others: lora_unet


class AdapterFormat(ABC):
    """One format; `layers` are the adapter's own names of layers where it was read from the same format."""

    weights_name: ClassVar[str | None]
    """of the file with the tensors in the output's folder; None: the output is the file"""

    def __init__(self, base: Path, names: Collection[str], given: Mapping[str, Layer]) -> None:
        """`names`: of the base's tensors; `given`: layers of an adapter in this format, by the base's weights."""
        self._base, self._names, self._given = base, names, given

    @abstractmethod
    def tensors(self, name: str, factors: Factors) -> dict[str, Tensor]:
        """The factors for the weight `name` of the base, under the names of the format; empty: it cannot hold them."""

    def whole(self, names: Collection[str], layers: Collection[str]) -> dict[str, str]:
        """Names under which it holds tensors of the base whole, by name in the base; what is missing it cannot hold.

        `names`: of the tensors that changed and are no layers; `layers`: of the weights that have factors.
        """
        return {}

    def config(self, factors: Mapping[str, Factors], whole: Mapping[str, str]) -> dict[str, Any]:
        """The config of PEFT for these layers: alpha = r, so that scale 1 is the product."""
        ranks = Counter(one.rank for one in factors.values())
        usual = ranks.most_common(1)[0][0]
        modules = sorted(self._module(name) for name in factors)
        other = {self._pattern(self._module(name), modules): one.rank for name, one in factors.items()}
        other = {pattern: rank for pattern, rank in other.items() if rank != usual}
        return {
            "peft_type": "LORA",
            "r": usual,
            "lora_alpha": usual,
            "rank_pattern": other,
            "alpha_pattern": dict(other),
            "target_modules": modules,
            "lora_dropout": 0.0,
            "use_rslora": False,
            "use_dora": False,
            "bias": "none",
        }

    def metadata(self, config: Mapping[str, Any]) -> dict[str, str]:
        """What the file of tensors says beside them."""
        return {"format": "pt"}

    def _module(self, name: str) -> str:
        """What the format calls the layer whose weight is `name`."""
        return self._given[name].module if name in self._given else name.removesuffix(".weight")

    @staticmethod
    def _pattern(module: str, modules: Collection[str]) -> str:
        """A layer as a key of `rank_pattern`, which stands for every layer that ends so."""
        return f"^{module}" if any(other.endswith(f".{module}") for other in modules) else module


class PEFTFormat(AdapterFormat):
    """`adapter_config.json` and `adapter_model.safetensors`, as `PeftModel.from_pretrained` opens them."""

    weights_name = "adapter_model.safetensors"

    def tensors(self, name: str, factors: Factors) -> dict[str, Tensor]:
        front = PEFT_FRONT + self._module(name)
        if factors.is_embedding:
            return {f"{front}.lora_embedding_A": factors.down, f"{front}.lora_embedding_B": factors.up}
        return {f"{front}.lora_A.weight": factors.down, f"{front}.lora_B.weight": _as_convolution(factors)}

    def whole(self, names: Collection[str], layers: Collection[str]) -> dict[str, str]:
        targets = {name.removesuffix(".weight") for name in layers}
        parents = {name.rpartition(".")[0] for name in self._names}
        saved = {
            module
            for name in names
            if not (name.endswith(".bias") or is_table(name, self._names))
            and (module := name.rpartition(".")[0])  # a parameter of the model itself has none
            and module not in targets
            and not any(parent.startswith(f"{module}.") for parent in parents)  # nor has one of a block with layers
        }
        found = {name: self._renamed(name) for name in self._names if name.rpartition(".")[0] in saved}
        for name in names:
            module, _, word = name.rpartition(".")
            # PEFT loads such names into the model itself, where a table may be shared with the output layer.
            if (word == "bias" or is_table(name, self._names)) and module not in saved:
                found[name] = self._renamed(
                    f"{module}.base_layer.bias" if word == "bias" and module in targets else name
                )
        return {name: PEFT_FRONT + held for name, held in found.items()}

    def _renamed(self, name: str) -> str:
        """A tensor of the base as the adapter's model calls it, which may have other words in front."""
        for held, layer in islice(self._given.items(), 1):
            ours, theirs = held.removesuffix(".weight"), layer.module
            if theirs.endswith(ours):
                return theirs.removesuffix(ours) + name
            return name.removeprefix(ours.removesuffix(theirs))
        return name

    def config(self, factors: Mapping[str, Factors], whole: Mapping[str, str]) -> dict[str, Any]:
        tables = {name for name in whole if is_table(name, self._names)}
        saved = {_parent(held) for name, held in whole.items() if name not in tables and not held.endswith(".bias")}
        has_biases = any(_parent(held) not in saved for name, held in whole.items() if name not in tables)
        return {
            **super().config(factors, whole),
            "bias": "all" if has_biases else "none",
            "modules_to_save": sorted(saved) or None,
            "fan_in_fan_out": any(one.by_columns and not one.is_embedding for one in factors.values()),
            "inference_mode": True,
            "task_type": None,
            "base_model_name_or_path": None,
            "init_lora_weights": True,
        }


class DiffusersFormat(AdapterFormat):
    """`pytorch_lora_weights.safetensors`, as `load_lora_weights` and `load_lora_adapter` of diffusers open it."""

    weights_name = DIFFUSERS_FILE

    def tensors(self, name: str, factors: Factors) -> dict[str, Tensor]:
        if factors.is_embedding or factors.by_columns:
            return {}
        front = f"{self._component}.{self._module(name)}"
        return {f"{front}.lora_A.weight": factors.down, f"{front}.lora_B.weight": _as_convolution(factors)}

    def metadata(self, config: Mapping[str, Any]) -> dict[str, str]:
        packed = {f"{self._component}.{name}": value for name, value in config.items() if name != "peft_type"}
        return {"format": "pt", CONFIG_ENTRY: json.dumps(packed, sort_keys=True)}

    @property
    def _component(self) -> str:
        """What pipelines call the network; they find nothing in a file without it."""
        given = next((layer.component for layer in self._given.values()), "")
        return given or component_of(self._base, self._names)

    def _module(self, name: str) -> str:
        if name in self._given:
            return super()._module(name)
        return super()._module(self._called.get(name, name)).removeprefix(FRONT)

    @cached_property
    def _called(self) -> dict[str, str]:
        """In diffusers, the weights of a base that is called as Stable Diffusion's first release."""
        is_first = any(name.removeprefix(FRONT).startswith("input_blocks.") for name in self._names)
        return dict(other_names(self._names)) if is_first else {}


class KohyaFormat(AdapterFormat):
    """One file with `lora_unet_...`, as the scripts of kohya and what reads their files open it."""

    weights_name = None

    def tensors(self, name: str, factors: Factors) -> dict[str, Tensor]:
        if factors.is_embedding or factors.by_columns:
            return {}
        if name in self._given:
            front = str(self._given[name])
        else:
            component = _KOHYA.get(component_of(self._base, self._names), "lora_unet")
            front = f"{component}_{self._module(name).removeprefix(FRONT).replace('.', '_')}"
        return {
            f"{front}.lora_down.weight": factors.down,
            f"{front}.lora_up.weight": _as_convolution(factors),
            f"{front}.alpha": torch.tensor(float(factors.rank)),
        }


FORMATS: dict[Style, type[AdapterFormat]] = {"peft": PEFTFormat, "diffusers": DiffusersFormat, "kohya": KohyaFormat}


def component_of(base: Path, names: Collection[str]) -> str:
    """Which network of a pipeline a base is: by the name of its folder, else by its layers."""
    for part in base.parts[-2:]:
        if part in _COMPONENTS:
            return part
    if any(name.removeprefix(FRONT).startswith(("down_blocks.", "input_blocks.")) for name in names):
        return "unet"
    return "text_encoder" if any(name.startswith("text_model.") for name in names) else "transformer"


def _parent(held: str) -> str:
    """The module of a tensor of a PEFT file."""
    return held.removeprefix(PEFT_FRONT).rpartition(".")[0]


def _as_convolution(factors: Factors) -> Tensor:
    """The outer factor with as many dimensions as the inner one: a convolution of size 1."""
    return factors.up.view(*factors.up.shape, *[1] * (factors.down.dim() - 2))
