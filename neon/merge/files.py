"""Merging checkpoint files: every w in one read of the inputs, tensor by tensor, nothing half-written.

Memory is a few buffers for safetensors and pickle outputs; a torch output (.pth, .pt, .ckpt) needs one copy of the
weights, because torch writes objects and not streams.
"""

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

import neon
from neon.checkpoint import (
    Checkpoint,
    PickleCheckpoint,
    PickleWriter,
    SafetensorsWriter,
    TensorSpec,
    save_torch,
    stream_safetensors,
)
from neon.checkpoint.safetensors_format import aligned, check_storable
from neon.checkpoint.torch_format import TorchCheckpoint
from neon.data.sampler import SAMPLER, sampler_text
from neon.errors import RequestError
from neon.merge.extrapolate import SERIAL_CHUNK, UpdateStats, check_weight, differ, merge_flat
from neon.merge.pair import Pair, new_buffer, open_pair, read_pieces, says_its_config, view_as
from neon.model import described, sampler_of
from neon.runtime.files import check_not_input, check_writable, sha256_file, write_json
from neon.settings import SETTINGS

FORMULA = "theta_neon = (1 + w) * theta_base - w * theta_self_trained"

_TORCH_SUFFIXES = (".pth", ".pt", ".ckpt")
_PICKLE_SUFFIX = ".pkl"
_SUFFIXES = (".safetensors", *_TORCH_SUFFIXES, _PICKLE_SUFFIX)
_UNKNOWN_HASH = "0" * 64

Progress = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True)
class MergeReport:
    """What one output of `merge_files` holds and where it came from."""

    output: str
    w: float
    formula: str
    base: str
    base_key: str  # nesting the state dict was found in; "" is the file itself
    base_candidates: tuple[str, ...]  # nestings the base file offers
    base_sha256: str
    self_trained: str
    self_trained_key: str
    self_trained_candidates: tuple[str, ...]
    self_trained_sha256: str
    merged_tensors: int
    copied_tensors: int
    buffers: tuple[str, ...]  # names of those copied although of a float dtype (see `Roles`)
    share_lost: float  # see UpdateStats
    relative_error: float
    warnings: tuple[str, ...]


