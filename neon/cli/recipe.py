"""A recipe, the `run.json` of a run or YAML written by hand, as the words of the command line that it stands for.

So there is one way for a value to be read and checked, and what is typed after it wins. A recipe names values of known
flags only; what runs code (--model) is none of them.
"""

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_type_hints

from neon.cli.command_line import Command
from neon.errors import RequestError, reason
from neon.runtime.hub import with_fetched
from neon.runtime.run_folder import VERSION_KEY, check_version

FLAG, BASE, SETTINGS = "recipe", "base", "settings"
NOT_OF_A_RECIPE = ("model", FLAG, "out", "fresh", "dry_run", "processes", "device", "set", "network", "plan")
"""fields of a command that no recipe holds"""
LARGEST = 1 << 20
EXPECTED = "expected the run.json of a run of neon improve, or YAML of its flags by name"


def words_of_recipe(program: type[Command], words: Sequence[str]) -> list[str]:
    """`words`, after those that the recipe stands for which they name with --recipe; without one just `words`.

    Raises:
        RequestError: the recipe cannot be read, names what is no flag, or holds a value that is none.
    """
    path = named_recipe(words)
    if path is None:
        return list(words)
    recipe = read_recipe(path, EXPECTED)
    base = recipe.pop(BASE, None)
    settings = recipe.pop(SETTINGS, None)
    known = _flags(program)
    own: list[str] = []
    for name, value in recipe.items():
        if name not in known:
            raise RequestError(
                f"{path}: {name!r} is no flag that a recipe can hold; expected {', '.join([BASE, SETTINGS, *known])}"
            )
        own += _words(path, name, value, known[name])
    if settings is not None:
        own += ["--set", *_pairs(path, settings)] if settings else []
    if base is None or (words and not words[0].startswith("-")):
        return [*words[: _positional(words)], *own, *words[_positional(words) :]]
    if not isinstance(base, str) or base.startswith("-"):
        raise RequestError(f"{path}: {BASE} is {base!r}; expected the name of a file")
    return [base, *own, *words]


def _positional(words: Sequence[str]) -> int:
    """How many words come before the first flag."""
    return next((i for i, word in enumerate(words) if word.startswith("-")), len(words))


def named_recipe(words: Sequence[str]) -> Path | None:
    """What stands behind --recipe."""
    for i, word in enumerate(words):
        flag, equals, value = word.partition("=")
        if flag == f"--{FLAG}":
            if equals:
                return Path(value)
            return Path(words[i + 1]) if i + 1 < len(words) else None
    return None


def read_recipe(path: Path, expected: str) -> dict[str, Any]:
    """The table of flags in a recipe; `expected`: what a recipe is, for the RequestError of a file that is none."""
    import yaml

    path = Path(with_fetched(path))
    try:
        if path.stat().st_size > LARGEST:
            raise RequestError(f"{path}: {path.stat().st_size:,} bytes are no recipe; {expected}")
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"{path}: cannot be read ({reason(error)}); {expected}") from error
    try:
        try:
            found = json.loads(text)
        except ValueError:
            found = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise RequestError(f"{path}: neither JSON nor YAML ({error}); {expected}") from error
    if isinstance(found, dict) and VERSION_KEY in found:
        check_version(path, found[VERSION_KEY])
        found = found.get("recipe")
    if not isinstance(found, dict) or not all(isinstance(name, str) for name in found):
        raise RequestError(f"{path}: no table of flags; {expected}")
    return dict(found)


def _flags(program: type[Command]) -> dict[str, Any]:
    """The flags that a recipe may hold, and their defaults."""
    found: dict[str, Any] = {}
    hints = get_type_hints(program)
    for field in dataclasses.fields(program):  # type: ignore[arg-type]
        if field.name == "plan":
            found |= {one.name: one.default for one in dataclasses.fields(hints["plan"])}
        elif field.name not in NOT_OF_A_RECIPE:
            found[field.name] = field.default
    return found


def _words(path: Path, name: str, value: Any, default: Any) -> Iterator[str]:
    """The words that say that flag `name` has `value`."""
    if value is None or value == default:
        return
    if isinstance(default, bool):
        if not isinstance(value, bool):
            raise RequestError(f"{path}: {name} is {value!r}; expected true or false")
        yield f"--{name}" if value else f"--no-{name}"
    elif isinstance(value, list | tuple):
        if isinstance(default, tuple) and all(isinstance(part, str) for part in (*default, *value)):
            if any(not part or part.startswith("-") for part in value):
                raise RequestError(f"{path}: {name} is {value!r}; expected names, and none that begins as flags do")
        elif not all(isinstance(part, int | float) and not isinstance(part, bool) for part in value):
            raise RequestError(f"{path}: {name} is {value!r}; expected numbers")
        yield f"--{name}"
        yield from map(str, value)
    elif isinstance(value, str | int | float) and not isinstance(value, bool):
        yield f"--{name}={value}"
    else:
        raise RequestError(f"{path}: {name} is {value!r}; expected a number or a text")


def _pairs(path: Path, settings: Any) -> Iterator[str]:
    """Settings of the sampler as NAME=VALUE."""
    if not isinstance(settings, Mapping):
        raise RequestError(f"{path}: {SETTINGS} is {settings!r}; expected a table of settings by name")
    for name, value in settings.items():
        if not isinstance(name, str) or not name.isidentifier():
            raise RequestError(f"{path}: {SETTINGS} name {name!r}; expected the names of settings")
        if value is None:  # as by default
            continue
        if isinstance(value, list):
            yield f"{name}={','.join(map(str, value))}"
        else:
            yield f"{name}={value}"
