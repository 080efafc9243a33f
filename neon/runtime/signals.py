"""Ctrl-C and SIGTERM: the first ends a program at a point where what it did is kept, a second Ctrl-C at once.

Under torchrun every process gets them, or one only; SIGKILL follows after 30 seconds.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType

from neon.errors import is_first_process

_DEFAULTS = (signal.SIG_DFL, signal.default_int_handler)

_answered: tuple[signal.Signals, ...] = ()
_received: int | None = None
_holds = 0


class Stopped(KeyboardInterrupt):
    """A signal ends the program. Whoever keeps what was done says, in `kept`, where the same command goes on."""

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.signum = signum
        self.shared = True
        """as of other failures: one process says it"""
        self.kept = ""
        """where the same command goes on, such as "step 120 of 500"; empty: it starts anew"""
        self.without = ""
        """a flag that would make the same command start anew"""

    @property
    def exit_code(self) -> int:
        """As shells have it: 130 after Ctrl-C, 143 after SIGTERM."""
        return 128 + self.signum

    def __str__(self) -> str:
        if not self.kept:
            return "stopped"
        return f"stopped; the same command{self.without and f' without {self.without}'} goes on from {self.kept}"


@contextlib.contextmanager
def answered() -> Iterator[None]:
    """Within the block SIGINT and SIGTERM raise `Stopped`, unless they are ignored or a caller answers them."""
    global _answered, _received
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    ours = tuple(number for number, handler in before.items() if handler in _DEFAULTS)
    for number in ours:
        signal.signal(number, _answer)
    outer, _answered = _answered, ours or _answered
    try:
        yield
    finally:
        _answered = outer
        if ours:
            _received = None
        for number in ours:
            signal.signal(number, before[number])


@contextlib.contextmanager
def postponed() -> Iterator[None]:
    """Within the block a signal waits: `requested` tells of it, the end of the block raises `Stopped`.

    So does the beginning of the next block, if another error has ended this one and was got over.
    """
    global _holds
    _raise_requested()
    _holds += 1
    try:
        yield
    finally:
        _holds -= 1
    _raise_requested()


def _raise_requested() -> None:
    if not _holds and (stop := requested()):
        raise stop


def requested() -> Stopped | None:
    """What is to be raised because of a signal that came; None: go on."""
    return None if _received is None else Stopped(_received)


def _answer(number: int, frame: FrameType | None) -> None:
    global _received
    _received = number
    # Launchers and `timeout` may send SIGTERM twice, which is no reason to hurry; the second Ctrl-C is the system's to
    # answer, so that it works in the middle of a long call of torch too.
    for each in _answered:
        signal.signal(each, signal.SIG_DFL if each == signal.SIGINT else signal.SIG_IGN)
    if not _holds:
        raise Stopped(number)
    if is_first_process():
        os.write(
            2, b"\nstopping at the end of this step; Ctrl-C again stops at once\n"
        )  # print may be interrupted here
