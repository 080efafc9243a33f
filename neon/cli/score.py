"""The part of every architecture's calculate_fid.py that is the same: scores of one network, or of merges of two.

Both sets of weights stay in memory and are merged into the live network for each w: one process, no file per w.
"""

import hashlib
import json
import os
import platform
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from neon import __version__
from neon.checkpoint import load_state
from neon.cli.flags import ScoringFlags
from neon.data.images import ImageDataset
from neon.errors import RequestError, warn
from neon.evaluate import Reference, ScoreLog, Scores, Tally, evaluate, load_manifold, tally_images
from neon.merge import LiveMerge, check_same_network
from neon.metrics import FrechetReference, Manifold, Statistics
from neon.metrics.features import FeatureExtractor, score_name
from neon.metrics.reference import INCEPTION, INCEPTION_DIM, load_extractor, load_statistics
from neon.model import GenerativeModel
from neon.runtime.distributed import Processes
from neon.runtime.download import shared_file
from neon.runtime.files import check_writable, sha256_file, write_json
from neon.runtime.run_folder import held_by_main
from neon.runtime.threads import use_threads
from neon.sampling import Label, check_enough, check_label

LOG_FILE, STATE_FILE, SCORES_FILE = "evaluations.jsonl", "evaluation.safetensors", "scores.json"


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Which images of a network are scored."""

    seeds: Sequence[int]
    seeds_text: str
    """as the user wrote them"""
    settings: Any
    """of the sampler: a frozen dataclass of the architecture"""
    label: Label
    batch_size: int
    key: str | None
    """nesting of the state dict in checkpoints"""
    compiled: bool
    """whether the network is"""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """what else determines the images, as JSON"""


def score_network(
    path: Path, model: GenerativeModel, sampling: Sampling, flags: ScoringFlags, processes: Processes
) -> None:
    """Score the network of checkpoint `path`, loaded as `model`, or its merges; the scores go to stdout and `--json`.

    Everything that can be wrong with the request is found before the first image is sampled.
    """
    ws = flags.merge_weights()
    check_enough(len(sampling.seeds), processes)
    check_label(model, sampling.label)
    if flags.json is not None:
        processes.on_main(lambda: check_writable(flags.json, overwrite=True))  # type: ignore[arg-type]
    ref = shared_file(flags.ref, processes)
    extractor = load_extractor(flags.features, flags.inception_weights, processes.device)
    use_threads(processes.device, model, extractor)
    statistics = load_statistics(ref, model, extractor)
    _warn_of_few(len(sampling.seeds), extractor.dim)
    live = None
    if flags.self_trained is not None:
        check_same_network(path, flags.self_trained, sampling.key)
        base = {name: tensor.clone() for name, tensor in model.network.state_dict().items()}
        live = LiveMerge(model.network, base, load_state(flags.self_trained, sampling.key))
    protocol = processes.on_main(lambda: _protocol(path, model, sampling, flags, ref, extractor))
    manifold = None
    if flags.precision_recall is not None:
        manifold = load_manifold(
            flags.precision_recall,
            extractor,
            nearest_k=flags.nearest_k,
            batch_size=sampling.batch_size,
            processes=processes,
        )
    reference = Reference(frechet=FrechetReference(statistics), manifold=manifold)
    scores = _evaluate_all(model, live, ws, sampling, flags, processes, extractor, reference, protocol)
    facts = {"processes": processes.world_size, "device": processes.device.type, "threads": processes.threads}
    record = {**protocol, **facts}
    processes.on_main(lambda: _report(scores, score_name(extractor), extractor.dim, record, flags.json))


def _warn_of_few(num_images: int | None, dim: int, name: str = "") -> None:
    """Warn if `dim` features of so many images have a singular covariance."""
    if _are_few(num_images, dim):
        warn(
            f"{name}{num_images} images for {dim} features: the covariance is singular and the score biased; compare "
            "it with scores of as many images only"
        )


def _are_few(num_images: int | None, dim: int) -> bool:
    return num_images is not None and num_images <= dim


def _protocol(
    path: Path,
    model: GenerativeModel,
    sampling: Sampling,
    flags: ScoringFlags,
    ref: Path,
    extractor: FeatureExtractor,
) -> dict[str, Any]:
    """All that determines the scores, as JSON."""
    weights = flags.inception_weights if flags.features == INCEPTION else Path(flags.features)
    return {
        "neon": __version__,
        "torch": torch.__version__,
        "machine": platform.machine(),
        "architecture": model.architecture,
        "network": str(path),
        "network_sha256": sha256_file(path),
        "self_trained": None if flags.self_trained is None else str(flags.self_trained),
        "self_trained_sha256": None if flags.self_trained is None else sha256_file(flags.self_trained),
        "conditional": model.num_classes > 0,
        "seeds": sampling.seeds_text,
        "class": sampling.label if isinstance(sampling.label, int) else None,
        "batch_size": sampling.batch_size,
        "settings": asdict(sampling.settings),
        "compile": sampling.compiled,
        **model.protocol,
        **sampling.facts,
        "features": extractor.name,
        "feature_weights_sha256": None if weights is None else sha256_file(weights),
        "ref": flags.ref,
        "ref_sha256": sha256_file(ref),
        "real_images": None if flags.precision_recall is None else str(flags.precision_recall),
        "nearest_k": None if flags.precision_recall is None else flags.nearest_k,
    }


def _evaluate_all(
    model: GenerativeModel,
    live: LiveMerge | None,
    ws: Sequence[float],
    sampling: Sampling,
    flags: ScoringFlags,
    processes: Processes,
    extractor: FeatureExtractor,
    reference: Reference,
    protocol: dict[str, Any],
) -> dict[float | None, Scores]:
    """The scores for each w (None: the network as it is); what a killed evaluation finished is not computed again."""
    digest = hashlib.sha256(json.dumps(protocol, sort_keys=True).encode()).hexdigest()
    folder = flags.run_dir or Path("runs") / f"{model.architecture}-fid-{digest[:12]}"
    with held_by_main(folder, protocol, processes, fresh=flags.fresh):
        log = ScoreLog(folder / LOG_FILE, processes)

        def one(w: float | None) -> Scores:
            if live is not None and w is not None:
                live.set(w)
            return evaluate(
                model,
                sampling.seeds,
                sampling.settings,
                extractor,
                reference,
                batch_size=sampling.batch_size,
                processes=processes,
                label=sampling.label,
                title="evaluating" if w is None else f"evaluating w = {w:g}",
                state=folder / STATE_FILE,
                identity=json.dumps(w),
            )

        found: dict[float | None, Scores] = {}
        for w in ws or (None,):
            found[w] = log.get_or(f"w = {w!r}", lambda w=w: one(w))  # type: ignore[misc]
        # The run is over: the same command measures again. Its scores stay, unless the folder was made up by us.
        processes.on_main(lambda: _close(folder, found, keep=flags.run_dir is not None))
    return found


def _close(folder: Path, scores: dict[float | None, Scores], *, keep: bool) -> None:
    if keep:
        write_json(folder / SCORES_FILE, {str(w): asdict(entry) for w, entry in scores.items()})
        (folder / LOG_FILE).unlink(missing_ok=True)
    else:
        shutil.rmtree(folder)


def _report(
    scores: dict[float | None, Scores],
    metric: str,
    dim: int,
    protocol: dict[str, Any],
    output: str | os.PathLike[str] | None,
) -> None:
    """Print one line per w and last the one of the lowest distance; write the same as JSON."""
    entries = [_entry(w, found, metric) for w, found in scores.items()]
    best = min(entries, key=lambda entry: entry[metric])
    about = "conditional" if protocol["conditional"] else "unconditional"
    steps = protocol["settings"].get("num_steps")
    about += "" if steps is None else f", {steps} steps"
    guidance = protocol["settings"].get("guidance")
    about += f", guidance {guidance:g}" if guidance else ""
    if len(entries) > 1:
        for entry in entries:
            print(f"w={entry['w']:<6g}{_text({**entry, 'w': None}, metric, dim)}")
        about += f"; the lowest of {len(entries)} on these seeds, report it on others"
    print(f"{_text(best, metric, dim)}  ({about})", flush=True)
    if output is not None:
        sweep = {"sweep": entries} if len(entries) > 1 else {}
        write_json(output, {"metric": metric, **best, **protocol, **sweep})


def _entry(w: float | None, scores: Scores, metric: str) -> dict[str, Any]:
    entry = asdict(scores)
    entry[metric] = entry.pop("distance")
    rate = scores.num_images / scores.seconds if scores.num_images and scores.seconds else None
    return {"w": w, **entry, "images_per_second": rate}


def _text(entry: dict[str, Any], metric: str, dim: int) -> str:
    """Scores in words; the distance with three digits where there are too few images for its `dim` features."""
    distance = entry[metric]
    shown = f"{distance:.6f}"
    if _are_few(entry["num_images"], dim):
        shown = f"{distance:.0f}" if distance >= 100 else f"{distance:.3g}"
    parts = [f"{metric.upper() if metric == 'fid' else f'FD_{metric[3:]}'}={shown}"]
    if entry["is_mean"] is not None:
        parts.append(f"IS={entry['is_mean']:.4f}+-{entry['is_std']:.4f}")
    parts += [
        f"{name}={entry[name]:.4f}"
        for name in ("precision", "recall", "density", "coverage")
        if entry[name] is not None
    ]
    if entry["w"] is not None:
        parts.append(f"w={entry['w']:g}")
    if entry["num_images"] is not None:
        parts.append(f"{entry['num_images']} images")
    return "  ".join(parts)


def score_images(
    a: Path,
    b: Path,
    *,
    features: str,
    inception_weights: Path | None,
    nearest_k: int | None,
    batch_size: int,
    processes: Processes,
    output: Path | None,
) -> None:
    """Score images or statistics `a` against images or statistics `b`; to stdout and, as JSON, to `output`.

    `nearest_k`: also precision, recall, density and coverage, by the k-th nearest neighbour.
    """
    sides = [Statistics.load(path) if path.suffix == ".npz" else ImageDataset(path) for path in (a, b)]
    if nearest_k is not None and any(isinstance(side, Statistics) for side in sides):
        raise RequestError("--precision_recall: needs images on both sides; statistics hold no single image")
    extractor = None
    if any(isinstance(side, ImageDataset) for side in sides):
        extractor = load_extractor(features, inception_weights, processes.device)
        use_threads(processes.device, extractor)
    statistics: list[Statistics] = []
    tallies: list[Tally] = []
    for path, side in zip((a, b), sides, strict=True):
        if isinstance(side, Statistics):
            statistics.append(side)
            continue
        assert extractor is not None
        tally = tally_images(
            side, extractor, batch_size=batch_size, processes=processes, keep_features=nearest_k is not None
        )
        tallies.append(tally)
        statistics.append(Statistics.from_moments(tally.moments, name=str(path)))

    def report() -> None:
        for path, side in zip((a, b), statistics, strict=True):
            _warn_of_few(side.count, side.dim, f"{path}: ")
        manifold = None if nearest_k is None else Manifold(tallies[1].features, k=nearest_k)
        reference = Reference(frechet=FrechetReference(statistics[1]), manifold=manifold)
        if isinstance(sides[0], Statistics):
            found = Scores(distance=reference.frechet.distance(statistics[0]), num_images=statistics[0].count)
        else:
            found = tallies[0].scores(reference, str(a))
        name = _statistics_name(statistics[0]) if extractor is None else score_name(extractor)
        entry = _entry(None, found, name)
        print(_text(entry, name, statistics[0].dim), flush=True)
        if output is not None:
            facts = {"a": str(a), "b": str(b), "features": name, "nearest_k": nearest_k, "neon": __version__}
            write_json(output, {"metric": name, **entry, **facts})

    processes.on_main(report)


def _statistics_name(statistics: Statistics) -> str:
    """The name of a score of bare statistics: only their size says which features they are of."""
    return "fid" if statistics.dim == INCEPTION_DIM else f"fd_{statistics.dim}"
