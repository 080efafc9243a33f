"""Networks that others published, as rows of a table: how they are built, how they are sampled, how well they do."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

Settings = TypeVar("Settings")


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


Row = TypeVar("Row", bound=Published[Any])


def row_sampled_as(
    rows: Mapping[str, Row], keywords: Mapping[str, Any], sampled_by: Callable[[Mapping[str, Any]], Any]
) -> Row | None:
    """The first row whose network is sampled as that of `keywords`; None: nothing that is known.

    `sampled_by` gives what of the keywords determines sampling, in one spelling.
    """
    wanted = sampled_by(keywords)
    return next((row for row in rows.values() if sampled_by(row.network) == wanted), None)
