"""Settings of a sampler by name: as a file carries them, as a recipe or a caller of the library gives them."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from neon.errors import RequestError
from neon.model import GenerativeModel
from neon.runtime.files import as_json

SETTINGS = "settings"
"""in a file's metadata, the settings that its weights are meant to be sampled with, as JSON by name"""

_INFINITE = ("inf", "-inf")  # as our JSON spells them


def with_settings(default: Any, values: Mapping[str, Any], source: str) -> Any:
    """Settings `default` (a frozen dataclass) with `values`, as JSON or Python has them, in their place.

    Whole numbers stand for floats, as do the names of those that are not finite ("inf", as in records), and lists for
    tuples; nothing else is converted.

    Raises:
        RequestError: no such setting, a value of another type, or one that makes no sense; begins with `source`.
    """
    known = {field.name: getattr(default, field.name) for field in dataclasses.fields(default)}
    given = {}
    for name, value in values.items():
        if name not in known:
            raise RequestError(f"{source}: no setting is called {name}; expected one of {', '.join(known)}")
        given[name] = _converted(value, known[name], f"{source}: {name}")
    try:
        return replace(default, **given)
    except ValueError as error:
        raise RequestError(f"{source}: {error}") from error


def _converted(value: Any, like: Any, source: str) -> Any:
    """`value` as one of the type of `like`."""
    if isinstance(like, tuple) and isinstance(value, list | tuple) and all(map(_is_number, value)):
        return tuple(map(float, value))
    if isinstance(like, float) and (_is_number(value) or value in _INFINITE):
        return float(value)
    if like is None or type(value) is type(like):
        return value
    raise RequestError(f"{source} is {value!r}; expected a value such as {like!r}")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def loss_settings(pairs: Sequence[str]) -> dict[str, float]:
    """Settings of a training loss by name, of NAME=NUMBER each; a RequestError if one is none."""
    found = {}
    for pair in pairs:
        name, _, text = pair.partition("=")
        try:
            found[name] = float(text)
        except ValueError:
            raise RequestError(f"--loss {pair}: expected NAME=NUMBER") from None
    return found


def settings_json(settings: Any) -> str:
    """Settings (a dataclass) as the text for a file's metadata from which `usual_settings` makes them again.

    Raises:
        RequestError: JSON cannot hold one of them.
    """
    values = as_json(dataclasses.asdict(settings))
    try:
        return json.dumps(values)
    except TypeError as error:
        raise RequestError(f"the settings {values} cannot be kept in a file ({error})") from error


def carried_settings(model: GenerativeModel) -> dict[str, Any] | None:
    """The settings that the file says which `model` was loaded from, as JSON; None: it says none.

    Raises:
        RequestError: what stands there cannot be read.
    """
    text = model.file_metadata.get(SETTINGS)
    if text is None:
        return None
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, dict):
        raise RequestError(
            f"the {SETTINGS} in the metadata of the file are {text[:60]!r}; expected a JSON table of settings by name, "
            "as neon improve writes them"
        )
    return values


def usual_settings(model: GenerativeModel) -> Any:
    """How to sample `model` unless told otherwise: as its file says, else as published.

    Raises:
        RequestError: what the file says cannot be read, or makes no sense for the architecture.
    """
    values = carried_settings(model)
    if values is None:
        return model.default_settings
    return with_settings(model.default_settings, values, f"the {SETTINGS} in the metadata of the file")
