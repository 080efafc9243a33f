"""`neon align`: which w to expect, from a few hundred images at each of four w.

What is left of the update in the precision that weights are kept in stands beside it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from neon.evaluate import features_in_order, sampled_images
from neon.merge import LiveMerge, UpdateStats
from neon.metrics import Statistics
from neon.metrics.features import FeatureExtractor
from neon.model import GenerativeModel
from neon.noise import Purpose, image_seeds
from neon.report.words import text_table
from neon.runtime.distributed import Processes
from neon.tune.predict import NODES, Prediction, predict


@dataclass(frozen=True, kw_only=True)
class Rounding:
    """What is left of the update at w = 1 when the weights are kept in `dtype`."""

    dtype: str
    share_kept: float
    """of the elements that should move, those that do"""
    relative_error: float
    """norm of the error over that of the update"""


def features_at(
    model: GenerativeModel,
    live: LiveMerge,
    ws: Sequence[float],
    settings: Any,
    extractor: FeatureExtractor,
    num_images: int,
    *,
    seed: int = 0,
    batch_size: int,
    processes: Processes,
) -> Tensor:
    """Features of the same selection images at each w: float32 [len(ws), num_images, F], in every process.

    Raises:
        RequestError: the images do not fit the extractor.
        WorkError: weights overflow at some w.
    """
    labels = model.labels_for(Purpose.SELECTION, num_images, seed)
    seeds, features = image_seeds(Purpose.SELECTION, seed, num_images), list[Tensor]()
    for w in ws:
        live.set(w)
        parts = features_in_order(
            sampled_images(model, seeds, settings, processes, labels),
            num_images,
            [extractor],
            batch_size=batch_size,
            processes=processes,
            title=f"sampling at w = {w:g}",
        )
        features.append(torch.cat([of_block for (of_block,) in parts]).cpu())  # one wait for a GPU
    return torch.stack(features)


def predict_from_few(
    sample: Callable[[Sequence[float]], Tensor], reference: Statistics, processes: Processes
) -> Prediction:
    """The prediction from features at `NODES` and at one more w, where they say that it tells most.

    Args:
        sample: from w [K] to features of the same N images at each [K, N, F], in every process.
        reference: of real images, on the same features.

    Raises:
        RequestError, DegenerateError: what `predict` raises.
    """
    features = sample(NODES)
    last = processes.on_main(lambda: predict(features, reference).next_node())
    nodes, features = (*NODES, last), torch.cat([features, sample([last])])
    return processes.on_main(lambda: predict(features, reference, nodes))


def rounding(network: nn.Module, self_trained: Mapping[str, Tensor], dtypes: Sequence[torch.dtype]) -> list[Rounding]:
    """What is left of the update at w = 1 if base and result are kept in each of `dtypes`."""
    left = []
    for dtype in dict.fromkeys(dtypes):
        stats = UpdateStats()
        for name, p in network.named_parameters():
            stats.add_kept_in(dtype, p.detach(), self_trained[name].to(p))
        text = str(dtype).removeprefix("torch.")
        left.append(Rounding(dtype=text, share_kept=1 - stats.share_lost, relative_error=stats.relative_error))
    return left


def prediction_text(prediction: Prediction, left: Sequence[Rounding], metric: str, num_images: int) -> str:
    """The prediction as lines for a terminal."""
    curve = {w: distance for w, distance in prediction.curve.items() if (w * 4).is_integer()}
    ends = min(prediction.curve), max(prediction.curve)

    def place(w: float) -> str:
        return f"{w:.3g}{' or beyond' * (w in ends)}"

    low, high = map(place, prediction.interval)
    bounds = "" if low == high else f" from {low} to {high}"
    nodes = ", ".join(f"{w:g}" for w in prediction.nodes)
    return "\n".join(
        [
            f"{metric} predicted from {num_images} images at each of w = {nodes}",
            text_table(
                [["w", *(f"{w:g}" for w in curve)], ["distance", *(f"{value:.4g}" for value in curve.values())]]
            ),
            f"slope at w = 0   {prediction.slope}",
            f"lowest at w =    {place(prediction.w.value)}, by 95%{bounds}: {prediction.sign}",
            f"lower there by   {prediction.gain}",
            *(
                f"in {entry.dtype:<9} {entry.share_kept:.1%} of the elements of the update survive, "
                f"off by {entry.relative_error:.1%}"
                for entry in left
            ),
        ]
    )
