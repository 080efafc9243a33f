"""Both inputs of a merge side by side, piece by piece, and what outputs say of them: for files and for folders."""

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch

import neon
from neon.checkpoint import Checkpoint, TensorSpec
from neon.data.sampler import SAMPLER, sampler_text
from neon.errors import RequestError
from neon.merge.extrapolate import SERIAL_CHUNK, UpdateStats, check_weight, differ, merge_flat, work_dtype
from neon.merge.pair import Pair, new_buffer, read_pieces, says_its_config, view_as
from neon.merge.precision import AS_THE_BASE, HALF, PRECISION, Precision, round_stochastically
from neon.model import described, sampler_of
from neon.runtime.files import sha256_file
from neon.runtime.hub import in_words, short_name
from neon.settings import SETTINGS

FORMULA = "theta_neon = (1 + w) * theta_base - w * theta_self_trained"
RECIPE = "recipe"
"""metadata of a merge with several w: the recipe as JSON"""
UNKNOWN_HASH = "0" * 64
"""in the place of one that is known only after the last byte was read"""

Hashes = tuple[str, str]
"""SHA-256 of base and self-trained"""
Progress = Callable[[int, int], None]
"""called with (bytes done, bytes in all)"""


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
    share_kept: float
    warnings: tuple[str, ...]


@dataclass
class Job:
    """One w and its output, while the merge runs."""

    w: float
    output: Path
    stats: UpdateStats = field(default_factory=UpdateStats)
    warnings: list[str] = field(default_factory=list)  # of what its format implies
    patterns: Mapping[str, float] = field(default_factory=dict)  # of names, and the w of theirs: the first that matches
    recipe: Mapping[str, Any] = field(default_factory=dict)  # by which it is made again

    def w_of(self, name: str) -> float:
        """The w of a tensor."""
        return next((w for pattern, w in self.patterns.items() if fnmatchcase(name, pattern)), self.w)


def jobs_of(ws: Sequence[float], output: str | os.PathLike[str], recipe: Mapping[str, Any] | None = None) -> list[Job]:
    """One job for every w, at the name that `{w}` in `output` gives it; a RequestError if a w or a name will not do.

    `recipe` as of `neon.merge.recipe.recipe_of`, for all of them.
    """
    name = os.fspath(output)
    if not ws:
        raise RequestError("no w given; name at least one merge weight")
    for w in ws:
        check_weight(w)
    if len(ws) > 1 and "{w}" not in name:
        raise RequestError(f"{name}: one name for {len(ws)} values of w; put {{w}} into it, as in neon_{{w}}.pth")
    ws = [w + 0.0 for w in ws]  # -0.0 becomes 0.0
    paths = [Path(name.replace("{w}", _w_text(w))) for w in ws]
    if len(set(paths)) < len(paths):
        raise RequestError(f"w = {' '.join(map(_w_text, ws))}: a value is given twice, both would be one output")
    recipe = recipe or {}
    patterns = dict(recipe.get("w", {}))
    for w in patterns.values():
        check_weight(w)
    return [
        Job(w, path, patterns=patterns, recipe={**recipe, "w": {**patterns, "default": w} if patterns else w})
        for w, path in zip(ws, paths, strict=True)
    ]


def _w_text(w: float) -> str:
    """The shortest text that reads back as `w`, without a trailing `.0`."""
    short = f"{w:g}"
    return short if float(short) == w else repr(w)


class Piece(NamedTuple):
    """Consecutive elements of one tensor; `self_trained` is None where the base is copied."""

    name: str
    start: int
    base: torch.Tensor
    self_trained: torch.Tensor | None
    out: torch.Tensor
    exact: torch.Tensor | None
    """where the merge is made before it is rounded stochastically"""
    seed: int

    def merge(self, job: Job) -> torch.Tensor:
        """The values for one output: in `out`, which the next call writes again, or those of the base."""
        if self.self_trained is None:
            return self.base
        target = self.out if self.exact is None else self.exact
        w = job.w_of(self.name)
        merge_flat(self.base, self.self_trained, w, target, self.name, SERIAL_CHUNK)
        if self.exact is not None:
            round_stochastically(self.exact, self.out, self.name, self.start, self.seed)
        job.stats.add(self.base, self.self_trained, w, self.out)
        return self.out


