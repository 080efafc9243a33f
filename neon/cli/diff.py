"""`neon diff`: how far two models lie apart, layer by layer."""

import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from neon.cli.command_line import at_least_one
from neon.cli.flags import File, Key
from neon.errors import shown

if TYPE_CHECKING:
    from neon.merge.diff import Diff as Found
    from neon.merge.diff import KeptIn


@dataclass(frozen=True, kw_only=True)
class Diff:
    """Show how far two models, or a model and a LoRA of it, lie apart, and what low precision would lose of it.

    Example: neon diff base.safetensors tuned.safetensors
    """

    a: tyro.conf.Positional[Path]
    """checkpoint of any readable format, or folder"""
    b: tyro.conf.Positional[Path]
    """the other one, or a LoRA of the first"""
    key: Key = None
    """nesting of the state dict, such as model_ema; chosen if not given"""
    self_trained_key: Key = None
    """the same for the second"""
    component: Annotated[list[str], tyro.conf.arg(metavar="NAME [NAME ...]")] = dataclasses.field(default_factory=list)
    """of pipelines: the components to compare; by default all"""
    variant: Annotated[str | None, tyro.conf.arg(metavar="NAME")] = None
    """of folders: the variant to compare, such as fp16"""
    top: int = 20
    """how many tensors to show, the largest change first"""
    json: File = None
    """also write everything to this file"""

    def __call__(self) -> None:
        from neon.merge.diff import diff
        from neon.runtime.files import check_writable, write_json

        at_least_one(top=self.top)
        if self.json is not None:
            check_writable(self.json, overwrite=True)
        found = diff(
            self.a,
            self.b,
            key=self.key,
            self_trained_key=self.self_trained_key,
            components=self.component,
            variant=self.variant,
        )
        _show(found, self.top)
        for note in dict.fromkeys(found.notes):
            print(f"neon diff: warning: {shown(note)}", file=sys.stderr)
        if self.json is not None:
            write_json(self.json, dataclasses.asdict(found))


def _show(found: "Found", top: int) -> None:
    from neon.checkpoint.common import listing
    from neon.report.words import text_table

    print(f"|b - a| / |a| = {_number(found.relative)}: {len(found.tensors)} tensors differ, {found.equal} are equal")
    for one in found.kept:
        print(f"at w = 1 in {one.dtype:<9} {_kept_text(one)}")
    for title, names in (
        ("other shapes", found.shapes),
        ("integers and buffers that differ", found.other),
        (f"only in {found.a}", found.only_a),
        (f"only in {found.b}", found.only_b),
    ):
        if names:
            print(shown(f"{title} ({len(names)}): {listing(names, 8)}"))
    if found.tensors:
        lost = [f"{what} in {one.dtype}" for one in found.kept for what in ("lost", "off")]
        lines = [["tensor", "change", "relative", "largest", *lost]]
        for tensor in found.tensors[:top]:
            cells = map(_number, (tensor.change, tensor.relative, tensor.largest_change))
            lines.append([shown(tensor.name), *cells, *(cell for one in tensor.kept for cell in _cells(one))])
        print(text_table(lines))
    if len(found.tensors) > top:
        print(f"and {len(found.tensors) - top} more")


def _kept_text(one: "KeptIn") -> str:
    if one.overflows:
        return "weights overflow"
    return (
        f"{one.share_lost:.1%} of the elements that should move do not, and the update is {one.relative_error:.1%} off"
    )


def _cells(one: "KeptIn") -> Sequence[str]:
    return ("overflow", "") if one.overflows else (f"{one.share_lost:.1%}", f"{one.relative_error:.1%}")


def _number(value: float | None) -> str:
    return "from 0" if value is None else f"{value:.3g}"
