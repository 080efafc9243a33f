"""Running a function in several CPU processes of this machine, one thread each.

Small models gain more from processes than from threads, and with one thread in each process the results
are the same bits for any number of processes.
"""

import contextlib
import ctypes
import multiprocessing
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from typing import TypeVar

from neon.errors import WorkError
from neon.runtime.signals import Stopped

Argument = TypeVar("Argument")
GRACE_SECONDS = 30.0
"""between SIGTERM and SIGKILL for a process that has to end, as under torchrun"""


def launched() -> bool:
    """Whether this process is one of several already (torchrun's, or ours)."""
    return "RANK" in os.environ


def run_in_processes(main: Callable[[Argument], int], argument: Argument, num_processes: int) -> int:
    """Call `main(argument)` in `num_processes` processes that can join one process group; the worst exit code.

    Both pickle. If one fails, or a signal reaches this process, the others are asked to end. They die with their
    parent, however it dies (Linux).

    Raises:
        WorkError: one was killed.
    """
    context = multiprocessing.get_context("spawn")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    children: list[BaseProcess] = [
        context.Process(target=_child, args=(main, argument, rank, num_processes, port, os.getpid()))
        for rank in range(num_processes)
    ]
    started: list[BaseProcess] = []
    try:
        with _inherited_without_ctrl_c():
            for child in children:
                child.start()
                started.append(child)
        return _wait_for(children)
    except Stopped as stop:  # the first of the children says so
        return stop.exit_code
    finally:
        for child in started:
            child.terminate()
        for child in started:
            child.join(GRACE_SECONDS)
            child.kill()
            child.join()


@contextlib.contextmanager
def _inherited_without_ctrl_c() -> Iterator[None]:
    """Processes that start here leave Ctrl-C, which a terminal sends to all of them, to their parent."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _wait_for(children: list[BaseProcess]) -> int:
    running = list(children)
    while running:
        wait([child.sentinel for child in running])
        for child in [child for child in running if child.exitcode is not None]:
            running.remove(child)
            if child.exitcode and child.exitcode < 0:
                name = signal.Signals(-child.exitcode).name
                raise WorkError(f"process {children.index(child)} was killed ({name}); was there memory left?")
            if child.exitcode:
                return child.exitcode
    return 0


def die_with(parent: int) -> None:
    """Let this process be killed when its parent, the process `parent`, dies in whatever way (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:  # it died meanwhile
            os._exit(1)


def _child(
    main: Callable[[Argument], int], argument: Argument, rank: int, num_processes: int, port: int, parent: int
) -> None:
    die_with(parent)
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
    # No stack of a lost connection where another process says what is wrong.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    import torch  # not before this process can follow its parent into death

    torch.set_num_threads(1)
    sys.exit(main(argument))
