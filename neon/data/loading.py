"""Reading ahead of those who compute: torch's DataLoader, whose workers are copies of this process."""

import contextlib
import os
import shutil
import signal
import threading
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

from neon.errors import RequestError, WorkError
from neon.runtime.distributed import Processes
from neon.runtime.launch import die_with
from neon.runtime.threads import available_cpus

Item = TypeVar("Item")
T = TypeVar("T")

AHEAD = 2
"""items that a worker is ahead of who uses them"""
USUALLY_MOST = 8
"""unless told otherwise: they read 256-pixel images faster than any network here trains on them"""
_SHARED = Path("/dev/shm")
"""where workers leave what they have read"""


def usual_workers(processes: Processes, nbytes: int) -> int:
    """How many workers read for this process unless told otherwise: none for a CPU, where the network needs it.

    For a GPU one for each processor of this machine that is left to this process, but as many as the memory that they
    share has room for (in a container often 64 MB), where an item takes `nbytes`.
    """
    if processes.device.type != "cuda":
        return 0
    here = int(os.environ.get("LOCAL_WORLD_SIZE", processes.world_size))  # as torchrun says
    room = shutil.disk_usage(_SHARED).free // here // ((AHEAD + 1) * max(nbytes, 1)) if _SHARED.is_dir() else 0
    return max(min(USUALLY_MOST, available_cpus() // here - 1, room), 0)


def read_ahead(
    load: Callable[[Item], T], items: Iterable[Item], *, workers: int, device: torch.device
) -> Generator[T, None, None]:
    """`load(item)` of each of the `items`, in their order, by `workers` processes which are ahead of the caller.

    Without workers each is loaded when it is asked for, by this process. Workers come with the first item and end with
    this iterator. They are copies of this process, so nothing needs to pickle but items and what is loaded: tensors in
    tuples, in page-locked memory if `device` is a GPU. `load` computes on the CPU, with one thread.

    Raises:
        RequestError, WorkError: those of `load`, when their item is asked for; or a worker was killed.
    """
    if workers == 0:
        yield from map(load, items)
        return
    with _left_to_this_process():
        arriving = iter(
            DataLoader(
                _Loaded(load),
                batch_size=None,
                sampler=items,
                num_workers=workers,
                collate_fn=_as_it_is,
                pin_memory=device.type == "cuda",
                worker_init_fn=partial(_begin, os.getpid()),
                multiprocessing_context="fork",
                generator=torch.Generator(),  # else one number is drawn from the global one
                prefetch_factor=AHEAD,
            )
        )
    try:
        while True:
            try:
                loaded = next(arriving)
            except StopIteration:
                return
            except (RuntimeError, OSError, EOFError) as error:
                if str(error).startswith("Caught "):  # raised by `load`, and none of ours
                    raise
                loaded = WorkError(
                    "a process that reads images ahead was killed; was there memory left, in the machine and in "
                    f"{_SHARED}? The commands that train read without such processes by --workers 0"
                )
            if isinstance(loaded, RequestError | WorkError):
                raise loaded
            yield loaded
    finally:
        del arriving  # ends the workers now, and not when the last traceback through here is forgotten


class ReadAhead(Generic[Item, T]):
    """`load(item)` of items that are asked for one by one, read ahead as `planned` tells their order.

    One that is asked for out of that order is loaded there and then; results do not depend on `workers`.
    """

    def __init__(
        self,
        load: Callable[[Item], T],
        planned: Callable[[], Iterable[Item]],
        *,
        workers: int,
        device: torch.device,
    ) -> None:
        """`planned` is called with the first item that is asked for."""
        self._load, self._planned, self._workers, self._device = load, planned, workers, device
        self._reading: Generator[tuple[Item, T], None, None] | None = None
        self._next: tuple[Item, T] | None = None
        """what comes next of what is read ahead, once it was looked at"""

    def __call__(self, item: Item) -> T:
        """Raises what `read_ahead` does."""
        if self._workers and self._next is None:
            if self._reading is None:
                self._reading = read_ahead(
                    self._with_item, self._planned(), workers=self._workers, device=self._device
                )  # fmt: skip
            self._next = next(self._reading, None)
        if self._next is not None and self._next[0] == item:
            (_, loaded), self._next = self._next, None
            return loaded
        return self._load(item)

    def _with_item(self, item: Item) -> tuple[Item, T]:
        return item, self._load(item)

    def close(self) -> None:
        """End the workers."""
        if self._reading is not None:
            self._reading.close()


class _Loaded(Dataset[Any]):
    """What `load` makes of an item; its failure as a value, which arrives as it is: DataLoader would wrap it."""

    def __init__(self, load: Callable[[Any], Any]) -> None:
        self.load = load

    def __getitem__(self, item: Any) -> Any:
        try:
            return self.load(item)
        except (RequestError, WorkError) as error:
            return error


def _as_it_is(loaded: T) -> T:
    return loaded


def _begin(parent: int, worker: int) -> None:
    die_with(parent)


@contextlib.contextmanager
def _left_to_this_process() -> Iterator[None]:
    """Processes and threads that start within the block leave Ctrl-C and SIGTERM to this one, which ends them.

    A batch that is computed when the signal comes needs its images yet. DataLoader's handler of SIGCHLD is not kept: it
    raises in the middle of anything; that a worker died is seen where its images are asked for.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    of_child = signal.getsignal(signal.SIGCHLD)
    try:
        with warnings.catch_warnings():  # of workers for few processors, and of copying a process with threads
            warnings.simplefilter("ignore")
            yield
    finally:
        if threading.current_thread() is threading.main_thread() and of_child is not None:
            signal.signal(signal.SIGCHLD, of_child)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
