"""Whether what a training keeps between its steps fits on a GPU, estimated before it begins."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from neon.errors import RequestError, WorkError, note, one_line
from neon.recipe import Recipe
from neon.runtime.distributed import Processes
from neon.runtime.parallel import Parallel
from neon.trained import Trained, repeated_parts

SHARE = 0.9
"""of the memory, that may be taken by what is kept if there is a choice; the rest is for activations"""
_LESS = "--lora_rank trains factors in the place of the weights"


@dataclass(frozen=True, kw_only=True)
class Kept:
    """Bytes that a training keeps: lower bounds, without activations."""

    weights: int
    """all parameters and buffers"""
    trained: int
    """parameters that are trained: as much again are their gradients"""
    copies: int
    """tensors like those that optimiser and average keep"""
    largest: int
    """parameters of the largest part that is gathered at once, where they are spread"""

    @property
    def whole(self) -> int:
        """In a process that has the whole network."""
        return self.weights + (1 + self.copies) * self.trained

    def spread(self, world_size: int) -> int:
        """In each of the processes that everything is spread over: its part, and two blocks that are gathered."""
        return -(-self.whole // world_size) + 2 * self.largest


def kept_by(trained: Trained, recipe: Recipe) -> Kept:
    """What a training of this kind keeps."""
    network = trained.network
    optimizer = recipe.optimizer(network)  # has nothing before its first step
    moments = 2 if isinstance(optimizer, (torch.optim.Adam, torch.optim.AdamW)) else 0
    parts = [_bytes(list(part.parameters())) for part in repeated_parts(network)]
    weights = _bytes(list(network.parameters()))
    return Kept(
        weights=weights + _bytes(list(network.buffers())),
        trained=_bytes(trained.parameters),
        copies=moments + int(recipe.averages),
        largest=max(*parts, weights - sum(parts), 0),
    )


def _bytes(tensors: list[torch.Tensor] | list[nn.Parameter]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def fitting(kept: Kept, room: int, world_size: int, asked: Parallel | None, usual: Parallel) -> Parallel:
    """The engine that is asked for, or the usual one, or `fsdp` where only that leaves room; says so in one line.

    `room` is the memory of one GPU in bytes that training may take, network included.

    Raises:
        RequestError: what is kept does not fit; says what would.
    """
    several = world_size > 1
    if asked is None and usual != "fsdp" and several and kept.whole > SHARE * room >= kept.spread(world_size):
        note(
            f"training keeps {_gb(kept.whole)} and a GPU has room for {_gb(room)}: spread over {world_size} processes "
            "(--parallel fsdp)"
        )
        return "fsdp"
    chosen = asked or usual
    needed = kept.spread(world_size) if chosen == "fsdp" and several else kept.whole
    if needed > room:
        raise RequestError(
            f"training keeps {_gb(needed)} on each GPU (weights, gradients, optimiser, averages) and there is room for "
            f"{_gb(room)}; {_what_fits(kept, room, world_size)}"
        )
    return chosen


def _what_fits(kept: Kept, room: int, world_size: int) -> str:
    left = SHARE * room - 2 * kept.largest
    if left <= 0:
        return f"expected a larger GPU; {_LESS}"
    number = int(-(-kept.whole // left))
    if number <= world_size:
        return f"expected --parallel fsdp; or {_LESS}"
    return f"expected {number} GPUs or more with --parallel fsdp; or {_LESS}"


def room_of(processes: Processes, kept: Kept) -> int:
    """The memory of the GPU with least that training may take, its network included, which lies there already."""
    device = processes.device
    free, _ = torch.cuda.mem_get_info(device)
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    room = torch.tensor(float(free + unused + kept.weights), dtype=torch.float64, device=device)
    return int(min(float(one) for one in processes.gather(room)))


def _gb(count: int) -> str:
    return f"{count / 1e9:,.1f} GB"


@contextlib.contextmanager
def enough_memory(folder: Path) -> Iterator[None]:
    """A WorkError that says what takes less, where a GPU has too little memory for the block."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise WorkError(
            f"{folder}: the GPU has too little memory for a step ({one_line(error)[:120]}); a smaller --batch_gpu, "
            f"--gradient_checkpointing or, on several GPUs, --parallel fsdp takes less, and {_LESS}"
        ) from error
