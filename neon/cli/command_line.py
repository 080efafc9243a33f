"""What `neon` and the programs of every architecture share: exit codes, one-line errors, and how values are spelled."""

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any

import tyro

from neon.cli.usage import check_names, flags_of, help_text, typed
from neon.errors import RequestError, WorkError

Weights = Annotated[list[str], tyro.conf.arg(name="w", aliases=["-w"], metavar="W [W ...]")]
"""merge weights, as text: a leading minus is no flag"""


def exit_code(command: str, run: Callable[[], int | None]) -> int:
    """The exit code of `run()`: 0 done, 1 the work failed, 2 the request was wrong; an error is one line on stderr."""
    try:
        code = run()
        sys.stdout.flush()
        return code or 0
    except SystemExit as stop:  # tyro: 0 after --help, 2 after a usage error
        return stop.code if isinstance(stop.code, int) else 2
    except (RequestError, WorkError) as error:
        # Under torchrun a wrong request is wrong in every process: one of them says so.
        if isinstance(error, WorkError) or os.environ.get("RANK", "0") == "0":
            print(f"{command}: {_one_line(error)}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:  # `neon inspect ... | head`: the reader has seen enough, and Python's own flush would fail
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        print(f"{command}: {_one_line(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def parse(
    program: Callable[..., Any], words: Sequence[str], *, name: str, aliases: Mapping[str, str] | None = None
) -> Any:
    """Call `program` with the flags among `words`; `--help` prints them and ends the process.

    Words in the flags of a dataclass are joined by underscores, those of a function by hyphens; both can be typed.

    Args:
        aliases: Other spellings of flags, as users of the published programs know them.

    Raises:
        RequestError: a flag is unknown, or one is missing.
        SystemExit: after `--help`, or because of a value of another type than the flag's.
    """
    underscores, aliases = isinstance(program, type), aliases or {}
    flags = flags_of(program, underscores=underscores, aliases=aliases)
    if {"-h", "--help"} & set(words):
        if os.environ.get("RANK", "0") == "0":
            print(help_text(program, flags))
        raise SystemExit(0)
    check_names(words, flags)
    usual = {typed(other): name for other, name in aliases.items()}
    args = []
    for word in words:
        flag, equals, value = word.partition("=")
        args.append(usual.get(typed(flag), flag) + equals + value)
    config = (tyro.conf.FlagCreatePairsOff,)
    return tyro.cli(program, prog=name, args=args, config=config, use_underscores=underscores)


def run_program(
    program: Callable[..., Callable[[], None]],
    aliases: Mapping[str, str],
    argv: Sequence[str] | None = None,
    *,
    name: str | None = None,
) -> int:
    """Parse the flags of `program`, a dataclass that can be called, call it, and return its exit code.

    `aliases` as in `parse`; `name`, for messages, is by default that of the file that runs.
    """
    called = name or os.path.basename(sys.argv[0])  # noqa: PTH119 - a name for messages
    words = list(sys.argv[1:] if argv is None else argv)

    def run() -> None:
        try:
            command = parse(program, words, name=called, aliases=aliases)
        except RequestError:
            raise
        except ValueError as error:  # settings refuse values that make no sense
            raise RequestError(f"{error}; see --help") from error
        command()

    return exit_code(called, run)


def number(flag: str, text: str) -> float:
    """`text` as a number, or a RequestError that names the flag."""
    try:
        return float(text)
    except ValueError:
        raise RequestError(f"{flag} {text}: not a number; give merge weights such as 0.5 1 1.5") from None


def seed_list(text: str) -> list[int]:
    """The seeds of a list such as `1,2,5-10` (ranges include both ends).

    Raises:
        RequestError: not such a list, a range that runs backwards, or a seed named twice.
    """
    expected = "expected numbers and ranges such as 0-49999 or 1,2,5-10"
    seeds: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise RequestError(f"--seeds {text}: {part.strip()!r} is no seed; {expected}")
        span = range(int(first), int(last if dash else first) + 1)
        if not span:
            raise RequestError(f"--seeds {text}: the range {part.strip()} runs backwards; {expected}")
        seeds.extend(span)
    if len(set(seeds)) < len(seeds):
        raise RequestError(f"--seeds {text}: a seed is named twice, it would give one image twice; {expected}")
    return seeds
