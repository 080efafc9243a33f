"""The schedules, scalings and noise levels that EDM compares its sampler with (arXiv 2206.00364, Table 1).

`AblationSettings` go to the same `integrate` as EDM's own settings, which are their default choices.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from edm.precond import iddpm_levels, vp_sigma, vp_time
from edm.sampler import RoundSigma, SamplerSettings, Schedule, Step, check_range, noise_levels, within
from neon.errors import RequestError

SIGMA_RANGES = {"ve": (0.02, 100.0), "iddpm": (0.002, 81.0), "edm": (0.002, 80.0)}
"""Noise levels per discretization, unless told otherwise; those of vp follow from its process."""


@dataclass(frozen=True)
class VPSchedule(Schedule):
    """The variance-preserving process of Song et al. 2020 (arXiv 2011.13456)."""

    beta_d: float = 19.9
    beta_min: float = 0.1

    @classmethod
    def between(cls, sigma_min: float, sigma_max: float, epsilon_s: float) -> "VPSchedule":
        """The process that is at `sigma_min` at time epsilon_s and at `sigma_max` at time 1."""
        low, high = (torch.tensor([sigma_min, sigma_max], dtype=torch.float64).square() + 1).log().tolist()
        beta_d = 2 * (low / epsilon_s - high) / (epsilon_s - 1)
        return cls(beta_d, high - beta_d / 2)

    def sigma(self, t: Tensor) -> Tensor:
        return vp_sigma(t, self.beta_d, self.beta_min)

    def speed(self, t: Tensor) -> Tensor:
        sigma = self.sigma(t)
        return (self.beta_min + self.beta_d * t) / 2 * (sigma + 1 / sigma)

    def time(self, sigma: Tensor) -> Tensor:
        return vp_time(sigma, self.beta_d, self.beta_min)


class VESchedule(Schedule):
    """The variance-exploding process: sigma(t) = sqrt(t)."""

    def sigma(self, t: Tensor) -> Tensor:
        return t.sqrt()

    def speed(self, t: Tensor) -> Tensor:
        return 1 / (2 * t.sqrt())

    def time(self, sigma: Tensor) -> Tensor:
        return sigma.square()


def vp_scale(sigma: Tensor) -> Tensor:
    """The scale that keeps the variance of the state at 1."""
    return 1 / (1 + sigma.square()).sqrt()


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
        check_range(*self._range())

    def _range(self) -> tuple[float, float]:
        """(sigma_min, sigma_max), as given or by default."""
        if self.discretization == "vp":
            low, high = VPSchedule().sigma(torch.tensor([self.epsilon_s, 1.0], dtype=torch.float64)).tolist()
        else:
            low, high = SIGMA_RANGES[self.discretization]
        return (
            low if self.sigma_min is None else self.sigma_min,
            high if self.sigma_max is None else self.sigma_max,
        )

    def steps(self, sigma_limits: tuple[float, float], round_sigma: RoundSigma) -> list[Step]:
        sigma_min, sigma_max = within(sigma_limits, *self._range())
        vp = VPSchedule.between(sigma_min, sigma_max, self.epsilon_s)
        schedule = {"vp": vp, "ve": VESchedule(), "linear": Schedule()}[self.schedule]
        scale = vp_scale if self.scaling == "vp" else torch.ones_like
        levels = self._levels(sigma_min, sigma_max, vp)
        return self._steps_along(levels, round_sigma, schedule, scale, self.alpha)

    def _levels(self, sigma_min: float, sigma_max: float, vp: VPSchedule) -> Tensor:
        """float64 [num_steps], from sigma_max down to sigma_min."""
        index = torch.arange(self.num_steps, dtype=torch.float64)
        ramp = index / (self.num_steps - 1)
        if self.discretization == "vp":
            return vp.sigma(1 + ramp * (self.epsilon_s - 1))
        if self.discretization == "ve":
            return sigma_max * (sigma_min / sigma_max) ** ramp
        if self.discretization == "iddpm":
            table = iddpm_levels(self.M, self.C_1, self.C_2, torch.float64)
            known = table[(sigma_min <= table) & (table <= sigma_max)]
            if len(known) == 0:
                raise RequestError(f"no level of iddpm's table is between {sigma_min:g} and {sigma_max:g}; widen them")
            return known[((len(known) - 1) / (self.num_steps - 1) * index).round().to(torch.int64)]
        return noise_levels(self.num_steps, sigma_min, sigma_max, self.rho)[:-1]
