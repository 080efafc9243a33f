"""The method's promise without real images: one self-training, merges at usual w, and samples to look at."""

from pathlib import Path
from typing import Any

from neon.data.sampler import sampler_record
from neon.improve.plan import ImprovePlan
from neon.improve.run import Base, identity_of, notes_of, say_what_is_left, self_trained, training_of
from neon.merge import merge_files
from neon.merge.live import beside
from neon.model import GenerativeModel, own_class
from neon.report.samples import Samples
from neon.report.unscored import Unscored, write_unscored
from neon.runtime.distributed import Processes
from neon.runtime.hub import short_name
from neon.runtime.run_folder import held_by_main
from neon.runtime.trackers import TrackerName
from neon.tune.pictures import LOOKED_AT, SHOWN, samples_at
from neon.tune.weights import IMPROVED, write_lora, write_pipelines

WS = (0.5, 1.0, 1.5)
"""merge weights that gained in most of the published experiments"""
UNSCORED = (
    "Nothing was scored, for no real images were given: whether a merge is better than the base is for you to see. "
    "With --real (statistics or images) w is chosen by the distance to them, and the gain reported."
)


def improve_unscored(
    plan: ImprovePlan,
    base: Base,
    model: GenerativeModel,
    settings: Any,
    out: Path,
    processes: Processes,
    *,
    recipe: dict[str, Any],
    facts: dict[str, Any],
    fresh: bool = False,
    log: TrackerName | None = None,
) -> tuple[tuple[Path, ...], str]:
    """Self-train `base` for the sampler of `settings`, write merges at `WS` and a page of their samples into `out`.

    Returns the files of the merges, and what was made and what to do next, for a terminal. Errors as of `improve`.
    """
    self_training = training_of(plan, base, model, log)
    identity = processes.on_main(lambda: identity_of(base, model, settings, recipe, facts))
    with held_by_main(out, identity, processes, fresh=fresh):
        say_what_is_left(plan, model, settings, None, out, processes)
        self_training, snapshots = self_trained(plan, self_training, settings, out, processes)
        last = snapshots[-1]
        samples = _samples(plan, base, model, settings, last, processes)
        shown = Unscored(
            title=f"Neon: {short_name(base.path)}, merged",
            samples=samples,
            notes=(UNSCORED, *notes_of(plan, self_training, model)),
            provenance=identity,
        )

        def write() -> list[str]:
            sampler = sampler_record(model.architecture, settings)
            named = out / f"{IMPROVED}-{{w}}.safetensors"
            reports = merge_files(base.path, last, WS, named, key=base.key, overwrite=True, sampler=sampler)
            write_pipelines(base.path, last, WS, named, sampler)
            for w in WS if plan.lora_rank else ():
                adapter = out / f"{IMPROVED}-{w:g}-lora"
                write_lora(base.path, last, w, adapter, of_pipeline=bool(model.component), key=base.key)
            write_unscored(out, shown)
            return [report.output for report in reports]

        written = processes.on_main(write)
    text = "\n".join(
        [
            "",
            UNSCORED,
            f"Merges at w = {', '.join(f'{w:g}' for w in WS)}, which say their sampler: {', '.join(written)}",
            f"Samples of each on the same noise: {out / 'report.html'}",
            f"Next: look at them, then neon sample --network {written[1]}{own_class(type(model))} --num_images 50000 "
            "--outdir samples.zip",
        ]
    )
    return tuple(map(Path, written)), text


def _samples(
    plan: ImprovePlan, base: Base, model: GenerativeModel, settings: Any, self_trained: Path, processes: Processes
) -> Samples:
    """Images of the same noise at every w."""
    live = beside(model.network, base.path, self_trained, base.key).live()

    def put(w: float) -> GenerativeModel:
        live.set(w)
        return model

    samples = samples_at(LOOKED_AT, put, model, settings, plan.seed, SHOWN, plan.batch_size, processes)
    live.set(0.0)  # whoever handed the model in finds it as it was
    return samples
