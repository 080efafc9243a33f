"""Progress bars with time left, on stderr, in the main process only."""

import sys
import threading
from types import TracebackType
from typing import TYPE_CHECKING

from tqdm import tqdm

if TYPE_CHECKING:
    from neon.runtime.distributed import Processes  # imports torch, which `neon download` does without

# tqdm's own lock works across processes; left behind by a killed process it makes Python complain at exit.
_LOCK = threading.RLock()


def seconds_between_updates() -> float:
    """How often a bar may be drawn again: seldom in a log file, where each time is a line to read."""
    return 0.1 if sys.stderr.isatty() else 10.0


class Progress:
    """A bar over `total` units; silent in all processes but the main one."""

    def __init__(self, title: str, total: int, unit: str, processes: "Processes", done: int = 0) -> None:
        self.done = done
        tqdm.set_lock(_LOCK)
        self._bar = tqdm(
            total=total,
            initial=done,
            desc=f"{title:<28}",
            unit=unit,
            file=sys.stderr,
            # Not said where a bar is wanted, so that TQDM_DISABLE may say otherwise.
            **({} if processes.is_main else {"disable": True}),
            dynamic_ncols=True,
            mininterval=seconds_between_updates(),
            bar_format="{desc} {percentage:3.0f}% |{bar}| {n_fmt}/{total_fmt} {rate_fmt}, {remaining} left {postfix}",
        )

    def advance(self, units: int, **figures: str) -> None:
        """Move on by `units`; `figures` stand behind the bar."""
        self.done += units
        if figures:
            self._bar.set_postfix(figures, refresh=False)
        self._bar.update(units)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()
