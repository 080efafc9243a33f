"""How the gradient of one batch comes about in several processes, each of which computes some of its micro-batches.

`ordered` adds gradients in the order of micro-batches: the bits of one process, at the price of gathering all of them.
`ddp` is torch's DistributedDataParallel: buckets of gradients are summed while the backward pass goes on. `fsdp` is
torch's `fully_shard` (FSDP2): weights, gradients, optimiser and averages are spread over the processes. A process alone
computes all micro-batches, whatever the engine is called.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Generic, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from neon.runtime.distributed import Processes, whole
from neon.runtime.parallel import Parallel
from neon.trained import repeated_parts

Part = TypeVar("Part")


class Engine(ABC, Generic[Part]):
    """Sets the gradients of a network to those of the sum of what `share` gives for each micro-batch.

    Args:
        network: may be changed in place: its parameters are to be asked for afterwards.
        share: the share of a micro-batch in the mean loss, a scalar with a graph.
        backward: adds the gradient of such a scalar to those of the parameters.
        tell: a number that is added up over the processes, too; asked when this one has computed its part.
    """

    keeps_folder: ClassVar[bool] = False
    """whether the state of a run is a folder that all processes write, instead of a file of the main one"""

    def __init__(
        self,
        network: nn.Module,
        processes: Processes,
        share: Callable[[Part], Tensor],
        backward: Callable[[Tensor], None],
        tell: Callable[[], float],
    ) -> None:
        self.network, self.processes, self.tell = network, processes, tell
        self._share, self._backward = share, backward

    @abstractmethod
    def gradients(self, parts: Sequence[Part]) -> Tensor:
        """Compute all `parts`, each in one process; float32 [2], the sums of all shares and of what processes tell.

        To be called by all processes. Gradients were cleared; afterwards every process has those of the whole batch
        (`fsdp`: its part of them).
        """

    def clear_gradients(self, optimizer: torch.optim.Optimizer) -> None:
        """Forget the gradients of a step that was taken."""
        optimizer.zero_grad(set_to_none=True)

    def whole(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """`tensors`, like parameters, as they are in one process, for the main one; to be called by all of them.

        Those that are spread are gathered one by one, to the CPU, and dropped at once in the other processes.
        """
        return [tensor.detach() for tensor in tensors]

    def _compute(self, part: Part) -> Tensor:
        """Add the gradient of a micro-batch to those of the parameters; its share."""
        share = self._share(part)
        self._backward(share)
        return share.detach()

    def _of_rank(self, parts: Sequence[Part]) -> Sequence[Part]:
        return parts[self.processes.rank :: self.processes.world_size]

    def _nothing(self) -> Tensor:
        return torch.zeros(2, device=self.processes.device)

    def _told(self, total: Tensor) -> Tensor:
        """Sums over all processes, of which `total` holds the shares of this one."""
        total[1] = self.tell()
        return self.processes.sum(total)


class Ordered(Engine[Part]):
    """The additions of one process, in its order."""

    def gradients(self, parts: Sequence[Part]) -> Tensor:
        world, rank = self.processes.world_size, self.processes.rank
        parameters = [p for p in self.network.parameters() if p.requires_grad]
        total = self._nothing()
        for first in range(0, len(parts), world):
            here = parts[first : first + world]
            told = self._nothing()
            before = [p.grad for p in parameters]
            if world > 1:
                for parameter in parameters:
                    parameter.grad = None
            if rank < len(here):
                told[0] = self._compute(here[rank])
            told[1] = self.tell()
            for other in self.processes.gather(told):
                total += other
            if world > 1:
                self._add_in_order(parameters, before, len(here))
        return total

    def _add_in_order(self, parameters: list[nn.Parameter], before: list[Tensor | None], count: int) -> None:
        """Gradients = `before` + those of ranks 0 .. count - 1, one after the other: as one process would add them.

        Holds the gradients of all ranks at once: world size times the size of the network.
        """
        flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters])
        gathered = self.processes.gather(flat)[:count]
        total = gathered[0] if before[0] is None else torch.cat([g.flatten() for g in before if g is not None])
        for other in gathered if before[0] is not None else gathered[1:]:
            total += other
        pieces = total.split([p.numel() for p in parameters])
        for parameter, piece in zip(parameters, pieces, strict=True):
            parameter.grad = piece.view_as(parameter)


class DataParallel(Engine[Part]):
    """Each process has the whole network; gradients are summed in buckets behind the last of its micro-batches."""

    def __init__(self, network: nn.Module, processes: Processes, *functions: Any) -> None:
        super().__init__(network, processes, *functions)
        # Gradients that are views of the buckets exist once.
        self._module = nn.parallel.DistributedDataParallel(
            _Called(network), broadcast_buffers=False, gradient_as_bucket_view=True
        )
        self._module.register_comm_hook(None, _sum)

    def gradients(self, parts: Sequence[Part]) -> Tensor:
        mine, total = self._of_rank(parts), self._nothing()
        with self._module.no_sync():
            for part in mine[:-1]:
                total[0] += self._compute(part)
        # A process without a micro-batch adds zeros.
        total[0] += self._compute(mine[-1]) if mine else self._run(lambda: total[0].clone())
        return self._told(total)

    def clear_gradients(self, optimizer: torch.optim.Optimizer) -> None:
        """In place: they are the buckets."""
        optimizer.zero_grad(set_to_none=False)

    def _compute(self, part: Part) -> Tensor:
        return self._run(lambda: self._share(part))

    def _run(self, function: Callable[[], Tensor]) -> Tensor:
        share = self._module(function)
        self._backward(share)
        return share.detach()


class _Called(nn.Module):
    """What DistributedDataParallel wraps: any computation with a network."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self._trained = [p for p in network.parameters() if p.requires_grad]

    def forward(self, function: Callable[[], Tensor]) -> Tensor:
        return _Needing.apply(function(), *self._trained)


