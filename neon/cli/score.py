"""The part of every architecture's calculate_fid.py that is the same: scores of one network, or of two.

Of two, both sets of weights stay in memory: they are merged into the live network for each w, or both networks sample
at each scale (SIMS). One process, no file for each value.
"""

import contextlib
import hashlib
import json
import os
import platform
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from neon import __version__
from neon.cli.flags import ImagePairFlags, ScoredImages
from neon.data.fingerprint import fingerprints
from neon.data.images import ImageDataset
from neon.errors import RequestError
from neon.evaluate import (
    LOG_FILE,
    STATE_FILE,
    Reference,
    ScoreLog,
    Scores,
    Tally,
    are_few,
    evaluate,
    load_manifold,
    tally_images,
    unfinished,
    warn_of_few,
)
from neon.merge import LiveMerge, load_self_trained, warn_of_snapshot
from neon.metrics import FrechetReference, Manifold, Statistics
from neon.metrics.features import FeatureExtractor, score_name
from neon.metrics.reference import INCEPTION_DIM, features_file, load_statistics
from neon.model import GenerativeModel
from neon.runtime.distributed import Processes
from neon.runtime.download import shared_file
from neon.runtime.files import check_writable, hashes, sha256_file, write_json
from neon.runtime.run_folder import RUN_FILE, difference, held_by_main, read_record
from neon.runtime.threads import use_threads
from neon.sampling import Label, check_enough, check_label