@dataclass
class _Job:
    """One w and its output, while the merge runs."""

    w: float
    output: Path
    stats: UpdateStats = field(default_factory=UpdateStats)
    warnings: list[str] = field(default_factory=list)  # of what its format implies


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

    Raises:
        RequestError: an input cannot be read, the inputs do not fit each other or are quantised, a w is not finite, an
            output exists, is an input, has an unknown suffix or one that the base cannot have, or cannot be written
            where it is asked for.
        WorkError: the disk is full or fails, or a result overflows its dtype. No output is left half-written.
    """
    jobs = _jobs(ws, output)
    with open_pair(base, self_trained, key, self_trained_key) as opened:
        b, s = opened.base, opened.self_trained
        _check_outputs(jobs, b, s, overwrite=overwrite)
        for job in jobs:
            job.stats.is_added = opened.adapter is not None
        pair = _Reader(opened, progress, told_of(sampler, s))
        with ThreadPoolExecutor(2) as pool:
            # Hashing releases the interpreter lock, so both files are hashed while they are merged.
            base_hash = pool.submit(sha256_file, b.path)
            self_trained_hash = base_hash if s.path.samefile(b.path) else pool.submit(sha256_file, s.path)
            _WRITERS[jobs[0].output.suffix](pair, jobs, lambda: (base_hash.result(), self_trained_hash.result()))
        return [_report(pair, job, (base_hash.result(), self_trained_hash.result())) for job in jobs]


def told_of(chosen: Mapping[str, Any] | None, self_trained: Checkpoint) -> dict[str, str]:
    """What metadata say of the sampler: of the one that w was `chosen` for, else of that of the synthetic set."""
    if chosen is not None:
        return {SAMPLER: sampler_text(chosen), SETTINGS: json.dumps(chosen["settings"])}
    drew = sampler_of(self_trained.metadata)
    return {} if drew is None else {SAMPLER: sampler_text(drew)}


def _jobs(ws: Sequence[float], output: str | os.PathLike[str]) -> list[_Job]:
    """One job for every w; a RequestError if a w or a name will not do."""
    name = os.fspath(output)
    if not ws:
        raise RequestError("no w given; name at least one merge weight")
    for w in ws:
        check_weight(w)
    if Path(name).suffix not in _SUFFIXES:
        raise RequestError(f"{name}: unknown output format; end the name in one of {', '.join(_SUFFIXES)}")
    if len(ws) > 1 and "{w}" not in name:
        raise RequestError(f"{name}: one name for {len(ws)} values of w; put {{w}} into it, as in neon_{{w}}.pth")
    ws = [w + 0.0 for w in ws]  # -0.0 becomes 0.0
    paths = [Path(name.replace("{w}", _w_text(w))) for w in ws]
    if len(set(paths)) < len(paths):
        raise RequestError(f"w = {' '.join(map(_w_text, ws))}: a value is given twice, both would be one output")
    return [_Job(w, path) for w, path in zip(ws, paths, strict=True)]


def _w_text(w: float) -> str:
    """The shortest text that reads back as `w`, without a trailing `.0`."""
    short = f"{w:g}"
    return short if float(short) == w else repr(w)


def _check_outputs(jobs: Sequence[_Job], base: Checkpoint, self_trained: Checkpoint, *, overwrite: bool) -> None:
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


class _Piece(NamedTuple):
    """Consecutive elements of one tensor; `self_trained` is None where the base is copied."""

    name: str
    start: int
    base: torch.Tensor
    self_trained: torch.Tensor | None
    out: torch.Tensor

    def merge(self, job: _Job) -> torch.Tensor:
        """The values for one output, in a buffer that the next call writes again."""
        if self.self_trained is None:
            return self.base
        merge_flat(self.base, self.self_trained, job.w, self.out, self.name, SERIAL_CHUNK)
        job.stats.add(self.base, self.self_trained, job.w, self.out)
        return self.out


class _Reader:
    """Both inputs of a merge, read side by side in pieces."""

    def __init__(self, pair: Pair, progress: Progress | None, sampler: dict[str, str]) -> None:
        self.base, self.self_trained, self.roles, self.notes = pair.base, pair.self_trained, pair.roles, pair.notes
        self.sampler = sampler
        self.any_differ = False
        self._progress = progress
        self._done = 0

    def pieces(self, layout: Mapping[str, TensorSpec], passes: int = 1) -> Iterator[_Piece]:
        """Every tensor of `layout` in its order, cut into pieces whose values live until the next one is asked for."""
        total = passes * sum(spec.nbytes for spec in layout.values())
        buffers, out_buffer = [new_buffer(), new_buffer()], new_buffer()
        for name, spec in layout.items():
            files = (self.base, self.self_trained) if name in self.roles.merged else (self.base,)
            for start, (base, *others) in read_pieces(name, files, buffers):
                self_trained = others[0] if others else None
                if self_trained is not None:
                    self.any_differ = self.any_differ or differ(base, self_trained)
                yield _Piece(name, start, base, self_trained, view_as(out_buffer, spec.dtype, len(base)))
                self._done += base.nbytes
                if self._progress:
                    self._progress(self._done, total)


def _write_safetensors(pair: _Reader, jobs: Sequence[_Job], hashes: Callable[[], tuple[str, str]]) -> None:
    layout = aligned(pair.base.specs)
    with contextlib.ExitStack() as stack:
        writers = [
            stack.enter_context(
                stream_safetensors(job.output, layout, _metadata(pair, job, (_UNKNOWN_HASH, _UNKNOWN_HASH)))
            )
            for job in jobs
        ]
        _stream(pair, layout, jobs, writers)
        for job, writer in zip(jobs, writers, strict=True):
            writer.replace_metadata(_metadata(pair, job, hashes()))


def _write_pickles(pair: _Reader, jobs: Sequence[_Job], hashes: Callable[[], tuple[str, str]]) -> None:
    base = _pickle(pair.base, jobs[0].output)
    with contextlib.ExitStack() as stack:
        writers = [stack.enter_context(base.stream_copy(job.output)) for job in jobs]
        _stream(pair, base.layout, jobs, writers)
    for job in jobs:
        job.warnings.append(
            f"{job.output.name} is a copy of {base.path.name} with other weights in {base.key or 'it'}: whatever else "
            "that file embeds (source text, augmentation, settings of its training) is copied too"
        )
        write_json(_sidecar(job.output), _provenance(pair, job, hashes()))


def _stream(
    pair: _Reader,
    layout: Mapping[str, TensorSpec],
    jobs: Sequence[_Job],
    writers: Sequence[SafetensorsWriter | PickleWriter],
) -> None:
    for piece in pair.pieces(layout):
        for job, writer in zip(jobs, writers, strict=True):
            writer.write(piece.merge(job))


def _write_torch(pair: _Reader, jobs: Sequence[_Job], hashes: Callable[[], tuple[str, str]]) -> None:
    # One copy of the weights, filled again for every w: the inputs are mapped or in the page cache by then.
    merged = {name: torch.empty(spec.shape, dtype=spec.dtype) for name, spec in pair.base.specs.items()}
    for job in jobs:
        for piece in pair.pieces(pair.base.specs, passes=len(jobs)):
            values = piece.merge(job)
            merged[piece.name].view(-1)[piece.start : piece.start + len(values)] = values
        if isinstance(pair.base, TorchCheckpoint):
            pair.base.save_with(job.output, merged)
        else:
            save_torch(job.output, merged)
        write_json(_sidecar(job.output), _provenance(pair, job, hashes()))


_WRITERS = {
    ".safetensors": _write_safetensors,
    _PICKLE_SUFFIX: _write_pickles,
    **dict.fromkeys(_TORCH_SUFFIXES, _write_torch),
}


def _sidecar(output: Path) -> Path:
    return output.with_name(output.name + ".json")


def _metadata(pair: _Reader, job: _Job, hashes: tuple[str, str]) -> dict[str, str]:
    network = described(pair.base)
    if not says_its_config(pair.base) and says_its_config(pair.self_trained):  # which was told more than shapes tell
        theirs = described(pair.self_trained)
        network = {**network, **{name: theirs[name] for name in ("architecture", "config") if name in theirs}}
    return {**network, **_provenance(pair, job, hashes)}


def _provenance(pair: _Reader, job: _Job, hashes: tuple[str, str]) -> dict[str, str]:
    return provenance_of(pair.base, pair.self_trained, job.w, hashes, pair.sampler)


def provenance_of(
    base: Checkpoint, self_trained: Checkpoint, w: float, hashes: tuple[str, str], sampler: Mapping[str, str]
) -> dict[str, str]:
    """What an output says of where it came from. `sampler`: metadata of it, as `told_of` has them."""
    inputs = _inputs(base, self_trained, hashes)
    names = {side: Path(inputs[side]).name for side in ("base", "self_trained")}  # folders are nobody's business
    return {"formula": FORMULA, "w": repr(w), **inputs, **names, **sampler, "neon_version": neon.__version__}


def _inputs(base: Checkpoint, self_trained: Checkpoint, hashes: tuple[str, str]) -> dict[str, str]:
    """Which weights were merged."""
    found = dict[str, str]()
    for side, file, digest in (("base", base, hashes[0]), ("self_trained", self_trained, hashes[1])):
        found |= {side: str(file.path), f"{side}_key": file.key, f"{side}_sha256": digest}
    return found


def _report(pair: _Reader, job: _Job, hashes: tuple[str, str]) -> MergeReport:
    return MergeReport(
        output=str(job.output),
        w=job.w,
        formula=FORMULA,
        **_inputs(pair.base, pair.self_trained, hashes),
        base_candidates=pair.base.candidates,
        self_trained_candidates=pair.self_trained.candidates,
        merged_tensors=len(pair.roles.merged),
        copied_tensors=len(pair.base.specs) - len(pair.roles.merged),
        buffers=pair.roles.buffers,
        share_lost=job.stats.share_lost,
        relative_error=job.stats.relative_error,
        warnings=(*pair.notes, *job.stats.warnings(job.w, any_differ=pair.any_differ), *job.warnings),
    )
