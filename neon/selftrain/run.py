"""The moving parts of one training run: its steps, its state on the disk and its log."""

import json
import math
import pickle
import signal
import time
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from neon.checkpoint import open_checkpoint, save_torch
from neon.data.images import TrainingImages
from neon.data.sampler import SAMPLER, sampler_text
from neon.errors import RequestError, WorkError, warn
from neon.lora.settings import LoRA
from neon.lora.trained import LowRank
from neon.model import GenerativeModel
from neon.noise import Purpose, image_seeds
from neon.recipe import Recipe
from neon.runtime.background import Background
from neon.runtime.distributed import Processes, local_part
from neon.runtime.files import append_json, as_json, atomic_write, read_json_lines, write_csv
from neon.runtime.memory import copy_in_memory
from neon.runtime.parallel import Parallel
from neon.runtime.run_folder import (
    FINGERPRINT,
    STATE_VERSION,
    VERSION_KEY,
    check_version,
    difference,
    reading_state,
)
from neon.runtime.signals import Stopped, requested
from neon.selftrain.engine import Engine, engine_of
from neon.selftrain.folder import CURVE_FILE, FACTS_FILE, LOG_FILE, OF_STEP, SHARDS, STATE_FILE
from neon.selftrain.memory import fitting, kept_by, room_of
from neon.selftrain.snapshots import snapshot_path
from neon.selftrain.visits import TrainingInputs, Visits
from neon.trained import Trained, WholeNetwork

