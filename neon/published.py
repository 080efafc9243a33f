"""Networks that others published, as rows of a table: how they are built, how they are sampled, how well they do."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

Settings = TypeVar("Settings")


IMAGES = 50_000
"""behind every published score"""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """How the merge of a published network was scored: a command of its architecture's own program."""

    checkpoint: str
    """the merge, by its name in the table of published files"""
    statistics: str
    """real images, likewise; what else the program opens lies where it looks by itself"""
    program: str
    """module:class"""
    flags: str
    """{checkpoint}, {statistics}, {count} (images) and {last} (count - 1) stand for what they say"""
    calls: int
    """network evaluations an image"""

    @property
    def name(self) -> str:
        """The checkpoint's, without its suffix."""
        return self.checkpoint.rpartition(".")[0]

    def words(self, checkpoint: str, statistics: str, count: int) -> list[str]:
        """The flags of the program, with the files where they lie and the number of images."""
        values = {"checkpoint": checkpoint, "statistics": statistics, "count": count, "last": count - 1}
        return [word.format(**values) for word in self.flags.split()]


@dataclass(frozen=True, kw_only=True)
class Published(Generic[Settings]):
    """One published network. `name` is its file without the suffix."""

    name: str
    network: dict[str, Any]
    """keywords that build it"""
    settings: Settings
    """how it is sampled for `fid_base`"""
    fid_base: float | None = None
    """50,000 images; None: not published"""
    fid_neon: float | None = None
    """of Neon's merge, 50,000 images; None: not published"""
    neon: Evaluation | None = None
    """what `fid_neon` is of; None: no merge was released"""


Row = TypeVar("Row", bound=Published[Any])


def row_sampled_as(
    rows: Mapping[str, Row], keywords: Mapping[str, Any], sampled_by: Callable[[Mapping[str, Any]], Any]
) -> Row | None:
    """The first row whose network is sampled as that of `keywords`; None: nothing that is known.

    `sampled_by` gives what of the keywords determines sampling, in one spelling.
    """
    wanted = sampled_by(keywords)
    return next((row for row in rows.values() if sampled_by(row.network) == wanted), None)
