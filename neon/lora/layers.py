"""Which layers of a network take factors, and the factors put beside them in place, by PEFT."""

import functools
import math
import re
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from neon.checkpoint.common import listing
from neon.errors import RequestError
from neon.lora.settings import EVERY, LoRA

ADAPTER = "default"
"""what PEFT calls the only adapter"""
FACTORS = (f"lora_A.{ADAPTER}.weight", f"lora_B.{ADAPTER}.weight")
"""the names of the factors of a layer, within it"""
_OF_PEFT = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TABLES = (nn.Embedding, nn.EmbeddingBag)


def layers_of(network: nn.Module, targets: Sequence[str]) -> dict[str, nn.Module]:
    """The layers that `targets` name, by name.

    Raises:
        RequestError: one of them matches no linear layer or convolution; tells what they are called.
    """
    known = dict(_layers(network))
    found = set[str]()
    for target in targets:
        named = {name for name in known if target == EVERY or f".{name}".endswith(f".{target}")}
        if not named:
            called = listing(dict.fromkeys(map(_last_words, known)), first=12)
            raise RequestError(
                f"--lora_targets {target}: matches no linear layer or convolution of the network; expected {EVERY}, or "
                f"names such as {called}"
            )
        found |= named
    return {name: layer for name, layer in known.items() if name in found}


def _layers(network: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every layer whose weight is a matrix or the kernels of a convolution; by names, in the order of the network."""
    inside = [name for name, module in network.named_modules() if isinstance(module, nn.MultiheadAttention)]
    for name, module in network.named_modules():
        weight = module._parameters.get("weight")
        if weight is None or not weight.is_floating_point() or not 2 <= weight.dim() <= 5:
            continue
        if isinstance(module, _TABLES) or getattr(module, "groups", 1) != 1:
            continue
        if any(name.startswith(f"{attention}.") for attention in inside):  # reads weights past their layers
            continue
        yield name, module


def _last_words(name: str) -> str:
    """The end of a layer's name, as targets name it: with the word before it if it counts layers."""
    words = name.split(".")
    return ".".join(words[-2:] if words[-1].isdecimal() else words[-1:])


def added_parameters(network: nn.Module, lora: LoRA) -> int:
    """How many numbers the factors have; errors as `layers_of`."""
    weights = map(weight_of, layers_of(network, lora.targets).values())
    return sum(lora.rank * (len(weight) + weight[0].numel()) for weight in weights)


def weight_of(layer: nn.Module) -> Tensor:
    """The weight of one of `layers_of`."""
    weight = layer._parameters["weight"]
    assert weight is not None
    return weight


def inject(network: nn.Module, lora: LoRA, seed: int) -> dict[str, Any]:
    """Freeze `network` and put factors beside the targets, in place: PEFT's layers, by their names.

    The first factor is drawn by `seed`, as PEFT draws it (Kaiming's uniform of a = sqrt(5)), the second is 0; both are
    float32, or float64 as the weight. The order of draws is that of the layers, whatever the device.

    Raises:
        RequestError: as `layers_of`.
    """
    layers = layers_of(network, lora.targets)
    from peft import LoraConfig, inject_adapter_in_model  # seconds: only those who train by it wait

    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type] # a number
        target_modules="|".join(map(re.escape, layers)),  # a list would match the ends of names
    )
    config._register_custom_module({type(layer): _of_weight() for layer in _unknown(layers.values())})
    with torch.random.fork_rng(devices=[]):  # PEFT draws from the global generator
        inject_adapter_in_model(config, network, ADAPTER)
    found = {name: network.get_submodule(name) for name in layers}
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, layer in layers.items():
            down, up = factors_of(found[name])
            dtype = torch.promote_types(weight_of(layer).dtype, torch.float32)
            down.data, up.data = down.to(dtype), up.to(dtype)
            bound = 1 / math.sqrt(down[0].numel())
            down.copy_(torch.empty(down.shape).uniform_(-bound, bound, generator=generator))
            up.zero_()
    return found


def factors_of(layer: Any) -> tuple[nn.Parameter, nn.Parameter]:
    """The factors of a layer that `inject` has made: down [r, in, ...] and up [out, r, ...]."""
    return layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight


def _unknown(layers: Any) -> Iterator[nn.Module]:
    """Layers of classes that PEFT has no factors for."""
    return (layer for layer in layers if not isinstance(layer, _OF_PEFT))


@functools.cache
def _of_weight() -> type[nn.Module]:
    """PEFT's layer for classes of other people's."""
    from peft.tuners.lora import LoraLayer

    class OfWeight(nn.Module, LoraLayer):
        """A layer that computes with weight + scale up down in the place of its weight, whatever it does with that."""

        def __init__(self, base_layer: nn.Module, adapter_name: str, r: int, lora_alpha: float, **_: Any) -> None:
            super().__init__()
            LoraLayer.__init__(self, base_layer)
            self._active_adapter = adapter_name
            self.r[adapter_name], self.lora_alpha[adapter_name] = r, lora_alpha
            self.scaling[adapter_name] = lora_alpha / r
            inputs, outputs = self._get_in_out_features(base_layer)
            self.lora_A[adapter_name] = nn.Linear(inputs, r, bias=False)
            self.lora_B[adapter_name] = nn.Linear(r, outputs, bias=False)
            self._move_adapter_to_device_of_base_layer(adapter_name)
            self.set_adapter(self.active_adapters)

        def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
            weight = weight_of(module)
            return weight[0].numel(), len(weight)

        def forward(self, *args: Any, **kwargs: Any) -> Tensor:
            down, up = factors_of(self)
            weight = weight_of(self.base_layer)
            changed = weight + self.scaling[ADAPTER] * (up @ down).view_as(weight)
            return functional_call(self.base_layer, {"weight": changed}, args, kwargs)

    return OfWeight
