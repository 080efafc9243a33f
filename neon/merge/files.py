"""Merging checkpoint files: every w in one read of the inputs, tensor by tensor, nothing half-written.

Memory is a few buffers for safetensors and pickle outputs; a torch output (.pth, .pt, .ckpt) needs one copy of the
weights, because torch writes objects and not streams.
"""

import contextlib
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from neon.checkpoint import Checkpoint, PickleCheckpoint, save_torch, stream_safetensors
from neon.checkpoint.safetensors_format import aligned, check_storable
from neon.checkpoint.torch_format import TorchCheckpoint
from neon.errors import RequestError
from neon.merge.extrapolate import SERIAL_CHUNK
from neon.merge.pair import open_pair
from neon.merge.precision import AS_THE_BASE, Precision
from neon.merge.recipe import check_patterns, recipe_of
from neon.merge.streaming import (
    UNKNOWN_HASH,
    Hashes,
    Job,
    MergeReport,
    Progress,
    Reader,
    hashing,
    jobs_of,
    merge_provenance,
    metadata_of,
    report_of,
    stream,
)
from neon.runtime.files import check_not_input, check_writable, write_json

_TORCH_SUFFIXES = (".pth", ".pt", ".ckpt")
_PICKLE_SUFFIX = ".pkl"
SUFFIXES = (".safetensors", *_TORCH_SUFFIXES, _PICKLE_SUFFIX)


def merge_files(
    base: str | os.PathLike[str],
    self_trained: str | os.PathLike[str],
    ws: Sequence[float],
    output: str | os.PathLike[str],
    *,
    key: str | None = None,
    self_trained_key: str | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
    sampler: Mapping[str, Any] | None = None,
    precision: Precision = AS_THE_BASE,
    patterns: Mapping[str, float] | None = None,
) -> list[MergeReport]:
    """Write (1 + w) base - w self_trained for every w; formats and nestings of the two inputs may differ.

    An output named .safetensors holds flat tensors with the base's metadata and the merge's provenance. One named
    .pth, .pt or .ckpt is the base's whole object with the chosen state dict replaced (flat, if the base is
    safetensors or a pickle), and its provenance lies beside it in `<output>.json`. So does that of one named .pkl,
    which is a copy of the base, a pickle too, with other values in the chosen network.

    Args:
        output: file name; `{w}` in it stands for the weight and is needed when there are several.
        key: nesting of the base's state dict (see `open_checkpoint`), and of the self-trained one if it has it.
        self_trained_key: nesting of the self-trained state dict.
        progress: called with (bytes merged so far, bytes in all).
        sampler: record of the sampler that w was chosen for (`neon.data.sampler`), in place of what the self-trained
            file says: the one that drew its synthetic set. The provenance holds it; where neither tells, metadata of
            the base that do stay. If given, its settings are those that the output is sampled with by default
            (`neon.settings`).
        precision: dtype of what is merged, and how it is rounded; by default the base's, to the nearest.
        patterns: of names (`fnmatch`), and the w of the tensors that match; the first that does counts.

    Raises:
        RequestError: an input cannot be read, the inputs do not fit each other or are quantised, a w is not finite, an
            output exists, is an input, has an unknown suffix or one that the base cannot have, or cannot be written
            where it is asked for.
        WorkError: the disk is full or fails, or a result overflows its dtype. No output is left half-written.
    """
    recipe = recipe_of(base, self_trained, patterns, precision, key=key, self_trained_key=self_trained_key)
    jobs = _jobs(ws, output, recipe)
    with open_pair(base, self_trained, key, self_trained_key) as opened:
        check_patterns(jobs[0].patterns, opened.roles.merged)
        _check_outputs(jobs, opened.base, opened.self_trained, overwrite=overwrite)
        suffix = jobs[0].output.suffix
        if suffix == _PICKLE_SUFFIX and precision.dtype:
            raise RequestError(
                f"--dtype {precision.dtype}: a .pkl keeps the base's; end --output in .safetensors or .pth"
            )
        passes = len(jobs) if suffix in _TORCH_SUFFIXES else 1
        pair = Reader(opened, progress, sampler=sampler, precision=precision, passes=passes)
        with hashing(opened) as hashes:
            _WRITERS[suffix](pair, jobs, hashes)
            return [report_of(pair, job, hashes()) for job in jobs]


