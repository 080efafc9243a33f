"""Flags that EDM's programs share, and how users of the published programs spell them."""

from dataclasses import dataclass
from typing import Annotated

import tyro

from edm.sampler import EDMSettings
from neon.cli.command_line import seed_list
from neon.errors import RequestError

ALIASES = {
    "--network": "--network_pkl",
    "--steps": "--num_steps",
    "--batch": "--max_batch_size",
    "--batch_size": "--max_batch_size",
    "--batch-size": "--max_batch_size",
    "--s_churn": "--S_churn",
    "--s_min": "--S_min",
    "--s_max": "--S_max",
    "--s_noise": "--S_noise",
}


@dataclass(frozen=True, kw_only=True)
class ImageFlags:
    """Images, and the network that makes them."""

    network_pkl: Annotated[str, tyro.conf.arg(metavar="FILE|URL")]
    """the network: published .pkl, or safetensors by neon"""
    seeds: str
    """one image per seed, such as 0-49999 or 1,2,5-10"""
    max_batch_size: int = 64
    """images per forward pass of one process"""
    class_: Annotated[int | None, tyro.conf.arg(name="class")] = None
    """class of every image; by default drawn for each from its own seed"""
    settings: Annotated[EDMSettings, tyro.conf.arg(name="")] = EDMSettings()  # noqa: RUF009 - frozen

    def checked_seeds(self) -> list[int]:
        """The seeds as numbers; a RequestError for flags that make no sense."""
        if self.max_batch_size < 1:
            raise RequestError(f"--max_batch_size {self.max_batch_size}: expected at least 1")
        return seed_list(self.seeds)
