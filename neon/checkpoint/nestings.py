"""Where in a pickle or torch file the state dict lies that is to be used.

A file is a dictionary of networks, state dicts and settings, or one of them. A network is a tree of records whose
`_parameters`, `_buffers` and `_modules` give the names of its state dict, in that order.
"""

import functools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from neon.checkpoint.common import listing
from neon.checkpoint.stand_ins import is_unread_tensor
from neon.checkpoint.unpickler import SHOWN, Budget, Corrupt, Opaque, Record, Refused, Tensor
from neon.errors import RequestError, warn

# Where published checkpoints keep the weights that are to be used, the averaged ones first.
_USUAL_KEYS = ("model_ema", "ema", "trainer.var_wo_ddp", "var_wo_ddp", "state_dict", "model", "net")
_MAX_NESTING = 3  # published nestings are at most two deep
_MAX_DEPTH = 64  # of modules in modules; published networks nest five deep
_MAX_NAME = 1000
_AVERAGED = ("model_ema", "ema")  # keys of averages with names
_AVERAGES = ("shadow_params", *_AVERAGED)  # names of lists of averages


class Slot(NamedTuple):
    """Where a tensor lies in what a file holds: `container[at]`."""

    container: Any
    at: Any

    @property
    def tensor(self) -> Tensor:
        return self.container[self.at]


Slots = dict[str, Slot]


class Choice(NamedTuple):
    """The state dict of a file that is used."""

    key: str
    candidates: tuple[str, ...]  # every key that could have been chosen
    content: Any  # what lies there: a dictionary, a network, a list of averages
    slots: Slots


def choose(path: Path, content: Any, key: str | None, kind: str, budget: Budget) -> Choice:
    """The state dict `key` of what a file of format `kind` holds, or the usual one.

    Averages without names take those of the usual state dict, if their number and shapes allow one order only, and
    are then preferred to it.

    Raises:
        RequestError: there is none, or no such one.
        Corrupt, Refused: it is no state dict that can be read.
    """
    nestings = _nestings(content, budget)
    lists = {name: nestings.pop(name) for name in list(nestings) if isinstance(nestings[name], list)}
    if not nestings:
        raise RequestError(
            f"{path}: unknown format, a {kind} file without tensors by name (it holds a {_kind(content)}"
            f"{f' and lists of tensors in {listing(lists)}' if lists else ''}); expected a network, a state dict or "
            "a dictionary that holds one"
        )
    usual = _usual_key(nestings)
    raw = {} if usual is None or not lists else named_slots(nestings[usual], budget)
    averages = {name: slots for name, values in lists.items() if (slots := _match(values, raw))}
    nestings |= {name: lists[name] for name in averages}
    chosen = _choose_key(path, nestings, key)
    if key is None and chosen not in _AVERAGED:
        if averages:
            chosen = next(iter(averages))
            _say(f"{path}: the averages in {chosen} have no names; they are taken in the order of those of {usual!r}")
        elif lists:
            _say(
                f"{path}: averages without names lie in {listing(lists)}, and their number and shapes do not tell "
                f"which is which; the weights used are those of {chosen!r}"
            )
        elif chosen not in (*_USUAL_KEYS, ""):
            _say(f"{path}: the weights used are those of {chosen!r}, the only ones that it holds by name")
    slots = averages.get(chosen) or named_slots(nestings[chosen], budget)
    return Choice(chosen, tuple(nestings), nestings[chosen], slots)


def _usual_key(nestings: Mapping[str, Any]) -> str | None:
    """Where the weights lie that are used unless told otherwise: in a usual place, or in the only one there is."""
    usual = next((name for name in (*_USUAL_KEYS, "") if name in nestings), None)
    return next(iter(nestings)) if usual is None and len(nestings) == 1 else usual


def _choose_key(path: Path, nestings: Mapping[str, Any], key: str | None) -> str:
    """The nesting asked for, or the usual one; a RequestError that lists what is present if there is none."""
    present = listing([name or '"" (the file itself)' for name in nestings], first=8)
    chosen = _usual_key(nestings) if key is None else key
    if chosen is None:
        raise RequestError(
            f"{path}: no state dict in a usual place; present: {present}; choose with --key, where a command has it"
        )
    if chosen not in nestings:
        raise RequestError(f"{path}: no nesting {key!r} with tensors; present: {present}")
    return chosen


@functools.cache
def _say(message: str) -> None:
    """Warn once, however often the file is opened."""
    warn(message)


def _kind(content: Any) -> str:
    if isinstance(content, Record):
        return content.origin.maker.name if isinstance(content, Opaque) and content.origin else content.class_name
    return type(content).__name__


