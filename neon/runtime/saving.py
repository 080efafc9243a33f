"""Work in a thread beside the caller's: one piece at a time, whose errors the caller gets."""

import contextlib
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import TypeVar

from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

T = TypeVar("T")


class Saving:
    """Does what it is given in a thread, while the caller goes on; leaving the block waits for it."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(1)
        self._pending: Future[None] | None = None

    def __enter__(self) -> "Saving":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Wait; an error of the work is raised unless another one ends the block."""
        self._threads.shutdown()
        if error is None:
            self.wait()

    def start(self, work: Callable[[], None]) -> None:
        """Begin `work` once that before it has ended; raises what that has raised."""
        self.wait()
        self._pending = self._threads.submit(work)

    def wait(self) -> None:
        """Wait until nothing is pending; raises what it has raised."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()


def copy_in_memory(content: T) -> T | None:
    """`content` of dicts and lists with copies of its tensors on the CPU; None: there is too little memory for two.

    Tensors that share their memory do so in the copy, too.
    """
    tensors = {_place(leaf): leaf for leaf in tree_leaves(content) if isinstance(leaf, Tensor)}
    if 2 * sum(tensor.nbytes for tensor in tensors.values()) > available_memory():
        return None
    copies = {place: tensor.detach().to("cpu", copy=True) for place, tensor in tensors.items()}
    copy: T = tree_map_only(Tensor, lambda tensor: copies[_place(tensor)], content)
    return copy


def _place(tensor: Tensor) -> tuple[object, ...]:
    return tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()


def available_memory(
    system: Path = Path("/proc/meminfo"),
    groups: Path = Path("/sys/fs/cgroup"),
    membership: Path = Path("/proc/self/cgroup"),
) -> int:
    """Bytes of memory that this process may still take, of the machine and its control groups; 0 if nothing tells."""
    try:
        lines = dict(line.split(":", 1) for line in system.read_text().splitlines())
        left = [1024 * int(lines["MemAvailable"].split()[0])]
    except (OSError, KeyError, ValueError):
        return 0
    with contextlib.suppress(OSError, ValueError):
        here = Path(membership.read_text().rpartition("::")[2].strip().lstrip("/"))
        for group in (here, *here.parents):
            most, used = (groups / group / f"memory.{name}" for name in ("max", "current"))
            if most.exists() and (limit := most.read_text().strip()) != "max":
                left.append(int(limit) - int(used.read_text()))
    return max(0, min(left))
