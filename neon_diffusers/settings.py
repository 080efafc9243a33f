"""How to sample a pipeline; imports nothing heavy."""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

from neon_diffusers.schedulers import DIFFUSION, FLOW, SPACINGS, WITH_ETA

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
        if self.scheduler not in DIFFUSION:
            raise ValueError(f"scheduler is {self.scheduler}; expected one of {', '.join(DIFFUSION)}")
        if self.spacing not in (DEFAULT, *SPACINGS):
            raise ValueError(f"spacing is {self.spacing}; expected {DEFAULT}, {', '.join(SPACINGS)}")
        if not 0 <= self.eta <= 1:
            raise ValueError(f"eta is {self.eta:g}; expected 0 to 1")
        if self.eta and self.scheduler not in WITH_ETA:
            raise ValueError(f"eta is {self.eta:g}, but only {', '.join(WITH_ETA)} has one, not {self.scheduler}")

    @property
    def changed(self) -> dict[str, Any]:
        """What takes the place of the configuration of the pipeline's scheduler."""
        return {} if self.spacing == DEFAULT else {"timestep_spacing": self.spacing}


@dataclass(frozen=True, kw_only=True)
class GuidedSettings(DiffusionSettings):
    """The sampler of a pipeline that guides."""

    guidance: float = 4.0
    """scale of classifier-free guidance (Ho and Salimans 2022, arXiv 2207.12598), at two network calls; 1: none"""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_guidance(self.guidance)


@dataclass(frozen=True, kw_only=True)
class FlowSettings:
    """The sampler of a pipeline of flow matching: Euler's steps along the flow."""

    num_steps: int = 28
    """steps, at one network call each, or two with guidance"""
    guidance: float = 7.0
    """scale of classifier-free guidance, as of `GuidedSettings`"""
    shift: float = 1.0
    """of time towards noise (Esser et al. 2024, arXiv 2403.03206, equation 23): 1 is none"""

    scheduler: ClassVar[str] = FLOW
    eta: ClassVar[float] = 0.0

    def __post_init__(self) -> None:
        if self.num_steps < 1:
            raise ValueError(f"num_steps is {self.num_steps}; expected at least 1")
        _check_guidance(self.guidance)
        if not (math.isfinite(self.shift) and self.shift > 0):
            raise ValueError(f"shift is {self.shift:g}; expected more than 0, 1 for none")

    @property
    def changed(self) -> dict[str, Any]:
        """What takes the place of the configuration of the pipeline's scheduler."""
        return {"shift": self.shift}


def _check_guidance(guidance: float) -> None:
    if not (math.isfinite(guidance) and guidance >= 0):
        raise ValueError(f"guidance is {guidance:g}; expected 0 or more, 1 for none")
