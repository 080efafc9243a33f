"""How EDM samples, as settings: without torch, so that a program shows its flags at once."""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

SIGMA_RANGES = {"ve": (0.02, 100.0), "iddpm": (0.002, 81.0), "edm": (0.002, 80.0)}
"""Noise levels per discretization, unless told otherwise; those of vp follow from its process."""


@dataclass(frozen=True, kw_only=True)
class SamplerSettings(ABC):
    """What every sampler of diffusion models asks for."""

    num_steps: Annotated[int, tyro.conf.arg(aliases=["--steps"])] = 18
    """noise levels, at least 2"""
    solver: Literal["heun", "euler"] = "heun"
    """heun: 2 num_steps - 1 network calls; euler: num_steps"""
    guidance: float = 0.0
    """g in D + g (D - D_unconditional); 0: none; needs label dropout"""
    rho: float = 7.0
    """exponent of the spacing of noise levels"""
    S_churn: Annotated[float, tyro.conf.arg(aliases=["--s_churn"])] = 0.0
    """amount of fresh noise; 0: deterministic"""
    S_min: Annotated[float, tyro.conf.arg(aliases=["--s_min"])] = 0.0
    """no churn below this noise level"""
    S_max: Annotated[float, tyro.conf.arg(aliases=["--s_max"])] = math.inf
    """no churn above this noise level"""
    S_noise: Annotated[float, tyro.conf.arg(aliases=["--s_noise"])] = 1.0
    """standard deviation of the fresh noise"""

    def __post_init__(self) -> None:
        if self.num_steps < 2:
            raise ValueError(f"num_steps is {self.num_steps}; expected at least 2 noise levels")
        self._expect_one_of("solver", "heun", "euler")
        self._expect_positive("rho", "S_noise")
        if not 0 <= self.S_churn < math.inf:
            raise ValueError(f"S_churn is {self.S_churn}; expected 0 or more")
        if not math.isfinite(self.guidance):
            raise ValueError(f"guidance is {self.guidance}; expected a finite number")

    @abstractmethod
    def sigma_range(self) -> tuple[float, float]:
        """(sigma_min, sigma_max), as given or by default."""

    def _expect_one_of(self, name: str, *known: str) -> None:
        if getattr(self, name) not in known:
            raise ValueError(f"{name} is {getattr(self, name)!r}; expected {', '.join(known[:-1])} or {known[-1]}")

    def _expect_positive(self, *names: str) -> None:
        for name in names:
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}; expected a positive number")


@dataclass(frozen=True, kw_only=True)
class EDMSettings(SamplerSettings):
    """Sampler: Algorithm 2; the defaults are the published CIFAR-10 settings."""

    sigma_min: float = 0.002
    """lowest noise level, where images are in [-1, 1]"""
    sigma_max: float = 80.0
    """highest noise level"""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self.sigma_min, self.sigma_max)

    def sigma_range(self) -> tuple[float, float]:
        return self.sigma_min, self.sigma_max


@dataclass(frozen=True, kw_only=True)
class AblationSettings(SamplerSettings):
    """How to sample with other noise levels, schedules and scalings; the defaults are EDM's choices."""

    discretization: Literal["vp", "ve", "iddpm", "edm"] = "edm"
    """which noise levels are visited"""
    schedule: Literal["vp", "ve", "linear"] = "linear"
    """how the noise level runs with time"""
    scaling: Literal["vp", "none"] = "none"
    """vp: the state keeps unit variance; none: it grows with the noise level"""
    sigma_min: float | None = None
    """lowest noise level; None: the default of the discretization"""
    sigma_max: float | None = None
    """highest noise level; None: the default of the discretization"""
    epsilon_s: float = 1e-3
    """time of the lowest noise level of vp"""
    C_1: float = 0.001
    """least ratio of neighbouring levels in the table of iddpm"""
    C_2: float = 0.008
    """offset of the cosine schedule of iddpm"""
    M: int = 1000
    """levels in the table of iddpm"""
    alpha: float = 1.0
    """where the second slope of a step is taken, as a share of the step; 1: Heun, 1/2: midpoint"""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._expect_one_of("discretization", "vp", "ve", "iddpm", "edm")
        self._expect_one_of("schedule", "vp", "ve", "linear")
        self._expect_one_of("scaling", "vp", "none")
        self._expect_positive("epsilon_s", "C_1", "C_2", "M", "alpha")
        for name in ("epsilon_s", "alpha"):
            if getattr(self, name) > 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected at most 1")
        check_range(*self.sigma_range())

    def sigma_range(self) -> tuple[float, float]:
        if self.discretization == "vp":
            import torch  # its float64 decides the last bits; flags are shown without it

            from edm.schedules import VPSchedule

            low, high = VPSchedule().sigma(torch.tensor([self.epsilon_s, 1.0], dtype=torch.float64)).tolist()
        else:
            low, high = SIGMA_RANGES[self.discretization]
        return (
            low if self.sigma_min is None else self.sigma_min,
            high if self.sigma_max is None else self.sigma_max,
        )


def check_range(sigma_min: float, sigma_max: float) -> None:
    """Raise ValueError unless 0 < sigma_min < sigma_max, both finite."""
    if not 0 < sigma_min < sigma_max < math.inf:
        raise ValueError(f"sigma_min is {sigma_min} and sigma_max {sigma_max}; expected 0 < sigma_min < sigma_max")
