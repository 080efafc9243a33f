"""Curves to TensorBoard, Weights & Biases or trackio, beside the files of a run; nothing is imported unless asked for.

A tracker never changes a run: it is no part of what determines one, and what goes wrong in it is warned of, once.
"""

import contextlib
import contextvars
import json
import secrets
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from neon.errors import RequestError, one_line, warn
from neon.runtime.files import as_json, write_json
from neon.runtime.run_folder import reading_state

if TYPE_CHECKING:
    from neon.runtime.distributed import Processes

TrackerName = Literal["tensorboard", "wandb", "trackio"]
"""also the name of the package that it takes"""
PROJECT = "neon"
SECONDS_TO_KEEP = 15.0
"""after which a tracker has kept what it was given; each keeps or sends it some seconds later"""
Log = Callable[[dict[str, float], int], Any]
Finish = Callable[[], Any]


def check_installed(name: TrackerName | None) -> None:
    """A RequestError if the package of a tracker that was asked for is not there; imports nothing."""
    found = None if name is None else find_spec(name)
    # A folder of that name, such as wandb leaves in the working directory, passes for a package without an origin.
    if name is not None and (found is None or found.origin is None):
        raise RequestError(f"--log {name}: the package {name} is not installed; pip install {name}, or leave it out")


def _tensorboard(folder: Path, run: str, kept: int, config: dict[str, Any]) -> tuple[Log, Finish]:
    """Events in the folder; those after step `kept`, which come again, are hidden."""
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(folder / "tensorboard", purge_step=kept + 1, flush_secs=5)
    writer.add_text("config", f"```\n{json.dumps(config, indent=2)}\n```", kept + 1)

    def log(values: dict[str, float], step: int) -> None:
        for key, value in values.items():
            writer.add_scalar(key, value, step)

    return log, writer.close


def _wandb(folder: Path, run: str, kept: int, config: dict[str, Any]) -> tuple[Log, Finish]:
    """A run of wandb, whose own files lie in the folder, too."""
    import wandb

    # A training within a search is a run beside that of the search.
    one = wandb.init(
        project=PROJECT, id=run, name=str(folder), dir=folder, config=config, resume="allow", reinit="create_new"
    )
    return lambda values, step: one.log(values, step=step), one.finish


def _trackio(folder: Path, run: str, kept: int, config: dict[str, Any]) -> tuple[Log, Finish]:
    """A run of trackio, in its database."""
    import trackio

    # In a context of its own, for trackio ends the run before of this one.
    one = contextvars.Context().run(
        trackio.init, project=PROJECT, name=f"{folder} {run}", config=config, resume="allow"
    )  # fmt: skip
    return lambda values, step: one.log(values, step=step), one.finish


START: dict[str, Callable[[Path, str, int, dict[str, Any]], tuple[Log, Finish]]] = {
    "tensorboard": _tensorboard,
    "wandb": _wandb,
    "trackio": _trackio,
}
"""what starts each, given a folder, the identifier of the run there, the last step kept of it, and what it is; returns
what logs values at a step, and what ends it"""


class Tracker:
    """Takes the values of a run from its main process to a tracker; to none if none is asked for.

    A run that goes on logs all of its steps again, and those that the tracker has are passed over. Which these are lies
    in the folder, and follows with a delay: so a kill loses nothing, but the last seconds before it may come twice.

    Args:
        config: what the run is, as JSON.
    """

    def __init__(
        self, name: TrackerName | None, folder: Path, config: Mapping[str, Any], processes: "Processes"
    ) -> None:
        self._name, self._mark = name, folder / f"{name}-run.json"
        self._run: tuple[Log, Finish] | None = None
        if name is None or not processes.is_main:
            return
        with self._harmless():
            self._id, self._kept = secrets.token_hex(4), 0
            if self._mark.exists():
                with reading_state(self._mark, "delete it, and another run is tracked"):
                    found = json.loads(self._mark.read_bytes())
                    self._id, self._kept = str(found["run"]), int(found["step"])
            self._last = self._before = self._kept
            self._note(self._kept)
            self._run = START[name](folder, self._id, self._kept, as_json(dict(config)))

    @property
    def on(self) -> bool:
        """Whether values go anywhere."""
        return self._run is not None

    def log(self, values: Mapping[str, float | None], step: int) -> None:
        """Log the values that there are at a step, which follows those before."""
        if self._run is not None:
            with self._harmless():
                if step > self._kept:
                    if time.monotonic() - self._noted > SECONDS_TO_KEEP:
                        self._note(self._before)
                        self._before = self._last
                    self._run[0]({key: value for key, value in values.items() if value is not None}, step)
                    self._last = step

    def _note(self, step: int) -> None:
        """Leave in the folder which steps the tracker has."""
        write_json(self._mark, {"run": self._id, "step": step})
        self._noted = time.monotonic()

    def __enter__(self) -> "Tracker":
        return self

    def __exit__(self, *error: object) -> None:
        """End, with all that was logged where it belongs."""
        run, self._run = self._run, None
        if run is not None:
            with self._harmless():
                run[1]()
                self._note(self._last)

    @contextlib.contextmanager
    def _harmless(self) -> Iterator[None]:
        """What fails within ends the tracking and nothing else; what is printed is no result of ours."""
        try:
            with contextlib.redirect_stdout(sys.stderr):
                yield
        except Exception as error:  # of any kind: network, disk, keys, the package itself
            self._run = None
            warn(f"--log {self._name}: {one_line(error)[:200]}; the run goes on without it, its own files tell all")
