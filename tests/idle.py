"""What the processes of tests/test_launch.py do that neither compute nor join: they start fast, and are killed."""

import multiprocessing
import os
import signal
import time
from pathlib import Path

if "NEON_TESTS_LATE" in os.environ and multiprocessing.parent_process() is not None:
    time.sleep(2)  # as if a child had much to import


def sleep(arguments: list[str]) -> int:
    """Say that this process is there, and stay."""
    Path(arguments[0], f"pid-{os.environ['RANK']}").write_text(str(os.getpid()))
    time.sleep(60)
    return 0


def die(arguments: list[str]) -> int:
    """Be killed in process 1, wait for that in the other."""
    if os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)
    return 0