def _jobs(ws: Sequence[float], output: str | os.PathLike[str], recipe: Mapping[str, Any]) -> list[Job]:
    """One job for every w; a RequestError if a w or a name will not do."""
    if ws and Path(output).suffix not in SUFFIXES:
        raise RequestError(
            f"{os.fspath(output)}: unknown output format; end the name in one of {', '.join(SUFFIXES)}, or in none to "
            "merge a folder into a folder"
        )
    return jobs_of(ws, output, recipe)


def _check_outputs(jobs: Sequence[Job], base: Checkpoint, self_trained: Checkpoint, *, overwrite: bool) -> None:
    for job in jobs:
        for source in (base, self_trained):
            for file in source.files:
                check_not_input(job.output, file)
        if job.output.suffix == _PICKLE_SUFFIX:
            _pickle(base, job.output).check_copyable()
        if job.output.suffix == ".safetensors":
            check_storable(job.output, base.specs)
    for job in jobs:
        check_writable(job.output, overwrite=overwrite)
        if job.output.suffix != ".safetensors":
            check_writable(_sidecar(job.output), overwrite=overwrite)


def _pickle(base: Checkpoint, output: Path) -> PickleCheckpoint:
    if not isinstance(base, PickleCheckpoint):
        raise RequestError(
            f"{output}: a .pkl is written only as a copy of a base .pkl, and {base.path} is a {base.format} file; "
            "end the name in .safetensors or .pth"
        )
    return base


def _write_safetensors(pair: Reader, jobs: Sequence[Job], hashes: Callable[[], Hashes]) -> None:
    layout = aligned(pair.layout)
    with contextlib.ExitStack() as stack:
        writers = [
            stack.enter_context(
                stream_safetensors(job.output, layout, metadata_of(pair, job, (UNKNOWN_HASH, UNKNOWN_HASH)))
            )
            for job in jobs
        ]
        stream(pair, layout, jobs, writers)
        for job, writer in zip(jobs, writers, strict=True):
            writer.replace_metadata(metadata_of(pair, job, hashes()))


def _write_pickles(pair: Reader, jobs: Sequence[Job], hashes: Callable[[], Hashes]) -> None:
    base = _pickle(pair.base, jobs[0].output)
    with contextlib.ExitStack() as stack:
        writers = [stack.enter_context(base.stream_copy(job.output)) for job in jobs]
        stream(pair, base.layout, jobs, writers)
    for job in jobs:
        job.warnings.append(
            f"{job.output.name} is a copy of {base.path.name} with other weights in {base.key or 'it'}: whatever else "
            "that file embeds (source text, augmentation, settings of its training) is copied too"
        )
        _write_sidecar(pair, job, hashes())


def _write_torch(pair: Reader, jobs: Sequence[Job], hashes: Callable[[], Hashes]) -> None:
    # One copy of the weights, filled again for every w: the inputs are mapped or in the page cache by then.
    merged = {name: torch.empty(spec.shape, dtype=spec.dtype) for name, spec in pair.layout.items()}
    for job in jobs:
        for piece in pair.pieces(pair.layout, merged):
            values = piece.merge(job)
            if values is not piece.out:
                # In the calling thread, as the merge itself: torch's other threads would wait for those that hash.
                for part, out in zip(values.split(SERIAL_CHUNK), piece.out.split(SERIAL_CHUNK), strict=True):
                    out.copy_(part)
        if isinstance(pair.base, TorchCheckpoint):
            pair.base.save_with(job.output, merged)
        else:
            save_torch(job.output, merged)
        _write_sidecar(pair, job, hashes())


_WRITERS = {
    ".safetensors": _write_safetensors,
    _PICKLE_SUFFIX: _write_pickles,
    **dict.fromkeys(_TORCH_SUFFIXES, _write_torch),
}


def _write_sidecar(pair: Reader, job: Job, hashes: Hashes) -> None:
    write_json(_sidecar(job.output), merge_provenance(pair, job, hashes))


def _sidecar(output: Path) -> Path:
    return output.with_name(output.name + ".json")
