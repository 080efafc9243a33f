"""`neon tune` and `neon align`: the choice of w, from the files that a user names."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from neon.checkpoint import load_state
from neon.cli.flags import settings_with
from neon.data.images import ImageDataset
from neon.errors import RequestError
from neon.evaluate import Reference, load_manifold
from neon.merge import LiveMerge, check_same_network
from neon.metrics import FrechetReference
from neon.metrics.features import score_name
from neon.metrics.reference import INCEPTION, INCEPTION_DIM, load_extractor, load_statistics
from neon.model import code_file, load_model, open_autoencoder
from neon.runtime.distributed import Processes
from neon.runtime.files import check_writable, sha256_file, write_json
from neon.tune import gradients
from neon.tune.align import features_at, rounding, text_table
from neon.tune.predict import GROUPS, NODES, Prediction, predict
from neon.tune.run import Outcome, TunePlan, tune


def tune_command(
    plan: TunePlan,
    *,
    select_stats: Path,
    report_stats: Path,
    pairs: Sequence[str],
    vae: Path | None,
    real_images: Path | None,
    nearest_k: int,
    features: str,
    inception_weights: Path | None,
    out: Path,
    fresh: bool,
    processes: Processes,
    kind: str | None = None,
) -> Outcome:
    """`tune` of the files that `neon tune` names; everything that can be wrong with them is found before sampling.

    `kind` is what the user calls the class of the model; None: as the base says.
    """
    model = load_model(plan.base, device=processes.device, kind=kind)
    settings = settings_with(model.default_settings, pairs)
    guidances = plan.guidance or (plan.grid and plan.grid[1])
    if guidances and not hasattr(settings, "guidance"):
        raise RequestError(f"--guidance: the sampler of {model.architecture} has none")
    if guidances and model.num_classes == 0:
        raise RequestError(f"--guidance: {plan.base} is unconditional, there is nothing to guide by")
    autoencoder = open_autoencoder(model, vae)
    if features == INCEPTION and min(plan.num_images, plan.report_images) <= INCEPTION_DIM:
        raise RequestError(
            f"--num_images {plan.num_images}, --report_images {plan.report_images}: FID of as few images as features "
            f"({INCEPTION_DIM}) says little of the network; ask for more, or score with a small feature network"
        )
    extractor = load_extractor(features, inception_weights, processes.device)
    selection, reporting = (load_statistics(ref, model, extractor) for ref in (select_stats, report_stats))
    manifold = None
    if real_images is not None:
        manifold = load_manifold(
            real_images, extractor, nearest_k=nearest_k, batch_size=plan.batch_size, processes=processes
        )
    hashed = {
        "select_stats_sha256": select_stats,
        "report_stats_sha256": report_stats,
        "autoencoder_sha256": autoencoder,
        "model_sha256": code_file(kind),
        "feature_weights_sha256": inception_weights if features == INCEPTION else Path(features),
    }
    facts: dict[str, Any] = processes.on_main(
        lambda: {name: None if path is None else sha256_file(path) for name, path in hashed.items()}
    )
    facts |= {
        "features": extractor.name,
        "real_images": None if real_images is None else str(real_images),
        "nearest_k": None if real_images is None else nearest_k,
    }
    return tune(
        plan,
        model,
        settings,
        extractor,
        Reference(frechet=FrechetReference(selection), manifold=manifold),
        Reference(frechet=FrechetReference(reporting), manifold=manifold),
        out,
        processes,
        facts,
        fresh=fresh,
    )


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
