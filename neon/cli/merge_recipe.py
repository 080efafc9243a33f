"""The recipe of a merge, YAML or JSON, as the words of the command line that it stands for; what is typed wins."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from neon.cli.recipe import named_recipe, read_recipe
from neon.errors import RequestError

EXPECTED = "expected YAML or JSON with base, self_trained, w, output and what else neon merge has flags for"
TEXTS = ("base", "self_trained", "output", "key", "self_trained_key", "variant", "shard_size", "dtype", "rounding")
KNOWN = (*TEXTS, "w", "component", "seed")


def words_of_merge(words: Sequence[str]) -> list[str]:
    """`words`, after those that the recipe stands for which they name with --recipe; without one just `words`.

    Raises:
        RequestError: the recipe cannot be read, names what is no flag, or holds a value that is none.
    """
    path = named_recipe(words)
    if path is None:
        return list(words)
    recipe = read_recipe(path, EXPECTED)
    typed = {word.partition("=")[0].lstrip("-").replace("-", "_") for word in words if word.startswith("-")}
    own = list[str]()
    for name, value in recipe.items():
        if name not in KNOWN:
            raise RequestError(f"{path}: {name!r} is nothing that a recipe can hold; expected {', '.join(KNOWN)}")
        found = list(_words(path, name, value))
        if name not in typed and not (name == "w" and "w_of" in typed):
            own += found
    return [*own, *words]


def _words(path: Path, name: str, value: Any) -> Iterator[str]:
    """The words that say that flag `name` has `value`."""
    if name == "w" and isinstance(value, dict):
        rest = dict(value)
        yield f"--w={_number(path, 'w: default', rest.pop('default', None))}"
        if rest:
            yield "--w_of"
            yield from (f"{pattern}={_number(path, f'w: {pattern}', w)}" for pattern, w in rest.items())
    elif name == "w":
        yield "--w"
        yield from _each(path, name, value, _number)
    elif name == "component":
        yield "--component"
        yield from _each(path, name, value, _text)
    elif name == "seed":
        if type(value) is not int:
            raise RequestError(f"{path}: seed is {value!r}; expected an integer")
        yield f"--seed={value}"
    else:
        yield f"--{name}={_text(path, name, value)}"


def _each(path: Path, name: str, value: Any, said: Callable[[Path, str, Any], str]) -> Iterator[str]:
    values = value if isinstance(value, list) else [value]
    return (said(path, name, one) for one in values or [None])


def _number(path: Path, name: str, value: Any) -> str:
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise RequestError(f"{path}: {name} is {value!r}; expected a number, or patterns of names and a default")
    return repr(value)


def _text(path: Path, name: str, value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise RequestError(f"{path}: {name} is {value!r}; expected a text")
    return value
