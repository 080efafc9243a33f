"""`neon align`: which w to expect, from a few hundred images at each of three w.

Given real and synthetic images it also tells what their gradients say. That is of the loss, and the sign of the best w
is wrong more often than right (`benchmarks/align.py`, `benchmarks/results/align.json`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from neon.checkpoint import load_state
from neon.cli.score import load_extractor, load_statistics
from neon.data.images import ImageDataset
from neon.errors import RequestError
from neon.evaluate import features_in_order, sampled_images
from neon.merge import LiveMerge, UpdateStats, check_same_network, merge_tensor
from neon.metrics.features import FeatureExtractor, score_name
from neon.model import GenerativeModel, load_model, open_autoencoder
from neon.noise import Purpose, image_seeds
from neon.runtime.distributed import Processes
from neon.runtime.files import check_writable, write_json
from neon.tune import gradients
from neon.tune.predict import GROUPS, NODES, RANGE, Prediction, predict
from neon.tune.run import settings_with


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
    seeds, found = image_seeds(Purpose.SELECTION, seed, num_images), []
    for w in ws:
        live.set(w)
        parts = features_in_order(
            sampled_images(model, seeds, settings, processes),
            num_images,
            extractor,
            batch_size=batch_size,
            processes=processes,
            title=f"sampling at w = {w:g}",
        )
        found.append(torch.cat([*parts]).cpu())  # one wait for a GPU
    return torch.stack(found)


def rounding(network: nn.Module, self_trained: Mapping[str, Tensor], dtypes: Sequence[torch.dtype]) -> list[Rounding]:
    """What is left of the update at w = 1 if base and result are kept in each of `dtypes`."""
    found = []
    for dtype in dict.fromkeys(dtypes):
        stats = UpdateStats()
        for name, p in network.named_parameters():
            base = p.detach().to(dtype)
            moved = base.double() - (p.detach() - self_trained[name].to(p))
            stats.add(base, moved, 1.0, merge_tensor(base, moved, 1.0, name=name))
        text = str(dtype).removeprefix("torch.")
        found.append(Rounding(dtype=text, share_kept=1 - stats.share_lost, relative_error=stats.relative_error))
    return found


def align_command(
    base: Path,
    self_trained: Path,
    stats: Path,
    *,
    features: str,
    inception_weights: Path | None,
    real: Path | None,
    synthetic: Path | None,
    num_images: int,
    batch_size: int,
    pairs: Sequence[str],
    vae: Path | None,
    seed: int,
    json: Path | None,
    processes: Processes,
    kind: str | None = None,
) -> Prediction:
    """Print the prediction for a base and weights self-trained on its samples, and write it to `json`.

    With `real` and `synthetic` images (folders or zips) their gradients at the base are compared, too. `pairs` are
    settings of the sampler, NAME=VALUE each; `kind` is what the user calls the class of the model.
    Everything that can be wrong with the files is found before the first image is sampled.

    Raises:
        RequestError: files or settings do not fit each other, or the images are too few for the features.
        WorkError: as `features_at`, or features are not finite.
    """
    if json is not None:
        processes.on_main(lambda: check_writable(json, overwrite=True))
    if (real is None) != (synthetic is None):
        raise RequestError("--real, --synthetic: gradients are compared of both; give both sets of images, or neither")
    if batch_size < 1:
        raise RequestError(f"--batch-size {batch_size}: expected at least 1")
    check_same_network(base, self_trained)
    model = load_model(base, device=processes.device, kind=kind)
    settings = settings_with(model.default_settings, pairs)
    open_autoencoder(model, vae)
    extractor = load_extractor(features, inception_weights, processes.device)
    reference = load_statistics(stats, model, extractor)
    fewest = 2 * max(extractor.dim, GROUPS)
    if num_images < fewest:
        raise RequestError(
            f"--num-images {num_images}: too few for the covariance of {extractor.dim} features; "
            f"expected at least {fewest}, better twice as many"
        )
    sets = None if real is None or synthetic is None else (ImageDataset(real), ImageDataset(synthetic))
    state = {name: tensor.clone() for name, tensor in model.network.state_dict().items()}
    trained = load_state(self_trained)
    own = next(model.network.parameters()).dtype
    left = processes.on_main(lambda: rounding(model.network, trained, [own, torch.bfloat16, torch.float16]))
    compared = sets and gradients.gradient_report(model, *sets, trained, seed=seed, processes=processes)
    live = LiveMerge(model.network, state, trained)
    found = predict(
        features_at(
            model, live, NODES, settings, extractor, num_images, seed=seed, batch_size=batch_size, processes=processes
        ),
        reference,
    )

    def tell() -> None:
        print(text_table(found, left, score_name(extractor), num_images))
        if compared is not None:
            print(gradients.text_table(compared))
        if json is not None:
            facts = {"metric": score_name(extractor), "num_images": num_images, "nodes": NODES, "seed": seed}
            told = {"sign": found.sign, **asdict(found), "rounding": [asdict(entry) for entry in left]}
            more = {"gradients": compared and asdict(compared), "settings": asdict(settings)}
            write_json(json, {**facts, **told, **more})

    processes.on_main(tell)
    return found


def text_table(found: Prediction, left: Sequence[Rounding], metric: str, num_images: int) -> str:
    """The prediction as lines for a terminal."""
    shown = {w: distance for w, distance in found.curve.items() if (w * 4).is_integer()}
    lowest = str(found.w)
    if found.w.value in RANGE:
        lowest = f"{found.w.value:g} or beyond, where the range ends"
    return "\n".join(
        [
            f"{metric} predicted from {num_images} images at each of w = {', '.join(f'{w:g}' for w in NODES)}",
            "w         " + "".join(f"{w:>10g}" for w in shown),
            "distance  " + "".join(f"{distance:>10.4g}" for distance in shown.values()),
            f"slope at w = 0   {found.slope}: {found.sign}",
            f"lowest at w =    {lowest}",
            f"lower there by   {found.gain}",
            *(
                f"in {entry.dtype:<9} {entry.share_kept:.1%} of the elements of the update survive, "
                f"off by {entry.relative_error:.1%}"
                for entry in left
            ),
        ]
    )
