"""The one loop over blocks of images: each computed whole by one process, with progress, and not twice.

Blocks are of consecutive indices, so batches, hence results, are the same for any number of processes and after any
restart.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from neon.errors import RequestError, WorkError
from neon.runtime.background import Background, Job, on_host
from neon.runtime.distributed import Failure, Processes
from neon.runtime.progress import Progress
from neon.runtime.signals import Stopped, postponed, requested


def blocks(num_images: int, batch_size: int) -> list[range]:
    """Indices 0 .. num_images - 1 in consecutive blocks; only the last may be shorter than `batch_size`."""
    return [range(first, min(first + batch_size, num_images)) for first in range(0, num_images, batch_size)]


def own_blocks(num_images: int, batch_size: int, processes: Processes, done: int = 0) -> list[range]:
    """Those of the blocks after the first `done` images that this process computes, in its order."""
    return blocks(num_images, batch_size)[-(-done // batch_size) :][processes.rank :: processes.world_size]


def write_blocks(
    compute: Callable[[range], Iterable[Job]],
    num_images: int,
    *,
    batch_size: int,
    processes: Processes,
    title: str,
    is_written: Callable[[range], bool],
    folder: Path,
) -> list[range]:
    """Compute every block that is not written yet, each in one process; all blocks, when all are written.

    `compute` returns the jobs that write a block, which threads do while the next is computed. A run that was stopped
    or killed goes on where it was; one that is stopped writes what it has computed.

    Raises:
        WorkError: what was written is not in `folder` any more, in all processes.
        Exception: what a job raised, at the next block or the one after.
    """
    every = blocks(num_images, batch_size)
    with Progress(title, num_images, "img", processes) as progress:
        try:
            with Background() as background:
                for one_round in _rounds(every, processes):
                    if processes.rank < len(one_round) and not is_written(one_round[processes.rank]):
                        background.hand_in(compute(one_round[processes.rank]))
                    progress.advance(sum(map(len, one_round)))
        except Stopped as stop:
            stop.kept = f"image {progress.done:,} of {num_images:,}"
            raise
    processes.barrier()

    def check() -> None:
        if lost := [block for block in every if not is_written(block)]:
            raise WorkError(
                f"{folder}: images {lost[0].start} to {lost[0].stop - 1} were written and some are gone, in "
                f"{len(lost)} of {len(every)} batches; keep others out of this folder, remove it and run again"
            )

    processes.on_main(check)
    return every


def rows_in_order(
    compute: Callable[[range], Tensor],
    num_images: int,
    width: int,
    *,
    batch_size: int,
    processes: Processes,
    title: str,
    done: int = 0,
    one_row: bool = False,
) -> Iterator[Tensor]:
    """What `compute` makes of blocks of images `done` .. num_images - 1, in their order, in every process.

    Args:
        compute: float32 [B, width] of a block, or [1, width] with `one_row`; called by each process for its own blocks.
        done: Images that are left out, a multiple of `batch_size`.
        one_row: A block gives one row instead of one per image.

    Raises:
        RequestError or WorkError: `compute` raised it, in whichever process; the lowest rank's in all of them.
        Stopped: a signal reached a process, likewise; between two rounds, so that the caller has whole ones.
    """
    every = blocks(num_images, batch_size)[-(-done // batch_size) :]
    height = 1 if one_row else max(map(len, every), default=0)
    # A GPU has the next round to do before it is asked whether a process has failed in this one.
    ahead = 1 if processes.device.type == "cuda" else 0
    failure: Failure | None = None
    gathered: deque[tuple[list[range], list[Tensor], Callable[[], bool]]] = deque()
    with Progress(title, num_images, "img", processes, done=done) as progress, postponed():

        def whole(rounds: int) -> Iterator[Tensor]:
            """The rows of all rounds that were gathered but the last few."""
            while len(gathered) > rounds:
                one_round, parts, any_failed = gathered.popleft()
                if any_failed():
                    processes.raise_first(failure)
                for block, rows in zip(one_round, parts, strict=False):
                    yield rows[: 1 if one_row else len(block)]
                    progress.advance(len(block))

        for one_round in _rounds(every, processes):
            mine = torch.zeros(height + 1, width, device=processes.device)  # the last row tells of a failure
            failure = failure or requested()
            try:
                if failure is None and processes.rank < len(one_round):
                    rows = compute(one_round[processes.rank])
                    mine[: len(rows)] = rows
            except (RequestError, WorkError) as error:
                failure = error
            mine[-1] = failure is not None
            parts = processes.gather(mine)
            gathered.append((one_round, parts, _any_failed(parts, failure)))
            yield from whole(ahead)
        yield from whole(0)


def _any_failed(parts: list[Tensor], failure: Failure | None) -> Callable[[], bool]:
    """What tells, without a wait until it is called, whether a process has failed in a round."""
    if len(parts) == 1:
        return lambda: failure is not None
    marks = on_host(torch.stack([part[-1, 0] for part in parts]))
    return lambda: bool(marks().any())


def _rounds(every: list[range], processes: Processes) -> Iterator[list[range]]:
    """The blocks of each round: one for each process, in the order of ranks; in the last round some go without."""
    for first in range(0, len(every), processes.world_size):
        yield every[first : first + processes.world_size]
