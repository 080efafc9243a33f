"""What drew a synthetic set, as files tell it: the sampler's settings, the architecture and the network.

Such a record stands under the name `sampler` in the `dataset.json` of a set and in the index of one that was encoded
from it; as JSON text in the metadata of weights that were trained on the set, and of merges with these.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, is_dataclass
from typing import Any

from neon.runtime.files import as_json

SAMPLER = "sampler"
_LONGEST_TEXT, _MOST_SETTINGS, _MOST_VALUES, _LARGEST_NUMBER = 100, 100, 1000, 1 << 62
_LONGEST_RECORD = 1 << 20


def sampler_record(architecture: str, settings: Any, network_sha256: str | None = None) -> dict[str, Any] | None:
    """The record of a sampler with these settings (a dataclass) and of its network.

    None: the settings are none that a record can hold, which are texts, numbers and rows of numbers.
    """
    if not is_dataclass(settings) or isinstance(settings, type):
        return None
    network = {} if network_sha256 is None else {"network_sha256": network_sha256}
    return as_sampler({"architecture": architecture, **network, "settings": asdict(settings)})


def as_sampler(value: Any) -> dict[str, Any] | None:
    """A record of what any file holds under the name `sampler`; None: it is none, or beyond all measure."""
    if not isinstance(value, Mapping):
        return None
    settings, known = value.get("settings"), {name: value.get(name) for name in ("architecture", "network_sha256")}
    if known["network_sha256"] is None:
        del known["network_sha256"]
    if not isinstance(settings, Mapping) or not all(isinstance(text, str) and _plain(text) for text in known.values()):
        return None
    if len(settings) > _MOST_SETTINGS or not all(isinstance(name, str) and _plain(name) for name in settings):
        return None
    if not all(_plain(one) or _is_row(one) for one in settings.values()):
        return None
    record: dict[str, Any] = as_json({**known, "settings": dict(settings)})
    return record


def sampler_text(record: Mapping[str, Any]) -> str:
    """A record as text for metadata; equal ones give equal texts."""
    return json.dumps(record, sort_keys=True)


def parse_sampler(text: str | None) -> dict[str, Any] | None:
    """The record in a text of metadata; None: there is none in it."""
    if text is None or len(text) > _LONGEST_RECORD:
        return None
    try:
        return as_sampler(json.loads(text))
    except (ValueError, RecursionError):
        return None


def _plain(value: object) -> bool:
    if isinstance(value, str):
        return len(value) <= _LONGEST_TEXT
    return value is None or isinstance(value, float) or (isinstance(value, int) and abs(value) < _LARGEST_NUMBER)


def _is_row(value: object) -> bool:
    return isinstance(value, list | tuple) and len(value) <= _MOST_VALUES and all(map(_plain, value))
