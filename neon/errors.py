"""The ways a command can end badly, told apart by exit code.

Both carry a text that says what was being done, to which file or flag, what was found, what was
expected and what to do next. Programs print it as `one_line`; nothing else is a user's business.
"""

import os
import sys
from pathlib import Path

LONGEST_LINE = 500
"""of an error or a warning, in characters"""


class RequestError(ValueError):
    """The request was wrong (a flag, a path, files that do not fit each other): exit code 2."""

    exit_code = 2
    shared = True
    """every process of the run raises it, so one of them says it"""


class WorkError(RuntimeError):
    """The request was sound and the work failed (disk full, killed writer, non-finite result): exit code 1."""

    exit_code = 1
    shared = False


class NoConnectionError(WorkError):
    """A server that cannot be reached, which need not be asked for its other files."""


class DegenerateError(WorkError):
    """Weights or images that cannot be scored: not finite, overflowing, or all alike. A search goes on past it."""


def one_line(text: object) -> str:
    """`text` (an exception, a name, anything with a `str`) as one line that any terminal can show.

    White space becomes one blank, control characters and lone surrogates become escapes such as `\\x1b` (names of
    tensors and files are foreign text). Of more than 500 characters the middle is left out: the beginning names the
    file, the end says what to do.
    """
    line = shown(" ".join(str(text).split()))
    if len(line) > LONGEST_LINE:
        tail = LONGEST_LINE // 3
        line = f"{line[: LONGEST_LINE - tail - 5]} ... {line[-tail:]}"
    return line or (type(text).__name__ if isinstance(text, BaseException) else "")


def shown(text: str) -> str:
    """`text` with control characters and lone surrogates as escapes."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def reason(error: Exception) -> str:
    """What `error` says, without the path that an OSError repeats."""
    return (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__


def is_first_process() -> bool:
    """Whether this process speaks for its run: it is the only one, or the first of those that torchrun started."""
    return os.environ.get("RANK", "0") == "0"


def warn(message: str) -> None:
    """Print a warning, once however many processes there are."""
    note(f"warning: {message}")


def note(message: str) -> None:
    """Print what a user should know, once however many processes there are; to stderr, since it is no result."""
    if is_first_process():
        program = Path(sys.argv[0]).name
        # Not "-c" nor "__main__.py", nor nothing as where one types Python.
        called = program if program and program[0] not in "-_" else "neon"
        print(f"{called}: {one_line(message)}", file=sys.stderr)
