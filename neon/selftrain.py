"""Training a generative model: briefly on its own samples (Neon), or from scratch on real images.

The noise of a training image belongs to its visit (the n-th image that training looks at), and on a CPU
gradients are added up in a fixed order of micro-batches; so there the weights do not depend on the number
of processes, and a killed run that continues ends with the weights of one that was never killed. On GPUs
gradients are reduced by NCCL, in the order that is fastest.
"""

import json
import math
import os
import pickle
import signal
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from neon import __version__
from neon.checkpoint import PickleCheckpoint, load_state, open_checkpoint, save_torch
from neon.data.encoded import ExampleSet, encode_set
from neon.data.fingerprint import fingerprint
from neon.data.images import Prompted, TrainingImages
from neon.data.prompts import TEXT_FORM, TEXTS_FILE
from neon.data.sampler import SAMPLER, sampler_text
from neon.errors import RequestError, WorkError, warn
from neon.lora.settings import LoRA, record_of
from neon.lora.trained import LowRank
from neon.merge import LEAST_CHANGE
from neon.model import GenerativeModel
from neon.noise import ImageNoise, Purpose, image_seeds
from neon.recipe import Recipe
from neon.runtime.distributed import Processes
from neon.runtime.files import append_json, as_json, atomic_write, read_json_lines, write_csv
from neon.runtime.hub import in_words
from neon.runtime.progress import Progress
from neon.runtime.run_folder import (
    FINGERPRINT,
    STATE_VERSION,
    VERSION_KEY,
    check_version,
    difference,
    held_by_main,
    reading_state,
)
from neon.runtime.signals import Stopped, postponed, requested
from neon.runtime.trackers import Tracker, TrackerName
from neon.sampling import check_classes
from neon.trained import Trained, WholeNetwork, checkpoint_gradients

STATE_FILE = "training-state.pt"
EXAMPLES = "examples"
"""folder of what images are encoded as, where that is done once"""
LOG_FILE, CURVE_FILE = "training.jsonl", "training.csv"
"""every step, as it is taken; and the same as a table, whenever the state is saved"""


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """Weights after a budget of training."""

    images_seen: int
    path: Path

    def moved(self) -> float | None:
        """|weights - those at the start| / |those at the start|, as its file says; None: an old file does not."""
        with open_checkpoint(self.path) as checkpoint:
            text = checkpoint.metadata.get("moved")
        return None if text is None else float(text)

    def unmoved(self) -> str | None:
        """That no merge with these weights differs from the base, and why; None: they moved, or do not say."""
        moved = self.moved()
        if moved is None or moved >= LEAST_CHANGE:
            return None
        return (
            f"{self.path}: {self.images_seen:,} images moved the weights by {moved:.1e} of the base's norm, less than "
            f"{LEAST_CHANGE:g}: any merge will be the base but for rounding"
        )


def recipe_of(model: GenerativeModel, batch: int | None = None, lr: float | None = None) -> Recipe:
    """How `model` is trained, with other images per step or another learning rate if given; a ValueError of these.

    Losses are scaled where they are computed in float16.
    """
    usual = model.recipe
    return replace(
        usual,
        batch_size=usual.batch_size if batch is None else batch,
        lr=usual.lr if lr is None else lr,
        scale_losses=model.precision.name == "fp16",
    )


def training_identity(
    model: GenerativeModel, data: Path, base_sha256: str | None, facts: Mapping[str, Any]
) -> dict[str, Any]:
    """What, with plan, recipe and seed, determines a training, as JSON.

    Args:
        data: the images.
        base_sha256: of the file that training starts from; None: from scratch.
        facts: of what else the model is made.

    Raises:
        RequestError: there is nothing at `data`.
    """
    return {
        "neon": __version__,
        "base_sha256": base_sha256,
        "config": model.config,
        "data": in_words(data),
        "data_fingerprint": fingerprint(data),
        **facts,
    }


def snapshot_path(folder: str | os.PathLike[str], images_seen: int) -> Path:
    """Where the snapshot after `images_seen` images lies."""
    return Path(folder) / f"snapshot-{images_seen / 1000:010.3f}-kimg.safetensors"


