"""The model card of a merged folder: what was done to which weights, and what of the base's folder is not in it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

import neon
from neon.checkpoint.weight_sets import PIPELINE_FILE
from neon.merge.streaming import FORMULA, MergeReport
from neon.runtime.hub import is_hub_name, short_name
from neon.runtime.markdown import code, escaped

_KEPT = ("license", "license_name", "license_link", "language", "pipeline_tag", "library_name")
"""of the front matter of the base's card: what holds of the merge, too"""
_LARGEST = 1 << 16
"""bytes of a card in which its front matter is looked for"""


def folder_card(
    base: Path, w: float, merged: Mapping[str, MergeReport], left_out: Sequence[str], notes: Sequence[str]
) -> str:
    """The card as Markdown; `merged` are the reports of its components by name."""
    names = [name or "the model" for name in merged]
    lines = [
        f"# {code(short_name(base))}, extrapolated by Neon",
        "",
        f"`{FORMULA}` with w = {w:g}, by Neon {neon.__version__}: {escaped(', '.join(names))}.",
        "",
    ]
    for name, report in merged.items():
        said = f"{code(name)}: " if name else ""
        lines += [
            f"- {said}base {code(_place(report.base))}, SHA-256 {code(report.base_sha256)}",
            f"- {said}self-trained {code(_place(report.self_trained))}, SHA-256 {code(report.self_trained_sha256)}",
            f"- {said}{report.merged_tensors} tensors merged, {report.copied_tensors} copied from the base; rounding "
            f"keeps the update to {report.relative_error:.2%}",
        ]
    if notes:
        lines += ["", "Notes:", "", *(f"- {escaped(note)}" for note in notes)]
    if left_out:
        lines += ["", "Not taken over from the base's folder:", "", *(f"- {escaped(one)}" for one in left_out)]
    return f"---\n{yaml.safe_dump(_front(base), allow_unicode=True)}---\n\n" + "\n".join(lines) + "\n"


def _place(path: str) -> str:
    """A name on the Hub, or a file's name and that of its folder; whose folders that lies in is nobody's business."""
    return path if is_hub_name(path) else f"{Path(path).absolute().parent.name}/{Path(path).name}"


def _front(base: Path) -> dict[str, Any]:
    """The front matter: that of the base's card in what still holds, and ours."""
    library = "diffusers" if (base / PIPELINE_FILE).is_file() else None
    theirs = _front_of(base / "README.md")
    languages = _texts(theirs.get("language"))
    kept = {name: theirs[name] for name in _KEPT if isinstance(theirs.get(name), str)}
    tags = _texts(theirs.get("tags"))
    return {
        "license": "unknown",
        **({"library_name": library} if library else {}),
        **({"language": languages} if languages else {}),
        **kept,
        "tags": list(dict.fromkeys(["neon", "merge", *tags])),
    }


def _front_of(card: Path) -> dict[str, Any]:
    if not card.is_file():
        return {}
    try:
        with open(card, encoding="utf-8") as file:
            text = file.read(_LARGEST)
        front = yaml.safe_load(text.split("---\n")[1]) if text.startswith("---\n") else None
    except (OSError, ValueError, IndexError, RecursionError, yaml.YAMLError):
        return {}
    return front if isinstance(front, dict) else {}


def _texts(value: object) -> list[str]:
    return [text for text in value if isinstance(text, str)] if isinstance(value, list) else []
