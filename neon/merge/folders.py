"""Merging folders of transformers and diffusers models: shards, components, configuration, and a card, whole or not.

Weights are read in pieces, so that memory is a few buffers whatever their size; every w is made in one read.
"""

import contextlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import yaml

from neon.checkpoint import open_checkpoint, stream_safetensors
from neon.checkpoint.safetensors_format import check_storable, rewrite_metadata
from neon.checkpoint.weight_sets import PIPELINE_FILE, SAFETENSORS, WEIGHT_SUFFIXES, WeightSet
from neon.errors import RequestError, WorkError, reason
from neon.merge.components import Chosen, Match, choose_components
from neon.merge.copying import CARD, RECIPE_FILE, Survey, copy_file, state_dtype, survey
from neon.merge.extrapolate import UpdateStats
from neon.merge.folder_card import folder_card
from neon.merge.pair import PathLike, new_buffer, open_pair, read_pieces
from neon.merge.precision import AS_THE_BASE, Precision
from neon.merge.recipe import check_patterns, recipe_of
from neon.merge.shards import Shard, index_name, index_of, parse_size, shards_of, size_note
from neon.merge.streaming import (
    FORMULA,
    UNKNOWN_HASH,
    Hashes,
    Job,
    MergeReport,
    Progress,
    Reader,
    hashing,
    jobs_of,
    metadata_of,
    report_of,
    stream,
)
from neon.merge.ties import cut_ties
from neon.runtime.atomic_folder import atomic_folder
from neon.runtime.files import atomic_write, write_json

_FORMAT = {"format": "pt"}
"""without which transformers refuses a safetensors file"""


@dataclass(frozen=True, kw_only=True)
class FolderReport:
    """What one output of `merge_folders` holds and where it came from."""

    output: str
    w: float
    formula: str
    components: Mapping[str, MergeReport]
    """what was merged, by name; "" is a folder that is one model"""
    copied: tuple[str, ...]
    """files of the base, relative to its folder, and components whose weights are the base's"""
    left_out: tuple[str, ...]
    """what of the base's folder is not in the output, each with the reason"""
    warnings: tuple[str, ...]


def is_folder_merge(base: Path, output: str) -> bool:
    """Whether a merge is one of folders: the base is one, or nothing yet, and the output is named as one."""
    return not base.is_file() and not Path(output).suffix[1:2].isalpha()


def merge_folders(
    base: PathLike,
    self_trained: PathLike,
    ws: Sequence[float],
    output: str | os.PathLike[str],
    *,
    components: Sequence[str] = (),
    variant: str | None = None,
    shard_size: str | None = None,
    key: str | None = None,
    self_trained_key: str | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
    precision: Precision = AS_THE_BASE,
    patterns: Mapping[str, float] | None = None,
    sampler: Mapping[str, Any] | None = None,
) -> list[FolderReport]:
    """Write, for every w, a folder that is `base` with (1 + w) base - w self_trained as its weights, as safetensors.

    Args:
        base: folder of a transformers or diffusers model, or of a pipeline (`model_index.json`) of several.
        self_trained: the like of it, the folder of one component, or a file of weights.
        output: name of the folder; `{w}` in it stands for the weight and is needed when there are several.
        components: of a pipeline, those to merge; by default the one that differs.
        variant: such as "fp16", whose files are named so; by default those without.
        shard_size: the most bytes of a file, such as "5GB"; by default the weights are cut as the base's are.
        key: nesting of the base's state dict, and `self_trained_key` of the other's, as in `merge_files`.
        progress: called with (bytes merged so far, bytes in all), for each component anew.
        precision: dtype of what is merged, and how it is rounded; by default the base's, to the nearest.
        patterns: of names (`fnmatch`), and the w of the tensors that match; the first that does counts.
        sampler: record of the sampler that w was chosen for, as in `merge_files`.

    Raises:
        RequestError: an input cannot be read, the inputs do not fit each other or are quantised, no component is meant
            or several are, a w is not finite, or an output exists or cannot be written.
        WorkError: the disk is full or fails, or a result overflows its dtype. No output is left half-written.
    """
    recipe = recipe_of(
        base,
        self_trained,
        patterns,
        precision,
        key=key,
        self_trained_key=self_trained_key,
        component=list(components),
        variant=variant,
        shard_size=shard_size,
    )
    base, self_trained = Path(base), Path(self_trained)
    size = None if shard_size is None else parse_size(shard_size)
    jobs = jobs_of(ws, output, recipe)
    for job in jobs:
        _check_place(job.output, (base, self_trained))
    keys = (key, self_trained_key)
    chosen = choose_components(base, self_trained, components, variant, keys)
    if patterns:
        check_patterns(patterns, _merged_names(chosen, keys))
    found = _survey(base, chosen)
    with contextlib.ExitStack() as stack:
        folders = [
            stack.enter_context(atomic_folder(job.output, overwrite=overwrite, may_be_replaced=_is_model))
            for job in jobs
        ]
        made_of = (size, keys, progress, precision, sampler)
        merged = {match.name: _merge(match, jobs, folders, *made_of) for match in chosen.merged}
        for name, weights in chosen.copied.items():
            for folder in folders:
                _copy_weights(weights, folder / name, size)
        reports = []
        for number, (job, folder) in enumerate(zip(jobs, folders, strict=True)):
            parts = {name: made[number] for name, made in merged.items()}
            reports.append(_finish(base, job, folder, parts, chosen, found))
            if precision.dtype:
                for name in merged:
                    state_dtype(folder / name / "config.json", precision.dtype)
    return reports