def snapshot_steps(batch_size: int, total_images: int, interval: int) -> list[int]:
    """The steps before which the published loop saves (the first save, of the base, left out), and the last step.

    It saves when at least as many images were seen as it waits for, and then waits for `interval` more.
    """
    steps, waiting_for, found = -(-total_images // batch_size), interval, set()
    for step in range(1, steps):
        if step * batch_size >= waiting_for:
            found.add(step)
            waiting_for += interval
    return sorted({*found, steps})


def largest_divisor(number: int, limit: int) -> int:
    """The largest divisor of `number` that is at most `limit`: a micro-batch where none is asked for."""
    return next(divisor for divisor in range(min(number, limit), 0, -1) if number % divisor == 0)


def usual_micro_batch(batch: int, multiple: int, largest: int) -> int:
    """The largest micro-batch of at most `largest` images, in multiples of what the model takes, that divides `batch`.

    At least `multiple`.
    """
    return multiple * largest_divisor(max(batch // multiple, 1), max(largest // multiple, 1))


def encoded_once(
    model: GenerativeModel,
    dataset: TrainingImages,
    folder: str | os.PathLike[str],
    processes: Processes,
    batch_size: int = 64,
) -> TrainingImages:
    """The set of what `model` encodes the images of `dataset` as, made in `folder` or found there.

    `dataset` itself where it is encoded, or the model encodes images at every visit. `folder` is that of a run which is
    held for the model; `batch_size` images are encoded at a time.

    Raises:
        RequestError: the images do not fit the model, or `folder` holds something else.
        WorkError: examples are not finite, or the disk is full.
    """
    dataset = asked(model, dataset)
    if dataset.encoded or not model.example_kind:
        return dataset

    def encode(images: Tensor) -> Tensor:
        with model.precision.allowed_on(processes.device):
            examples = model.encode(images, ImageNoise([0] * len(images), images.device)).cpu()
        if not examples.isfinite().all():
            raise WorkError(
                f"{dataset.path}: {model.example_kind} are not finite in {model.precision.name}; compute in another "
                "precision (--precision bf16 or fp32)"
            )
        return examples

    encode_set(
        encode,
        dataset,
        folder,
        kind=model.example_kind,
        image_shape=model.image_shape,
        batch_size=batch_size,
        processes=processes,
        identity={"neon": __version__, "precision": model.precision.name},
        fresh=False,
    )
    return ExampleSet(folder, model.example_kind)


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
    ordered: bool | None = None,
    keep_raw: bool = False,
    lora: LoRA | None = None,
    gradient_checkpointing: bool = False,
    log: TrackerName | None = None,
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
        ordered: add gradients in the order of micro-batches, at the price of gathering those of all processes,
            instead of summing them in any order. By default on a CPU.
        keep_raw: beside each snapshot of averaged weights write the raw ones, as `raw-<its name>`.
        lora: train factors of low rank in the place of the weights; snapshots hold these alone.
        gradient_checkpointing: compute activations once more for the backward pass, which moves no result.
        log: a tracker that the curves go to as well, by images seen.

    Raises:
        RequestError: the images do not fit the model, batch sizes do not divide, the targets of `lora` match nothing,
            or the network cannot checkpoint gradients.
        WorkError: the loss is not finite.
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
    ordered = processes.device.type == "cpu" if ordered is None else ordered
    if gradient_checkpointing:
        checkpoint_gradients(model)
    run = TrainingRun(model, dataset, folder, recipe, seed, processes, micro_batch, facts, ordered=ordered, lora=lora)

    def tell(steps: Iterable[int]) -> None:
        for step in steps:
            if on_snapshot is not None:
                on_snapshot(snapshots[step])

    def write_snapshot(moved: float) -> None:
        run.write_snapshot(moved, keep_raw=keep_raw)
        tell([run.step])

    if processes.on_main(lambda: all(run.has_written(snapshot.path) for snapshot in snapshots.values())):
        processes.on_main(lambda: tell(wanted))
        return list(snapshots.values())
    run.resume()
    processes.on_main(lambda: _check_kept(folder, run.step, snapshots))
    processes.on_main(lambda: tell(step for step in wanted if step <= run.step))
    last_saved = time.monotonic()
    with (
        Tracker(log, folder, run.identity, processes) as tracker,
        Progress(title, num_steps * batch, "img", processes, done=run.step * batch) as progress,
        postponed(),
    ):
        for row in run.logged() if tracker.on else ():
            tracker.log({"training/loss": row.get("loss"), "training/lr": row.get("lr")}, row["images_seen"])
        while run.step < num_steps:
            begun = time.monotonic()
            loss, lr = run.one_step()
            rate = batch / (time.monotonic() - begun)
            progress.advance(batch, loss=f"{loss:.3f}", lr=f"{lr:.1e}")
            moved = run.moved() if run.step in snapshots else None
            run.log(loss, lr, moved)
            curves = {"training/loss": loss, "training/lr": lr, "training/images_per_second": rate}
            tracker.log(curves, run.step * batch)
            due = moved is not None or run.stop is not None or time.monotonic() - last_saved > state_every_seconds
            if processes.is_main and due:
                run.write_curve()  # first: with the last snapshot all is done
            if moved is not None:
                processes.on_main(partial(write_snapshot, moved))
            if processes.is_main and due:
                run.save_state()
                last_saved = time.monotonic()
            if run.stop is not None:
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


def pickle_copies(base: Path | None, key: str | None, model: GenerativeModel) -> Callable[[Snapshot], None] | None:
    """What writes a snapshot of `model` also as a copy of the published pickle `base`; None if `base` is not one.

    The copies are named by thousand images; of several snapshots of one name the last stays, as published. Warns if
    `base` is such a pickle and cannot be copied, or would say of the copies that they are another network.
    """
    if base is None:
        return None
    with open_checkpoint(base, key) as checkpoint:
        if not isinstance(checkpoint, PickleCheckpoint):
            return None
        try:
            checkpoint.check_copyable()
        except RequestError as error:
            warn(f"{error}; snapshots will be .safetensors only")
            return None
        if json.dumps(type(model).config_of(checkpoint)) != json.dumps(model.config):
            changed = "flags changed the network, and a copy of the file would not say so"
            warn(f"{base}: {changed}; snapshots will be .safetensors only")
            return None

    def write(snapshot: Snapshot) -> None:
        kimg = snapshot.images_seen // 1000
        copy = snapshot.path.with_name(f"network-snapshot-{kimg:06d}.pkl")
        of_this_name = snapshot.path.parent.glob(f"snapshot-{kimg:06d}.*-kimg.safetensors")
        is_written = copy.exists() and copy.stat().st_mtime_ns > snapshot.path.stat().st_mtime_ns
        if snapshot.path == max(of_this_name) and not is_written:
            with open_checkpoint(base, key) as checkpoint:
                assert isinstance(checkpoint, PickleCheckpoint)
                checkpoint.save_with(copy, load_state(snapshot.path))

    return write


def asked(model: GenerativeModel, dataset: TrainingImages) -> TrainingImages:
    """The set with labels that are numbers of prompts of `model`, if it is asked by prompts and the set has them.

    A model that has none yet gets those of the set.

    Raises:
        RequestError: the set has others.
    """
    if model.prompts is None or (texts := dataset.texts) is None:
        return dataset
    if not model.prompts:
        model.use_prompts(tuple(dict.fromkeys(texts)))
    return Prompted(dataset, model.prompts)


def check_trainable(model: GenerativeModel, dataset: TrainingImages, batch_size: int, micro_batch: int) -> None:
    """Raise a RequestError unless the images fit the model and the sizes each other."""
    if tuple(dataset.image_shape) != tuple(model.image_shape):
        raise RequestError(
            f"{dataset.path}: images are {dataset.image_shape} (C, H, W); the model makes {model.image_shape}"
        )
    if model.prompts is not None and (not model.prompts or dataset.labels is None):
        raise RequestError(
            f"{dataset.path}: no {TEXTS_FILE}, but the model is asked by prompts; expected a line "
            f"{TEXT_FORM} for each image"
        )
    if model.num_classes and dataset.labels is None:
        raise RequestError(
            f"{dataset.path}: no labels, but the model knows {model.num_classes} classes; "
            "expected a dataset.json or one folder per class"
        )
    if model.num_classes and dataset.labels is not None:
        check_classes(dataset.labels, model.num_classes, f"{dataset.path}: labels")
    if batch_size < 1 or micro_batch < 1 or batch_size % micro_batch or micro_batch % model.batch_multiple:
        raise RequestError(
            f"a batch of {batch_size} images in micro-batches of {micro_batch}: expected the micro-batch to "
            f"divide the batch and to be a multiple of {model.batch_multiple}"
        )


def visit(
    model: GenerativeModel,
    dataset: TrainingImages,
    indices: Sequence[int],
    noise_seeds: Sequence[int],
    device: torch.device,
) -> tuple[Tensor, Tensor | None, ImageNoise]:
    """What the loss of a model takes of some images: examples, classes int64 [B] or None, and their noise."""
    examples, labels = dataset.load(indices) if model.num_classes else (dataset.examples(indices), None)
    noise = ImageNoise(noise_seeds, device)
    examples = examples.to(device, non_blocking=True)
    if not dataset.encoded:
        examples = model.encode(examples, noise)
    known = None if labels is None else labels.to(device, non_blocking=True)
    return examples, known, noise


class TrainingRun:
    """The moving parts of one training run: network, optimiser, average, and where it stands."""

    def __init__(
        self,
        model: GenerativeModel,
        dataset: TrainingImages,
        folder: Path,
        recipe: Recipe,
        seed: int,
        processes: Processes,
        micro_batch: int,
        identity: Mapping[str, Any] | None = None,
        *,
        ordered: bool = True,
        lora: LoRA | None = None,
    ) -> None:
        self.model, self.dataset, self.folder, self.recipe = model, dataset, folder, recipe
        self.seed, self.processes, self.micro_batch, self.identity = seed, processes, micro_batch, identity or {}
        self.ordered = ordered
        if processes.device.type == "cuda":
            torch.backends.cudnn.benchmark = True  # batches are of one shape
        self.trained: Trained = (
            WholeNetwork(model, tells_moved=processes.is_main)
            if lora is None
            else LowRank(model, lora, seed, tells_moved=processes.is_main)
        )
        self.network = model.network
        self.parameters = self.trained.parameters
        self.optimizer = recipe.optimizer(self.network)
        for group in self.optimizer.param_groups:  # recipes know no frozen weights
            group["params"] = [p for p in group["params"] if p.requires_grad]
        self.average = [p.detach().clone() for p in self.parameters] if recipe.averages else []
        self.step = 0
        self.stop: Stopped | None = None
        """what to raise after this step: a signal has reached one of the processes"""
        self.started = time.monotonic()
        self.visits = recipe.visits(len(dataset), seed)
        self.scaler = torch.amp.GradScaler(
            processes.device.type,
            init_scale=recipe.first_scale,
            growth_interval=recipe.scale_steps,
            enabled=recipe.scale_losses,
        )
        # Its state is made by the first use, which a process without a micro-batch of its own would not come to.
        self.scaler.scale(torch.zeros((), device=processes.device))

    def one_step(self) -> tuple[float, float]:
        """Take one optimiser step; (mean loss of the batch, learning rate)."""
        recipe, seen = self.recipe, self.step * self.recipe.batch_size
        indices = list(islice(self.visits, recipe.batch_size))
        noise_seeds = image_seeds(Purpose.TRAINING, self.seed, recipe.batch_size, start=seen)
        with self.model.precision.allowed_on(self.processes.device):
            total = self._gradients(indices, noise_seeds)
        lr = recipe.lr_at(seen)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.scaler.unscale_(self.optimizer)
        recipe.repair_gradients(self.parameters)
        # The one value that a GPU is waited for (the scaler, if there is one, looks for an overflow right after). Read
        # here, so that what is done above is queued by then, and the host goes on while the optimiser works.
        loss, stopping = total.tolist()
        if stopping:
            self.stop = requested() or Stopped(signal.SIGTERM)
        if not math.isfinite(loss):
            raise WorkError(
                f"{self.folder}: the loss is {loss} at step {self.step + 1}; lower the learning rate "
                "or look at the training images"
            )
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if recipe.scale_losses and recipe.largest_scale is not None:
            scale = self.scaler.scale(torch.ones((), device=total.device))
            self.scaler.update(scale.clamp(max=recipe.largest_scale))
        self.optimizer.zero_grad(set_to_none=True)
        if self.average:
            recipe.update_average(self.average, [p.detach() for p in self.parameters], seen)
        self.step += 1
        return loss, lr

    def _gradients(self, indices: list[int], noise_seeds: list[int]) -> Tensor:
        """Set every parameter's gradient to that of the mean loss of the batch.

        Returns the mean loss and, so that all processes learn of it at no cost, how many of them a signal has reached.
        """
        parts = [slice(first, first + self.micro_batch) for first in range(0, len(indices), self.micro_batch)]
        if self.ordered and self.processes.world_size > 1:
            return self._gradients_in_order(indices, noise_seeds, parts)
        total = torch.zeros(2, device=self.processes.device)
        for part in parts[self.processes.rank :: self.processes.world_size]:
            total[0] += self._backward(indices[part], noise_seeds[part], len(parts))
        total[1] = requested() is not None
        if self.processes.world_size > 1:
            self._set_gradients(self.processes.sum(self._flat_gradients()))
        return self.processes.sum(total)

    def _gradients_in_order(self, indices: list[int], noise_seeds: list[int], parts: list[slice]) -> Tensor:
        """The same with the additions of one process, in its order; gathers the gradients of every process."""
        world, rank = self.processes.world_size, self.processes.rank
        total = torch.zeros(2, device=self.processes.device)
        for first in range(0, len(parts), world):
            here = parts[first : first + world]
            told = torch.zeros(2, device=self.processes.device)
            before = [p.grad for p in self.parameters]
            self.optimizer.zero_grad(set_to_none=True)
            if rank < len(here):
                told[0] = self._backward(indices[here[rank]], noise_seeds[here[rank]], len(parts))
            told[1] = requested() is not None
            for other in self.processes.gather(told):
                total += other
            self._add_in_order(before, len(here))
        return total

    def _backward(self, indices: list[int], noise_seeds: list[int], num_parts: int) -> Tensor:
        """Add the gradient of one of `num_parts` micro-batches to the parameters'; its share of the mean loss."""
        loss = self._loss(indices, noise_seeds) / num_parts
        self.scaler.scale(loss * self.recipe.loss_scaling).backward()
        return loss.detach()

    def _add_in_order(self, before: list[Tensor | None], count: int) -> None:
        """Gradients = `before` + those of ranks 0 .. count - 1, one after the other: as one process would add them.

        Holds the gradients of all ranks at once: world size times the size of the network.
        """
        gathered = self.processes.gather(self._flat_gradients())[:count]
        total = gathered[0] if before[0] is None else torch.cat([g.flatten() for g in before if g is not None])
        for other in gathered if before[0] is not None else gathered[1:]:
            total += other
        self._set_gradients(total)

    def _flat_gradients(self) -> Tensor:
        return torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in self.parameters])

    def _set_gradients(self, flat: Tensor) -> None:
        pieces = flat.split([p.numel() for p in self.parameters])
        for parameter, piece in zip(self.parameters, pieces, strict=True):
            parameter.grad = piece.view_as(parameter)

    def _loss(self, indices: list[int], noise_seeds: list[int]) -> Tensor:
        device = self.processes.device
        inputs = visit(self.model, self.dataset, indices, noise_seeds, device)
        # Dropout inside a network draws from the global generator: seeded by the visit, then put back.
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(noise_seeds[0])
            return self.model.training_loss(*inputs).mean()

    def has_written(self, path: Path) -> bool:
        """Whether the snapshot `path` is there; a RequestError if it is there and of another run."""
        if not path.exists():
            return False
        with open_checkpoint(path) as snapshot:
            self._check_identity(path, snapshot.metadata.get("training", "unknown"))
        return True

    def _check_identity(self, path: Path, text: str) -> None:
        with reading_state(path, "start in another folder"):
            found = as_json(json.loads(text))
            if not isinstance(found, dict):
                raise ValueError("it does not say of which training it is")
        other = difference(found, self.identity)
        if other is not None:
            raise RequestError(
                f"{path}: a run with other settings lies here ({other}); continue with those, or start in another "
                "folder"
            )

    def resume(self) -> None:
        """Take up the saved state of this folder, if there is one."""
        path = self.folder / STATE_FILE
        if not self.processes.from_main(path.exists()):
            return
        advice = "delete it, and training begins anew"
        with reading_state(path, advice):
            state = _read_state(path)
            version, identity = state.get(VERSION_KEY), str(state["identity"])
        check_version(path, version)
        self._check_identity(path, identity)
        with reading_state(path, advice):
            self._take_up(state)
        if self.processes.is_main:
            self._forget_later_steps()
        next(islice(self.visits, self.step * self.recipe.batch_size, self.step * self.recipe.batch_size), None)

    def _take_up(self, state: Mapping[str, Any]) -> None:
        """Become the run that `save_state` saved; an exception of any kind if `state` is not of one like this."""
        self.trained.take_up(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        average = [tensor.to(self.processes.device) for tensor in state["average"]]
        if [one.shape for one in average] != [one.shape for one in self.average]:
            raise ValueError("averages of other shapes than the network's")
        self.average, self.step = average, int(state["step"])
        # Fewer than those of the run where an overflow of float16 has cost some.
        counted = [float(entry["step"]) for entry in self.optimizer.state.values() if "step" in entry]
        if self.step < 1 or not all(0 <= steps <= self.step for steps in counted):
            raise ValueError(f"step {self.step}, and an optimiser of {max(counted, default=0):g}")

    def save_state(self) -> None:
        """Write what `resume` needs, atomically."""
        state = {
            "network": self.trained.state(),
            "optimizer": self.optimizer.state_dict(),
            "average": self.average,
            "scaler": self.scaler.state_dict(),
            "step": self.step,
            "identity": json.dumps(self.identity, sort_keys=True),
            VERSION_KEY: STATE_VERSION,
        }
        save_torch(self.folder / STATE_FILE, state)

    @property
    def result(self) -> list[Tensor]:
        """What stands for the parameters in the end: their averages if the recipe averages, else themselves."""
        return self.average or [p.detach() for p in self.parameters]

    def moved(self) -> float:
        """|result so far - weights at the start| / |weights at the start|; 0 in other processes than the main one."""
        return self.trained.moved(self.result)

    def write_snapshot(self, moved: float, *, keep_raw: bool) -> None:
        """Write the result so far: the averaged weights if the recipe averages, else the raw ones."""
        broken = [name for name, weights in self.network.named_parameters() if not weights.isfinite().all()]
        if broken:  # a loss may forgive what it cannot compute
            raise WorkError(
                f"{self.folder}: {len(broken)} tensors are not finite after step {self.step}, first {broken[0]}; lower "
                "the learning rate or look at the training images"
            )
        path = snapshot_path(self.folder, self.step * self.recipe.batch_size)
        if self.average and keep_raw:  # first, so that a snapshot that is there is whole
            raw = {"weights": "raw", **self._synthetic()}
            self.trained.save(path.with_name(f"raw-{path.name}"), self.parameters, raw)
        images_seen = self.step * self.recipe.batch_size
        # Without fingerprints, which tell times of files: equal runs end in equal bytes.
        identity = {name: value for name, value in self.identity.items() if not name.endswith(FINGERPRINT)}
        metadata = {
            "images_seen": str(images_seen),
            "training": json.dumps(identity, sort_keys=True),
            "weights": "averaged" if self.average else "raw",
            "moved": f"{moved:.6e}",
            **self._synthetic(),
        }
        self.trained.save(path, self.result, metadata)

    def _synthetic(self) -> dict[str, str]:
        """What the metadata tells of a synthetic set: its sampler, which w will belong to, and its size."""
        sampler = self.dataset.sampler
        if sampler is None:
            return {}
        return {SAMPLER: sampler_text(sampler), "synthetic_images": str(len(self.dataset))}

    def _forget_later_steps(self) -> None:
        """Take steps out of the log that were lost with a killed run and will be taken again."""
        path = self.folder / LOG_FILE
        lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
        with atomic_write(path) as file:
            file.write(b"".join(lines[: self.step]))
        self.write_curve()

    def write_curve(self) -> None:
        """Write the log as a table."""
        columns = ("step", "images_seen", "loss", "lr", "seconds", "moved")
        write_csv(self.folder / CURVE_FILE, columns, self.logged())

    def logged(self) -> Iterator[dict[str, Any]]:
        """What the log tells of each step, in order."""
        for row in read_json_lines(self.folder / LOG_FILE):
            if "step" in row:
                yield {**row, "images_seen": row["step"] * self.recipe.batch_size}

    def log(self, loss: float, lr: float, moved: float | None = None) -> None:
        """Tell of the last step, and at a snapshot how far the weights have `moved`."""
        if self.processes.is_main:
            entry = {"step": self.step, "loss": loss, "lr": lr, "seconds": round(time.monotonic() - self.started, 3)}
            append_json(self.folder / LOG_FILE, entry if moved is None else {**entry, "moved": moved})


def _read_state(path: Path) -> dict[str, Any]:
    """What `save_state` wrote; an exception of any kind if the file is damaged."""
    with zipfile.ZipFile(path) as archive:
        torn = archive.testzip()  # torch does not look at checksums
    if torn is not None:
        raise ValueError(f"{torn} is not as it was written")
    try:
        # To the CPU, where the optimiser keeps its counts of steps: it would read them from a GPU in every step.
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:  # its text advises to load unsafely
        raise ValueError("it holds what no training leaves") from None
