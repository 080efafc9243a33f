"""What of a network is trained, what a run of it goes on from, and how the result is kept: here all of its weights."""

import contextlib
import os
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import partial

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from neon.errors import RequestError
from neon.merge.extrapolate import Change
from neon.model import GenerativeModel, save_model

PathLike = str | os.PathLike[str]


class Trained(ABC):
    """The parameters of `model.network` that are trained, in train mode; the others are frozen."""

    def __init__(self, model: GenerativeModel) -> None:
        self.model, self.network = model, model.network

    @property
    def named(self) -> dict[str, nn.Parameter]:
        """What is trained, by name; others once the network is spread over processes."""
        return {name: p for name, p in self.network.named_parameters() if p.requires_grad}

    @property
    def parameters(self) -> list[nn.Parameter]:
        """In the order of the network."""
        return list(self.named.values())

    @abstractmethod
    def state(self) -> dict[str, Tensor]:
        """What `take_up` goes on from."""

    @abstractmethod
    def take_up(self, state: Mapping[str, Tensor]) -> None:
        """Become what `state` was taken of; an exception of any kind if it is of another network."""

    @abstractmethod
    def moved(self, result: Sequence[Tensor]) -> float:
        """|weights of the network with `result` - those at the start| / |those at the start|.

        `result` stands for `parameters`.
        """

    @abstractmethod
    def save(self, path: PathLike, result: Sequence[Tensor], metadata: dict[str, str]) -> None:
        """Write the network with `result` in the place of `parameters` as safetensors that a merge takes."""


class WholeNetwork(Trained):
    """All weights; those at the start are copied if the caller `tells_moved`, else `moved` is 0."""

    def __init__(self, model: GenerativeModel, *, tells_moved: bool) -> None:
        model.network.train().requires_grad_(True)
        super().__init__(model)
        self._start = [p.detach().to("cpu", copy=True) for p in self.parameters] if tells_moved else []

    def state(self) -> dict[str, Tensor]:
        return self.network.state_dict()

    def take_up(self, state: Mapping[str, Tensor]) -> None:
        self.network.load_state_dict(state)

    def moved(self, result: Sequence[Tensor]) -> float:
        change = Change()
        if self._start:
            for before, now in zip(self._start, result, strict=True):
                change.add(before, now.detach().cpu())
        return change.relative

    def save(self, path: PathLike, result: Sequence[Tensor], metadata: dict[str, str]) -> None:
        state = {name: tensor.detach() for name, tensor in self.network.state_dict().items()}
        state.update(zip(self.named, (tensor.detach() for tensor in result), strict=True))
        save_model(path, self.model, state, metadata)


def repeated_parts(network: nn.Module) -> list[nn.Module]:
    """The blocks that a network is a row of: the outermost entries of its lists of modules that have parts themselves.

    In the order of the network; none for one that is built otherwise.
    """
    found: list[nn.Module] = []
    for child in network.children():
        if isinstance(child, (nn.ModuleList, nn.ModuleDict)):
            found += (entry for entry in child.children() if any(True for _ in entry.children()))
        else:
            found += repeated_parts(child)
    return found


def checkpoint_gradients(model: GenerativeModel) -> None:
    """Have the network compute activations once more for the backward pass: as it offers, or block by block.

    Raises:
        RequestError: it offers nothing and has no blocks.
    """
    with contextlib.suppress(AttributeError, ValueError):
        model.network.enable_gradient_checkpointing()  # type: ignore[operator] # of diffusers
        return
    blocks = repeated_parts(model.network)
    if not blocks:
        raise RequestError(
            f"--gradient_checkpointing: the network of {model.architecture} offers none and has no list of blocks; "
            "leave the flag out"
        )
    for block in blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
