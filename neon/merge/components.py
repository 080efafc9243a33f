"""Which models of two folders are merged: the folders themselves, or components of a diffusers pipeline."""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from neon.checkpoint.weight_sets import PIPELINE_FILE, WeightSet, component_sets, sets_in, usual_set
from neon.errors import RequestError, reason
from neon.merge.pair import open_pair, values_differ
from neon.runtime.small_json import read_table

Sets = Mapping[str, list[WeightSet]]
"""the sets of weights of each component, by its name; that of a folder that is one model is called "" """

_QUANTISED = ("quantization_config", "compression_config")
_BLOB = re.compile(r"[0-9a-f]{64}")
"""how the cache of the Hub names large files: by their SHA-256"""


@dataclass(frozen=True)
class Match:
    """A component that is merged."""

    name: str
    base: WeightSet
    self_trained: Path
    """what opens its self-trained weights"""


@dataclass(frozen=True)
class Chosen:
    """What becomes of the weights of a base's folder."""

    merged: tuple[Match, ...]
    copied: Mapping[str, WeightSet]
    """components that stay as they are, by name"""
    notes: tuple[str, ...]
    """what a user should know, in sentences"""


def choose_components(
    base: Path,
    self_trained: Path,
    names: Sequence[str] = (),
    variant: str | None = None,
    keys: tuple[str | None, str | None] = (None, None),
) -> Chosen:
    """Find what is to be merged in the folder `base`, and its self-trained weights.

    Args:
        self_trained: the like of the base, the folder of one component, or a file.
        names: components to merge; by default the one that differs, or that the self-trained weights fit.
        variant: such as "fp16"; by default as `usual_set`.
        keys: of both sides, as in `open_pair`.

    Raises:
        RequestError: a folder has no weights or damaged ones, no component is meant or several are, one that is named
            is not there, or the weights are quantised.
    """
    sets = _sets_of(base)
    used = {name: usual_set(base / name, found, _variant_in(found, variant, name)) for name, found in sets.items()}
    if variant and all(one.variant != variant for one in used.values()):
        there = sorted({one.variant or "the default" for found in sets.values() for one in found})
        raise RequestError(f"{base}: no weights of the variant {variant!r}; it has {', '.join(there)}")
    if unknown := [name for name in names if name not in sets or not name]:
        raise RequestError(
            f"{base}: no component {unknown[0]!r} with weights; " + (f"it has {_list(sets)}" if "" not in sets else
            f"it is one model and no pipeline ({PIPELINE_FILE}), leave --component out")
        )  # fmt: skip
    theirs = _paths_in(self_trained, used, variant)
    if theirs is None:
        chosen, theirs = _fitting(used, self_trained, names, keys)
    elif "" in theirs and "" not in used:
        chosen, theirs = _fitting(used, theirs[""], names, keys)
    elif "" in used and "" not in theirs:
        raise RequestError(
            f"{self_trained}: a pipeline, and {base} is one model; name the folder of that model inside it"
        )
    else:
        chosen = _named_or_differing(base, self_trained, used, theirs, names, keys)
    for name in chosen:
        _check_not_quantised(base / name)
        _check_not_quantised(theirs[name] if theirs[name].is_dir() else theirs[name].parent)
    merged = tuple(Match(name, used[name], theirs[name]) for name in chosen)
    return Chosen(merged, {name: one for name, one in used.items() if name not in chosen}, _notes(merged))


def opposite(
    a: Path, b: Path, names: Sequence[str] = (), variant: str | None = None
) -> tuple[dict[str, tuple[Path, Path]], list[str], list[str]]:
    """The weights of two models or pipelines that stand opposite each other, by component ("": no pipeline).

    Args:
        a: file or folder, and `b` likewise, which may be one component of a pipeline `a`.
        names: the components that are meant; by default all.

    Returns:
        what opens both sides of each, and the components that are only in `a` and only in `b`.

    Raises:
        RequestError: a folder has damaged weights or none, or nothing of the two stands opposite.
    """
    ours = _paths_in(a, {}, variant) or {"": a}
    theirs = _paths_in(b, {}, variant) or {"": b}
    if "" in theirs and "" not in ours:
        used = {
            name: usual_set(a / name, found, _variant_in(found, variant, name)) for name, found in _sets_of(a).items()
        }
        [name], theirs = _fitting(used, theirs[""], names, (None, None))
        names = [name]
    if lacking := [name for name in names if name not in ours or name not in theirs]:
        raise RequestError(
            f"--component {lacking[0]}: not on both sides; {a} has {_list(ours)} and {b} {_list(theirs)}"
        )
    both = {name: (ours[name], theirs[name]) for name in ours if name in theirs and (not names or name in names)}
    if not both:
        raise RequestError(f"{a} and {b}: no component is in both ({_list(ours)} and {_list(theirs)})")
    if names:
        return both, [], []
    return both, [name for name in ours if name not in theirs], [name for name in theirs if name not in ours]


