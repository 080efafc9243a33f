"""The flags of a program, read from its signature: what `--help` prints of them, and which of those given are wrong.

A program is a function, or a dataclass whose bases group its flags under the first sentence of their docstrings. What a
flag means stands below its field, or in the Args section of the function.
"""

import ast
import dataclasses
import difflib
import functools
import inspect
import re
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import tyro

from neon.errors import RequestError

Program = Callable[..., Any]

WIDTH = 100
"""columns of a help text"""
TEXT_COLUMN = 26
METAVARS = {int: "N", float: "X", str: "TEXT", Path: "PATH"}
_POSITIONAL = get_args(tyro.conf.Positional[int])[1]


@dataclass(frozen=True, kw_only=True)
class Flag:
    """One flag, or (without names) one positional argument."""

    names: tuple[str, ...]
    """as they are typed, the usual one last"""
    metavar: str
    """what stands for its value; empty: it takes none"""
    default: Any
    """`inspect.Parameter.empty`: it must be given"""
    text: str
    group: str

    @property
    def required(self) -> bool:
        """Whether it must be given."""
        return self.default is inspect.Parameter.empty

    def line(self) -> str:
        """Its lines in a help text."""
        # Of spellings that differ in case and dashes, one is shown.
        shown_names = {name.lower().replace("_", "-"): name for name in self.names}.values()
        called = f"{', '.join(shown_names)} {self.metavar}".strip()
        shown = _shown(self.default)
        text = f"{self.text} (default: {shown})" if shown else self.text
        first = f"  {called}".ljust(TEXT_COLUMN - 2) + "  "
        return textwrap.fill(text, WIDTH, initial_indent=first, subsequent_indent=" " * TEXT_COLUMN)


def flags_of(program: Program, *, underscores: bool, aliases: Mapping[str, str] | None = None) -> list[Flag]:
    """The flags of a program by groups, the most particular first.

    Args:
        program: A function, or a dataclass.
        underscores: How words in names are joined: `--num_images` or `--num-images`; both can be typed.
        aliases: Other spellings, to the usual one.
    """
    found = []
    for flag in _flags(program):
        names = [*(other for other, usual in (aliases or {}).items() if usual in flag.names), *flag.names]
        names = [name if underscores else name.replace("_", "-") for name in names]
        found.append(dataclasses.replace(flag, names=tuple(names)))
    # The fields of a dataclass begin with those of its remotest base, which are the most general ones.
    groups = list(dict.fromkeys(flag.group for flag in reversed(found)))
    return sorted(found, key=lambda flag: groups.index(flag.group))


def help_text(program: Program, flags: Sequence[Flag]) -> str:
    """What `--help` prints: what the program does, one example, and its flags, at most `WIDTH` columns wide."""
    groups: dict[str, list[Flag]] = {}
    for flag in sorted(flags, key=lambda flag: not flag.required):
        groups.setdefault("Required" if flag.required else flag.group, []).append(flag)
    parts = _introduction(program)
    for title, members in groups.items():
        parts += [f"{title}:", *(flag.line() for flag in members)]
    return "\n".join(parts)


def check_names(words: Sequence[str], flags: Sequence[Flag]) -> None:
    """Raise a RequestError if `words` hold a flag that the program does not have, or lack one that it needs."""
    known = {typed(name): name for flag in flags for name in flag.names}
    given = [word.partition("=")[0] for word in words if word.startswith("-")]
    for name in given:
        if name.startswith("--") and name != "--" and not name.startswith("--tyro") and typed(name) not in known:
            raise RequestError(f"{name}: unknown flag; {nearest(typed(name), known)}")
    missing = [flag.names[-1] for flag in flags if flag.required and flag.names and not _any_in(flag.names, given)]
    if missing:
        raise RequestError(f"{', '.join(missing)}: missing; see --help")


