"""The loop of training: steps until the last, state and snapshots when they are due, in a folder that is held."""

import contextlib
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from neon.data.images import TrainingImages
from neon.errors import RequestError
from neon.lora.settings import LoRA, record_of
from neon.model import GenerativeModel
from neon.noise import Purpose, image_seeds
from neon.recipe import Recipe
from neon.runtime.background import Background
from neon.runtime.compiling import check_compiler
from neon.runtime.distributed import Processes
from neon.runtime.parallel import Parallel
from neon.runtime.progress import Progress
from neon.runtime.run_folder import held_by_main
from neon.runtime.signals import postponed
from neon.runtime.trackers import Tracker, TrackerName
from neon.selftrain.examples import asked, check_trainable, encoded_once
from neon.selftrain.memory import enough_memory
from neon.selftrain.run import TrainingRun
from neon.selftrain.snapshots import Snapshot, snapshot_path
from neon.trained import checkpoint_gradients

EXAMPLES = "examples"
"""folder of what images are encoded as, where that is done once"""


def train(
    model: GenerativeModel,
    dataset: TrainingImages,
    folder: str | os.PathLike[str],
    *,
    num_steps: int,
    snapshot_steps: Sequence[int],
    recipe: Recipe,
    seed: int,
    processes: Processes,
    micro_batch: int | None = None,
    state_every_seconds: float = 60.0,
    title: str = "training",
    identity: Mapping[str, Any] | None = None,
    on_snapshot: Callable[[Snapshot], None] | None = None,
    parallel: Parallel | None = None,
    keep_raw: bool = False,
    lora: LoRA | None = None,
    gradient_checkpointing: bool = False,
    compile_network: bool = False,
    log: TrackerName | None = None,
    workers: int | None = None,
) -> list[Snapshot]:
    """Train for `num_steps` optimiser steps from the weights of `model`; a snapshot after each of `snapshot_steps`.

    Results are the snapshots: the averaged weights if the recipe averages, else the raw ones; `model.network` is
    worked on in place, and of no use afterwards if the run was finished before. The state of the run is saved
    every `state_every_seconds` and at each snapshot; a second call with the same folder goes on from there.

    Args:
        micro_batch: images per forward pass; the recipe's batch is cut into micro-batches which processes
            take in turn. Results depend on it (by rounding) but not on the number of processes.
        identity: what else determines the result (starting weights, augmentation), as JSON.
        on_snapshot: called in the main process when a snapshot is there; again in a run that continues.
        parallel: how several processes add up gradients (`neon.selftrain.engine`); by default in order on CPUs, by
            `ddp` on GPUs, and there by `fsdp` where nothing else fits. Moves results by rounding only, and is no part
            of what a run is held for; but `fsdp` keeps the state in a form of its own.
        keep_raw: beside each snapshot of averaged weights write the raw ones, as `raw-<its name>`.
        lora: train factors of low rank in the place of the weights; snapshots hold these alone.
        gradient_checkpointing: compute activations once more for the backward pass, which moves no result.
        compile_network: by torch.compile, which moves results by rounding; a run may go on without, and with it.
        log: a tracker that the curves go to as well, by images seen.
        workers: processes that read and prepare images ahead, for each that trains; by default none on a CPU.

    Raises:
        RequestError: the images do not fit the model, batch sizes do not divide, the targets of `lora` match nothing,
            the network cannot checkpoint gradients, or there is no compiler.
        WorkError: the loss is not finite, or a GPU has too little memory.
    """
    micro_batch = recipe.batch_size if micro_batch is None else micro_batch
    dataset = asked(model, dataset)
    check_trainable(model, dataset, recipe.batch_size, micro_batch)
    folder, batch = Path(folder), recipe.batch_size
    wanted = sorted({min(step, num_steps) for step in snapshot_steps} | {num_steps})
    snapshots = {step: Snapshot(images_seen=step * batch, path=snapshot_path(folder, step * batch)) for step in wanted}
    image_seeds(Purpose.TRAINING, seed, 0)  # refuses a seed out of range
    facts = {"seed": seed, "images": len(dataset), "micro_batch": micro_batch, "recipe": recipe.facts()}
    facts |= {**(identity or {}), **record_of(lora)}
    if gradient_checkpointing:
        checkpoint_gradients(model)
    if compile_network:
        check_compiler(processes.device)
        model.compile_training()
    run = TrainingRun(
        model,
        dataset,
        folder,
        recipe,
        seed,
        processes,
        micro_batch,
        facts,
        parallel=parallel,
        lora=lora,
        workers=workers,
    )

    def tell(steps: Iterable[int]) -> None:
        for step in steps:
            if on_snapshot is not None:
                on_snapshot(snapshots[step])

    if processes.on_main(lambda: all(run.has_written(snapshot.path) for snapshot in snapshots.values())):
        processes.on_main(lambda: tell(wanted))
        return list(snapshots.values())
    run.resume()
    processes.on_main(lambda: _check_kept(folder, run.step, snapshots))
    processes.on_main(lambda: tell(step for step in wanted if step <= run.step))
    last_saved = time.monotonic()
    with (
        contextlib.closing(run.inputs),
        Tracker(log, folder, run.identity, processes) as tracker,
        Progress(title, num_steps * batch, "img", processes, done=run.step * batch) as progress,
        Background(threads=1, ahead=1) as saving,
        postponed(),
    ):
        for row in run.logged() if tracker.on else ():
            tracker.log({"training/loss": row.get("loss"), "training/lr": row.get("lr")}, row["images_seen"])
        while run.step < num_steps:
            begun = time.monotonic()
            with enough_memory(folder):
                loss, lr = run.one_step()
            rate = batch / (time.monotonic() - begun)
            progress.advance(batch, loss=f"{loss:.3f}", lr=f"{lr:.1e}")
            result = run.result if run.step in snapshots else None
            moved = None if result is None else run.moved(result)
            run.log(loss, lr, moved)
            curves = {"training/loss": loss, "training/lr": lr, "training/images_per_second": rate}
            tracker.log(curves, run.step * batch)
            due = moved is not None or run.stop is not None or time.monotonic() - last_saved > state_every_seconds
            due = processes.from_main(due) if run.engine.keeps_folder else due and processes.is_main
            if processes.is_main and due:
                run.write_curve()  # first: with the last snapshot all is done
            if result is not None and moved is not None:
                run.write_snapshot(result, moved, keep_raw=keep_raw)
                processes.on_main(lambda: tell([run.step]))
            if due:
                run.save_state(saving)
                last_saved = time.monotonic()
            if run.stop is not None:
                saving.wait()
                processes.barrier()  # nobody leaves before the state is written
                run.stop.kept = f"step {run.step:,} of {num_steps:,}"
                raise run.stop
    processes.barrier()
    model.network.eval().requires_grad_(False)
    return list(snapshots.values())


def _check_kept(folder: Path, step: int, snapshots: Mapping[int, Snapshot]) -> None:
    """A RequestError if one of the `snapshots` up to `step`, by which they are told, does not lie in `folder`."""
    lost = [snapshot.path.name for due, snapshot in snapshots.items() if due <= step and not snapshot.path.exists()]
    if lost:
        raise RequestError(
            f"{folder}: training stands at step {step}, past snapshots that were not written ({', '.join(lost)}); "
            "start in another folder"
        )


def train_in_folder(
    model: GenerativeModel,
    dataset: TrainingImages,
    folder: str | os.PathLike[str],
    *,
    record: dict[str, Any],
    fresh: bool,
    processes: Processes,
    **settings: Any,
) -> list[Snapshot]:
    """`train` with `settings` in a folder that is held meanwhile; `record` is what the run is determined by.

    Raises:
        RequestError: the folder is another run's (unless `fresh`), is in use, or as `train`.
    """
    with held_by_main(folder, record, processes, fresh=fresh):
        examples = encoded_once(model, dataset, Path(folder) / EXAMPLES, processes)
        snapshots = train(model, examples, folder, processes=processes, **settings)
    return snapshots
