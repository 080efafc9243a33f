"""The moving parts of one training run: its steps, its state on the disk and its log."""

import json
import math
import pickle
import signal
import time
import zipfile
from collections.abc import Iterator, Mapping
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from neon.checkpoint import open_checkpoint, save_torch
from neon.data.images import TrainingImages
from neon.data.sampler import SAMPLER, sampler_text
from neon.errors import RequestError, WorkError
from neon.lora.settings import LoRA
from neon.lora.trained import LowRank
from neon.model import GenerativeModel
from neon.noise import Purpose, image_seeds
from neon.recipe import Recipe
from neon.runtime.background import Background, copy_in_memory
from neon.runtime.distributed import Processes
from neon.runtime.files import append_json, as_json, atomic_write, read_json_lines, write_csv
from neon.runtime.run_folder import (
    FINGERPRINT,
    STATE_VERSION,
    VERSION_KEY,
    check_version,
    difference,
    reading_state,
)
from neon.runtime.signals import Stopped, requested
from neon.selftrain.examples import visit
from neon.selftrain.snapshots import snapshot_path
from neon.trained import Trained, WholeNetwork

STATE_FILE = "training-state.pt"
LOG_FILE, CURVE_FILE = "training.jsonl", "training.csv"
"""every step, as it is taken; and the same as a table, whenever the state is saved"""


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

    def save_state(self, background: Background | None = None) -> None:
        """Write what `resume` needs, atomically; in the `background`, if there is one and memory for a copy.

        An error in writing is raised here, or there by what waits for it.
        """
        if background is not None:
            background.wait()  # for one copy at a time
        state = {
            "network": self.trained.state(),
            "optimizer": self.optimizer.state_dict(),
            "average": self.average,
            "scaler": self.scaler.state_dict(),
            "step": self.step,
            "identity": json.dumps(self.identity, sort_keys=True),
            VERSION_KEY: STATE_VERSION,
        }
        copy = None if background is None else copy_in_memory(state)
        if background is None or copy is None:
            save_torch(self.folder / STATE_FILE, state)
        else:
            background.start(partial(save_torch, self.folder / STATE_FILE, copy))

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
