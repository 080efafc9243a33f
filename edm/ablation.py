"""Which noise levels are visited: EDM's choice, and those it is compared with (arXiv 2206.00364, Table 1)."""

import torch
from torch import Tensor

from edm.precond import iddpm_levels
from edm.schedules import VPSchedule
from edm.settings import AblationSettings
from neon.errors import RequestError


def noise_levels(num_steps: int, sigma_min: float, sigma_max: float, rho: float) -> Tensor:
    """float64 [num_steps + 1], from sigma_max down to sigma_min, then 0 (EDM eq. 5)."""
    ramp = torch.arange(num_steps, dtype=torch.float64) / (num_steps - 1)
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    return torch.cat([(high + ramp * (low - high)) ** rho, torch.zeros(1, dtype=torch.float64)])


def ablation_levels(settings: AblationSettings, sigma_min: float, sigma_max: float, vp: VPSchedule) -> Tensor:
    """float64 [num_steps], from sigma_max down to sigma_min."""
    index = torch.arange(settings.num_steps, dtype=torch.float64)
    ramp = index / (settings.num_steps - 1)
    if settings.discretization == "vp":
        return vp.sigma(1 + ramp * (settings.epsilon_s - 1))
    if settings.discretization == "ve":
        return sigma_max * (sigma_min / sigma_max) ** ramp
    if settings.discretization == "iddpm":
        table = iddpm_levels(settings.M, settings.C_1, settings.C_2, torch.float64)
        known = table[(sigma_min <= table) & (table <= sigma_max)]
        if len(known) == 0:
            raise RequestError(f"no level of iddpm's table is between {sigma_min:g} and {sigma_max:g}; widen them")
        return known[((len(known) - 1) / (settings.num_steps - 1) * index).round().to(torch.int64)]
    return noise_levels(settings.num_steps, sigma_min, sigma_max, settings.rho)[:-1]
