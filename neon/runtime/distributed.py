"""One process, or many under torchrun: NCCL on GPUs, gloo on CPUs, one node or several."""

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist

# Its functions take the process group of import time as a default. Imported later (torch.optim does), they would keep
# gloo's threads alive after the group is destroyed, and one exit in seven ended in "terminate called" (torch 2.11).
import torch.distributed.nn
from torch import Tensor

from neon.errors import RequestError, WorkError, one_line
from neon.runtime.launch import launched
from neon.runtime.lifeline import LOST, connected, ends_well
from neon.runtime.signals import Stopped, requested
from neon.runtime.threads import use_threads

T = TypeVar("T")
Failure = RequestError | WorkError | Stopped
"""what ends all processes of a run alike"""


@dataclass(frozen=True, kw_only=True)
class Processes:
    """The processes of this run, and how tensors travel between them."""

    rank: int = 0
    world_size: int = 1
    device: torch.device = torch.device("cpu")

    @property
    def is_main(self) -> bool:
        """True in the one process that writes files and talks to the user."""
        return self.rank == 0

    @property
    def threads(self) -> int | None:
        """How many threads this process computes with, on which roundings on a CPU depend; None for a GPU."""
        return torch.get_num_threads() if self.device.type == "cpu" else None

    def barrier(self) -> None:
        """Wait until every process is here."""
        if self.world_size > 1:
            dist.barrier()

    def from_main(self, value: T) -> T:
        """The main process's `value` (anything that pickles), in every process."""
        if self.world_size == 1:
            return value
        box: list[Any] = [value]
        dist.broadcast_object_list(box, src=0, device=self.device if self.device.type == "cuda" else None)
        return box[0]

    def on_main(self, function: Callable[[], T]) -> T:
        """What `function` returns in the main process, in every process; so is a failure it reports."""
        if self.world_size == 1:
            return function()
        outcome: tuple[T | None, Failure | None] = (None, None)
        if self.is_main:
            try:
                outcome = (function(), None)
            except (RequestError, WorkError, Stopped) as error:
                outcome = (None, error)
        result, failure = self.from_main(outcome)
        if failure is not None:
            failure.shared = True
            raise failure
        return result  # type: ignore[return-value]

    def raise_first(self, failure: Failure | None) -> None:
        """Raise, in every process, the failure of the lowest rank that has one; to be called by all of them."""
        failures: list[Failure | None] = [failure]
        if self.world_size > 1:
            failures = [None] * self.world_size
            dist.all_gather_object(failures, failure)
        for first in failures:
            if first is not None:
                first.shared = True
                raise first

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of the `tensor` of every process, in place, in every process; rounding depends on their number."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """The `tensor` of every process, equally shaped, in order of rank, in every process."""
        if self.world_size == 1:
            return [tensor]
        gathered = [torch.empty_like(tensor) for _ in range(self.world_size)]
        dist.all_gather(gathered, tensor.contiguous())
        return gathered


def device_type(asked: str | None, gpus: int) -> str:
    """The device to compute on, "cpu" or "cuda": as asked for, by default CUDA if this machine has GPUs.

    Raises:
        RequestError: another one is asked for.
    """
    if asked is None:
        return "cuda" if gpus else "cpu"
    if asked in ("cpu", "cuda"):
        return asked
    expected = f"expected cpu or cuda, of which this machine has {gpus}"
    if asked == "mps":
        raise RequestError(
            "--device mps: not served, for samplers, losses and the sums behind scores are in float64, which Apple's "
            f"GPUs do not know; {expected}"
        )
    raise RequestError(f"--device {asked}: not served; {expected}")


def gpu_count() -> int:
    """How many GPUs torch sees."""
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def local_part(tensor: Tensor) -> Tensor:
    """What this process keeps of a tensor that is spread over processes (a DTensor); any other tensor is whole."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor that is spread over processes, gathered by all of them; any other tensor is whole."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


@contextlib.contextmanager
def processes(device: str | None = None) -> Iterator[Processes]:
    """Join the process group that torchrun announces in the environment, or work alone without one.

    `device`: "cpu" or "cuda"; by default CUDA where there is one. Each process takes the GPU of its LOCAL_RANK.

    Raises:
        RequestError: there is no GPU, none for this process, or no such device.
    """
    gpus = gpu_count()
    kind = device_type(device, gpus)
    local = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if kind == "cuda" else torch.device(kind)
    if local.type == "cuda":
        if local.index >= gpus:
            raise RequestError(
                f"process {local.index} of this machine needs a GPU of its own and there are {gpus}; "
                "start fewer processes (--nproc_per_node), or compute with --device cpu"
            )
        torch.cuda.set_device(local)
    use_threads(local)
    if not launched():
        yield Processes(device=local)
        return
    if dist.is_initialized():  # by a caller, who ends it too
        yield Processes(rank=dist.get_rank(), world_size=dist.get_world_size(), device=local)
        return
    try:
        _join("nccl" if local.type == "cuda" else "gloo")
        with _tied(Processes(rank=dist.get_rank(), world_size=dist.get_world_size(), device=local)) as group:
            yield group
    except RuntimeError as error:
        if "onnection" in str(error) and not isinstance(error, WorkError):
            raise _ended(LOST) from error
        raise
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


@contextlib.contextmanager
def _tied(group: Processes) -> Iterator[Processes]:
    """Within the block the processes of `group` end together."""
    if group.world_size == 1:
        yield group
        return
    try:
        line = connected(group.rank, group.world_size, group.from_main)
    except OSError as error:
        raise _ended(f"no connection between the processes of this run ({one_line(error)[:200]})") from error
    try:
        yield group
    except BaseException as error:
        line.close(well=ends_well(error))
        raise
    line.close(well=True)


def _join(backend: str) -> None:
    try:
        dist.init_process_group(backend)
    except ValueError as error:
        raise RequestError(
            f"RANK is set, as for one of several processes, but: {error}; start them with torchrun, or unset RANK"
        ) from error
    except dist.DistNetworkError as error:
        raise _ended(f"no connection between the processes of this run ({one_line(error)[:200]})") from error


def _ended(message: str) -> WorkError | Stopped:
    """The error to raise where other processes are lost: in all of them, and if a signal came it is because of that."""
    error = requested() or WorkError(message)
    error.shared = True
    return error