def nearest(name: str, known: Mapping[str, str]) -> str:
    """Advice for a mistyped `name`: the most similar of `known`, in its usual spelling, and --help."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6) or [other for other in known if name in other]
    return f"did you mean {known[close[0]]}? See --help" if close else "see --help"


def summary(program: Program) -> str:
    """The first paragraph of the docstring of a program."""
    return _paragraphs(program.__doc__)[0]


def described_line(name: str, text: str) -> str:
    """The lines of a list of names with what they are."""
    return textwrap.fill(text, WIDTH, initial_indent=f"  {name:<11}", subsequent_indent=" " * 13)


def wrapped_command(command: str) -> str:
    """A command that can be copied, in lines that end with a backslash where they go on."""
    together = re.sub(r"(?<= )(--?\S+) (?!-)", "\\1\0", command)  # a flag and its first value
    lines = textwrap.wrap(together, WIDTH - 6, break_long_words=False, break_on_hyphens=False)
    return " \\\n    ".join(lines).replace("\0", " ")


def _introduction(program: Program) -> list[str]:
    """What a program does and an example: from its docstring or, if that has none, from that of its module."""
    paragraphs = _paragraphs(program.__doc__)
    if not any(paragraph.startswith("Example: ") for paragraph in paragraphs) and isinstance(program, type):
        above = _paragraphs(sys.modules[program.__module__].__doc__)
        paragraphs = [above[0], *(f"Example: {_first_command(block)}" for block in above[1:2])]
    return [
        wrapped_command(paragraph) if paragraph.startswith("Example: ") else textwrap.fill(paragraph, WIDTH)
        for paragraph in paragraphs
    ]


def typed(name: str) -> str:
    """A flag in the spelling in which it is compared: `_` and `-` are the same."""
    return "--" + name[2:].replace("_", "-") if name.startswith("--") else name


def _any_in(names: Sequence[str], given: Sequence[str]) -> bool:
    return bool({typed(name) for name in names} & {typed(name) for name in given})


def _flags(program: Program, title: str = "") -> Iterator[Flag]:
    """The flags of a program in the order of its signature, all in the group `title` if there is one."""
    called: Any = program.__init__ if isinstance(program, type) else program  # type: ignore[misc]  # a class, as it is
    hints = get_type_hints(called, include_extras=True)
    for name, parameter in inspect.signature(program).parameters.items():
        hint, metadata = hints.get(name, Any), list[Any]()
        # Python 3.10 makes Optional[Annotated[...]] of what is annotated and None by default.
        if get_origin(hint) is Union:
            hint = next((part for part in get_args(hint) if get_origin(part) is Annotated), hint)
        if get_origin(hint) is Annotated:
            hint, *metadata = get_args(hint)  # tyro's markers and settings
        argument = next((entry for entry in metadata if hasattr(entry, "metavar")), None)
        if dataclasses.is_dataclass(hint):  # settings of a sampler: their fields are flags
            yield from _flags(hint, _title(hint))  # type: ignore[arg-type]
            continue
        text, group = _said(program, name)
        usual = getattr(argument, "name", None) or name
        yield Flag(
            names=() if _POSITIONAL in metadata else (*(getattr(argument, "aliases", None) or ()), f"--{usual}"),
            metavar=getattr(argument, "metavar", None) or (name.upper() if _POSITIONAL in metadata else _metavar(hint)),
            default=_default(program, name, parameter),
            text=text,
            group=title or group,
        )


def _title(cls: type) -> str:
    """What the flags of a class are headed by: the beginning of its docstring."""
    return re.split(r"[.;:]", summary(cls))[0]


def _default(program: Program, name: str, parameter: inspect.Parameter) -> Any:
    """The default of a flag; that of a field may come from a factory."""
    if isinstance(program, type):
        field = next(field for field in dataclasses.fields(program) if field.name == name)
        if field.default_factory is not dataclasses.MISSING:
            return field.default_factory()
    return parameter.default


def _metavar(hint: Any) -> str:
    arguments = [argument for argument in get_args(hint) if argument is not NoneType]
    origin = get_origin(hint)
    if hint is bool:
        return ""
    if origin in (Union, UnionType):
        return "|".join(map(_metavar, arguments))
    if origin is Literal:
        return "|".join(map(str, arguments))
    if origin is list or (origin is tuple and Ellipsis in arguments):
        return f"{_metavar(arguments[0])} .."
    if origin is tuple:
        return " ".join(map(_metavar, arguments))
    return METAVARS.get(hint, "VALUE")


def _shown(default: Any) -> str:
    """A default as a help text shows it; empty: there is nothing to show."""
    if default is None or default is inspect.Parameter.empty or default in ("", (), []):
        return ""
    if isinstance(default, bool):
        return "on" if default else "off"
    return " ".join(map(str, default)) if isinstance(default, tuple | list) else str(default)


def _said(program: Program, name: str) -> tuple[str, str]:
    """(what the flag means, the title of its group)."""
    if not isinstance(program, type):
        return _arguments(program).get(name, ""), "Flags"
    for cls in program.__mro__:
        if name in inspect.get_annotations(cls):
            # A field that a program declares again stays in the group where it was.
            first = next(base for base in reversed(program.__mro__) if name in inspect.get_annotations(base))
            return _attributes(cls).get(name, ""), "Flags" if first is program else _title(first)
    return "", "Flags"


def _paragraphs(document: str | None) -> list[str]:
    """The paragraphs of a docstring up to its Args, each in one line; indented ones as they are."""
    text = inspect.cleandoc(document or "").partition("\nArgs:\n")[0]
    parts = [part for part in text.split("\n\n") if part.strip()] or [""]
    return [part if part.startswith(" ") else " ".join(part.split()) for part in parts]


def _first_command(block: str) -> str:
    """The first command of an indented block, in one line."""
    lines = []
    for line in block.splitlines():
        lines.append(line.strip().removesuffix("\\").strip())
        if not line.endswith("\\"):
            break
    return " ".join(lines)


def _arguments(function: Program) -> dict[str, str]:
    """The texts in the Args section of a docstring."""
    section = inspect.cleandoc(function.__doc__ or "").partition("\nArgs:\n")[2]
    entries = re.split(r"^    (?=\w+:)", section, flags=re.MULTILINE)[1:]
    return {entry.partition(":")[0]: " ".join(entry.partition(":")[2].split()) for entry in entries}


@functools.cache
def _attributes(cls: type) -> dict[str, str]:
    """The docstrings below the fields of a class."""
    try:
        [definition] = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    except OSError:  # its source is not at hand: the flags work without their texts
        return {}
    assert isinstance(definition, ast.ClassDef)
    found = {}
    for field, below in zip(definition.body, definition.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(below, ast.Expr):
            found[field.target.id] = " ".join(str(ast.literal_eval(below.value)).split())
    return found