def _sets_of(folder: Path) -> Sets:
    try:
        return component_sets(folder)
    except OSError as error:
        raise RequestError(f"{folder}: cannot be read ({reason(error)}); check the path and its permissions") from error


def _variant_in(found: Sequence[WeightSet], variant: str | None, name: str) -> str | None:
    """The variant to use of one component: not all of a pipeline need have it."""
    return variant if variant is None or any(one.variant == variant for one in found) else None


def _paths_in(folder: Path, used: Mapping[str, WeightSet], variant: str | None) -> dict[str, Path] | None:
    """What opens each self-trained component: the base's variant if it has it. None: no folder of models."""
    if not folder.is_dir() or not ((folder / PIPELINE_FILE).is_file() or sets_in(folder)):
        return None  # an adapter, or what `open_checkpoint` finds in it
    found = _sets_of(folder)
    paths = dict[str, Path]()
    for name, sets in found.items():
        ours = used[name].variant if name in used else variant
        paths[name] = usual_set(folder / name, sets, _variant_in(sets, ours, name)).path
    return paths


def _fitting(
    used: Mapping[str, WeightSet], path: Path, names: Sequence[str], keys: tuple[str | None, str | None]
) -> tuple[list[str], dict[str, Path]]:
    """The component that one model's weights are of: the one named, or the only one whose names and shapes they have.

    Raises:
        RequestError: they fit none, or several.
    """
    if len(names) > 1:
        raise RequestError(f"{path}: weights of one model, and --component names {len(names)}")
    if names or "" in used:
        name = names[0] if names else ""
        return [name], {name: path}
    fitting, problem = list[str](), None
    for name, weights in used.items():
        try:
            with open_pair(weights.path, path, *keys):
                fitting.append(name)
        except RequestError as error:
            problem = error
    if len(fitting) == 1:
        return fitting, {fitting[0]: path}
    if fitting:
        raise RequestError(f"{path}: fits several components: {_list(fitting)}; choose with --component")
    raise RequestError(f"{path}: fits none of the components {_list(used)} ({problem})")


def _named_or_differing(
    base: Path,
    self_trained: Path,
    used: Mapping[str, WeightSet],
    theirs: Mapping[str, Path],
    names: Sequence[str],
    keys: tuple[str | None, str | None],
) -> list[str]:
    """The components to merge of two folders that are alike."""
    if "" in used:
        return [""]
    if lacking := [name for name in names if name not in theirs]:
        raise RequestError(f"{self_trained}: no component {lacking[0]!r} with weights; it has {_list(theirs)}")
    if names:
        return list(dict.fromkeys(names))
    both = [name for name in used if name in theirs]
    differing = [name for name in both if _differ(used[name], theirs[name], keys)]
    if len(differing) == 1:
        return differing
    if differing:
        raise RequestError(
            f"{base} and {self_trained}: several components differ: {_list(differing)}; choose with --component, which "
            "takes one or more"
        )
    raise RequestError(
        f"{base} and {self_trained}: no component differs ({_list(both)} compared): nothing to extrapolate; name the "
        "self-trained model"
    )


def _differ(weights: WeightSet, theirs: Path, keys: tuple[str | None, str | None]) -> bool:
    """Whether two models differ anywhere; reading ends at the first value that does, and is spared for equal files."""
    if theirs.name == weights.path.name and all(_same_file(file, theirs.parent / file.name) for file in weights.files):
        return False
    try:
        with open_pair(weights.path, theirs, *keys) as pair:
            return any(values_differ(pair.base, pair.self_trained, name) for name in pair.base.specs)
    except RequestError:  # which is said in full when it is merged
        return True


def _same_file(a: Path, b: Path) -> bool:
    """Whether two names are of one file, or of copies that the cache of the Hub names by one hash."""
    try:
        return a.samefile(b) or (
            _BLOB.fullmatch(os.path.realpath(a).rpartition("/")[2]) is not None
            and Path(os.path.realpath(a)).name == Path(os.path.realpath(b)).name
        )
    except OSError:
        return False


def _check_not_quantised(folder: Path) -> None:
    config = folder / "config.json"
    table = read_table(config)
    for entry in _QUANTISED:
        if said := table.get(entry):
            method = said.get("quant_method") if isinstance(said, dict) else None
            raise RequestError(
                f"{config}: the weights are quantised ({entry}{f': {method}' if method else ''}), which has no "
                "extrapolation; merge the weights as they were before, or dequantise both"
            )


def _notes(merged: Sequence[Match]) -> tuple[str, ...]:
    return tuple(
        f"{match.self_trained}: not of the variant {match.base.variant or '(default)'!r} that the base is read at"
        for match in merged
        if match.base.variant and f".{match.base.variant}" not in match.self_trained.name
    )


def _list(names: Sequence[str] | Mapping[str, object]) -> str:
    return ", ".join(names)
