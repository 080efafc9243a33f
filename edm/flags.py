"""Flags that EDM's programs share, and how users of the published programs spell them."""

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from edm.settings import EDMSettings, SamplerSettings
from neon.cli.command_line import seed_list
from neon.cli.flags import ImageFlags, NetworkFlags
from neon.errors import RequestError

if TYPE_CHECKING:
    from edm.model import EDM
    from neon.noise import Purpose
    from neon.runtime.distributed import Processes
    from neon.sampling import Label


@dataclass(frozen=True, kw_only=True)
class EDMFlags(NetworkFlags):
    """The network."""

    network_pkl: Annotated[
        str | None, tyro.conf.arg(name="transfer", metavar="FILE|URL", aliases=["--ref", "--network_pkl"])
    ] = None
    """network to start from; without: random weights"""

    def load(self, group: "Processes", **arguments: Any) -> "tuple[Path, EDM]":
        from edm.model import EDM

        return self.open(self.network_pkl, EDM, group, **arguments)

    def facts(self, model: Any, group: "Processes") -> dict[str, Any]:
        # Nothing for float32, as runs before there was a choice.
        return {} if model.precision.name == "fp32" else self.recorded_precision(model)


@dataclass(frozen=True, kw_only=True)
class SamplerFlags(SamplerSettings):
    """Sampler: Algorithm 2; the defaults are the published CIFAR-10 settings."""

    sigma_min: float | None = None
    """lowest noise level, where images are in [-1, 1]; by default 0.002, or as the noise levels of an ablation"""
    sigma_max: float | None = None
    """highest noise level; by default 80, or as the noise levels of an ablation"""

    def sigma_range(self) -> tuple[float, float]:
        return EDMSettings(**self.given()).sigma_range()

    def given(self) -> dict[str, Any]:
        """Settings by name, less noise levels that no flag says: their defaults belong to the sampler."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if value is not None}


@dataclass(frozen=True, kw_only=True)
class EDMImageFlags(EDMFlags, ImageFlags):
    """Images, and the network that makes them."""

    network_pkl: Annotated[str, tyro.conf.arg(metavar="FILE|URL", aliases=["--network"])] = field()
    """the network: published .pkl, or safetensors by neon"""
    seeds: str
    """one image per seed, such as 0-49999 or 1,2,5-10"""
    batch_size: Annotated[int, tyro.conf.arg(name="max_batch_size", aliases=["--batch", "--batch_size"])] = 64
    """images per forward pass of one process"""
    class_: Annotated[int | None, tyro.conf.arg(name="class")] = None
    """class of every image; by default drawn for each from its own seed"""
    settings: Annotated[SamplerFlags, tyro.conf.arg(name="")] = SamplerFlags()

    def check(self) -> None:
        super().check()
        seed_list(self.seeds)
        self.sampler()

    def seeds_of(self, purpose: "Purpose") -> list[int]:
        """The seeds that the user names, whatever the images are for."""
        return seed_list(self.seeds)

    def recorded_seeds(self) -> dict[str, Any]:
        return {"seeds": self.seeds}

    def labels(self, model: Any, purpose: "Purpose") -> "Label":
        return self.class_

    def settings_for(self, model: Any) -> SamplerSettings:
        from edm.published import warn_if_unusual

        settings = self.sampler()
        warn_if_unusual(model, settings)
        return settings

    def sampler(self) -> SamplerSettings:
        """The sampler that the flags ask for; a RequestError for values that make no sense."""
        try:
            return self.build_sampler()
        except ValueError as error:
            raise RequestError(f"{error}; see --help") from error

    def build_sampler(self) -> SamplerSettings:
        """The same; a ValueError for values that make no sense."""
        return EDMSettings(**self.settings.given())
