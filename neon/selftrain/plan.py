"""What a training is determined by beside its images: recipe, batches, and the record of a run."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from neon import __version__
from neon.data.fingerprint import fingerprint
from neon.model import GenerativeModel
from neon.recipe import Recipe
from neon.runtime.hub import in_words


def recipe_of(model: GenerativeModel, batch: int | None = None, lr: float | None = None) -> Recipe:
    """How `model` is trained, with other images per step or another learning rate if given; a ValueError of these.

    Losses are scaled where they are computed in float16.
    """
    usual = model.recipe
    return replace(
        usual,
        batch_size=usual.batch_size if batch is None else batch,
        lr=usual.lr if lr is None else lr,
        scale_losses=model.precision.name == "fp16",
    )


def training_identity(
    model: GenerativeModel, data: Path, base_sha256: str | None, facts: Mapping[str, Any]
) -> dict[str, Any]:
    """What, with plan, recipe and seed, determines a training, as JSON.

    Args:
        data: the images.
        base_sha256: of the file that training starts from; None: from scratch.
        facts: of what else the model is made.

    Raises:
        RequestError: there is nothing at `data`.
    """
    return {
        "neon": __version__,
        "base_sha256": base_sha256,
        "config": model.config,
        "data": in_words(data),
        "data_fingerprint": fingerprint(data),
        **facts,
    }


def largest_divisor(number: int, limit: int) -> int:
    """The largest divisor of `number` that is at most `limit`: a micro-batch where none is asked for."""
    return next(divisor for divisor in range(min(number, limit), 0, -1) if number % divisor == 0)


def usual_micro_batch(batch: int, multiple: int, largest: int) -> int:
    """The largest micro-batch of at most `largest` images, in multiples of what the model takes, that divides `batch`.

    At least `multiple`.
    """
    return multiple * largest_divisor(max(batch // multiple, 1), max(largest // multiple, 1))
