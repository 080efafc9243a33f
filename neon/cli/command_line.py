"""From words to a command: parsed by tyro, run, and ended with an exit code.

A command is a frozen dataclass: its fields are its flags, the docstring below a field is its help, and calling it does
the work. 0: done, 1: the work failed, 2: the request was wrong; an error is one line on stderr.
"""

import contextlib
import dataclasses
import math
import operator
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, get_args, get_type_hints

import tyro

from neon.errors import RequestError, WorkError, is_first_process, one_line
from neon.runtime.hub import is_hub_name, output_path, with_fetched
from neon.runtime.signals import Stopped, answered

Command = Callable[[], int | None]

Weights = Annotated[list[str], tyro.conf.arg(aliases=["-w"], metavar="W [W ...]")]
"""merge weights, as text: what is wrong with one is said by us"""
Scales = Annotated[list[str], tyro.conf.arg(metavar="G [G ...]")]
"""scales of a second network, as text likewise"""
SWITCH_VALUES = {"1": True, "true": True, "0": False, "false": False}
"""how the published programs also spell a switch: `--cond=1`, `--cond true`"""
OUTPUTS = ("out", "outdir", "output", "json", "run_dir", "into", "export_mergekit")
"""fields that name what is written"""
PUSHED_TO = "repository"
"""the field that names a place on the Hub and no input"""
CODE = "model"
"""the field that names a file which is run"""
OUT_OF_MEMORY = ("out of memory", "not enough memory", "can't allocate memory")
"""what torch says of a GPU and of a CPU that has no more of it"""


def run_program(program: type[Command], argv: Sequence[str] | None = None, *, name: str | None = None) -> int:
    """Parse the flags of a command, run it, and return its exit code; `name` stands in messages, by default the file's.

    `--num-images` and `--num_images` are the same flag.
    """
    called = name or Path(sys.argv[0]).name
    words = list(sys.argv[1:] if argv is None else argv)

    def run() -> int | None:
        with values_refused():
            command = parse(program, words, called)
        return with_hub_files(command)()

    return exit_code(called, run)


def with_hub_files(command: Command) -> Command:
    """The command, with every `hf:` name among its values as the path in the Hub's cache that it was fetched to.

    So is one in a list, or behind LABEL=.

    Raises:
        RequestError, WorkError: as `fetched`, or an output, or code to run, is such a name.
    """
    if not dataclasses.is_dataclass(command):
        return command
    values = {field.name: getattr(command, field.name) for field in dataclasses.fields(command) if field.init}
    changed = {name: _fetched(name, value) for name, value in values.items()}
    new = {name: value for name, value in changed.items() if value is not values[name]}
    return dataclasses.replace(command, **new) if new else command


def _fetched(name: str, value: Any) -> Any:
    """`value` of field `name`, the same object if there is nothing to fetch."""
    if dataclasses.is_dataclass(value):
        return with_hub_files(value)  # type: ignore[arg-type]  # settings that are part of a command
    if isinstance(value, tuple | list):
        parts = [_fetched(name, part) for part in value]
        return value if all(map(operator.is_, parts, value)) else type(value)(parts)
    if not isinstance(value, str | Path) or name == PUSHED_TO:
        return value
    if name in OUTPUTS:
        output_path(value)
    if name == CODE and is_hub_name(value):
        raise RequestError(f"--{name} {value}: code from the Hub is not run; download it, read it, and name that file")
    path = with_fetched(value)
    return value if path == str(value) else type(value)(path)


def parse(program: type[Command], words: Sequence[str], name: str) -> Command:
    """The command that `words` describe.

    Raises:
        RequestError: a flag of the published program that has no place here: those in `program.refused`, with why.
        ValueError: settings among its flags refuse a value.
        SystemExit: after `--help` (0), or because of an unknown flag, a missing one or a value of another type (2).
    """
    words = getattr(program, "with_recipe", list)(words)  # a file that stands for flags
    _refuse_published(program, words)
    with _silent_unless_first():
        return tyro.cli(
            program,
            prog=name,
            args=_split_lists(program, _plain_switches(program, words)),
            config=(tyro.conf.FlagCreatePairsOff,),
            use_underscores=True,
        )


