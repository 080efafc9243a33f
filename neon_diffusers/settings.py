"""How to sample a pipeline; imports nothing heavy."""

import math
from dataclasses import dataclass

from neon_diffusers.schedulers import SCHEDULERS, SPACINGS, WITH_ETA, WITH_SPACING

DEFAULT = "default"


@dataclass(frozen=True, kw_only=True)
class DiffusionSettings:
    """The sampler of a pipeline without guidance."""

    num_steps: int = 50
    """steps of the scheduler; one of the second order evaluates the network twice in each"""
    scheduler: str = "DDIMScheduler"
    """the class of diffusers, with the configuration of the pipeline's own"""
    spacing: str = DEFAULT
    """which of the trained timesteps: leading, linspace or trailing; by default as the pipeline says"""
    eta: float = 0.0
    """of DDIM: 0 is deterministic, 1 adds as much noise as DDPM"""

    def __post_init__(self) -> None:
        if self.num_steps < 1:
            raise ValueError(f"num_steps is {self.num_steps}; expected at least 1")
        if self.scheduler not in SCHEDULERS:
            raise ValueError(f"scheduler is {self.scheduler}; expected one of {', '.join(SCHEDULERS)}")
        if self.spacing not in (DEFAULT, *SPACINGS):
            raise ValueError(f"spacing is {self.spacing}; expected {DEFAULT}, {', '.join(SPACINGS)}")
        if self.spacing != DEFAULT and self.scheduler not in WITH_SPACING:
            raise ValueError(f"spacing is {self.spacing}, but {self.scheduler} has none to choose; leave it out")
        if not 0 <= self.eta <= 1:
            raise ValueError(f"eta is {self.eta:g}; expected 0 to 1")
        if self.eta and self.scheduler not in WITH_ETA:
            raise ValueError(f"eta is {self.eta:g}, but only {', '.join(WITH_ETA)} has one, not {self.scheduler}")


@dataclass(frozen=True, kw_only=True)
class GuidedSettings(DiffusionSettings):
    """The sampler of a pipeline that guides."""

    guidance: float = 4.0
    """scale of classifier-free guidance (Ho and Salimans 2022, arXiv 2207.12598), at two network calls; 1: none"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (math.isfinite(self.guidance) and self.guidance >= 0):
            raise ValueError(f"guidance is {self.guidance:g}; expected 0 or more, 1 for none")