class _Needing(torch.autograd.Function):
    """A value that depends on tensors in name: DistributedDataParallel waits for the gradient of every parameter.

    A loss need not use all of them (labels of augmentations, layers of a LoRA), and some process may compute none.
    """

    @staticmethod
    def forward(ctx: Any, value: Tensor, *tensors: Tensor) -> Tensor:
        ctx.count = len(tensors)
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return (*gradients, *[None] * ctx.count)


def _sum(state: object, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """Sum a bucket over the processes: shares of a mean are not averaged again."""
    work = dist.all_reduce(bucket.buffer(), async_op=True)
    return work.get_future().then(lambda future: future.value()[0])


class FullySharded(Engine[Part]):
    """Each process keeps a part of every parameter; those of a block are gathered while it computes.

    Gradients of every micro-batch are summed at once, so that no process ever holds those of the whole network.
    """

    keeps_folder = True

    def __init__(self, network: nn.Module, processes: Processes, *functions: Any) -> None:
        super().__init__(network, processes, *functions)
        if processes.world_size == 1:
            return
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

        mesh = init_device_mesh(processes.device.type, (processes.world_size,))
        for part in (*repeated_parts(network), network):
            module = fully_shard(part, mesh=mesh)
            module.set_gradient_divide_factor(1.0)  # shares of a mean are summed
            module.set_force_sum_reduction_for_comms(True)
            for method in getattr(part, "also_called", ()):
                register_fsdp_forward_method(part, method)

    def gradients(self, parts: Sequence[Part]) -> Tensor:
        total = self._nothing()
        world, rank = self.processes.world_size, self.processes.rank
        for first in range(0, len(parts), world):
            if first + rank < len(parts):
                total[0] += self._compute(parts[first + rank])
            else:  # the others need its part of the weights: it computes what counts nothing
                self._backward(0 * self._share(parts[0]))
        return self._told(total)

    def whole(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        kept = []
        for tensor in tensors:
            gathered = whole(tensor.detach())
            if self.processes.is_main:
                kept.append(gathered.cpu())
        return kept


def engine_of(parallel: Parallel, processes: Processes) -> type[Engine[Any]]:
    """The engine of that name; a process alone adds in its order anyway."""
    if parallel == "fsdp":
        return FullySharded
    return DataParallel if parallel == "ddp" and processes.world_size > 1 else Ordered
