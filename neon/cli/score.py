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
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from neon import __version__
from neon.cli.flags import ImagePairFlags, ScoredImages
from neon.data.fingerprint import fingerprints
from neon.data.shards import open_images
from neon.errors import RequestError
from neon.evaluate import (
    LOG_FILE,
    SHARES,
    STATE_FILE,
    RealFeatures,
    Reference,
    ScoreLog,
    Scores,
    Tally,
    are_few,
    evaluate,
    is_statistics,
    real_features,
    scores_in,
    scores_json,
    side_by_side,
    tally_images,
    unfinished,
    warn_of_few,
)
from neon.merge import warn_of_snapshot
from neon.merge.live import beside
from neon.metrics import FrechetReference, Manifold, Statistics
from neon.metrics.features import FeatureExtractor
from neon.metrics.kernel import KERNEL_PROTOCOL
from neon.metrics.reference import INCEPTION, INCEPTION_DIM, load_statistics, statistics_in
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
    extractors = flags.extractors(processes.device)
    use_threads(processes.device, model, *extractors)
    statistics = load_statistics(ref, model, extractors)
    for extractor in extractors:
        warn_of_few(len(sampling.seeds), extractor.dim)
    model_at = _models(path, model, sampling.settings, flags)
    protocol = processes.on_main(lambda: _protocol(path, model, sampling, flags, ref, extractors))
    real = real_features(
        flags.precision_recall,
        extractors,
        nearest_k=flags.nearest_k,
        kernel=True,
        batch_size=flags.batch_size,
        processes=processes,
    )
    references = [
        Reference(extractor=extractor, frechet=FrechetReference(found), real=features)
        for extractor, found, features in zip(extractors, statistics, real, strict=True)
    ]
    folder = flags.run_dir or processes.on_main(lambda: _usual_folder(f"{model.architecture}-fid", protocol))

    def score(value: float | None) -> Scores:
        return evaluate(
            model if value is None else model_at(value),
            sampling.seeds,
            sampling.settings,
            references,
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
    kernel = {} if flags.precision_recall is None else KERNEL_PROTOCOL
    facts = {**kernel, "processes": processes.world_size, "device": processes.device.type, "threads": processes.threads}
    processes.on_main(lambda: _report(scores, kind, references, {**protocol, **facts}, flags.json))


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
    network = model.network
    live = beside(network, path, flags.self_trained, flags.key, flags.self_trained_key).live()

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
    extractors: Sequence[FeatureExtractor],
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
        **flags.named_features().facts(extractors),
        "ref": flags.ref,
        "ref_sha256": sha256_file(ref),
        "real_images": None if real is None else str(real),
        "nearest_k": None if real is None else flags.nearest_k,
        **fingerprints({"real_images_fingerprint": real}),
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
        write_json(folder / SCORES_FILE, {str(w): scores_json(entry) for w, entry in scores.items()})
        (folder / LOG_FILE).unlink(missing_ok=True)
    else:
        shutil.rmtree(folder)


def _report(
    scores: Mapping[float | None, Scores],
    kind: str,
    references: Sequence[Reference],
    protocol: dict[str, Any],
    output: str | os.PathLike[str] | None,
) -> None:
    """Print one line per value of w or sims and last the one of the lowest distance; write the same as JSON."""
    metric, (best_value, best) = references[0].metric, min(scores.items(), key=lambda entry: entry[1].distance)
    about = "conditional" if protocol["conditional"] else "unconditional"
    steps = protocol["settings"].get("num_steps")
    about += "" if steps is None else f", {steps} steps"
    guidance = protocol["settings"].get("guidance")
    about += f", guidance {guidance:g}" if guidance else ""
    dims = {one.metric: one.extractor.dim for one in references}
    if len(scores) > 1:
        for value, entry in scores.items():
            print(f"{kind}={value:<6g}{_text(entry, dims)}")
        about += f"; the lowest of {len(scores)} on these seeds, report it on others"
    chosen = {} if best_value is None else {kind: best_value}
    print(f"{_text(best, dims, chosen)}  ({about})", flush=True)
    if output is not None:
        entries = [_entry(of_value, metric, {kind: value}) for value, of_value in scores.items()]
        sweep = {"sweep": entries} if len(entries) > 1 else {}
        write_json(output, {"metric": metric, **_entry(best, metric, {kind: best_value}), **protocol, **sweep})


def _entry(scores: Scores, metric: str, about: Mapping[str, float | None]) -> dict[str, Any]:
    """Scores as JSON: distances in every feature space by their names, what else there is in the others in `beside`."""
    rate = scores.num_images / scores.seconds if scores.num_images and scores.seconds else None
    others = {name: _of_space(one, name) for name, one in scores.beside.items()}
    return {
        **about,
        **_of_space(scores, metric),
        "num_images": scores.num_images,
        "seconds": scores.seconds,
        "images_per_second": rate,
        **{name: one.distance for name, one in scores.beside.items()},
        **({"beside": others} if others else {}),
    }


def _of_space(scores: Scores, metric: str) -> dict[str, Any]:
    """The scores in one feature space, distances by their names."""
    kernel = kernel_name(metric)
    of_kernel = {} if scores.kernel is None else {kernel: scores.kernel, f"{kernel}_std": scores.kernel_std}
    return {
        metric: scores.distance,
        **{name: getattr(scores, name) for name in ("is_mean", "is_std", *SHARES)},
        **of_kernel,
        **({} if scores.clip_score is None else {"clip_score": scores.clip_score}),
    }


def kernel_name(metric: str) -> str:
    """`kid` where the distance is called `fid`, `kd_<features>` where it is `fd_<features>`."""
    return "kid" if metric == "fid" else f"kd_{metric.removeprefix('fd_')}"


def _spelled(name: str) -> str:
    """The name of a distance as it is printed: `FID`, `FD_dinov2`."""
    head, _, features = name.partition("_")
    return head.upper() + (f"_{features}" if features else "")


def _text(
    scores: Scores,
    dims: Mapping[str, int],
    chosen: Mapping[str, float] | None = None,
    few_real: Collection[str] = (),
) -> str:
    """Scores in words; a distance with three digits where there are too few images for its features (`dims`).

    `few_real`: the distances for which there are too few real ones.
    """
    parts = []
    for number, (metric, one) in enumerate(zip(dims, (scores, *scores.beside.values()), strict=True)):
        distance = one.distance
        shown = f"{distance:.6f}"
        if metric in few_real or are_few(one.num_images, dims[metric]):
            shown = f"{distance:.0f}" if distance >= 100 else f"{distance:.3g}"
        parts.append(f"{_spelled(metric)}={shown}")
        if one.kernel is not None:
            parts.append(f"{_spelled(kernel_name(metric))}={one.kernel:.5f}+-{one.kernel_std:.5f}")
        if one.clip_score is not None:
            parts.append(f"CLIP={one.clip_score:.2f}")
        if number:
            continue
        if one.is_mean is not None:
            parts.append(f"IS={one.is_mean:.4f}+-{one.is_std:.4f}")
        parts += [f"{name}={getattr(one, name):.4f}" for name in SHARES if getattr(one, name) is not None]
    parts += [f"{kind}={value:g}" for kind, value in (chosen or {}).items()]
    if scores.num_images is not None:
        parts.append(f"{scores.num_images} images")
    return "  ".join(parts)


def score_images(flags: ImagePairFlags, processes: Processes) -> None:
    """Score the images or statistics of `neon fid`; to stdout and, as JSON, to `--json`."""
    _check_output(flags.json, processes)
    paths = (flags.a, flags.b)
    images = [None if is_statistics(path) else open_images(path) for path in paths]
    if flags.precision_recall and None in images:
        raise RequestError("--precision_recall: needs images on both sides; statistics hold no single image")
    if not any(images):
        processes.on_main(lambda: _score_statistics(flags))
        return
    extractors = flags.extractors(processes.device)
    use_threads(processes.device, *extractors)
    tallies: list[list[Tally]] = []
    statistics: list[list[Statistics]] = []
    for path, dataset in zip(paths, images, strict=True):
        if dataset is None:
            statistics.append(statistics_in(path, extractors))
            continue
        tallies.append(
            tally_images(
                dataset,
                extractors,
                batch_size=flags.batch_size,
                processes=processes,
                keep_features=flags.precision_recall,
            )
        )
        statistics.append([Statistics.from_moments(tally.moments, name=str(path)) for tally in tallies[-1]])

    def report() -> None:
        for path, of_path in zip(paths, statistics, strict=True):
            for side in of_path:
                warn_of_few(side.count, side.dim, f"{path}: ")
        real: list[RealFeatures | None] = [None] * len(extractors)
        if flags.precision_recall:
            real = [
                RealFeatures(manifold=Manifold(tally.features, k=flags.nearest_k), kernel=tally.features)
                for tally in tallies[1]
            ]
        references = [
            Reference(extractor=extractor, frechet=FrechetReference(of_it), real=features)
            for extractor, of_it, features in zip(extractors, statistics[1], real, strict=True)
        ]
        if images[0] is not None:
            scores = scores_in(references, tallies[0], str(flags.a))
        else:
            found = [
                Scores(distance=reference.frechet.distance(one), num_images=one.count)
                for reference, one in zip(references, statistics[0], strict=True)
            ]
            scores = side_by_side(references, found)
        few = [one.metric for one, side in zip(references, statistics[1], strict=True) if are_few(side.count, side.dim)]
        protocols = {one.metric: dict(one.extractor.protocol) for one in references if one.extractor.protocol}
        _report_pair(scores, {one.metric: one.extractor.dim for one in references}, flags, few, protocols)

    processes.on_main(report)


def _score_statistics(flags: ImagePairFlags) -> None:
    """The distance of two files of statistics: only they say which features they are of."""
    a, b = Statistics.load(flags.a), Statistics.load(flags.b)
    if a.features is not None and b.features is not None and a.features != b.features:
        b = Statistics.load(flags.b, a.features)
    for path, side in ((flags.a, a), (flags.b, b)):
        warn_of_few(side.count, side.dim, f"{path}: ")
    name = (a.features or b.features or "").partition(":")[0]
    inception = name == INCEPTION or (not name and a.dim == INCEPTION_DIM)
    metric = "fid" if inception else f"fd_{name or a.dim}"
    scores = Scores(distance=FrechetReference(b).distance(a), num_images=a.count)
    _report_pair(scores, {metric: a.dim}, flags, [metric] if are_few(b.count, b.dim) else [], {})


def _report_pair(
    scores: Scores,
    dims: Mapping[str, int],
    flags: ImagePairFlags,
    few_real: Collection[str],
    protocols: Mapping[str, dict[str, str]],
) -> None:
    """Print the scores of `flags` and write them to `--json`, with the `protocols` of features by distance."""
    print(_text(scores, dims, few_real=few_real), flush=True)
    if flags.json is None:
        return
    metric, *_ = dims
    nearest_k = flags.nearest_k if flags.precision_recall else None
    facts = {"a": str(flags.a), "b": str(flags.b), "features": metric, "nearest_k": nearest_k}
    kernel = KERNEL_PROTOCOL if flags.precision_recall else {}
    resized = {"feature_protocols": protocols} if protocols else {}
    write_json(
        flags.json,
        {"metric": metric, **_entry(scores, metric, {"w": None}), **facts, **kernel, **resized, "neon": __version__},
    )
