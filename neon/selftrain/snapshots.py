"""Weights that a training leaves: after how many images, in which file, and as copies of a published pickle."""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from neon.checkpoint import PickleCheckpoint, load_state, open_checkpoint
from neon.errors import RequestError, warn
from neon.merge import LEAST_CHANGE
from neon.model import GenerativeModel


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
