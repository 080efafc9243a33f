"""Self-trained weights beside a live network that holds their base, to be merged into it at one w after another.

Whole weights stay resident, as copies. Those of a LoRA are the base with factors on it: they are computed anew for each
w, a layer at a time from the files, and nothing but the network is as large as the network.
"""

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor, nn

from neon.checkpoint.naming import fitted
from neon.errors import RequestError, warn
from neon.merge.extrapolate import Change, check_weight
from neon.merge.pair import Pair, PathLike, load_self_trained, open_pair
from neon.merge.states import LiveMerge, State, merge_into
from neon.model import load_weights


class Live(Protocol):
    """What puts merges into a live network."""

    def set(self, w: float) -> None:
        """Put (1 + w) base - w self_trained into the network, in place; errors as `merge_tensor`."""
        ...


class Beside(ABC):
    """Self-trained weights beside a live network."""

    is_adapter: bool
    """whether the file holds factors only"""

    @abstractmethod
    def live(self) -> Live:
        """What puts their merges into the network; it counts on a network that holds the base, or what it has put."""

    @property
    @abstractmethod
    def length(self) -> float:
        """The Euclidean norm of the update of all weights."""

    @abstractmethod
    def second(self) -> nn.Module:
        """A copy of the network, which holds the base now, with these weights."""


def beside(
    network: nn.Module,
    base: PathLike,
    self_trained: PathLike,
    key: str | None = None,
    self_trained_key: str | None = None,
    *,
    copied: Callable[[], State] | None = None,
) -> Beside:
    """The self-trained weights of a pair of files beside the `network` that was loaded from `base`.

    Warns of what a user should know.

    Args:
        copied: gives a copy of the base's weights, which is asked for where whole weights are to be merged; by default
            one of those in the network is made.

    Raises:
        RequestError: as `open_pair`, or the network is another one.
    """
    with open_pair(base, self_trained, key, self_trained_key) as pair:
        is_adapter = pair.adapter is not None
    if is_adapter:
        return _Adapter(network, base, self_trained, key, self_trained_key)
    kept = copied_weights(network) if copied is None else copied()
    return _Whole(network, kept, load_self_trained(network, base, self_trained, key, self_trained_key), self_trained)


def copied_weights(network: nn.Module) -> dict[str, Tensor]:
    """A copy of the weights of a network."""
    return {name: tensor.clone() for name, tensor in network.state_dict().items()}


class _Whole(Beside):
    is_adapter = False

    def __init__(self, network: nn.Module, base: State, state: Mapping[str, Tensor], path: PathLike) -> None:
        self._network, self._base, self._state, self._path = network, base, dict(state), path

    def live(self) -> Live:
        return LiveMerge(self._network, self._base, self._state)

    @cached_property
    def length(self) -> float:
        names = [name for name, _ in self._network.named_parameters()]
        steps = (self._state[name].double() - self._base[name].cpu().double() for name in names)
        return math.sqrt(sum(map(_square, steps)))

    def second(self) -> nn.Module:
        second = copy.deepcopy(self._network)
        load_weights(second, self._state, self._path)
        return second


class _Adapter(Beside):
    is_adapter = True

    def __init__(
        self,
        network: nn.Module,
        base: PathLike,
        self_trained: PathLike,
        key: str | None,
        self_trained_key: str | None,
    ) -> None:
        self._network, self._files = network, (base, self_trained, key, self_trained_key)
        own = {name: tensor.detach() for name, tensor in network.state_dict().items()}
        squares, change = 0.0, Change()
        with open_pair(*self._files) as pair:
            for note in pair.notes:
                warn(note)
            names = fitted(own, pair.base.specs)
            if names is None:
                raise RequestError(f"{base}: holds other tensors than the network that is merged into")
            assert pair.adapter is not None
            changed = pair.adapter.changes.keys() & pair.roles.merged
            self._names = {name: held for name, held in names.items() if held in changed}
            """of the tensors that the adapter changes: in the network, and in the files"""
            for _, b, s in self._tensors(pair):
                squares += _square(s.double() - b.double())
                change.add(b, s)
        for name in own.keys() - self._names.keys():
            if own[name].is_floating_point():
                change.add(own[name], own[name])
        if (text := change.warning()) is not None:
            warn(f"{self_trained}: {text}")
        self._length = math.sqrt(squares)

    def live(self) -> Live:
        return self

    @property
    def length(self) -> float:
        return self._length

    @torch.no_grad()
    def set(self, w: float) -> None:
        """As `LiveMerge.set`, to the same bits; what the adapter does not change is left as it is."""
        check_weight(w)
        live = self._network.state_dict()
        with open_pair(*self._files) as pair:
            for name, b, s in self._tensors(pair):
                merge_into(live[name], b, s, w, name)

    def second(self) -> nn.Module:
        """Shares with the network what the adapter does not change."""
        shared = {id(p): p for name, p in self._network.named_parameters() if name not in self._names}
        self.set(-1.0)
        second = copy.deepcopy(self._network, shared)
        self.set(0.0)
        return second

    def _tensors(self, pair: Pair) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Name, base's and self-trained values of the tensors that differ, one at a time in memory."""
        for name, held in self._names.items():
            yield name, pair.base.tensor(held), pair.self_trained.tensor(held)


def _square(step: Tensor) -> float:
    """The square of the length; of a tensor that is not finite, of what is."""
    return float(step.square().nan_to_num(0, 0, 0).sum())
