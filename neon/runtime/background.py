"""Work behind the main thread: results on their way from a GPU, and a bounded pool of threads that write them."""

import os
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

import torch
from torch import Tensor

from neon.runtime.threads import available_cpus

Job = Callable[[], object]
MOST_THREADS = 8
BATCHES_AHEAD = 2
"""how many batches may wait to be written: more would be memory that makes nothing faster"""


def on_host(tensor: Tensor) -> Callable[[], Tensor]:
    """Send `tensor` to the CPU without waiting for the device; what is returned waits, in whichever thread calls it."""
    if tensor.device.type != "cuda":
        copy = tensor.cpu()
        return lambda: copy
    copy = tensor.to("cpu", non_blocking=True)  # into pinned memory
    arrived = torch.cuda.Event()
    arrived.record(torch.cuda.current_stream(tensor.device))

    def get() -> Tensor:
        arrived.synchronize()
        return copy

    return get


class Background:
    """A few threads that do the jobs of one batch after another, while the caller makes the next.

    Leaving the block waits for all that was handed in, also where a signal ends it, and raises what a job raised.
    After a failure no further job is begun.

    Args:
        threads: by default as many as processors are left for them.
        ahead: batches that may wait, or be at work; with one thread and one ahead, one piece of work after another.
    """

    def __init__(self, threads: int | None = None, ahead: int = BATCHES_AHEAD) -> None:
        beside = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # processes of this run on this machine
        self._pool = ThreadPoolExecutor(threads or max(1, min(MOST_THREADS, available_cpus() // beside)))
        self._ahead = ahead
        self._batches: deque[list[Future[object]]] = deque()

    def hand_in(self, jobs: Iterable[Job]) -> None:
        """Let threads do the `jobs` of a batch, in any order; waits while too many batches are on their way.

        Raises:
            Exception: what one of an earlier batch raised.
        """
        while len(self._batches) >= self._ahead:
            self._finish_first()
        self._batches.append([self._pool.submit(job) for job in jobs])

    def __enter__(self) -> "Background":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.wait()
        except KeyboardInterrupt:  # a signal that came while this waited
            self.wait()
            raise
        finally:
            self._pool.shutdown(cancel_futures=True)

    def wait(self) -> None:
        """Wait until nothing is pending; raises what a job has raised."""
        while self._batches:
            self._finish_first()

    def _finish_first(self) -> None:
        for future in self._batches[0]:
            future.result()
        self._batches.popleft()
