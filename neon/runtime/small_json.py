"""JSON beside models (config.json and the like), which is foreign and looked at, never obeyed."""

import json
from pathlib import Path
from typing import Any

_LARGEST = 1 << 24


def read_table(path: Path) -> dict[str, Any]:
    """The table in a JSON file; empty where there is no such file, or something else in it."""
    try:
        if not path.is_file() or path.stat().st_size > _LARGEST:
            return {}
        table = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return table if isinstance(table, dict) else {}
