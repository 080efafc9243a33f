"""The improved weights as files that know how to be sampled; of a LoRA also as an adapter of the base."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from neon.checkpoint.weight_sets import pipeline_of
from neon.data.sampler import sampler_record
from neon.errors import RequestError, warn
from neon.merge import merge_files
from neon.merge.adapters.writing import write_adapter
from neon.merge.folders import merge_folders
from neon.model import GenerativeModel, read_weights
from neon.tune.run import Tuner
from neon.tune.search import Point

IMPROVED = "improved"
"""the name of their files"""
IMPROVED_LORA = f"{IMPROVED}-lora"
"""of the folder of an adapter that makes them of the base, loaded at scale 1"""
COPIED = (".pkl", ".pth", ".pt", ".ckpt")
"""formats of a base that its improved weights are written in, too"""


def write_weights(tuner: Tuner, point: Point) -> tuple[Path, ...]:
    """The files of the merge at `point`, in the folder of the run: safetensors, and the format of a base of `COPIED`.

    They carry the settings that w was chosen at (`neon.settings`). Where the self-trained weights are a LoRA there is
    the folder of an adapter, too, and elsewhere, of a pipeline, a folder which is the base's with this denoiser. None
    for the base, w = 0.
    """
    folder, suffix = tuner.scorer.folder, tuner.plan.base.suffix
    if point.w == 0:
        if tuner.weights[point.snapshot].is_adapter:  # one was written to be scored
            (folder / f"{IMPROVED}.safetensors").unlink(missing_ok=True)
        return ()
    written = [_merged(tuner, point, ".safetensors")]
    if suffix in COPIED:
        try:
            written.append(_merged(tuner, point, suffix))
        except RequestError as error:  # a pickle that cannot be copied
            warn(f"{error}; the improved weights are .safetensors only")
    base, snapshot = tuner.plan.base, tuner.snapshots[point.snapshot]
    if tuner.weights[point.snapshot].is_adapter:
        keys = {"key": tuner.plan.key, "self_trained_key": tuner.own_key}
        of_pipeline = bool(tuner.scorer.model.component)
        written += write_lora(base, snapshot, point.w, folder / IMPROVED_LORA, of_pipeline=of_pipeline, **keys)
    else:
        written += write_pipelines(base, snapshot, [point.w], written[0], _sampler(tuner, point))
    return tuple(written)


def write_pipelines(
    base: Path, self_trained: Path, ws: Sequence[float], weights: Path, sampler: dict[str, Any] | None
) -> list[Path]:
    """Folders of pipelines with the merges at `ws`, named as the files `weights`; none unless `base` is of a pipeline.

    `{w}` in the name stands for w; `sampler` is the record of that which w belongs to.
    """
    folder = pipeline_of(base)
    if folder is None:
        return []
    output = weights.with_suffix("")
    try:
        reports = merge_folders(folder, self_trained, ws, output, overwrite=True, sampler=sampler)
    except RequestError as error:  # the base's folder cannot be copied as a whole, or holds that of the run
        warn(f"{error}; the improved weights are {weights.name} only")
        return []
    return [Path(report.output) for report in reports]


def reopened(tuner: Tuner, point: Point) -> GenerativeModel:
    """The live model with the weights of `point` as they are written, read from the file."""
    path = tuner.scorer.processes.on_main(lambda: _merged(tuner, point, ".safetensors"))
    model = tuner.merged(point)  # so that the base comes back by what puts it back after any merge
    read_weights(model.network, path)
    return model


def _merged(tuner: Tuner, point: Point, suffix: str) -> Path:
    """The merge at `point` in the format of a suffix."""
    plan = tuner.plan
    output = tuner.scorer.folder / f"{IMPROVED}{suffix}"
    merge_files(
        plan.base,
        tuner.snapshots[point.snapshot],
        [point.w],
        output,
        key=plan.key,
        self_trained_key=tuner.own_key,
        overwrite=True,
        sampler=_sampler(tuner, point),
    )
    return output


def _sampler(tuner: Tuner, point: Point) -> dict[str, Any] | None:
    """The record of the sampler that w was chosen at."""
    return sampler_record(tuner.scorer.model.architecture, tuner.settings_at(point))


def write_lora(base: Path, self_trained: Path, w: float, output: Path, *, of_pipeline: bool, **keys: Any) -> list[Path]:
    """The adapter that makes the merge at `w` of the base, in the folder `output`; none where it changes no layer.

    Of diffusers for the network of a pipeline, else PEFT's. `keys`: those of `write_adapter`.
    """
    try:
        report = write_adapter(
            base,
            self_trained,
            w,
            output,
            adapter_format="diffusers" if of_pipeline else "peft",
            overwrite=True,
            **keys,
        )
    except RequestError as error:
        warn(f"{error}; there is no {output.name}")
        return []
    for text in report.warnings:
        warn(f"{output}: {text}")
    return [output]
