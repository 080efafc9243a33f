"""The samplers of EDM (arXiv 2206.00364): one loop for Algorithm 2 and for the schedules it is compared with.

Time t falls to 0. The state is x = s (y + sigma n) of an image y and unit normal n, at noise level sigma(t)
and scale s, which is 1 or 1 / sqrt(1 + sigma^2). In both cases the flow (EDM eq. 4, the score written by D) is
dx/dt = (s sigma'/sigma) (s x - D(x / s, sigma)); in EDM's own sampler sigma = t and s = 1.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from neon.errors import RequestError

Denoiser = Callable[[Tensor, Tensor], Tensor]
"""(x [B, C, R, R], sigma scalar tensor), both of the sampler's dtype -> denoised x, any float dtype."""
RoundSigma = Callable[[Tensor], Tensor]
"""Noise levels -> the nearest ones that a network knows."""


class Point(NamedTuple):
    """The flow at one time, in Python floats: dx/dt = rate (scale x - D(x / scale, sigma))."""

    sigma: float
    scale: float
    rate: float


class Step(NamedTuple):
    """One step of the loop, in Python floats: on a GPU the loop never waits for the device."""

    rise: float
    """factor on x, before the noise; in the first step it takes unit variance to the highest level"""
    noise: float
    """standard deviation of the fresh noise, 0 without churn"""
    start: Point
    """after the noise"""
    length: float
    """in time, negative"""
    second: Point | None
    """where the slope is taken again, `alpha` of the way; None: nowhere (Euler)"""
    alpha: float


class Schedule:
    """How the noise level runs with time; float64 tensors. EDM's choice: sigma(t) = t."""

    def sigma(self, t: Tensor) -> Tensor:
        return t

    def speed(self, t: Tensor) -> Tensor:
        """d sigma / dt."""
        return torch.ones_like(t)

    def time(self, sigma: Tensor) -> Tensor:
        """The inverse of `sigma`."""
        return sigma


@dataclass(frozen=True, kw_only=True)
class SamplerSettings(ABC):
    """What every sampler of diffusion models asks for."""

    num_steps: int = 18
    """noise levels, at least 2"""
    solver: Literal["heun", "euler"] = "heun"
    """heun: 2 num_steps - 1 network calls; euler: num_steps"""
    guidance: float = 0.0
    """g in D + g (D - D_unconditional); 0: none; needs label dropout"""
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
        self._expect_one_of("solver", "heun", "euler")
        self._expect_positive("rho", "S_noise")
        if not 0 <= self.S_churn < math.inf:
            raise ValueError(f"S_churn is {self.S_churn}; expected 0 or more")
        if not math.isfinite(self.guidance):
            raise ValueError(f"guidance is {self.guidance}; expected a finite number")

    def _expect_one_of(self, name: str, *known: str) -> None:
        if getattr(self, name) not in known:
            raise ValueError(f"{name} is {getattr(self, name)!r}; expected {', '.join(known[:-1])} or {known[-1]}")

    def _expect_positive(self, *names: str) -> None:
        for name in names:
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}; expected a positive number")

    @abstractmethod
    def steps(self, sigma_limits: tuple[float, float], round_sigma: RoundSigma) -> list[Step]:
        """The steps of the sampler for a network that knows the levels within `sigma_limits`."""

    def _steps_along(
        self,
        levels: Tensor,
        round_sigma: RoundSigma,
        schedule: Schedule,
        scale: Callable[[Tensor], Tensor] = torch.ones_like,
        alpha: float = 1.0,
    ) -> list[Step]:
        """The steps through `levels` [num_steps], float64 on the CPU; `scale` is s as a function of sigma."""
        sigma = round_sigma(levels).to(torch.float64)
        churning = ((self.S_min <= sigma) & (sigma <= self.S_max)).to(torch.float64)
        gamma = min(self.S_churn / self.num_steps, math.sqrt(2) - 1) * churning
        sigma_hat = round_sigma(sigma + gamma * sigma).to(torch.float64)
        rise = scale(sigma_hat) / scale(sigma)
        rise[0] *= sigma[0] * scale(sigma[0])
        noise = (sigma_hat**2 - sigma**2).clamp(min=0).sqrt() * scale(sigma_hat) * self.S_noise

        t, t_hat = schedule.time(sigma), schedule.time(sigma_hat)
        length = torch.cat([t[1:], t.new_zeros(1)]) - t_hat

        def points(t: Tensor) -> list[Point]:
            sigma = schedule.sigma(t)
            rate = scale(sigma) * schedule.speed(t) / sigma
            return list(map(Point, sigma.tolist(), scale(sigma).tolist(), rate.tolist()))

        # The last step ends at noise level 0, where the flow has no slope: it is always Euler's.
        second: list[Point | None] = [None] * self.num_steps
        if self.solver == "heun":
            second[:-1] = points((t_hat + alpha * length)[:-1])
        return [
            Step(*numbers, alpha)
            for numbers in zip(rise.tolist(), noise.tolist(), points(t_hat), length.tolist(), second, strict=True)
        ]


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

    def steps(self, sigma_limits: tuple[float, float], round_sigma: RoundSigma) -> list[Step]:
        levels = noise_levels(self.num_steps, *within(sigma_limits, self.sigma_min, self.sigma_max), self.rho)
        return self._steps_along(levels[:-1], round_sigma, Schedule())


