"""What of a sampler's settings is worth a search, settings of as many network calls, and how far two are apart."""

import math
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, fields, replace
from typing import Any, Literal

FAR = 0.25
"""from which on settings are far apart: as a share of a range, or of the smaller number where there is no range"""

_DIGITS = 2  # of a value that a search tries: more would pretend a precision that it has not


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`."""

    low: float
    high: float
    scale: Literal["linear", "log"] = "linear"
    """in which equal steps matter equally"""
    integer: bool = False
    unlimited: float | None = None
    """a value outside that means as much as `high`: 0 for the number of codes drawn from"""

    def part_of(self, value: float) -> float:
        """Where a value lies, 0 to 1 in the scale; one beyond an end counts as that end."""
        if value == self.unlimited or value >= self.high:
            return 1.0
        if value <= self.low:
            return 0.0
        if self.scale == "log":
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)

    def value_at(self, part: float) -> float:
        """The value at a part, rounded to two digits; an end beyond 0 and 1."""
        if part >= 1:
            return self.high
        if part <= 0:
            return self.low
        log = self.scale == "log"
        value = self.low * (self.high / self.low) ** part if log else self.low + (self.high - self.low) * part
        value = min(max(float(f"{value:.{_DIGITS}g}"), self.low), self.high)
        return round(value) if self.integer else value


@dataclass(frozen=True)
class Choice:
    """One of a few values, in no order."""

    values: tuple[Any, ...]


Tunable = Range | Choice
Tunables = Mapping[str, Tunable]
"""by the name of a field of the settings"""


def at_calls(calls_of: Callable[[Any], int | None], settings: Any, calls: int) -> Any | None:
    """`settings` with the most steps that take at most `calls` network calls an image.

    Of a sampler without `num_steps`: `settings` as they are, if they take no more. None: nothing takes so few, or the
    model, whose `calls` is `calls_of`, does not count them.
    """
    found = calls_of(settings)
    if found is None:
        return None
    if found == calls:
        return settings
    if not hasattr(settings, "num_steps"):
        return settings if found <= calls else None
    for num_steps in range(calls, 0, -1):
        try:
            candidate = replace(settings, num_steps=num_steps)
        except ValueError:  # the sampler takes no such number, or other settings fix it
            continue
        if (needed := calls_of(candidate)) is not None and needed <= calls:
            return candidate
    return None


def far_apart(
    tunable: Tunables, calls_of: Callable[[Any], int | None], then: Mapping[str, Any], now: Any
) -> tuple[str, ...]:
    """In what settings of a sampler are very different from others, each as `name: then -> now`.

    That is: numbers by more than a quarter of their range (one of `tunable`, in its scale) or, without a range, of the
    smaller one; guidance where one of the two has none; network calls by more than a quarter of the fewer; whatever
    is no number where it is not the same.

    Args:
        then: settings as JSON holds them (`neon.data.sampler`). What is not there counts as its default, as in settings
            of before there was a choice; what `now` cannot have is left out.
        now: settings, a dataclass.
    """
    told = dict[str, Any]()
    for field in fields(now):
        usual = getattr(now, field.name)
        try:
            told[field.name] = _restored(then[field.name], usual)
        except KeyError:
            told[field.name] = usual if field.default is MISSING else field.default
        except ValueError:
            told[field.name] = usual
    calls = _calls(calls_of, now, told)
    found = [
        f"{name}: {_text(value)} -> {_text(getattr(now, name))}"
        for name, value in told.items()
        if not (calls and name == "num_steps") and _are_far(name, tunable.get(name), value, getattr(now, name))
    ]
    if calls and _are_far("calls", None, *calls):
        found.append(f"network calls: {calls[0]} -> {calls[1]}")
    if others := [name for name in then if name not in told]:
        found.append(f"{', '.join(others)}: of another sampler")
    return tuple(found)


def _restored(value: Any, like: Any) -> Any:
    """A setting as JSON holds it in the kind of `like`; a ValueError if it is none of that kind."""
    if value is None or like is None or type(value) is type(like):
        return value
    if isinstance(like, tuple) and isinstance(value, list):
        return tuple(value)
    if _is_number(like) and (_is_number(value) or value in ("inf", "-inf", "nan")):
        return float(value)
    raise ValueError(f"{value!r} instead of a setting such as {like!r}")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _calls(calls_of: Callable[[Any], int | None], now: Any, told: Mapping[str, Any]) -> tuple[int, int] | None:
    """Network calls of the settings `told` and of `now`; None: not known of both."""
    try:
        before, after = calls_of(replace(now, **told)), calls_of(now)
    except (ValueError, TypeError, ArithmeticError, LookupError):  # nobody has sampled with what the file tells
        return None
    return None if before is None or after is None else (before, after)


def _are_far(name: str, tunable: Tunable | None, a: Any, b: Any) -> bool:
    if a == b or not (_is_number(a) and _is_number(b)):
        return bool(a != b)
    if not isinstance(tunable, Range):
        return abs(a - b) > FAR * min(abs(a), abs(b))
    guided = name == "guidance" and min(a, b) <= tunable.low < max(a, b)  # its lowest value is none
    return guided or abs(tunable.part_of(a) - tunable.part_of(b)) > FAR


def _text(value: Any) -> str:
    if isinstance(value, tuple):
        return ",".join(map(_text, value)) or "none"
    return f"{value:g}" if isinstance(value, float) else str(value)