if TYPE_CHECKING:
    from neon.selftrain.shards import ShardedState


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
        parallel: Parallel | None = None,
        lora: LoRA | None = None,
        workers: int | None = None,
    ) -> None:
        self.model, self.dataset, self.folder, self.recipe = model, dataset, folder, recipe
        self.seed, self.processes, self.micro_batch, self.identity = seed, processes, micro_batch, identity or {}
        if processes.device.type == "cuda":
            torch.backends.cudnn.benchmark = True  # batches are of one shape
        self.trained: Trained = (
            WholeNetwork(model, tells_moved=processes.is_main)
            if lora is None
            else LowRank(model, lora, seed, tells_moved=processes.is_main)
        )
        self.network = model.network
        self.parallel = self._engine_for(parallel)
        self.engine: Engine[Visits] = engine_of(self.parallel, processes)(
            self.network, processes, self._share, self._backward, lambda: float(requested() is not None)
        )
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
        self.inputs = TrainingInputs(model, dataset, recipe, seed, processes, micro_batch, workers)
        self.scaler = torch.amp.GradScaler(
            processes.device.type,
            init_scale=recipe.first_scale,
            growth_interval=recipe.scale_steps,
            enabled=recipe.scale_losses,
        )
        # Its state is made by the first use, which a process without a micro-batch of its own would not come to.
        self.scaler.scale(torch.zeros((), device=processes.device))

    def _engine_for(self, asked: Parallel | None) -> Parallel:
        """The engine that is asked for, or usual here, or that the state in the folder is of, or that alone fits.

        Raises:
            RequestError: too little memory for it.
        """
        processes = self.processes
        usual: Parallel = "ddp" if processes.device.type == "cuda" and processes.world_size > 1 else "ordered"
        if asked is None and processes.from_main((self.folder / SHARDS / FACTS_FILE).exists()):
            usual = "fsdp"
        if processes.device.type != "cuda":
            return asked or usual
        kept = kept_by(self.trained, self.recipe)
        return fitting(kept, room_of(processes, kept), processes.world_size, asked, usual)

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
        self.engine.clear_gradients(self.optimizer)
        if self.average:
            recipe.update_average([*map(local_part, self.average)], [*map(local_part, self._raw())], seen)
        self.step += 1
        return loss, lr

    def _gradients(self, indices: list[int], noise_seeds: list[int]) -> Tensor:
        """Set every parameter's gradient to that of the mean loss of the batch.

        Returns the mean loss and, so that all processes learn of it at no cost, how many of them a signal has reached.
        """
        parts = [slice(first, first + self.micro_batch) for first in range(0, len(indices), self.micro_batch)]
        return self.engine.gradients([Visits(indices[part], noise_seeds[part]) for part in parts])

    def _share(self, visits: Visits) -> Tensor:
        """The share of a micro-batch in the mean loss."""
        return self._loss(visits) / (self.recipe.batch_size // self.micro_batch)

    def _backward(self, share: Tensor) -> None:
        self.scaler.scale(share * self.recipe.loss_scaling).backward()

    def _loss(self, visits: Visits) -> Tensor:
        device = self.processes.device
        inputs = self.inputs(visits, self.step)
        # Dropout inside a network draws from the global generator: seeded by the visit, then put back.
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(visits.seeds[0])
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
        """Take up the saved state of this folder, if there is one.

        Raises:
            RequestError: it is damaged, another run's, or of an engine that keeps it otherwise.
        """
        if not self.processes.from_main(self._has_state()):
            return
        advice = "delete it, and training begins anew"
        path = self.state_path
        with reading_state(path, advice):
            state = json.loads(path.read_bytes()) if self.engine.keeps_folder else _read_state(path)
            version, identity, began = state.get(VERSION_KEY), str(state["identity"]), state.get("parallel", "ordered")
        check_version(path, version)
        self._check_identity(path, identity)
        with reading_state(path, advice):
            self._take_up(state)
        if began != self.parallel:
            warn(f"{path}: began as --parallel {began} and goes on as {self.parallel}; the last digits may differ")
        if self.processes.is_main:
            self._forget_later_steps()
        next(islice(self.visits, self.step * self.recipe.batch_size, self.step * self.recipe.batch_size), None)

    @property
    def state_path(self) -> Path:
        """The file that tells of the state."""
        return self.folder / SHARDS / FACTS_FILE if self.engine.keeps_folder else self.folder / STATE_FILE

    def _has_state(self) -> bool:
        """Whether there is one; a RequestError if another engine has left it, which keeps it otherwise."""
        file, folder = self.folder / STATE_FILE, self.folder / SHARDS
        other, flag = (file, "ordered or ddp") if self.engine.keeps_folder else (folder, "fsdp")
        if (other / FACTS_FILE if other == folder else other).exists():
            raise RequestError(
                f"{other}: state of a run with --parallel {flag}, and this one has {self.parallel}; go on with that, "
                "in any number of processes, or start in another folder"
            )
        return self.state_path.exists()

    def _take_up(self, state: Mapping[str, Any]) -> None:
        """Become the run that `save_state` saved; an exception of any kind if `state` is not of one like this."""
        self.scaler.load_state_dict(state["scaler"])
        if self.engine.keeps_folder:
            self._shards().read(self.folder / SHARDS, str(state["folder"]))
        else:
            self.trained.take_up(state["network"])
            self.optimizer.load_state_dict(state["optimizer"])
            average = [tensor.to(self.processes.device) for tensor in state["average"]]
            if [one.shape for one in average] != [one.shape for one in self.average]:
                raise ValueError("averages of other shapes than the network's")
            self.average = average
        self.step = int(state["step"])
        # Fewer than those of the run where an overflow of float16 has cost some.
        counted = [float(entry["step"]) for entry in self.optimizer.state.values() if "step" in entry]
        if self.step < 1 or not all(0 <= steps <= self.step for steps in counted):
            raise ValueError(f"step {self.step}, and an optimiser of {max(counted, default=0):g}")

    def save_state(self, saving: Background | None = None) -> None:
        """Write what `resume` needs, atomically; called by the main process, or by all if the engine keeps a folder.

        By `saving`, beside the next steps, if the state is one file and there is memory for a copy: an error in writing
        is then raised by who waits for it.
        """
        if saving is not None:
            saving.wait()  # for one copy at a time
        facts = {
            "scaler": self.scaler.state_dict(),
            "step": self.step,
            "identity": json.dumps(self.identity, sort_keys=True),
            VERSION_KEY: STATE_VERSION,
            **({} if self.parallel == "ordered" else {"parallel": self.parallel}),
        }
        if self.engine.keeps_folder:
            self._shards().write(self.folder / SHARDS, f"{OF_STEP}{self.step}", facts)
            return
        state = {"network": self.trained.state(), "optimizer": self.optimizer.state_dict(), "average": self.average}
        copy = None if saving is None else copy_in_memory(state)
        if saving is None or copy is None:
            save_torch(self.folder / STATE_FILE, {**state, **facts})
        else:
            saving.hand_in([partial(save_torch, self.folder / STATE_FILE, {**copy, **facts})])

    def _shards(self) -> "ShardedState":
        from neon.selftrain.shards import ShardedState  # torch's part for it takes a while to import

        return ShardedState(self.trained, self.optimizer, self.average, self.processes)

    def _raw(self) -> list[Tensor]:
        return [p.detach() for p in self.parameters]

    @property
    def result(self) -> list[Tensor]:
        """What stands for the parameters in the end: their averages if the recipe averages, else themselves.

        Whole in the main process, for which all processes ask for them.
        """
        return self.engine.whole(self.average or self._raw())

    def moved(self, result: Sequence[Tensor]) -> float:
        """|`result` - weights at the start| / |weights at the start|; 0 in other processes than the main one."""
        return self.trained.moved(result) if self.processes.is_main else 0.0

    def write_snapshot(self, result: Sequence[Tensor], moved: float, *, keep_raw: bool) -> None:
        """Write `result`: the averaged weights if the recipe averages, else the raw ones; called by all processes."""
        self._check_finite()
        raw = self.engine.whole(self._raw()) if self.average and keep_raw else None
        self.processes.on_main(lambda: self._write_snapshot(result, moved, raw))

    def _check_finite(self) -> None:
        """A WorkError, in all processes, if a weight is not finite: a loss may forgive what it cannot compute."""
        names, weights = zip(*self.network.named_parameters(), strict=True)
        finite = [local_part(w.detach()).isfinite().all() for w in weights]
        broken = self.processes.sum((~torch.stack(finite)).float()).tolist()
        found = [name for name, count in zip(names, broken, strict=True) if count]
        if found:
            error = WorkError(
                f"{self.folder}: {len(found)} tensors are not finite after step {self.step}, first {found[0]}; lower "
                "the learning rate or look at the training images"
            )
            self.processes.raise_first(error)

    def _write_snapshot(self, result: Sequence[Tensor], moved: float, raw: Sequence[Tensor] | None) -> None:
        path = snapshot_path(self.folder, self.step * self.recipe.batch_size)
        if raw is not None:  # first, so that a snapshot that is there is whole
            self.trained.save(path.with_name(f"raw-{path.name}"), raw, {"weights": "raw", **self._synthetic()})
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
        self.trained.save(path, result, metadata)

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