def exit_code(command: str, run: Callable[[], int | None]) -> int:
    """The exit code of `run()`: 0 done, 1 the work failed, 2 the request was wrong; an error is one line on stderr.

    After Ctrl-C it is 130 and after SIGTERM 143; the line says where the same command goes on.
    """
    try:
        with answered():
            code = run()
            sys.stdout.flush()
        return code or 0
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 2
    except (RequestError, WorkError) as error:
        if is_first_process() or not error.shared:
            print(f"{command}: {one_line(error)}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:  # `neon inspect ... | head`: the reader has seen enough, and Python's own flush would fail
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        print(f"{command}: {one_line(error)}", file=sys.stderr)
        return 1
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and not any(words in str(error) for words in OUT_OF_MEMORY):
            raise
        print(f"{command}: out of memory ({one_line(error)[:200]}); ask for smaller batches", file=sys.stderr)
        return 1
    except Stopped as stop:
        if is_first_process():
            print(f"{command}: {one_line(stop)}", file=sys.stderr)
        return stop.exit_code
    except KeyboardInterrupt:  # where somebody else answers signals
        return 130


@contextlib.contextmanager
def values_refused(flags: str = "") -> Iterator[None]:
    """Within, what settings say of values that make no sense becomes a RequestError, which begins with `flags`."""
    try:
        yield
    except RequestError:
        raise
    except ValueError as error:
        raise RequestError(f"{flags}{error}; see --help") from error


def number(flag: str, text: str) -> float:
    """`text` as a number, or a RequestError that names the flag."""
    try:
        return float(text)
    except ValueError:
        raise RequestError(f"{flag} {text}: not a number; expected such as 0.5 1 1.5") from None


def at_least_one(**numbers: int | None) -> None:
    """A RequestError for a flag, named as its keyword, whose number is below 1; None: it was not given."""
    for name, value in numbers.items():
        if value is not None and value < 1:
            raise RequestError(f"--{name} {value}: expected at least 1")


def finite(flag: str, numbers: Sequence[float]) -> None:
    """A RequestError for the first of the `numbers` of a flag that is not finite."""
    for value in numbers:
        if not math.isfinite(value):
            raise RequestError(f"{flag} {value}: expected a finite number")


def positive(**numbers: float | None) -> None:
    """A RequestError for the first of these flags that is given and not a finite number above 0."""
    for name, value in numbers.items():
        if value is not None and not 0 < value < math.inf:
            raise RequestError(f"--{name} {value}: expected a positive number")


def between(low: float, high: float, **numbers: float | None) -> None:
    """A RequestError for the first of these flags that is given and not a finite number from `low` to `high`."""
    for name, value in numbers.items():
        if value is not None and not (math.isfinite(value) and low <= value <= high):
            expected = f"{low:g} to {high:g}" if math.isfinite(high) else f"{low:g} or more"
            raise RequestError(f"--{name} {value}: expected {expected}")


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


def _plain_switches(program: type, words: Sequence[str]) -> list[str]:
    """`words` with switches as the parser takes them: `--cond=1` and `--cond 1` are `--cond`, `--cond=0` is nothing.

    Those that tell 0 from nothing (`bool | None`) get a value instead: True or False.
    """
    switches = _flags_of(program, lambda hint: hint is bool)
    valued = _flags_of(program, lambda hint: hint == bool | None)
    plain: list[str] = []
    left = list(words)
    while left:
        word = left.pop(0)
        flag, equals, value = word.partition("=")
        if _comparable(flag) not in switches:
            plain.append(word)
            continue
        if not equals and left and left[0].lower() in SWITCH_VALUES:
            equals, value = "=", left.pop(0)
        if equals and value.lower() not in SWITCH_VALUES:
            raise RequestError(f"{word}: expected no value, or one of {', '.join(SWITCH_VALUES)}")
        on = not equals or SWITCH_VALUES[value.lower()]
        if _comparable(flag) in valued:
            plain += [flag, str(on)]
        elif on:
            plain.append(flag)
    return plain


def _refuse_published(program: type, words: Sequence[str]) -> None:
    """Raise a RequestError for a flag of the published program that would change nothing here, or another thing."""
    refused = getattr(program, "refused", {})
    reasons = {_comparable(f"--{flag}" if len(flag) > 1 else f"-{flag}"): why for flag, why in refused.items()}
    for word in words:
        flag = word.partition("=")[0]
        if word.startswith("+") and "--config-name" in reasons:  # an override of a configuration file
            raise RequestError(f"{flag}: {reasons['--config-name']}")
        if _comparable(flag) in reasons:
            raise RequestError(f"{flag}: {reasons[_comparable(flag)]}")


def _split_lists(program: type, words: Sequence[str]) -> list[str]:
    """`words` with the published spelling of lists of numbers, `--cres 1,2,2,2`, as the words that the parser takes."""
    lists = _flags_of(program, lambda hint: get_args(hint)[:1] in ((int,), (float,)))
    split: list[str] = []
    within = False
    for word in words:
        flag, equals, value = word.partition("=")
        if word.startswith("--"):
            within = _comparable(flag) in lists
        if not within or "," not in word:
            split.append(word)
        elif equals:
            split += [flag, *value.split(",")]
        else:
            split += word.split(",")
    return split


def _flags_of(program: type, is_one: Callable[[Any], bool]) -> set[str]:
    """The flags of a command, as `_comparable`, whose type `is_one`; of optional ones the type without None."""
    found: set[str] = set()
    for name, hint in get_type_hints(program, include_extras=True).items():
        names = [f"--{name}"]
        if hasattr(hint, "__metadata__"):
            settings = hint.__metadata__[0]
            names += getattr(settings, "aliases", None) or ()
            if called := getattr(settings, "name", None):  # not as its field
                names.append(f"--{called}")
            hint = hint.__origin__
        if dataclasses.is_dataclass(hint):  # settings of a sampler: their fields are flags
            found |= _flags_of(hint, is_one)  # type: ignore[arg-type]
            continue
        inner = [part for part in get_args(hint) if part is not NoneType]
        if is_one(hint) or (isinstance(hint, UnionType) and len(inner) == 1 and is_one(inner[0])):
            found |= {_comparable(each) for each in names}
    return found


def _comparable(flag: str) -> str:
    return flag.replace("_", "-")


@contextlib.contextmanager
def _silent_unless_first() -> Iterator[None]:
    """Nothing is printed by the other processes of a run: what is wrong is wrong in all of them."""
    if is_first_process():
        yield
        return
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        yield
