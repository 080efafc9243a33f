"""How many threads a process computes with on a CPU: as OMP_NUM_THREADS says, else few enough for the machine."""

import contextlib
import functools
import math
import os
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

from neon.errors import note

SMALL = 5_000_000
"""parameters up to which one thread is safest: where other programs run, threads wait for one that has not its turn. On
two processors with ten such programs one thread was 19 times as fast as two for a network of 0.3 million, 17 times for
0.4 and 9 times for 1.8; where nothing else runs several are faster, the more the larger the network"""
_DEFAULT = torch.get_num_threads()


def available_cpus(groups: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")) -> int:
    """Processors that this process may use: by its affinity, and by the quota of its control groups."""
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    lines = membership.read_text().splitlines() if membership.exists() else []
    quotas = [math.inf]
    for controllers, path in (line.split(":", 2)[1:] for line in lines):
        if controllers and "cpu" not in controllers.split(","):
            continue
        # In a container the path may be that of the host, and what applies lies in the root.
        group = Path(path.lstrip("/"))
        quotas += [_quota(groups / ("cpu" if controllers else "") / each) for each in (group, *group.parents)]
    return max(1, min(affinity, math.ceil(min(*quotas, affinity))))


def _quota(group: Path) -> float:
    """The processors' worth of time that a control group may use, of either version."""
    try:
        if (both := group / "cpu.max").exists():
            quota, period = both.read_text().split()
        else:
            quota, period = ((group / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        return float(quota) / float(period) if float(quota) > 0 else math.inf
    except (OSError, ValueError, ZeroDivisionError):  # no such file, or "max": no limit
        return math.inf


def use_threads(device: torch.device, *networks: object) -> None:
    """Compute with one thread if there are `networks` and all together are small, else with all that may run at once.

    Nothing is changed under OMP_NUM_THREADS, under torchrun, and for a GPU.
    """
    if device.type != "cpu" or "OMP_NUM_THREADS" in os.environ or "RANK" in os.environ:
        return
    size = sum(p.numel() for network in networks if isinstance(network, nn.Module) for p in network.parameters())
    most = min(_DEFAULT, available_cpus())
    threads = 1 if networks and size <= SMALL else most
    if threads < most:
        _tell_of_one(most)
    torch.set_num_threads(threads)


@contextlib.contextmanager
def threads_for(device: torch.device, *networks: object) -> Iterator[None]:
    """`use_threads` within the block; then as many again as a caller had."""
    before = torch.get_num_threads()
    use_threads(device, *networks)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@functools.cache  # a caller of the library comes here with every call
def _tell_of_one(most: int) -> None:
    note(
        f"computing with one thread of {most}, which suits small networks; {most} processes under torchrun use "
        "them all, OMP_NUM_THREADS sets another number"
    )
