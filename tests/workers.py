"""Processes that start warm, and stay so between the tests which need several: imports take longer than their work."""

import contextlib
import ctypes
import importlib
import multiprocessing
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import TracebackType
from unittest import mock

import torch

LIMIT_SECONDS = 600.0
ROOT = Path(__file__).parent.parent
FORKS = multiprocessing.get_context("forkserver")
"""A process of this context is a copy of one that has imported what takes long, and did nothing else."""
# The last is imported by every optimiser.
FORKS.set_forkserver_preload(["tests.programs", "torch.distributed.checkpoint", "torch._dynamo"])


@dataclass(frozen=True)
class Task:
    """A function to call, as "module:function", in the process of one rank; `folder` is its working directory."""

    function: str
    arguments: Sequence[object]
    folder: Path
    rank: int
    world_size: int
    port: int


class Workers:
    """Up to `number` processes which call functions together, as under torchrun; they end with this process."""

    def __init__(self, number: int) -> None:
        self.number = number
        self._running: list[tuple[BaseProcess, Connection]] = []

    def __enter__(self) -> "Workers":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._discard()

    def run(self, function: str, *arguments: object, folder: Path, world_size: int) -> None:
        """Call "module:function" in `world_size` processes; what they say ends up in `folder`, as `stderr`.

        Raises:
            AssertionError: one ended with another code than 0, or not in time.
        """
        assert world_size <= self.number
        if not self._running:
            self._running = [_connected() for _ in range(self.number)]
        port = free_port()
        connections = [connection for _, connection in self._running[:world_size]]
        try:
            for rank, connection in enumerate(connections):
                connection.send(Task(function, arguments, folder, rank, world_size, port))
            _expect_success(connections)
        except BaseException as error:
            self._discard()  # the others may wait for the failed one in a collective
            if isinstance(error, AssertionError):
                raise AssertionError(f"{error}\n{_said(folder, world_size)}") from None
            raise
        (folder / "stderr").write_text(_said(folder, world_size))

    def _discard(self) -> None:
        for process, connection in self._running:
            process.kill()
            process.join()
            connection.close()
        self._running = []


def free_port() -> int:
    """The number of a port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def environment_of(rank: int, world_size: int, port: int) -> dict[str, str]:
    """What torchrun tells a process of one machine by its environment."""
    loopback = next((name for _, name in socket.if_nameindex() if name.startswith("lo")), None)
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        **({"GLOO_SOCKET_IFNAME": loopback} if loopback is not None else {}),
    }


def start(function: Callable[..., object], *arguments: object) -> BaseProcess:
    """A process that calls `function`, which is importable; it dies with this one."""
    with mock.patch.dict(os.environ, PYTHONPATH=str(ROOT)):  # where the process that is copied looks for the tests
        process = FORKS.Process(target=_follow, args=(function, *arguments), daemon=True)
        process.start()
    return process


def _follow(function: Callable[..., object], *arguments: object) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: of the copied one, which dies with the tests
    function(*arguments)


def ended(function: Callable[..., object], *arguments: object) -> tuple[int | None, str]:
    """The exit code of a process that calls `function` in this working directory, and what it wrote to stderr."""
    ours, theirs = FORKS.Pipe(duplex=False)
    process = start(_telling, theirs, Path.cwd(), function, *arguments)
    theirs.close()
    with open(ours.fileno(), closefd=False) as said:
        text = said.read()
    process.join(LIMIT_SECONDS)
    return process.exitcode, text


def _telling(stderr: Connection, folder: Path, function: Callable[..., object], *arguments: object) -> None:
    os.chdir(folder)
    os.dup2(stderr.fileno(), 2)
    stderr.close()
    function(*arguments)


def _connected() -> tuple[BaseProcess, Connection]:
    ours, theirs = FORKS.Pipe()
    process = start(_serve, theirs)
    theirs.close()  # so that the end of the process is the end of the pipe
    return process, ours


def _expect_success(connections: list[Connection]) -> None:
    """Wait for the answer of every process; the first that failed ends the waiting."""
    deadline, waiting = time.monotonic() + LIMIT_SECONDS, list(connections)
    while waiting:
        ready = wait(waiting, max(deadline - time.monotonic(), 0))
        assert ready, f"{len(waiting)} processes did not end in {LIMIT_SECONDS:.0f} s"
        for connection in ready:
            assert isinstance(connection, Connection)
            waiting.remove(connection)
            try:
                code, trace = connection.recv()
            except EOFError:
                raise AssertionError("a process died") from None
            assert code == 0, f"a process ended with {code}\n{trace}"


def _said(folder: Path, world_size: int) -> str:
    files = [folder / f"stderr.{rank}" for rank in range(world_size)]
    return "".join(file.read_text() for file in files if file.exists())


def _serve(connection: Connection) -> None:
    while True:
        try:
            task = connection.recv()
        except EOFError:
            return
        connection.send(_call(task))


def _call(task: Task) -> tuple[object, str]:
    """The exit code of a task, and where it failed."""
    try:
        with _as_launched(task):
            module, _, name = task.function.partition(":")
            return getattr(importlib.import_module(module), name)(*task.arguments) or 0, ""
    except SystemExit as end:
        return end.code or 0, traceback.format_exc()
    except BaseException:
        return 1, traceback.format_exc()


@contextlib.contextmanager
def _as_launched(task: Task) -> Iterator[None]:
    """The environment, working directory, standard error and random numbers of a process that torchrun has started."""
    environment = environment_of(task.rank, task.world_size, task.port)
    before, stderr = Path.cwd(), os.dup(2)
    torch.set_num_threads(1)
    try:
        with mock.patch.dict(os.environ, environment), torch.random.fork_rng(devices=[]):
            os.chdir(task.folder)
            with open(f"stderr.{task.rank}", "wb") as said:
                os.dup2(said.fileno(), 2)
            yield
    finally:
        sys.stderr.flush()
        os.dup2(stderr, 2)
        os.close(stderr)
        os.chdir(before)
        torch.use_deterministic_algorithms(False)
