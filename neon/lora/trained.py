"""LoRA as what is trained of a network: its factors alone are stepped, averaged, resumed from and written."""

import json
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from neon.checkpoint import save_safetensors
from neon.checkpoint.common import listing
from neon.errors import warn
from neon.lora.layers import FACTORS, inject
from neon.lora.settings import RECORD, LoRA
from neon.merge.adapters.names import CONFIG_ENTRY
from neon.merge.extrapolate import Change
from neon.model import GenerativeModel, model_metadata
from neon.trained import PathLike, Trained


class LowRank(Trained):
    """The factors of a LoRA that is put into the network of `model`, in place.

    A snapshot is one file in the form of diffusers: the factors of each layer, and the config of PEFT in the metadata,
    beside what those of whole networks say. The scale is in the second factor, for there are readers of such files that
    look at no config.
    """

    def __init__(self, model: GenerativeModel, lora: LoRA, seed: int, *, tells_moved: bool) -> None:
        self.lora = lora
        self._norm = _norm_of(model.network) if tells_moved else 0.0
        self._metadata = model_metadata(model)  # by the names of the network as it is
        self._layers = inject(model.network, lora, seed)
        for module in model.network.train().modules():
            if isinstance(module, _NormBase):  # whose running statistics belong to the base
                module.eval()
        super().__init__(model)
        self._places = {name: at for at, name in enumerate(self.named)}
        self._is_told = False

    def state(self) -> dict[str, Tensor]:
        return {name: parameter.detach() for name, parameter in self.named.items()}

    @torch.no_grad()
    def take_up(self, state: Mapping[str, Tensor]) -> None:
        if state.keys() != self.named.keys():
            raise ValueError("factors of other layers")
        for name, parameter in self.named.items():
            if state[name].shape != parameter.shape:
                raise ValueError(f"{name} of another shape")
            parameter.copy_(state[name])

    def moved(self, result: Sequence[Tensor]) -> float:
        """By norms of products, which take no more memory than the factors."""
        if not self._norm:
            return 0.0
        squares = 0.0
        for name in self._layers:
            down, up = (factor.double().flatten(1) for factor in self._of(name, result))
            squares += float(((up.T @ up) * (down @ down.T)).sum())
        return self.lora.scale * math.sqrt(max(squares, 0.0)) / self._norm

    def save(self, path: PathLike, result: Sequence[Tensor], metadata: dict[str, str]) -> None:
        """Warns, once, of layers whose factors have not moved."""
        self._tell_unmoved(result)
        front = f"{self.model.component}." if self.model.component else ""
        tensors = {}
        for name, layer in self._layers.items():
            shape = layer.base_layer.weight.shape
            down, up = self._of(name, result)
            tensors[f"{front}{name}.lora_A.weight"] = down.reshape(-1, *shape[1:])
            up = self.lora.scale * up
            tensors[f"{front}{name}.lora_B.weight"] = up.reshape(shape[0], -1, *[1] * (len(shape) - 2))
        config = {f"{front}{name}": value for name, value in self._config().items()}
        said = {
            **self._metadata,
            RECORD: json.dumps(self.lora.facts),
            CONFIG_ENTRY: json.dumps(config, sort_keys=True),
        }
        save_safetensors(path, tensors, {**said, **metadata})

    def _of(self, layer: str, result: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """What of `result` stands for the factors of a layer."""
        down, up = (result[self._places[f"{layer}.{name}"]].detach() for name in FACTORS)
        return down, up

    def _config(self) -> dict[str, object]:
        """What PEFT is told to make the same layers of the file."""
        return {
            "r": self.lora.rank,
            "lora_alpha": self.lora.rank,
            "target_modules": sorted(self._layers),
            "lora_dropout": 0.0,
            "use_rslora": False,
            "use_dora": False,
            "bias": "none",
        }

    def _tell_unmoved(self, result: Sequence[Tensor]) -> None:
        """Say which layers have not moved, if others have: those that the loss does not depend on."""
        still = [name for name in self._layers if not self._of(name, result)[1].any()]
        if self._is_told or not 0 < len(still) < len(self._layers):
            return
        self._is_told = True
        warn(
            f"{len(still)} of {len(self._layers)} layers with factors do not move, for the loss does not call them: "
            f"{listing(still)}; --lora_targets names others"
        )


def _norm_of(network: nn.Module) -> float:
    """The norm of all weights."""
    change = Change()
    for parameter in network.parameters():
        change.add(parameter.detach(), parameter.detach())
    return math.sqrt(change.norm)
