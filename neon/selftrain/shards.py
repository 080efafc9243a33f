"""The state of a run whose tensors are spread over processes, as a folder that any number of processes goes on from.

`state.json` names the folder of the shards beside it, and is replaced when that is whole: a save that is killed leaves
the state before.
"""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from neon.checkpoint.sharded import read_shards, shapes_in, write_shards
from neon.runtime.distributed import Processes
from neon.runtime.files import is_file_name, write_failure, write_json
from neon.selftrain.folder import FACTS_FILE, OF_STEP
from neon.trained import Trained


class ShardedState:
    """Network, optimiser and average of a run, as tensors by name; all processes call its methods together."""

    def __init__(
        self, trained: Trained, optimizer: torch.optim.Optimizer, average: Sequence[Tensor], processes: Processes
    ) -> None:
        self.trained, self.optimizer, self.processes = trained, optimizer, processes
        self._kept = {f"network.{name}": tensor for name, tensor in trained.state().items()}
        self._kept |= {f"average.{name}": tensor for name, tensor in zip(trained.named, average, strict=False)}

    def write(self, folder: Path, name: str, facts: Mapping[str, Any]) -> None:
        """Write `folder`/`name` and, as what tells of it, `folder`/state.json with `facts`; others there go.

        Raises:
            WorkError: the disk is full or fails.
        """
        place = folder / name

        def prepare() -> None:
            shutil.rmtree(place, ignore_errors=True)  # of a save that was killed
            try:
                place.mkdir(parents=True)
            except OSError as error:
                raise write_failure(error, folder) from error

        def finish() -> None:
            write_json(folder / FACTS_FILE, {**facts, "folder": name})
            for other in folder.glob(f"{OF_STEP}*"):
                if other != place:
                    shutil.rmtree(other, ignore_errors=True)

        self.processes.on_main(prepare)
        write_shards(place, self._kept | self._moments(), self.processes.world_size)
        self.processes.on_main(finish)

    def read(self, folder: Path, name: str) -> None:
        """Take up what `write` has written; an exception of any kind if it is of another run, or damaged."""
        if not is_file_name(name):
            raise ValueError("it names a folder elsewhere")
        self._make_moments(folder / name)
        read_shards(folder / name, self._kept | self._moments(), self.processes.world_size)

    def _moments(self) -> dict[str, Tensor]:
        """What the optimiser keeps of each parameter."""
        state = self.optimizer.state
        return {
            f"optimizer.{name}.{key}": value
            for name, parameter in self.trained.named.items()
            if parameter in state
            for key, value in state[parameter].items()
        }

    def _make_moments(self, folder: Path) -> None:
        """Give the optimiser tensors to read into, like those that were written: as parameters, or numbers."""
        saved = shapes_in(folder)
        for name, parameter in self.trained.named.items():
            front = f"optimizer.{name}."
            keys = [key.removeprefix(front) for key in saved if key.startswith(front)]
            for key in (key for key in keys if "." not in key):
                shape, dtype = saved[front + key]
                if key == "step":  # a number, on the CPU, where optimisers read it
                    made = torch.zeros(shape, dtype=dtype)
                else:
                    made = torch.zeros_like(parameter.detach(), dtype=dtype)
                self.optimizer.state[parameter][key] = made