SCORES_FILE = "scores.json"
SIMS = "SIMS: (1 + g) out - g out_self_trained of both networks"
"""what records call scores of two networks at inference; those of merges say nothing"""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Which images of a network are scored, in what its flags leave to the model."""

    seeds: Sequence[int]
    settings: Any
    """of the sampler: a frozen dataclass of the architecture"""
    label: Label
    facts: Mapping[str, Any]
    """what else determines the images, as JSON"""


def score_network(
    path: Path, model: GenerativeModel, sampling: Sampling, flags: ScoredImages, processes: Processes
) -> None:
    """Score the network of checkpoint `path`, loaded as `model`, its merges, or SIMS; to stdout and `--json`.

    For SIMS the model has the second network already (`SelfTrainedFlags.combined`).

    Everything that can be wrong with the request is found before the first image is sampled.
    """
    kind, values = flags.sweep()
    check_enough(len(sampling.seeds), processes)
    check_label(model, sampling.label)
    _check_output(flags.json, processes)
    ref = shared_file(flags.ref, processes)
    extractor = flags.extractor(processes.device)
    use_threads(processes.device, model, extractor)
    statistics = load_statistics(ref, model, extractor)
    warn_of_few(len(sampling.seeds), extractor.dim)
    model_at = _models(path, model, sampling.settings, flags)
    protocol = processes.on_main(lambda: _protocol(path, model, sampling, flags, ref, extractor))
    manifold = load_manifold(
        flags.precision_recall, extractor, nearest_k=flags.nearest_k, batch_size=flags.batch_size, processes=processes
    )
    reference = Reference(frechet=FrechetReference(statistics), manifold=manifold)
    folder = flags.run_dir or processes.on_main(lambda: _usual_folder(f"{model.architecture}-fid", protocol))

    def score(value: float | None) -> Scores:
        return evaluate(
            model if value is None else model_at(value),
            sampling.seeds,
            sampling.settings,
            extractor,
            reference,
            batch_size=flags.batch_size,
            processes=processes,
            label=sampling.label,
            title="evaluating" if value is None else f"evaluating {kind} = {value:g}",
            state=folder / STATE_FILE,
            identity=json.dumps(value),
        )

    with held_by_main(folder, protocol, processes, fresh=flags.fresh):
        log = ScoreLog(folder / LOG_FILE, processes)
        wanted: Sequence[float | None] = values or (None,)
        begun = processes.on_main(lambda: unfinished(folder / STATE_FILE))
        scored = {  # first what a killed run has begun
            value: log.get_or(f"{kind} = {value!r}", partial(score, value))
            for value in sorted(wanted, key=lambda value: json.dumps(value) != begun)
        }
        scores = {value: scored[value] for value in wanted}
        # The run is over: the same command measures again. Its scores stay, unless the folder was made up by us.
        processes.on_main(lambda: _close(folder, scores, keep=flags.run_dir is not None))
    facts = {"processes": processes.world_size, "device": processes.device.type, "threads": processes.threads}
    entries = [_entry(kind, value, of_value, score_name(extractor)) for value, of_value in scores.items()]
    processes.on_main(
        lambda: _report(entries, kind, score_name(extractor), extractor.dim, {**protocol, **facts}, flags.json)
    )


def _check_output(output: Path | None, processes: Processes) -> None:
    """Raise now, before any work, what writing scores to `output` would raise at the end."""
    if output is not None:
        processes.on_main(lambda: check_writable(output, overwrite=True))


def _models(
    path: Path, model: GenerativeModel, settings: Any, flags: ScoredImages
) -> Callable[[float], GenerativeModel]:
    """The model to score at each value of a sweep: with its second network, or merged with `--self_trained`."""
    if flags.self_trained is None:
        return lambda value: model
    warn_of_snapshot(flags.self_trained, model, settings, flags.key, flags.self_trained_key)
    if model.second is not None:
        network, _ = model.second
        return lambda scale: model.combine(network, scale)
    trained = load_self_trained(model.network, path, flags.self_trained, flags.key, flags.self_trained_key)
    base = {name: tensor.clone() for name, tensor in model.network.state_dict().items()}
    live = LiveMerge(model.network, base, trained)

    def merged(w: float) -> GenerativeModel:
        live.set(w)
        return model

    return merged


def _protocol(
    path: Path,
    model: GenerativeModel,
    sampling: Sampling,
    flags: ScoredImages,
    ref: Path,
    extractor: FeatureExtractor,
) -> dict[str, Any]:
    """All that determines the scores, as JSON."""
    real = flags.precision_recall
    keys = {"key": flags.key, "self_trained_key": flags.self_trained_key}  # named in records where they were given
    return {
        "neon": __version__,
        "torch": torch.__version__,
        "machine": platform.machine(),
        "architecture": model.architecture,
        "network": str(path),
        "network_sha256": sha256_file(path),
        "self_trained": None if flags.self_trained is None else str(flags.self_trained),
        **hashes({"self_trained_sha256": flags.self_trained}),
        **{name: key for name, key in keys.items() if key is not None},
        **({} if model.second is None else {"combination": SIMS}),
        "conditional": model.num_classes > 0,
        "seeds": flags.seeds_text(),
        "class": sampling.label if isinstance(sampling.label, int) else None,
        "batch_size": flags.batch_size,
        "settings": asdict(sampling.settings),
        "compile": flags.compile,
        **model.protocol,
        **sampling.facts,
        "features": extractor.name,
        **hashes({"feature_weights_sha256": flags.feature_weights()}),
        "ref": flags.ref,
        "ref_sha256": sha256_file(ref),
        "real_images": None if real is None else str(real),
        "nearest_k": None if real is None else flags.nearest_k,
        **fingerprints(
            {
                "features_fingerprint": features_file(flags.features, flags.inception_weights),
                "real_images_fingerprint": real,
            }
        ),
    }


def _usual_folder(name: str, protocol: dict[str, Any]) -> Path:
    """The folder below runs/ where such an evaluation was killed, or that of a new one."""
    digest = hashlib.sha256(json.dumps(protocol, sort_keys=True).encode()).hexdigest()
    for record in sorted(Path("runs").glob(f"{name}-*/{RUN_FILE}")):
        with contextlib.suppress(RequestError):  # another's record, that need not be readable
            if difference(read_record(record.parent), protocol) is None:
                return record.parent
    return Path("runs") / f"{name}-{digest[:12]}"


def _close(folder: Path, scores: dict[float | None, Scores], *, keep: bool) -> None:
    if keep:
        write_json(folder / SCORES_FILE, {str(w): asdict(entry) for w, entry in scores.items()})
        (folder / LOG_FILE).unlink(missing_ok=True)
    else:
        shutil.rmtree(folder)


def _report(
    entries: Sequence[dict[str, Any]],
    kind: str,
    metric: str,
    dim: int,
    protocol: dict[str, Any],
    output: str | os.PathLike[str] | None,
) -> None:
    """Print one line per value of w or sims and last the one of the lowest distance; write the same as JSON."""
    best = min(entries, key=lambda entry: entry[metric])
    about = "conditional" if protocol["conditional"] else "unconditional"
    steps = protocol["settings"].get("num_steps")
    about += "" if steps is None else f", {steps} steps"
    guidance = protocol["settings"].get("guidance")
    about += f", guidance {guidance:g}" if guidance else ""
    if len(entries) > 1:
        for entry in entries:
            print(f"{kind}={entry[kind]:<6g}{_text({**entry, kind: None}, metric, dim)}")
        about += f"; the lowest of {len(entries)} on these seeds, report it on others"
    print(f"{_text(best, metric, dim)}  ({about})", flush=True)
    if output is not None:
        sweep = {"sweep": entries} if len(entries) > 1 else {}
        write_json(output, {"metric": metric, **best, **protocol, **sweep})


def _entry(kind: str, value: float | None, scores: Scores, metric: str) -> dict[str, Any]:
    entry = asdict(scores)
    entry[metric] = entry.pop("distance")
    rate = scores.num_images / scores.seconds if scores.num_images and scores.seconds else None
    return {kind: value, **entry, "images_per_second": rate}


def _text(entry: dict[str, Any], metric: str, dim: int) -> str:
    """Scores in words; the distance with three digits where there are too few images for its `dim` features."""
    distance = entry[metric]
    shown = f"{distance:.6f}"
    if are_few(entry["num_images"], dim):
        shown = f"{distance:.0f}" if distance >= 100 else f"{distance:.3g}"
    parts = [f"{metric.upper() if metric == 'fid' else f'FD_{metric[3:]}'}={shown}"]
    if entry["is_mean"] is not None:
        parts.append(f"IS={entry['is_mean']:.4f}+-{entry['is_std']:.4f}")
    parts += [
        f"{name}={entry[name]:.4f}"
        for name in ("precision", "recall", "density", "coverage")
        if entry[name] is not None
    ]
    parts += [f"{kind}={entry[kind]:g}" for kind in ("w", "sims") if entry.get(kind) is not None]
    if entry["num_images"] is not None:
        parts.append(f"{entry['num_images']} images")
    return "  ".join(parts)


def score_images(flags: ImagePairFlags, processes: Processes) -> None:
    """Score the images or statistics of `neon fid`; to stdout and, as JSON, to `--json`."""
    _check_output(flags.json, processes)
    paths = (flags.a, flags.b)
    sides = [Statistics.load(path) if path.suffix == ".npz" else ImageDataset(path) for path in paths]
    if flags.precision_recall and any(isinstance(side, Statistics) for side in sides):
        raise RequestError("--precision_recall: needs images on both sides; statistics hold no single image")
    extractor = None
    if any(isinstance(side, ImageDataset) for side in sides):
        extractor = flags.extractor(processes.device)
        use_threads(processes.device, extractor)
    statistics: list[Statistics] = []
    tallies: list[Tally] = []
    for path, side in zip(paths, sides, strict=True):
        if isinstance(side, Statistics):
            statistics.append(side)
            continue
        assert extractor is not None
        tally = tally_images(
            side, extractor, batch_size=flags.batch_size, processes=processes, keep_features=flags.precision_recall
        )
        tallies.append(tally)
        statistics.append(Statistics.from_moments(tally.moments, name=str(path)))

    def report() -> None:
        for path, side in zip(paths, statistics, strict=True):
            warn_of_few(side.count, side.dim, f"{path}: ")
        nearest_k = flags.nearest_k if flags.precision_recall else None
        manifold = None if nearest_k is None else Manifold(tallies[1].features, k=nearest_k)
        reference = Reference(frechet=FrechetReference(statistics[1]), manifold=manifold)
        if isinstance(sides[0], Statistics):
            scores = Scores(distance=reference.frechet.distance(statistics[0]), num_images=statistics[0].count)
        else:
            scores = tallies[0].scores(reference, str(flags.a))
        metric = _metric_of(statistics[0]) if extractor is None else score_name(extractor)
        entry = _entry("w", None, scores, metric)
        print(_text(entry, metric, statistics[0].dim), flush=True)
        if flags.json is not None:
            facts = {"a": str(flags.a), "b": str(flags.b), "features": metric, "nearest_k": nearest_k}
            write_json(flags.json, {"metric": metric, **entry, **facts, "neon": __version__})

    processes.on_main(report)


def _metric_of(statistics: Statistics) -> str:
    """The name of a score of bare statistics: only their size says which features they are of."""
    return "fid" if statistics.dim == INCEPTION_DIM else f"fd_{statistics.dim}"
