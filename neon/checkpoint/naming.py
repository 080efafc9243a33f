"""One network under two sets of names: wrappers such as DataParallel and torch.compile put words into them.

Or a library renamed its parts: diffusers called those of attention otherwise before 2023.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch

from neon.checkpoint.common import Checkpoint, Constructor

# What torch.compile, fully sharded training and activation checkpointing put in, in front or further in.
_WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
_IN_FRONT = "module"  # what DataParallel and its like put in front; elsewhere it is a network's own word
_OLD = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
"""parts of attention in models of diffusers: as files from before 2023 call them, and as they are called now"""
_AVERAGED = "n_averaged"  # a counter that torch's AveragedModel keeps beside the names it puts "module." in front of


class Renamed(Checkpoint):
    """A checkpoint under other names; closing it closes the file.

    Args:
        names: name in the file by the name it is to have, in the order of the file or any other; two names may be had
            by one tensor.

    Attributes:
        names_held: `names`.
    """

    def __init__(self, source: Checkpoint, names: Mapping[str, str]) -> None:
        specs = {name: source.specs[old] for name, old in names.items()}
        super().__init__(source.path, specs, key=source.key, candidates=source.candidates, metadata=source.metadata)
        self.format = source.format  # type: ignore[misc]  # of a class of files, and here of this one
        self._source = source
        self.names_held = dict(names)

    @property
    def files(self) -> tuple[Path, ...]:
        return self._source.files

    @property
    def has_constructor(self) -> bool:
        return self._source.has_constructor

    @property
    def constructor(self) -> Constructor | None:
        return self._source.constructor

    def read(self, name: str, start: int, out: torch.Tensor) -> None:
        self._source.read(self.names_held[name], start, out)

    def close(self) -> None:
        self._source.close()


def unwrapped(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint under the names that its network had before it was wrapped; itself if it was not."""
    plain = _plain_names(checkpoint.specs)
    while plain and all(name.startswith(f"{_IN_FRONT}.") for name in plain):
        plain = {name.removeprefix(f"{_IN_FRONT}."): old for name, old in plain.items()}
    return checkpoint if list(plain) == checkpoint.names() else Renamed(checkpoint, plain)


def fitted(ours: Iterable[str], theirs: Iterable[str]) -> dict[str, str] | None:
    """What each of our names is called among theirs; None: not the same names, even without what wrappers put in.

    The words that all names of one side begin with, and none of the other, count as a wrapper's.
    """
    mine, other = list(ours), list(theirs)
    if set(mine) == set(other):
        return {name: name for name in mine}
    plain, plain_other = _plain_names(mine), _plain_names(other)
    front, front_other = _common_front(plain), _common_front(plain_other)
    if front_other[len(front_other) - len(front) :] == front:
        plain_other = _without_front(plain_other, len(front_other) - len(front))
    elif front[len(front) - len(front_other) :] == front_other:
        plain = _without_front(plain, len(front) - len(front_other))
    if plain.keys() != plain_other.keys():
        return None
    return {name: plain_other[word] for word, name in plain.items()}


def common_names(ours: Iterable[str], theirs: Iterable[str]) -> dict[str, str]:
    """What those of our names that theirs have too are called there, without the wrappers' words that `fitted` knows.

    Each side may have names of its own. Of the words that all names of a side begin with, as many count as a
    wrapper's as leave the most names in common.
    """
    plain, plain_other = _plain_names(ours), _plain_names(theirs)
    fronts = [
        [_without_front(names, count) for count in range(len(_common_front(names)) + 1)]
        for names in (plain, plain_other)
    ]
    mine, other = max(
        ((a, b) for a in fronts[0] for b in fronts[1]), key=lambda pair: len(pair[0].keys() & pair[1].keys())
    )
    return {name: other[word] for word, name in mine.items() if word in other}


def names_differ(names: Mapping[str, str]) -> str:
    """What to tell a user whose file calls tensors otherwise than by the names they are read under."""
    name, held = next((name, held) for name, held in names.items() if name != held)
    why = "those of an older release" if renewed(held) == name else "the words of a wrapper"
    return f"its names differ by {why}: {held} is read as {name}, and so on"


def _plain_names(names: Iterable[str]) -> dict[str, str]:
    """The names by what they are `renewed` and without what wrappers put in; as they are where two would become one."""
    names = list(names)
    if _AVERAGED in names and all(name.startswith(f"{_IN_FRONT}.") for name in names if name != _AVERAGED):
        names.remove(_AVERAGED)
    plain = {renewed(".".join(word for word in name.split(".") if word not in _WRAPPERS)): name for name in names}
    return plain if len(plain) == len(names) else {name: name for name in names}


def renewed(name: str) -> str:
    """The name of a tensor as current versions of diffusers have it, by what an older one called it."""
    module, _, kind = name.rpartition(".")
    parent, _, part = module.rpartition(".")
    return f"{parent}.{_OLD[part]}.{kind}" if ".attentions." in name and part in _OLD else name


def _common_front(names: Iterable[str]) -> list[str]:
    """The words, between dots, that all names begin with; the last word of a name is none of them."""
    words = [name.split(".")[:-1] for name in names]
    if not words:
        return []
    low, high = min(words), max(words)
    count = next((i for i, (a, b) in enumerate(zip(low, high, strict=False)) if a != b), min(len(low), len(high)))
    return low[:count]


def _without_front(names: Mapping[str, str], count: int) -> dict[str, str]:
    return {name.split(".", count)[-1]: old for name, old in names.items()}
