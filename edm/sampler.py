"""The deterministic and stochastic samplers of EDM, Algorithm 2 (arXiv 2206.00364)."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Denoiser = Callable[[Tensor, Tensor], Tensor]
"""(x float64 [B, C, R, R], sigma float64 scalar tensor) -> denoised x, any float dtype."""


@dataclass(frozen=True, kw_only=True)
class EDMSettings:
    """How to sample; the defaults are the published CIFAR-10 settings."""

    num_steps: int = 18
    """noise levels, at least 2"""
    solver: Literal["heun", "euler"] = "heun"
    """heun: 2 num_steps - 1 network calls; euler: num_steps calls"""
    guidance: float = 0.0
    """g in D + g (D - D_unconditional); 0: none; needs a network trained with label dropout"""
    sigma_min: float = 0.002
    """lowest noise level, in units of the data (images in [-1, 1])"""
    sigma_max: float = 80.0
    """highest noise level"""
    rho: float = 7.0
    """exponent of the spacing of noise levels"""
    S_churn: float = 0.0
    """amount of fresh noise; 0: deterministic"""
    S_min: float = 0.0
    """no churn below this noise level"""
    S_max: float = math.inf
    """no churn above this noise level"""
    S_noise: float = 1.0
    """standard deviation of the fresh noise"""

    def __post_init__(self) -> None:
        if self.num_steps < 2:
            raise ValueError(f"num_steps is {self.num_steps}; expected at least 2 noise levels")
        if self.solver not in ("heun", "euler"):
            raise ValueError(f"solver is {self.solver!r}; expected heun or euler")
        if not 0 < self.sigma_min < self.sigma_max < math.inf:
            raise ValueError(
                f"sigma_min is {self.sigma_min} and sigma_max {self.sigma_max}; expected 0 < sigma_min < sigma_max"
            )
        for name in ("rho", "S_noise"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}; expected a positive number")
        if not 0 <= self.S_churn < math.inf:
            raise ValueError(f"S_churn is {self.S_churn}; expected 0 or more")
        if not math.isfinite(self.guidance):
            raise ValueError(f"guidance is {self.guidance}; expected a finite number")


def noise_levels(num_steps: int, sigma_min: float, sigma_max: float, rho: float) -> Tensor:
    """float64 [num_steps + 1], from sigma_max down to sigma_min, then 0 (EDM eq. 5)."""
    ramp = torch.arange(num_steps, dtype=torch.float64) / (num_steps - 1)
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    return torch.cat([(high + ramp * (low - high)) ** rho, torch.zeros(1, dtype=torch.float64)])


def integrate(
    denoise: Denoiser,
    latents: Tensor,
    settings: EDMSettings,
    *,
    sigma_limits: tuple[float, float] = (0.0, math.inf),
    round_sigma: Callable[[Tensor], Tensor] = torch.as_tensor,
    draw_noise: Callable[[], Tensor] | None = None,
) -> Tensor:
    """Integrate from unit-variance `latents` [B, C, R, R] to images, float64, about [-1, 1].

    `sigma_limits` clip the noise levels to those a network knows. `draw_noise` returns a float64 unit
    normal like `latents`; it is called once per step if `settings.S_churn` is above 0 (also at steps without
    churn, so that the stream of an image does not depend on S_min and S_max), else never: nothing is
    drawn after the sampler.
    """
    sigma_min = max(settings.sigma_min, sigma_limits[0])
    sigma_max = min(settings.sigma_max, sigma_limits[1])
    levels = noise_levels(settings.num_steps, sigma_min, sigma_max, settings.rho)
    # All levels are Python floats from here on: on a GPU the loop never waits for the device.
    t = [*round_sigma(levels[:-1]).to(torch.float64).tolist(), 0.0]

    def slope(x: Tensor, sigma: float) -> Tensor:
        level = torch.full((), sigma, dtype=torch.float64, device=x.device)
        return (x - denoise(x, level).to(torch.float64)) / sigma

    x = latents.to(torch.float64) * t[0]
    for i in range(settings.num_steps):
        churning = settings.S_min <= t[i] <= settings.S_max
        gamma = min(settings.S_churn / settings.num_steps, math.sqrt(2) - 1) if churning else 0.0
        t_hat = float(round_sigma(torch.tensor(t[i] + gamma * t[i], dtype=torch.float64)))
        if settings.S_churn > 0:
            assert draw_noise is not None, "S_churn above 0 needs a source of noise"
            x = x + math.sqrt(max(t_hat**2 - t[i] ** 2, 0.0)) * settings.S_noise * draw_noise()
        d = slope(x, t_hat)
        x_next = x + (t[i + 1] - t_hat) * d
        if settings.solver == "heun" and i < settings.num_steps - 1:
            x_next = x + (t[i + 1] - t_hat) * (d + slope(x_next, t[i + 1])) / 2
        x = x_next
    return x
