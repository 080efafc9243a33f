"""Names that only one of two files has although both are of one network: tied weights, and entries that are no weights.

A network that uses one matrix twice (GPT-2's embedding is its head, too) has two names for it. Torch files hold it
under both; transformers and diffusers leave one out of safetensors, and tie the two again when they load. So, of a name
that only one file has:

- it holds what another name of its file, which both files have, holds in every value (and not one number all over, as
  fresh biases and scales do): it is tied. In the base it is merged as that other name is; in the self-trained file it
  is left out.
- it is no weight (an integer, a buffer by its name, an attention mask): the base's is copied, the other is left out.
- else the files are of two networks, or of one whose tie was cut by training, and are not merged.
"""

from collections.abc import Collection, Mapping

import torch

from neon.checkpoint import Checkpoint, TensorSpec
from neon.checkpoint.common import bytes_of, listing
from neon.checkpoint.naming import Renamed, common_names, fitted, names_differ
from neon.merge.entries import buffers_by_name
from neon.merge.extrapolate import differ

_PIECE = 1 << 20  # elements compared at a time
_BEGINNING = 256  # elements by which tensors are told apart before they are compared in full
_MASKS = ("attn.bias", "attn.masked_bias", "attention.bias", "attention.masked_bias")
"""how names of GPT's attention masks end, which older files keep; other biases called so are vectors"""


class _Completed(Renamed):
    """A self-trained file under the base's names; what it lacks that is no weight is read from the base."""

    def __init__(self, source: Checkpoint, names: Mapping[str, str], base: Checkpoint, taken: Collection[str]) -> None:
        super().__init__(source, names)
        self.specs |= {name: base.specs[name] for name in taken}
        self._base, self._taken = base, frozenset(taken)

    def read(self, name: str, start: int, out: torch.Tensor) -> None:
        if name in self._taken:
            self._base.read(name, start, out)
        else:
            super().read(name, start, out)


def under_names_of(base: Checkpoint, self_trained: Checkpoint) -> tuple[Renamed, list[str]]:
    """The self-trained file under the base's names, and what a user should know of how they fit, in sentences.

    Files that do not fit come back under their own names; nothing is raised but by reading.
    """
    if (names := fitted(base.specs, self_trained.specs)) is not None:
        return Renamed(self_trained, names), _renaming(self_trained, names)
    names = common_names(base.specs, self_trained.specs)
    completed = _completed(base, self_trained, names) if names else None
    if completed is None:
        return Renamed(self_trained, {name: name for name in self_trained.specs}), []
    view, notes = completed
    return view, [*_renaming(self_trained, names), *notes]


def cut_ties(base: Checkpoint, self_trained: Checkpoint) -> list[str]:
    """What to tell a user of weights that are tied in the base, and no longer in self-trained weights of its names.

    Each is merged by itself, and a library that ties them again when it loads drops one.
    """
    beginnings: dict[tuple[TensorSpec, bytes], list[str]] = {}
    for name, spec in base.specs.items():
        if spec.numel and (spec.dtype.is_floating_point or spec.dtype.is_complex):
            first = torch.empty(min(_BEGINNING, spec.numel), dtype=spec.dtype)
            base.read(name, 0, first)
            beginnings.setdefault((spec, bytes(bytes_of(first))), []).append(name)
    pairs = [(names[0], other) for names in beginnings.values() for other in names[1:]]
    cut = [f"{a} = {b}" for a, b in pairs if _are_tied(base, a, b) and not _are_equal(self_trained, a, b)]
    if not cut:
        return []
    return [
        f"tied in {base.path.name} and not in {self_trained.path.name}: {listing(cut, 2)}; each is merged by itself, "
        "and a library that ties them when it loads drops one: see tie_word_embeddings in config.json"
    ]


def _renaming(file: Checkpoint, names: Mapping[str, str]) -> list[str]:
    differ_in_words = any(name != held for name, held in names.items())
    return [f"{file.path}: {names_differ(names)}"] if differ_in_words else []


def _completed(base: Checkpoint, other: Checkpoint, names: dict[str, str]) -> tuple[Renamed, list[str]] | None:
    """The view and its notes by the rules of this module; None: a name of one file only that they do not explain."""
    held = list(names.values())
    ties, ours = _explained(base, [name for name in base.specs if name not in names], list(names))
    ties_there, theirs = _explained(other, [name for name in other.specs if name not in set(held)], held)
    if ties is None or ties_there is None:
        return None
    notes = []
    for file, tied in ((base, ties), (other, ties_there)):
        if tied:
            pairs = listing([f"{name} = {twin}" for name, twin in tied.items()], 2)
            notes.append(f"only in {file.path.name}, tied there, and merged as what they are tied to: {pairs}")
    for file, kept, fate in ((base, ours, "copied"), (other, theirs, "left out")):
        if kept:
            notes.append(f"only in {file.path.name}, no weights, {fate}: {listing(kept, 2)}")
    everything = {**names, **{name: names[twin] for name, twin in ties.items()}}
    ordered = {name: everything[name] for name in base.specs if name in everything}
    return _Completed(other, ordered, base, ours), notes


def _explained(file: Checkpoint, alone: list[str], shared: list[str]) -> tuple[dict[str, str] | None, list[str]]:
    """Of the names that this file alone has: what each is tied to, and those that are no weights.

    The first is None if one is neither.
    """
    buffers = buffers_by_name(file.specs) if alone else frozenset()
    ties, kept = dict[str, str](), list[str]()
    for name in alone:
        if name in buffers or _is_no_weight(name, file.specs[name]):
            kept.append(name)
        elif twin := next((other for other in shared if _are_tied(file, name, other)), None):
            ties[name] = twin
        else:
            return None, kept
    return ties, kept


def _is_no_weight(name: str, spec: TensorSpec) -> bool:
    if not (spec.dtype.is_floating_point or spec.dtype.is_complex):
        return True
    return name.endswith(_MASKS) and (spec.numel == 1 or (len(spec.shape) == 4 and spec.shape[:2] == (1, 1)))


def _are_tied(file: Checkpoint, a: str, b: str) -> bool:
    """Whether two tensors of a file are equal in every value, and these values are not all one."""
    return _are_equal(file, a, b) and _varies(file, a)


def _are_equal(file: Checkpoint, a: str, b: str) -> bool:
    spec = file.specs[a]
    return spec == file.specs[b] and not any(
        differ(*(_piece(file, name, start) for name in (a, b))) for start in range(0, spec.numel, _PIECE)
    )


def _varies(file: Checkpoint, name: str) -> bool:
    """Whether a tensor holds more than one value."""
    first = _piece(file, name, 0)[:1]
    pieces = (_piece(file, name, start) for start in range(0, file.specs[name].numel, _PIECE))
    return any(differ(values, first.expand_as(values)) for values in pieces)


def _piece(file: Checkpoint, name: str, start: int) -> torch.Tensor:
    spec = file.specs[name]
    values = torch.empty(min(_PIECE, spec.numel - start), dtype=spec.dtype)
    file.read(name, start, values)
    return values