def _entries_of(content: Any) -> Mapping[Any, Any]:
    """The items of a dictionary, or of an object of a class of dictionaries; none of anything else."""
    if isinstance(content, Opaque):
        return content.origin.entries if content.origin else {}
    return content if isinstance(content, dict) else {}


def _nestings(content: Any, budget: Budget, prefix: str = "", depth: int = 0) -> dict[str, Any]:
    """Every object in nested dictionaries that holds tensors by name, by dotted key; "" is `content` itself.

    Lists of averages are among them: they hold tensors, but for their names.
    """
    budget.spend()
    found = _is_averages(prefix, content, budget) or next(_slots_in(content, budget), None) is not None
    nestings: dict[str, Any] = {prefix: content} if found else {}
    for name, value in _entries_of(content).items() if depth < _MAX_NESTING else ():
        budget.spend()
        if isinstance(name, str):
            nestings.update(_nestings(value, budget, f"{prefix}.{name}" if prefix else name, depth + 1))
    return nestings


def _is_averages(key: str, content: Any, budget: Budget) -> bool:
    if key.rpartition(".")[2] not in _AVERAGES or not isinstance(content, list):
        return False
    budget.spend(len(content))
    return bool(content) and all(isinstance(part, Tensor) for part in content)


def _match(values: list[Tensor], raw: Slots) -> Slots:
    """`raw` with `values` in place of those tensors whose turn it is by shape; empty if there is none, or a choice.

    Averages are kept of parameters, in their order; a state dict has buffers between these.
    """
    shapes = [tensor.shape for tensor in values]
    named = [name for name, slot in raw.items() if slot.tensor.dtype.is_floating_point]
    among = [raw[name].tensor.shape for name in named]
    earliest = _places(shapes, among)
    latest = [len(among) - 1 - place for place in reversed(_places(shapes[::-1], among[::-1]))]
    if len(earliest) < len(values) or earliest != latest:
        return {}
    return {**raw, **{named[place]: Slot(values, index) for index, place in enumerate(earliest)}}


def _places(shapes: list[tuple[int, ...]], among: list[tuple[int, ...]]) -> list[int]:
    """The earliest places in `among` where `shapes` are met in their order; fewer than these if they are not."""
    left = iter(enumerate(among))
    found = (next((place for place, shape in left if shape == wanted), None) for wanted in shapes)
    return [place for place in found if place is not None]


def named_slots(content: Any, budget: Budget) -> Slots:
    """The tensors of a state dict or network by name.

    Raises:
        Corrupt: a name is taken twice, or it is no network.
        Refused: a tensor is not a plain one, or all together do not fit in memory.
    """
    for name, value in _entries_of(content).items():
        if isinstance(name, str) and is_unread_tensor(value):
            raise Refused(f"{name[:SHOWN]} is a sparse, quantized or meta tensor or of another kind than a plain one")
    slots: Slots = {}
    total = 0
    for name, slot in _slots_in(content, budget):
        if name in slots:
            raise Corrupt(f"two tensors are called {name[:SHOWN]!r}")
        slots[name] = slot
        total += slot.tensor.nbytes
    if total > budget.room:
        raise Refused("its tensors share their values so often that they do not fit in memory")
    return slots


def _slots_in(content: Any, budget: Budget) -> Iterator[tuple[str, Slot]]:
    """The state dict of a network, or the tensors of a dictionary."""
    if isinstance(content, Record):
        yield from _state_of(content, "", 0, budget)
    entries = _entries_of(content)
    for name, value in entries.items():
        budget.spend()
        if isinstance(name, str) and isinstance(value, Tensor):
            yield name, Slot(entries, name)


def _state_of(module: Record, prefix: str, depth: int, budget: Budget) -> Iterator[tuple[str, Slot]]:
    """Names and tensors of a module below `prefix`: its parameters, its buffers, then its children's."""
    budget.spend()
    if depth > _MAX_DEPTH:
        raise Corrupt(f"modules nest more than {_MAX_DEPTH} deep")
    left_out = module.state.get("_non_persistent_buffers_set")
    if not isinstance(left_out, set):  # in which a name is found at once
        left_out = set()
    for table in ("_parameters", "_buffers", "_modules"):
        entries = module.state.get(table, {})
        for name, value in entries.items():
            budget.spend()
            if not isinstance(name, str) or len(prefix) + len(name) > _MAX_NAME:
                raise Corrupt(f"{module.class_name} names one of its {table[1:]} by no usual text")
            if table == "_modules" and isinstance(value, Record):
                yield from _state_of(value, f"{prefix}{name}.", depth + 1, budget)
            elif table != "_modules" and isinstance(value, Tensor):
                if table != "_buffers" or name not in left_out:
                    yield prefix + name, Slot(entries, name)
            elif value is not None:
                raise Corrupt(f"{module.class_name} holds a {type(value).__name__} among its {table[1:]}")
