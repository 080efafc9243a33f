"""Curves to TensorBoard, Weights & Biases or trackio, beside the files of a run; nothing is imported unless asked for.

A tracker never changes a run: it is no part of what determines one, and what goes wrong in it is warned of, once.
"""

import contextlib
import json
import secrets
import sys
from collections.abc import Callable, Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from neon.errors import RequestError, one_line, warn
from neon.runtime.files import as_json, atomic_write
from neon.runtime.run_folder import reading_state

if TYPE_CHECKING:
    from neon.runtime.distributed import Processes

TrackerName = Literal["tensorboard", "wandb", "trackio"]
"""also the name of the package that it takes"""
PROJECT = "neon"
Log = Callable[[dict[str, float], int], Any]
Finish = Callable[[], Any]


def check_installed(name: TrackerName | None) -> None:
    """A RequestError if the package of a tracker that was asked for is not there; imports nothing."""
    found = None if name is None else find_spec(name)
    # A folder of that name, such as wandb leaves in the working directory, passes for a package without an origin.
    if name is not None and (found is None or found.origin is None):
        raise RequestError(f"--log {name}: the package {name} is not installed; pip install {name}, or leave it out")


def _tensorboard(folder: Path, config: dict[str, Any], first: int) -> tuple[Log, Finish]:
    """Events in the folder; those from step `first` on that a killed run has left there are hidden."""
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(folder / "tensorboard", purge_step=first)
    writer.add_text("config", f"```\n{json.dumps(config, indent=2)}\n```", first)

    def log(values: dict[str, float], step: int) -> None:
        for key, value in values.items():
            writer.add_scalar(key, value, step)

    return log, writer.close


def _wandb(folder: Path, config: dict[str, Any], first: int) -> tuple[Log, Finish]:
    """A run of wandb, whose own files lie in the folder, too."""
    import wandb

    mark = _Mark(folder / "wandb-run.json")
    run = wandb.init(
        project=PROJECT, name=str(folder), id=mark.run, dir=folder, config=config, resume="allow", reinit="create_new"
    )
    return mark.after(lambda values, step: run.log(values, step=step)), run.finish


def _trackio(folder: Path, config: dict[str, Any], first: int) -> tuple[Log, Finish]:
    """A run of trackio, in its database."""
    import trackio

    mark = _Mark(folder / "trackio-run.json")
    run = trackio.init(project=PROJECT, name=f"{folder} {mark.run}", config=config, resume="allow")
    return mark.after(lambda values, step: run.log(values, step=step)), run.finish


START: dict[str, Callable[[Path, dict[str, Any], int], tuple[Log, Finish]]] = {
    "tensorboard": _tensorboard,
    "wandb": _wandb,
    "trackio": _trackio,
}
"""what starts each, of a folder, what the run there is, and its first step; returns what logs values, and what ends"""


class _Mark:
    """Which run of a service the folder belongs to and the last step that it has, in a file; a fresh folder has none.

    A service takes each step once, and a killed run takes again what its state did not hold.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.run, self.step = path, secrets.token_hex(4), 0
        if path.exists():
            with reading_state(path, "delete it, and a new run is tracked"):
                found = json.loads(path.read_bytes())
                self.run, self.step = str(found["run"]), int(found["step"])

    def after(self, log: Log) -> Log:
        """`log` for the steps that the service has not got."""

        def once(values: dict[str, float], step: int) -> None:
            if step > self.step:
                log(values, step)
                self.step = step
                with atomic_write(self.path, flush=False) as file:
                    file.write(json.dumps({"run": self.run, "step": step}).encode())

        return once


class Tracker:
    """Takes the values of a run from its main process to a tracker; to none if none is asked for.

    Args:
        config: what the run is, as JSON.
        first: the step that this process begins with; a run that goes on, and never one before that, counts on.
    """

    def __init__(
        self,
        name: TrackerName | None,
        folder: Path,
        config: Mapping[str, Any],
        processes: "Processes",
        *,
        first: int = 1,
    ) -> None:
        self.name = name
        self._run: tuple[Log, Finish] | None = None
        if name is not None and processes.is_main:
            with self._harmless():
                self._run = START[name](folder, as_json(dict(config)), first)

    def log(self, values: Mapping[str, float | None], step: int) -> None:
        """Log the values that there are at a step."""
        if self._run is not None:
            with self._harmless():
                self._run[0]({key: value for key, value in values.items() if value is not None}, step)

    def finish(self) -> None:
        """End, with all that was logged where it belongs."""
        run, self._run = self._run, None
        if run is not None:
            with self._harmless():
                run[1]()

    def __enter__(self) -> "Tracker":
        return self

    def __exit__(self, *error: object) -> None:
        self.finish()

    @contextlib.contextmanager
    def _harmless(self) -> Iterator[None]:
        """What fails within ends the tracking and nothing else; what is printed is no result of ours."""
        try:
            with contextlib.redirect_stdout(sys.stderr):
                yield
        except Exception as error:  # of any kind: network, disk, keys, the package itself
            self._run = None
            warn(f"--log {self.name}: {one_line(error)[:200]}; the run goes on without it, its own files tell all")
