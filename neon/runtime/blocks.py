"""The one loop over blocks of images: each computed whole by one process, with progress, and not twice.

Blocks are of consecutive indices, so batches, hence results, are the same for any number of processes and after any
restart.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from neon.errors import RequestError, WorkError
from neon.runtime.distributed import Processes
from neon.runtime.progress import Progress
from neon.runtime.signals import Stopped, postponed, requested


def blocks(num_images: int, batch_size: int) -> list[range]:
    """Indices 0 .. num_images - 1 in consecutive blocks; only the last may be shorter than `batch_size`."""
    return [range(first, min(first + batch_size, num_images)) for first in range(0, num_images, batch_size)]


def write_blocks(
    write: Callable[[range], None],
    num_images: int,
    *,
    batch_size: int,
    processes: Processes,
    title: str,
    is_written: Callable[[range], bool],
    folder: Path,
) -> list[range]:
    """Call `write` for every block that is not written yet, each in one process; all blocks, when all are done.

    A run that was stopped or killed goes on where it was.

    Raises:
        WorkError: what was written is not in `folder` any more, in all processes.
    """
    every = blocks(num_images, batch_size)
    with Progress(title, num_images, "img", processes) as progress:
        try:
            for one_round in _rounds(every, processes):
                if processes.rank < len(one_round) and not is_written(one_round[processes.rank]):
                    write(one_round[processes.rank])
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
    with Progress(title, num_images, "img", processes, done=done) as progress, postponed():
        for one_round in _rounds(every, processes):
            mine = torch.zeros(height, width, device=processes.device)
            failure: RequestError | WorkError | Stopped | None = requested()
            try:
                if failure is None and processes.rank < len(one_round):
                    rows = compute(one_round[processes.rank])
                    mine[: len(rows)] = rows
            except (RequestError, WorkError) as error:
                failure = error
            processes.raise_first(failure)
            for block, rows in zip(one_round, processes.gather(mine), strict=False):
                yield rows if one_row else rows[: len(block)]
                progress.advance(len(block))


def _rounds(every: list[range], processes: Processes) -> Iterator[list[range]]:
    """The blocks of each round: one for each process, in the order of ranks; in the last round some go without."""
    for first in range(0, len(every), processes.world_size):
        yield every[first : first + processes.world_size]