class Reader:
    """Both inputs of a merge, read side by side in pieces."""

    def __init__(
        self,
        pair: Pair,
        progress: Progress | None,
        *,
        sampler: Mapping[str, Any] | None = None,
        precision: Precision = AS_THE_BASE,
        passes: int = 1,
    ) -> None:
        """`sampler` and `precision` as in `merge_files`; `passes`: how often every tensor will be asked for."""
        self.base, self.self_trained, self.roles, self.notes = pair.base, pair.self_trained, pair.roles, pair.notes
        self.sampler = told_of(sampler, pair.self_trained)
        self.precision = precision
        self.layout = precision.layout(pair.base.specs, pair.roles.merged)
        self.any_differ = False
        self.is_adapter = pair.adapter is not None
        self._progress = progress
        self._done = 0
        self._total = passes * sum(spec.nbytes for spec in pair.base.specs.values())

    def pieces(
        self, layout: Mapping[str, TensorSpec], into: Mapping[str, torch.Tensor] | None = None
    ) -> Iterator[Piece]:
        """Every tensor of `layout` in its order, cut into pieces whose values live until the next one is asked for.

        `into`: contiguous tensors of that layout, in which pieces are merged instead of in a buffer.
        """
        buffers, out_buffer, exact_buffer = [new_buffer(), new_buffer()], new_buffer(), new_buffer()
        for name, spec in layout.items():
            files = (self.base, self.self_trained) if name in self.roles.merged else (self.base,)
            rounds = self.precision.is_stochastic and name in self.roles.merged and spec.dtype in HALF
            wide = work_dtype(*(file.dtype(name) for file in files)) if rounds else spec.dtype
            for start, (base, *others) in read_pieces(name, files, buffers, wide.itemsize):
                self_trained = others[0] if others else None
                if self_trained is not None:
                    self.any_differ = self.any_differ or differ(base, self_trained)
                here = slice(start, start + len(base))
                out = view_as(out_buffer, spec.dtype, len(base)) if into is None else into[name].view(-1)[here]
                exact = view_as(exact_buffer, wide, len(base)) if rounds else None
                yield Piece(name, start, base, self_trained, out, exact, self.precision.seed or 0)
                self._done += base.nbytes
                if self._progress:
                    self._progress(self._done, self._total)


class Writer(Protocol):
    """What takes the values of an output in order."""

    def write(self, values: torch.Tensor) -> None: ...


def stream(reader: "Reader", layout: Mapping[str, TensorSpec], jobs: Sequence[Job], writers: Sequence[Writer]) -> None:
    """Merge the tensors of `layout` for every job into its writer, with one read of the inputs."""
    for piece in reader.pieces(layout):
        for job, writer in zip(jobs, writers, strict=True):
            writer.write(piece.merge(job))


@contextmanager
def hashing(pair: Pair) -> Iterator[Callable[[], Hashes]]:
    """What gives the SHA-256 of both inputs, which are hashed while they are merged.

    Hashing releases the interpreter lock, and reads what the merge beside it reads, so that a disk is asked once.
    """
    b, s = pair.base.path, pair.self_trained.path
    with ThreadPoolExecutor(2) as pool:
        base = pool.submit(sha256_file, b)
        self_trained = base if s.samefile(b) else pool.submit(sha256_file, s)
        yield lambda: (base.result(), self_trained.result())


def metadata_of(pair: Reader, job: Job, hashes: Hashes) -> dict[str, str]:
    network = {name: text for name, text in described(pair.base).items() if name not in (*PRECISION, RECIPE)}
    if not says_its_config(pair.base) and says_its_config(pair.self_trained):  # which was told more than shapes tell
        theirs = described(pair.self_trained)
        network = {**network, **{name: theirs[name] for name in ("architecture", "config") if name in theirs}}
    return {**network, **merge_provenance(pair, job, hashes)}


def merge_provenance(pair: Reader, job: Job, hashes: Hashes) -> dict[str, str]:
    """`provenance_of` an output of weights."""
    recipe = {RECIPE: json.dumps(job.recipe)} if job.patterns else {}
    return (
        provenance_of(pair.base, pair.self_trained, job.w, hashes, pair.sampler) | pair.precision.provenance() | recipe
    )


def provenance_of(
    base: Checkpoint, self_trained: Checkpoint, w: float, hashes: Hashes, sampler: Mapping[str, str]
) -> dict[str, str]:
    """What an output says of where it came from. `sampler`: metadata of it, as `told_of` has them."""
    inputs = _inputs(base, self_trained, hashes)
    names = {"base": short_name(base.path), "self_trained": short_name(self_trained.path)}
    return {"formula": FORMULA, "w": repr(w), **inputs, **names, **sampler, "neon_version": neon.__version__}


def _inputs(base: Checkpoint, self_trained: Checkpoint, hashes: Hashes) -> dict[str, str]:
    """Which weights were merged."""
    found = dict[str, str]()
    for side, file, digest in (("base", base, hashes[0]), ("self_trained", self_trained, hashes[1])):
        found |= {side: in_words(file.path), f"{side}_key": file.key, f"{side}_sha256": digest}
    return found


def report_of(pair: Reader, job: Job, hashes: Hashes) -> MergeReport:
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
        share_kept=job.stats.share_kept,
        warnings=(
            *pair.notes,
            *job.stats.warnings(
                job.w,
                any_differ=pair.any_differ,
                is_added=pair.is_adapter,
                advice=pair.precision.advice,
                is_random=pair.precision.is_stochastic,
            ),
            *job.warnings,
        ),
    )


def told_of(chosen: Mapping[str, Any] | None, self_trained: Checkpoint) -> dict[str, str]:
    """What metadata say of the sampler: of the one that w was `chosen` for, else of that of the synthetic set."""
    if chosen is not None:
        return {SAMPLER: sampler_text(chosen), SETTINGS: json.dumps(chosen["settings"])}
    drew = sampler_of(self_trained.metadata)
    return {} if drew is None else {SAMPLER: sampler_text(drew)}
