"""What a merge is made of, as a table that makes it again, and the same for mergekit where that can say it."""

import os
import re
from collections.abc import Collection, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from neon.checkpoint.common import listing
from neon.errors import RequestError
from neon.merge.components import choose_components
from neon.merge.pair import PathLike, open_pair
from neon.merge.precision import Precision
from neon.runtime.hub import hub_name, parsed, short_name

_ANYWHERE = re.compile(r"\*([^*?\[\]]+)\*")
"""a pattern of what mergekit's filters can say: a text anywhere in the name"""


def recipe_of(
    base: PathLike, self_trained: PathLike, patterns: Mapping[str, float] | None, precision: Precision, **choices: Any
) -> dict[str, Any]:
    """The recipe of a merge without its w; of that, the `patterns`, if there are any.

    Names are as given where they are relative; of others, the name on the Hub with its commit, or the last part, since
    folders are nobody's business.
    `choices`: by the names of flags, those that are not None or empty.
    """
    w = {"w": dict(patterns)} if patterns else {}
    rounding = {"dtype": precision.dtype, "rounding": precision.rounding if precision.is_stochastic else None}
    chosen = {**choices, **rounding, "seed": precision.seed}
    named = {"base": _name(base), "self_trained": _name(self_trained)}
    return named | w | {name: value for name, value in chosen.items() if value is not None and value != []}


def _name(path: PathLike) -> str:
    return short_name(path) if Path(path).is_absolute() else Path(path).as_posix()


def check_patterns(patterns: Collection[str], names: Collection[str]) -> None:
    """A RequestError for the first of the patterns that matches none of the names of merged tensors."""
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise RequestError(
                f"w of {pattern!r}: matches no merged tensor; they are called {listing(sorted(names))}; a * stands for "
                "any part of a name"
            )


def mergekit_recipe(
    base: PathLike, self_trained: PathLike, ws: Collection[float], patterns: Mapping[str, float], precision: Precision
) -> dict[str, Any]:
    """A recipe of mergekit for a merge: its linear method, computed in float32.

    Raises:
        RequestError: it has no words for it, or a side cannot be read.
    """
    if len(ws) != 1:
        raise _unsaid("one recipe is of one w")
    if precision.is_stochastic:
        raise _unsaid("it does not round stochastically")
    filters = {pattern: _ANYWHERE.fullmatch(pattern) for pattern in patterns}
    if odd := [pattern for pattern, match in filters.items() if match is None]:
        raise _unsaid(f"its filters are texts anywhere in a name, *TEXT*, and not {odd[0]!r}")
    ours, theirs = Path(base), Path(self_trained)
    if ours.is_dir():
        [component, *others] = choose_components(ours, theirs).merged
        if component.name or others:
            raise _unsaid("it merges models, not pipelines")
        ours, theirs = component.base.path, component.self_trained
    with open_pair(ours, theirs) as pair:
        if pair.adapter is not None:
            raise _unsaid("a LoRA is no model of its own there")
        dtypes = {str(pair.base.specs[name].dtype).removeprefix("torch.") for name in pair.roles.merged}
    out = precision.dtype or (dtypes.pop() if len(dtypes) == 1 else None)
    [w] = ws
    named = [(match[1], value) for pattern, value in patterns.items() if (match := filters[pattern])]

    def weight(of_w: Any) -> Any:
        if not named:
            return of_w(w)
        return [*({"filter": text, "value": of_w(value)} for text, value in named), {"value": of_w(w)}]

    return {
        "merge_method": "linear",
        "models": [
            {"model": _of_mergekit(base), "parameters": {"weight": weight(lambda w: 1 + w)}},
            {"model": _of_mergekit(self_trained), "parameters": {"weight": weight(lambda w: -w)}},
        ],
        "parameters": {"normalize": False},
        "dtype": "float32",
        **({"out_dtype": out} if out else {}),
    }


def _of_mergekit(path: PathLike) -> str:
    """What mergekit calls a model: ORG/REPO@COMMIT on the Hub, or its folder."""
    if name := hub_name(path):
        found = parsed(name)
        if found.inside:
            raise _unsaid(f"of what is on the Hub it takes a whole repository, and not {name}")
        return f"{found.repository}@{found.revision}"
    if {"@", "+"} & set(os.fspath(path)):
        raise _unsaid(f"it reads @ and + in the name of a folder as more than that, and {os.fspath(path)} has one")
    return os.fspath(path)


def _unsaid(why: str) -> RequestError:
    return RequestError(f"--export-mergekit: mergekit has no words for this merge: {why}; leave the flag out")
