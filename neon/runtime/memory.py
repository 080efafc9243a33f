"""Memory that is left, and copies that fit in it."""

import contextlib
from pathlib import Path
from typing import TypeVar

from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

T = TypeVar("T")


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