def check_range(sigma_min: float, sigma_max: float) -> None:
    """Raise ValueError unless 0 < sigma_min < sigma_max, both finite."""
    if not 0 < sigma_min < sigma_max < math.inf:
        raise ValueError(f"sigma_min is {sigma_min} and sigma_max {sigma_max}; expected 0 < sigma_min < sigma_max")


def within(limits: tuple[float, float], sigma_min: float, sigma_max: float) -> tuple[float, float]:
    """The part of the noise levels from `sigma_min` to `sigma_max` that is within `limits`.

    Raises:
        RequestError: there is none.
    """
    low, high = max(sigma_min, limits[0]), min(sigma_max, limits[1])
    if low >= high:
        raise RequestError(
            f"sigma_min is {sigma_min} and sigma_max {sigma_max}, but the network knows noise levels "
            f"{limits[0]:g} to {limits[1]:g}; expected a range that overlaps"
        )
    return low, high


def noise_levels(num_steps: int, sigma_min: float, sigma_max: float, rho: float) -> Tensor:
    """float64 [num_steps + 1], from sigma_max down to sigma_min, then 0 (EDM eq. 5)."""
    ramp = torch.arange(num_steps, dtype=torch.float64) / (num_steps - 1)
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    return torch.cat([(high + ramp * (low - high)) ** rho, torch.zeros(1, dtype=torch.float64)])


def integrate(
    denoise: Denoiser,
    latents: Tensor,
    settings: SamplerSettings,
    *,
    sigma_limits: tuple[float, float] = (0.0, math.inf),
    round_sigma: RoundSigma = torch.as_tensor,
    draw_noise: Callable[[], Tensor] | None = None,
    dtype: torch.dtype = torch.float64,
    draw_at_rest: bool = True,
) -> Tensor:
    """Integrate from unit-variance `latents` [B, C, R, R] to images of `dtype`, about [-1, 1].

    `sigma_limits` clip the noise levels to those a network knows. `draw_noise` returns a unit normal like
    `latents`; it is called once per step if `settings.S_churn` is above 0 (also at steps without churn, so
    that the stream of an image does not depend on S_min and S_max), else never: nothing is drawn after the
    sampler. The published sampler of two networks is float32 and draws only where a step churns:
    `dtype=torch.float32, draw_at_rest=False`, no limits, no rounding, and `guided`.

    Raises:
        RequestError: the network knows none of the noise levels asked for.
    """

    def slope(x: Tensor, at: Point) -> Tensor:
        sigma = torch.full((), at.sigma, dtype=dtype, device=x.device)
        return at.rate * (at.scale * x - denoise(x / at.scale, sigma).to(dtype))

    x = latents.to(dtype)
    for step in settings.steps(sigma_limits, round_sigma):
        x = step.rise * x
        if step.noise > 0 or (settings.S_churn > 0 and draw_at_rest):
            assert draw_noise is not None, "S_churn above 0 needs a source of noise"
            x = x + step.noise * draw_noise().to(dtype)
        d = slope(x, step.start)
        if step.second is not None:
            d_second = slope(x + step.alpha * step.length * d, step.second)
            d = d + (d_second - d) / (2 * step.alpha)
        x = x + step.length * d
    return x


def guided(denoise: Denoiser, second: Denoiser, guidance: float) -> Denoiser:
    """D + guidance (D - D_second): away from the second denoiser; 0 is the first alone, -1 the second alone."""
    if guidance == 0:
        return denoise
    if guidance == -1:
        return second

    def extrapolated(x: Tensor, sigma: Tensor) -> Tensor:
        denoised = denoise(x, sigma)
        return denoised + guidance * (denoised - second(x, sigma))

    return extrapolated
