"""The model card of an improved model: what the Hugging Face Hub shows of it, and how to use it.

File names, settings and names of features are foreign text: they stand in code, or escaped.
"""

import json
import os
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from neon import __version__
from neon.errors import RequestError
from neon.report.record import Report
from neon.report.template import filled
from neon.report.words import conclusions, explained, score_table
from neon.runtime.files import as_json, atomic_write, sha256_file
from neon.runtime.markdown import block, code, escaped, line

CARD_FILE = "README.md"
TASK = "unconditional-image-generation"
UNKNOWN_LICENSE = "unknown"
"""as the Hub calls one that nobody has stated"""


@dataclass(frozen=True, kw_only=True)
class Card:
    """What a card says beside the report."""

    architecture: str
    weights: tuple[str, ...]
    """names of the files of the improved weights in the folder, at least one"""
    base: str
    """name of the base's file"""
    base_sha256: str
    w: float
    settings: dict[str, Any]
    """of the sampler to use, by name; the weights carry them"""
    synthetic_settings: dict[str, Any] | None = None
    """of the sampler that drew the synthetic set; None: `settings`"""
    synthetic_images: int
    training_images: int
    """that self-training saw, an image as often as it was seen"""
    image_shape: tuple[int, int, int]
    num_classes: int
    real: str
    """what it was scored against"""


def write_card(folder: str | os.PathLike[str], report: Report, card: Card) -> Path:
    """Write `README.md` of the model that `report` calls its best; returns its path.

    The folder holds `card.weights`, whose hashes are on the card.

    Raises:
        RequestError: one of them is missing.
        ValueError: the report's best is of another w.
    """
    if report.best.w not in (None, card.w):
        raise ValueError(f"a card of w = {card.w:g} with the scores of w = {report.best.w:g}")
    folder = Path(folder)
    for name in card.weights:
        if not (folder / name).exists():
            raise RequestError(f"{folder / name}: not found; expected the weights that the card is of")
    hashes = {name: sha256_file(folder / name) for name in card.weights}
    with atomic_write(folder / CARD_FILE) as file:
        file.write(card_text(report, card, hashes).encode())
    return folder / CARD_FILE


def card_text(report: Report, card: Card, hashes: Mapping[str, str]) -> str:
    """The card as Markdown; `hashes` are the SHA-256 of its weights by their names."""
    result, *more = map(escaped, conclusions(report))
    drawn = card.settings if card.synthetic_settings is None else card.synthetic_settings
    used = next((name for name in card.weights if name.endswith(".safetensors")), card.weights[0])
    shape = ", ".join(map(str, (16, *card.image_shape)))
    return filled(
        "card.md",
        metadata=_metadata(report, card),
        title=f"{code(card.base)}, improved by Neon",
        result="\n\n".join([f"**{result}**", *more]),
        synthetic_images=f"{card.synthetic_images:,}",
        training_images=f"{card.training_images:,}",
        base=code(card.base),
        sampled_with="the settings below" if drawn == card.settings else code(_json(drawn)),
        w=f"{card.w:g}",
        architecture=code(card.architecture),
        images=_images(card),
        python=block(
            "python",
            f"import neon\n\nmodel = neon.load({json.dumps(used) if used.isascii() else repr(used)})\n"
            f"images = model.sample(16, seed=0)  # uint8 [{shape}]",
        ),
        shell=block("sh", f"neon sample --network {line(shlex.quote(used))} --num_images 16 --outdir samples"),
        settings=block("json", _json(card.settings)),
        table=_table(report),
        real=code(card.real),
        protocol=_protocol(report),
        explained=escaped(explained(report)),
        hashes="\n".join(
            f"- {code(name)}, SHA-256 {code(digest)}"
            for name, digest in [*hashes.items(), (card.base, card.base_sha256)]
        ),
        version=__version__,
    )


def _metadata(report: Report, card: Card) -> str:
    """The front matter, as YAML.

    `base_model` is left out: it has to be the name of a repository on the Hub.
    """
    from huggingface_hub import EvalResult, ModelCardData

    best = report.best
    score = EvalResult(
        task_type=TASK,
        dataset_type="custom",
        dataset_name=line(card.real),
        metric_type=line(report.metric),
        metric_name=line(_metric_name(report)),
        metric_value=best.distance,
        metric_args={"num_images": best.blocks[0].num_images, "blocks": len(best.blocks)},
    )
    data = ModelCardData(
        license=UNKNOWN_LICENSE,
        library_name="neon",
        pipeline_tag=TASK,
        tags=["neon", "image-generation", line(card.architecture)],
        model_name=f"{line(card.base)}, improved by Neon",
        eval_results=[score],
    )
    return str(data.to_yaml())


def _metric_name(report: Report) -> str:
    """The distance in words: only that of Inception's features is called FID."""
    if report.metric == "fid":
        return "FID"
    return f"Fréchet distance of features of {report.metric.removeprefix('fd_')} (no FID)"


def _images(card: Card) -> str:
    channels, height, width = card.image_shape
    kind = f"{card.num_classes:,} classes" if card.num_classes else "no classes"
    return f"images of {height} x {width} pixels and {channels} channel{'s' if channels > 1 else ''}, {kind}"


def _protocol(report: Report) -> str:
    """By what, and on how many images of which seeds, the rows were scored."""
    blocks, images = len(report.base.blocks), report.base.blocks[0].num_images
    how_many = f"{blocks} block{'s' if blocks > 1 else ''}" + ("" if images is None else f" of {images:,} images each")
    return (
        f"by {escaped(_metric_name(report))}, on {how_many}, whose seeds are disjoint from those that settings and w "
        "were chosen on"
    )


def _table(report: Report) -> str:
    """The scores as a table, the best row in bold."""
    head, *lines = score_table(report)
    marked = [[""] * len(head)] + [["**" if row is report.best and cell else "" for cell in line]
                                   for row, line in zip(report.rows, lines, strict=True)]  # fmt: skip
    every = [
        "| " + " | ".join(f"{mark}{escaped(cell)}{mark}" for cell, mark in zip(cells, marks, strict=True)) + " |"
        for cells, marks in zip([head, *lines], marked, strict=True)
    ]
    return "\n".join([every[0], "|---|" + "---:|" * (len(head) - 1), *every[1:]])


def _json(settings: Mapping[str, Any]) -> str:
    return json.dumps(as_json(dict(settings)))
