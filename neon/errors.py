"""The ways a command can end badly, told apart by exit code.

Both carry one line that says what was being done, to which file or flag, what was found, what was
expected and what to do next. Programs print that line; nothing else is a user's business.
"""

import os
import sys
from pathlib import Path


class RequestError(ValueError):
    """The request was wrong (a flag, a path, files that do not fit each other): exit code 2."""

    exit_code = 2


class WorkError(RuntimeError):
    """The request was sound and the work failed (disk full, killed writer, non-finite result): exit code 1."""

    exit_code = 1


class DegenerateError(WorkError):
    """Weights or images that cannot be scored: not finite, overflowing, or all alike. A search goes on past it."""


def warn(message: str) -> None:
    """Print a warning, once however many processes there are."""
    if os.environ.get("RANK", "0") == "0":
        print(f"{Path(sys.argv[0]).name}: warning: {message}", file=sys.stderr)
