"""The improved weights as files that know how to be sampled."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from neon.checkpoint.weight_sets import pipeline_of
from neon.data.sampler import sampler_record
from neon.errors import RequestError, warn
from neon.merge import merge_files
from neon.merge.folders import merge_folders
from neon.tune.run import Tuner
from neon.tune.search import Point

IMPROVED = "improved"
"""the name of their files"""
COPIED = (".pkl", ".pth", ".pt", ".ckpt")
"""formats of a base that its improved weights are written in, too"""


def write_weights(tuner: Tuner, point: Point) -> tuple[Path, ...]:
    """The files of the merge at `point`, in the folder of the run: safetensors, and the format of a base of `COPIED`.

    Of a pipeline also a folder, which is the base's with this denoiser. They carry the settings that w was chosen at
    (`neon.settings`). None for the base, w = 0.
    """
    if point.w == 0:
        return ()
    plan, scorer = tuner.plan, tuner.scorer
    sampler = sampler_record(scorer.model.architecture, tuner.settings_at(point))

    def write(suffix: str) -> Path:
        output = scorer.folder / f"{IMPROVED}{suffix}"
        merge_files(
            plan.base,
            tuner.snapshots[point.snapshot],
            [point.w],
            output,
            key=plan.key,
            self_trained_key=tuner.own_key,
            overwrite=True,
            sampler=sampler,
        )
        return output

    written = [write(".safetensors")]
    if plan.base.suffix in COPIED:
        try:
            written.append(write(plan.base.suffix))
        except RequestError as error:  # a pickle that cannot be copied
            warn(f"{error}; the improved weights are .safetensors only")
    return (*written, *write_pipelines(plan.base, tuner.snapshots[point.snapshot], [point.w], written[0], sampler))


def write_pipelines(
    base: Path, self_trained: Path, ws: Sequence[float], weights: Path, sampler: dict[str, Any]
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