def _check_place(output: Path, inputs: Sequence[Path]) -> None:
    """Refuse an output that is an input, lies in one, or holds one."""
    place = Path(os.path.realpath(output))
    for source in inputs:
        real = Path(os.path.realpath(source))
        if place == real or real in place.parents or place in real.parents:
            raise RequestError(f"{output}: is the input {source}, lies in it or holds it; choose another place")


def _is_model(folder: Path) -> bool:
    """Whether an existing folder is one of a model, which `overwrite` may replace."""
    names = [path.name for path in folder.iterdir()]
    return PIPELINE_FILE in names or any(Path(name).suffix in WEIGHT_SUFFIXES for name in names)


def _survey(base: Path, chosen: Chosen) -> Survey:
    sets = [*chosen.copied.items(), *((match.name, match.base) for match in chosen.merged)]
    used = set(chain.from_iterable(weights.all_files for _, weights in sets))
    try:
        return survey(base, [name for name, _ in sets], used)
    except OSError as error:
        raise RequestError(f"{base}: cannot be read ({reason(error)}); check its permissions") from error


def _merged_names(chosen: Chosen, keys: tuple[str | None, str | None]) -> set[str]:
    names = set[str]()
    for match in chosen.merged:
        with open_pair(match.base.path, match.self_trained, *keys) as pair:
            names |= pair.roles.merged
    return names


def _merge(
    match: Match,
    jobs: Sequence[Job],
    folders: Sequence[Path],
    size: int | None,
    keys: tuple[str | None, str | None],
    progress: Progress | None,
    precision: Precision,
    sampler: Mapping[str, Any] | None,
) -> list[MergeReport]:
    """Write the weights of one component for every job; returns what each is."""
    parts = [
        replace(job, output=folder / match.name, stats=UpdateStats(), warnings=[])
        for job, folder in zip(jobs, folders, strict=True)
    ]
    with open_pair(match.base.path, match.self_trained, *keys) as pair:
        check_storable(match.base.path, pair.base.specs)
        reader = Reader(pair, progress, sampler=sampler, precision=precision)
        shards = shards_of(pair.base, match.base, size, reader.layout)
        notes = cut_ties(pair.base, pair.self_trained)
        # A pipeline says in its configurations what it is; the files of its weights do not say it once more.
        unsaid = {"architecture", "config"} - pair.base.metadata.keys()
        if match.base.index and (
            note := size_note(match.base.index, sum(spec.nbytes for spec in pair.base.specs.values()))
        ):
            notes.append(note)
        for job in parts:
            job.warnings += notes

        def metadata(job: Job, hashes: Hashes) -> dict[str, str]:
            said = {name: text for name, text in metadata_of(reader, job, hashes).items() if name not in unsaid}
            return {**said, **_FORMAT}

        with hashing(pair) as hashes:
            unknown = [metadata(job, (UNKNOWN_HASH, UNKNOWN_HASH)) for job in parts]
            for shard in shards:
                with contextlib.ExitStack() as stack:
                    writers = [
                        stack.enter_context(stream_safetensors(job.output / shard.file, shard.layout, before))
                        for job, before in zip(parts, unknown, strict=True)
                    ]
                    stream(reader, shard.layout, parts, writers)
            for job, before in zip(parts, unknown, strict=True):
                after = metadata(job, hashes())
                for shard in shards:
                    rewrite_metadata(job.output / shard.file, shard.layout, before, after)
                _write_index(job.output, match.base, shards, after)
            return [
                report_of(reader, replace(job, output=named.output / match.name), hashes())
                for job, named in zip(parts, jobs, strict=True)
            ]


def _write_index(folder: Path, weights: WeightSet, shards: list[Shard], metadata: Mapping[str, str]) -> None:
    if len(shards) > 1:
        write_json(folder / index_name(weights), index_of(shards, metadata))


def _copy_weights(weights: WeightSet, folder: Path, size: int | None) -> None:
    """The base's weights of a component that is not merged: its files, or as safetensors if they are none."""
    if weights.format == SAFETENSORS:
        for file in weights.all_files:
            _copied(file, folder / file.name)
        return
    with open_checkpoint(weights.path) as source:
        check_storable(weights.path, source.specs)
        shards = shards_of(source, weights, size)
        for shard in shards:
            with stream_safetensors(folder / shard.file, shard.layout, {**source.metadata, **_FORMAT}) as writer:
                for name in shard.layout:
                    for _, (values,) in read_pieces(name, [source], [new_buffer()]):
                        writer.write(values)
        _write_index(folder, weights, shards, {})


def _copied(source: Path, target: Path) -> None:
    try:
        copy_file(source, target)
    except OSError as error:
        raise WorkError(f"{source}: reading failed ({reason(error)}); nothing was written") from error


def _finish(
    base: Path, job: Job, folder: Path, merged: Mapping[str, MergeReport], chosen: Chosen, found: Survey
) -> FolderReport:
    """Put what is no weights into a folder, and its card."""
    for name in found.copied:
        _copied(base / name, folder / name)
    warnings = chain(chosen.notes, *(report.warnings for report in merged.values()), found.notes)
    report = FolderReport(
        output=str(job.output),
        w=job.w,
        formula=FORMULA,
        components=dict(merged),
        copied=(*(f"{name}/" for name in chosen.copied), *found.copied),
        left_out=found.left_out,
        warnings=tuple(dict.fromkeys(warnings)),
    )
    with atomic_write(folder / RECIPE_FILE) as file:
        file.write(yaml.safe_dump(dict(job.recipe), sort_keys=False, allow_unicode=True).encode())
    with atomic_write(folder / CARD) as file:
        file.write(folder_card(base, job.w, merged, report.left_out, report.warnings).encode())
    return report
