"""The templates of pages and cards: files beside this module, filled in."""

from importlib.resources import files
from string import Template


def filled(name: str, **fields: str) -> str:
    """The template `name` with `fields` in the places of `$field`."""
    return Template(text_of(name)).substitute(fields)


def text_of(name: str) -> str:
    """The file `name` as it is."""
    return files(__package__).joinpath(name).read_text(encoding="utf-8")
