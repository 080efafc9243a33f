"""Prompts as labels: read from a text file, dealt to purposes, and kept beside the images of a set.

Beside images they stand in `metadata.jsonl`, a line {"file_name": ..., "text": ...} for each, as the `imagefolder`
loader of the library datasets has them.
"""

import json
import os
from collections.abc import Iterable
from pathlib import Path

from neon.data.listing import plain
from neon.errors import RequestError, reason
from neon.noise import Purpose

TEXTS_FILE = "metadata.jsonl"
TEXT_FORM = '{"file_name": ..., "text": ...}'
FEWEST = 100
"""prompts of a purpose, below which synthetic set, selection and report share all of them"""
_APART = (Purpose.SYNTHETIC, Purpose.SELECTION, Purpose.REPORT)
_LARGEST = 1 << 28
"""bytes of a file of prompts"""


def read_prompts(path: str | os.PathLike[str]) -> tuple[str, ...]:
    """The prompts of a text file (UTF-8), one in each line; empty lines and repeated prompts are passed over.

    Raises:
        RequestError: there is no such file, it is no text, or there are no prompts in it.
    """
    path = Path(path)
    try:
        if path.stat().st_size > _LARGEST:
            raise RequestError(f"{path}: more than {_LARGEST:,} bytes; expected a text file with a prompt in each line")
        text = path.read_text("utf-8-sig")
    except (OSError, ValueError) as error:
        problem = reason(error) if isinstance(error, OSError) else "no text in UTF-8"
        raise RequestError(
            f"{path}: cannot be read ({problem}); expected a text file, a prompt in each line"
        ) from error
    prompts = tuple(dict.fromkeys(line.strip() for line in text.split("\n") if line.strip()))
    if not prompts:
        raise RequestError(f"{path}: no prompts in it; expected a text file with one in each line")
    return prompts


def prompts_for(purpose: Purpose, num_prompts: int) -> range:
    """The numbers of the prompts that images are drawn of for a purpose: every third, or all if these are too few."""
    return range(_APART.index(purpose), num_prompts, len(_APART)) if _are_enough(num_prompts) else range(num_prompts)


def sharing(num_prompts: int) -> str:
    """How purposes share so many prompts, in words."""
    whole = f"{num_prompts:,} prompt{'s' if num_prompts > 1 else ''}"
    if _are_enough(num_prompts):
        return f"{whole}, of which synthetic set, selection and report have a third each"
    least = FEWEST * len(_APART)
    return f"{whole} for synthetic set, selection and report alike; from {least} on each has prompts of its own"


def text_lines(texts: Iterable[tuple[str, str]]) -> bytes:
    """`metadata.jsonl` of images and their prompts, by name."""
    lines = (json.dumps({"file_name": name, "text": text}) for name, text in texts)
    return "".join(f"{line}\n" for line in lines).encode()


def parse_texts(data: bytes) -> dict[str, str]:
    """The prompt of each image by `metadata.jsonl`, names with slashes; a ValueError if a line is none."""
    by_name = dict[str, str]()
    for number, line in enumerate(data.splitlines(), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            json.dumps(entry, ensure_ascii=False).encode()  # half a character of two is no text
        except (ValueError, RecursionError) as error:
            raise ValueError(f"line {number} of {TEXTS_FILE} is no JSON") from error
        name, text = (entry.get(key) if isinstance(entry, dict) else None for key in ("file_name", "text"))
        if not (isinstance(name, str) and isinstance(text, str)):
            raise ValueError(f"line {number} of {TEXTS_FILE} has no file_name with a text")
        by_name[plain(name)] = text
    return by_name


def _are_enough(num_prompts: int) -> bool:
    return num_prompts >= FEWEST * len(_APART)
