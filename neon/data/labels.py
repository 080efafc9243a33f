"""The classes of a set: from `dataset.json`, or from the folders that its files lie in."""

import json
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from neon.data.listing import plain
from neon.data.sampler import SAMPLER, as_sampler

LABELS_FILE = "dataset.json"
FORM = '{"labels": [[name, label], ...]}'
LARGEST_CLASS = (1 << 20) - 1
SPLITS = frozenset({"train", "training", "val", "valid", "validation", "test", "testing", "dev", "eval", "holdout"})
"""folders that, with no others beside them, are parts of a set and not classes"""
SHOWN = 4
"""class folders that are named at the beginning of the list"""


def largest_labels_file(num_files: int) -> int:
    """Bytes that the `dataset.json` of a set may have: ImageNet's takes 30 to 60 an image, of 1.3 million."""
    return (1 << 26) + 256 * num_files


def most_labels(num_files: int) -> int:
    """Labels that the `dataset.json` of a set may have: all of ImageNet's, also beside a part of its images."""
    return (1 << 21) + 2 * num_files


def parse_labels(data: bytes, most: int) -> dict[str, int] | None:
    """The class of each file by `dataset.json`, names with slashes; None if it says that there are none.

    Raises:
        ValueError: it is no JSON of this form, names a file twice, or has a label that is no class number. 3.0 is
            one; 0.7, true, "3" and lists are none.
    """
    entries = _content(data, most)["labels"]
    if entries is None:
        return None
    if not isinstance(entries, list):
        raise ValueError(f"its labels are {_short(entries)}")
    labels: dict[str, int] = {}
    for entry in entries:
        if not (isinstance(entry, list) and len(entry) == 2 and isinstance(entry[0], str)):
            raise ValueError(f"among its labels is {_short(entry)}")
        name = plain(entry[0])
        if name in labels:
            raise ValueError(f"it names {name} twice")
        labels[name] = _class_number(name, entry[1])
    return labels


def parse_sampler_of_set(data: bytes, most: int) -> dict[str, Any] | None:
    """What drew the set by `dataset.json` (`neon.data.sampler`); None: it does not tell.

    Raises:
        ValueError: it is no JSON of labels.
    """
    return as_sampler(_content(data, most).get(SAMPLER))


def _content(data: bytes, most: int) -> dict[str, Any]:
    """What a `dataset.json` holds; a ValueError if it is none.

    JSON that cannot be `most` labels is not parsed: a few bytes of it, such as `[],`, can take a hundred of memory.
    """
    if data.count(b"[") + data.count(b"{") > 2 * most or data.count(b",") > 4 * most:
        raise ValueError(f"it has more entries than {most} labels")
    try:
        content = json.loads(data)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(content, dict) or "labels" not in content:
        raise ValueError('it has no entry "labels"')
    return content


def _class_number(name: str, label: object) -> int:
    if isinstance(label, float) and label.is_integer():
        label = int(label)
    if type(label) is not int or not 0 <= label <= LARGEST_CLASS:
        raise ValueError(f"the label of {name} is {_short(label)}, expected a class number, 0 to {LARGEST_CLASS}")
    return label


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:56]} ..."


def labels_file(files: Collection[str], name: str = LABELS_FILE) -> str | None:
    """The `dataset.json` of a set: at its top, or the only one below (a folder that was zipped with its name).

    Or another file that describes it, by `name`.

    Raises:
        ValueError: there are several, and none at the top.
    """
    if name in files:
        return name
    below = sorted(file for file in files if file.endswith(f"/{name}"))
    if len(below) > 1:
        raise ValueError(f"it holds {len(below)} sets, with {below[0]} and {below[1]}; name one of them")
    return below[0] if below else None


@dataclass(frozen=True)
class FolderClasses:
    """Classes by folder: the label of each file, and the folder of each class, by their numbers."""

    labels: list[int]
    folders: dict[int, str]

    def __str__(self) -> str:
        by_number = all(_is_number(folder) for folder in self.folders.values())
        texts = [folder if by_number else f"{number} = {folder}" for number, folder in self.folders.items()]
        if len(texts) > SHOWN + 1:
            texts[SHOWN:-1] = ["..."]
        said = "of the numbers that folders have" if by_number else "by folder"
        return f"{len(self.folders)} classes {said}: {', '.join(texts)}"


def folder_classes(files: Sequence[str], folders: Collection[str]) -> FolderClasses | None:
    """The classes of `files` by the folders they lie in; None if all lie in one, which is no class unless a number.

    Folders whose names are all whole numbers are the classes of these numbers; others are numbered in the order of
    their names. Folders around all files are passed over.

    Args:
        files: their names, in any order.
        folders: all folders, with a slash at the end; those without files among them.

    Raises:
        ValueError: the folders do not tell classes.
    """
    parts = [name.split("/")[:-1] for name in files]
    top = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(min(parts), max(parts), strict=False)))
    if all(len(part) == top for part in parts):
        if not top or not _is_number(parts[0][-1]):
            return None
        top -= 1
    for name, part in zip(files, parts, strict=True):
        if len(part) == top:
            raise ValueError(f"{name} lies beside folders with others")
        if len(part) > top + 1:
            raise ValueError(f"{name} lies in a folder of {part[top]}; if that is a part of the set, name it instead")
    names = sorted({part[top] for part in parts})
    if {name.lower() for name in names} <= SPLITS:
        raise ValueError(f"its folders {' and '.join(names)} are parts of a set, not classes; name one of them")
    if any(map(_is_number, names)):
        numbers = _numbers(names)
    else:
        _check_none_is_empty(names, "".join(f"{part}/" for part in parts[0][:top]), folders)
        numbers = range(len(names))
    by_name = dict(zip(names, numbers, strict=True))
    by_number = dict(sorted((number, name) for name, number in by_name.items()))
    return FolderClasses([by_name[part[top]] for part in parts], by_number)


def _numbers(names: Sequence[str]) -> Sequence[int]:
    """The class numbers that folders are named by; a ValueError if one is not, or two are the same."""
    if others := [name for name in names if not _is_number(name)]:
        number = next(name for name in names if _is_number(name))
        raise ValueError(f"folder {number} is named by a class number, {others[0]} is not")
    numbers = [int(name) for name in names]
    if len(set(numbers)) < len(names) or not 0 <= min(numbers) <= max(numbers) <= LARGEST_CLASS:
        raise ValueError(f"its folders are numbers, but not of one class each, 0 to {LARGEST_CLASS}")
    return numbers


def _check_none_is_empty(names: Sequence[str], around: str, folders: Collection[str]) -> None:
    """A ValueError if a folder beside the class folders `names`, below `around`, holds no files: was it a class?"""
    beside = {name.removeprefix(around).rstrip("/") for name in folders if name.startswith(around)}
    if empty := sorted(name for name in beside - {*names, ""} if "/" not in name):
        raise ValueError(f"folder {around}{empty[0]} holds none, so that it is not known whether it is a class")


def _is_number(name: str) -> bool:
    return re.fullmatch(r"-?[0-9]{1,18}", name) is not None
