"""Running a function in several CPU processes of this machine, one thread each.

Small models gain more from processes than from threads, and with one thread in each process the results
are the same bits for any number of processes.
"""

import ctypes
import multiprocessing
import os
import signal
import socket
import sys
from collections.abc import Callable
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess

import torch

Main = Callable[[list[str]], int]


def available_cpus() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def launched() -> bool:
    """Whether this process is one of several already (torchrun's, or ours)."""
    return "RANK" in os.environ


def run_in_processes(main: Main, arguments: list[str], num_processes: int) -> int:
    """Call `main(arguments)` in `num_processes` processes that can join one process group; the worst exit code.

    If one fails, the others are ended. The children die with their parent, however it dies (Linux).
    """
    context = multiprocessing.get_context("spawn")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    children: list[BaseProcess] = [
        context.Process(target=_child, args=(main, arguments, rank, num_processes, port))
        for rank in range(num_processes)
    ]
    for child in children:
        child.start()
    try:
        return _wait_for(children)
    finally:
        for child in children:
            child.terminate()
            child.join()


def _wait_for(children: list[BaseProcess]) -> int:
    running = list(children)
    while running:
        wait([child.sentinel for child in running])
        for child in [child for child in running if child.exitcode is not None]:
            running.remove(child)
            if child.exitcode:
                return child.exitcode if child.exitcode > 0 else 1
    return 0


def _child(main: Main, arguments: list[str], rank: int, num_processes: int, port: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    loopback = next((name for _, name in socket.if_nameindex() if name.startswith("lo")), None)
    if loopback is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback)  # works where the host's name does not resolve
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(num_processes),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    torch.set_num_threads(1)
    sys.exit(main(arguments))
