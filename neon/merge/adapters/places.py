"""Where the names of an adapter's layers lie among the names of a base."""

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from neon.merge.adapters.unet_names import other_names

_PROBED = 8  # names by which it is tried what stands in front of the base's names
_TEXT_MODEL = "text_model_"  # in front of text encoders' layers until transformers left it out


@dataclass(frozen=True)
class Place:
    """Where the names of one component of an adapter lie in the base."""

    names: Mapping[str, str]
    """name in the base by name in the adapter, of those that it has"""
    shapes_fit: Collection[str]
    """names in the adapter"""
    lacking: Sequence[str]
    """names in the adapter that the base has not"""

    @property
    def is_whole(self) -> bool:
        return len(self.shapes_fit) == len(self.names) + len(self.lacking)


def candidates(keys: Sequence[str], base: Sequence[str], flat: bool) -> Iterator[dict[str, str]]:
    """Ways to read the names of an adapter as names of the base: some name in the base by each that has one.

    The base may have words in front that the adapter has not (`model.diffusion_model.`), or lack the first word of all
    (`transformer.`), as the files of a model without its head do.

    Args:
        flat: the names of the adapter are those of layers, with underscores in place of dots; else those of tensors.
    """
    known = _known(base, flat)
    separator = "_" if flat else "."
    for left_out in ("", *_first_word(keys, flat)):
        tails = {key: key.removeprefix(left_out) for key in keys}
        fronts = {""} | {
            known[held][: len(held) - len(tail)]
            for tail in list(tails.values())[:_PROBED]
            for held in known
            if held.endswith(separator + tail)
        }
        for front in sorted((one for one in fronts if one == "" or one.endswith(".")), key=lambda one: (len(one), one)):
            inside = {held[len(front) :]: name for held, name in known.items() if name.startswith(front)}
            if names := {key: inside[tail] for key, tail in tails.items() if tail in inside}:
                yield names


def read_as(names: Mapping[str, str], flat: bool) -> str | None:
    """What to tell a user whose base calls layers otherwise than the adapter does; None: it does not."""
    for key, name in names.items():
        if key != (_flattened(name) if flat else name):
            return f"its names differ from the base's: {key} is read as {name}, and so on"
    return None


def _first_word(keys: Iterable[str], flat: bool) -> list[str]:
    """The word, with its separator, that all names begin with, if it is none that counts layers."""
    if flat:
        return [_TEXT_MODEL] if all(key.startswith(_TEXT_MODEL) for key in keys) else []
    words = {key.partition(".")[0] for key in keys}
    return [f"{word}." for word in words if len(words) == 1 and not word.isdecimal()]


def _flattened(name: str) -> str:
    return name.removesuffix(".weight").replace(".", "_")


def _known(base: Sequence[str], flat: bool) -> dict[str, str]:
    """The base's names by what an adapter may call them; what would stand for two of them is left out."""
    called = [*((name, name) for name in base), *((other, name) for name, other in other_names(base))]
    if flat:
        called = [(_flattened(word), name) for word, name in called if word.endswith(".weight")]
    count = Counter(word for word, _ in called)
    return {word: name for word, name in called if count[word] == 1}
