"""What a run will make and take: stages, images, network calls, disk, and the time by one batch."""

import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from neon.improve.plan import ImprovePlan
from neon.lora.layers import added_parameters
from neon.model import GenerativeModel
from neon.noise import Purpose, image_seeds
from neon.runtime.distributed import Processes
from neon.sampling import sample_block
from neon.tunable import at_calls
from neon.tune.inputs import Inputs
from neon.tune.pictures import LOOKED_AT, SHOWN, slider_ws

TRAINED = 3
"""network calls that a training image is worth: forward, and backward at twice that"""
STATE = 5
"""copies of what is trained that a self-training keeps on the disk: it, two moments, average, a snapshot"""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A part of a run, at most."""

    name: str
    images: int
    """made or trained on"""
    calls: int
    """of the network for each of them"""
    scored: bool = False
    """whether their features are compared"""
    disk: int = 0
    """bytes left behind"""


def stages(plan: ImprovePlan, model: GenerativeModel, settings: Any, features: int | None) -> list[Stage]:
    """The stages of a run in their order; `features` is how many scores are made of, None: there are none."""
    calls = model.calls(settings) or 1
    channels, height, width = model.image_shape
    weights = sum(parameter.numel() * parameter.element_size() for parameter in model.network.parameters())
    lora = plan.lora(model)
    kept = weights if lora is None else 4 * added_parameters(model.network, lora)
    drawn = Stage(
        name="synthetic set", images=plan.num_synthetic, calls=calls,
        disk=plan.num_synthetic * (channels * height * width + 500),
    )  # fmt: skip
    trained = Stage(
        name="self-training", images=plan.budget, calls=TRAINED, disk=kept * (STATE + plan.snapshots - 1)
    )  # fmt: skip
    if features is None:
        shown = len(LOOKED_AT) * SHOWN
        return [drawn, trained, Stage(name="merges and their samples", images=shown, calls=calls, disk=3 * weights)]
    moments = 8 * features * (features + 1)
    choice = Stage(
        name="choice of w", images=plan.limit * plan.select_images, calls=calls, scored=True, disk=plan.limit * moments
    )  # fmt: skip
    found = [drawn, trained, choice]
    if plan.tune_sampler and plan.sampler_scores > 1 and model.tunable:
        number = plan.sampler_scores
        found += [
            Stage(
                name="base's best sampler", images=number * plan.select_images, calls=calls, scored=True,
                disk=number * moments,
            ),
            *(replace(stage, name=f"{stage.name}, that sampler") for stage in (drawn, trained, choice)),
        ]  # fmt: skip
    return [*found, *_report(plan, model, settings, calls, weights)]


def _report(
    plan: ImprovePlan, model: GenerativeModel, settings: Any, calls: int, weights: int
) -> Iterable[Stage]:  # fmt: skip
    each = plan.images_of_report
    yield Stage(name="report", images=5 * plan.blocks * each, calls=calls, scored=True, disk=weights)
    yield Stage(name="samples on the page", images=len(slider_ws(*plan.w)) * SHOWN, calls=calls)
    if not plan.baselines:
        return
    if model.calls(settings) is not None and at_calls(model.calls, settings, 2 * calls) is not None:
        yield Stage(name="base, twice the calls", images=plan.blocks * each, calls=2 * calls, scored=True)
    converged = model.converged(settings)
    if converged is not None and (many := model.calls(converged) or 0) > 2 * calls:
        yield Stage(name="base, converged", images=each, calls=many, scored=True)
    if model.combines:
        yield Stage(name="both networks", images=plan.blocks * each, calls=2 * calls, scored=True)


def stages_text(found: list[Stage]) -> str:
    """The stages as a table, with their sums."""
    lines = [("stage", "images", "calls each", "calls", "disk")]
    lines += [
        (stage.name, f"{stage.images:,}", str(stage.calls), f"{stage.images * stage.calls:,}", _bytes(stage.disk))
        for stage in found
    ]
    calls, disk = sum(stage.images * stage.calls for stage in found), sum(stage.disk for stage in found)
    lines.append(("at most", "", "", f"{calls:,}", _bytes(disk)))
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if not column else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def _bytes(number: int) -> str:
    if not number:
        return ""
    return f"{number / 1e9:,.1f} GB" if number >= 1e9 else f"{number / 1e6:,.1f} MB"


def seconds_of(found: list[Stage], inputs: Inputs | None, model: GenerativeModel, settings: Any, plan: ImprovePlan,
               processes: Processes) -> float:  # fmt: skip
    """Seconds that the stages take at most, by one batch of the synthetic set in every process, and its features."""
    batch = min(plan.batch_size, plan.num_synthetic)
    seeds = image_seeds(Purpose.SYNTHETIC, plan.seed, batch)
    labels = model.labels_for(Purpose.SYNTHETIC, batch, plan.seed)
    begun = time.monotonic()
    images, _ = sample_block(model, range(batch), seeds, settings, processes, labels)
    images = images.cpu()  # on a GPU the work is done when they are here
    sampled = time.monotonic()
    if inputs is not None:
        for reference in inputs.reporting:
            reference.extractor(images.to(processes.device)).cpu()
    scored = time.monotonic()
    each_call = (sampled - begun) / batch / (model.calls(settings) or 1)
    each_score = (scored - sampled) / batch
    total = sum(stage.images * (stage.calls * each_call + stage.scored * each_score) for stage in found)
    return processes.from_main(total / processes.world_size)


def duration_text(seconds: float) -> str:
    """Seconds as people say them."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
