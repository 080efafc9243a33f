"""A merge weight belongs to the sampler that it was chosen for: said where weights meet a very different one."""

import math
from typing import Any

from neon.errors import warn
from neon.merge.pair import PathLike, open_self_trained
from neon.model import GenerativeModel, unlike_sampler_of


def warn_of_merge(path: PathLike, model: GenerativeModel, settings: Any) -> None:
    """Warn if `path`, which `model` was loaded from, is a merge for a sampler very different from `settings`."""
    w = _merge_weight(model.file_metadata.get("w"))
    if w and (differences := unlike_sampler_of(model.file_metadata, model, settings)):
        warn(
            f"{path}: merged with w = {w:g} for a very different sampler ({'; '.join(differences)}); sample as it was "
            "chosen for, or choose w again for this sampler"
        )


def warn_of_snapshot(
    path: PathLike, model: GenerativeModel, settings: Any, base_key: str | None = None, key: str | None = None
) -> None:
    """Warn if the synthetic set of the self-trained file `path` was drawn by a sampler very different from `settings`.

    `model` is its base; the keys are as in `open_self_trained`.
    """
    with open_self_trained(path, base_key, key) as snapshot:
        differences = unlike_sampler_of(snapshot.metadata, model, settings)
    if differences:
        warn(
            f"{path}: trained on images that a very different sampler drew ({'; '.join(differences)}); sample as they "
            "were drawn, or draw them and self-train again with this sampler"
        )


def _merge_weight(text: str | None) -> float:
    """The w of a merge by its metadata; 0, the base, for none that can be read."""
    try:
        w = float(text or 0)
    except ValueError:
        return 0.0
    return w if math.isfinite(w) else 0.0
