"""What of a sampler's settings is worth a search, and settings of as many network calls as others."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal


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
