"""Foreign text (names of files and tensors, settings) in Markdown, shown as it is."""

import re

from neon.errors import shown


def line(text: str) -> str:
    """Foreign text on one line, without control characters."""
    return shown(" ".join(text.split()))


def escaped(text: str) -> str:
    """Text that Markdown, and its tables, show as it is."""
    return re.sub(r"([\\`*_\[\]<>&|~$])", r"\\\1", line(text))


def code(text: str) -> str:
    """Text as a code span, within backticks more than it has in a row. Not for tables, which end cells in code, too."""
    text = line(text)
    ticks = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    blank = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{ticks}{blank}{text}{blank}{ticks}"


def block(language: str, text: str) -> str:
    """Text as a code block; no line of it may begin with what is foreign."""
    return f"```{language}\n{text}\n```\n"
