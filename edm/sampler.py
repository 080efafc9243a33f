"""The samplers of EDM (arXiv 2206.00364): one loop for Algorithm 2 and for the schedules it is compared with.

Time t falls to 0. The state is x = s (y + sigma n) of an image y and unit normal n, at noise level sigma(t)
and scale s, which is 1 or 1 / sqrt(1 + sigma^2). In both cases the flow (EDM eq. 4, the score written by D) is
dx/dt = (s sigma'/sigma) (s x - D(x / s, sigma)); in EDM's own sampler sigma = t and s = 1.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from edm.ablation import ablation_levels, noise_levels
from edm.schedules import SigmaSchedule, VESchedule, VPSchedule, vp_scale
from edm.settings import AblationSettings, SamplerSettings
from neon.errors import RequestError

Denoiser = Callable[[Tensor, Tensor], Tensor]
"""(x [B, C, R, R], sigma scalar tensor), both of the sampler's dtype -> denoised x, any float dtype."""
RoundSigma = Callable[[Tensor], Tensor]
"""Noise levels -> the nearest ones that a network knows."""


class FlowPoint(NamedTuple):
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
    start: FlowPoint
    """after the noise"""
    length: float
    """in time, negative"""
    second: FlowPoint | None
    """where the slope is taken again, `alpha` of the way; None: nowhere (Euler)"""
    alpha: float


def solver_steps(settings: SamplerSettings, sigma_limits: tuple[float, float], round_sigma: RoundSigma) -> list[Step]:
    """The steps of the sampler for a network that knows the levels within `sigma_limits`.

    Raises:
        RequestError: it knows none of those asked for.
    """
    sigma_min, sigma_max = within(sigma_limits, *settings.sigma_range())
    schedule, alpha = SigmaSchedule(), 1.0
    scale: Callable[[Tensor], Tensor] = torch.ones_like
    if isinstance(settings, AblationSettings):
        vp = VPSchedule.between(sigma_min, sigma_max, settings.epsilon_s)
        schedule = {"vp": vp, "ve": VESchedule(), "linear": schedule}[settings.schedule]
        scale = vp_scale if settings.scaling == "vp" else scale
        levels, alpha = ablation_levels(settings, sigma_min, sigma_max, vp), settings.alpha
    else:
        levels = noise_levels(settings.num_steps, sigma_min, sigma_max, settings.rho)[:-1]
    sigma = round_sigma(levels).to(torch.float64)
    churning = ((settings.S_min <= sigma) & (sigma <= settings.S_max)).to(torch.float64)
    gamma = min(settings.S_churn / settings.num_steps, math.sqrt(2) - 1) * churning
    sigma_hat = round_sigma(sigma + gamma * sigma).to(torch.float64)
    rise = scale(sigma_hat) / scale(sigma)
    rise[0] *= sigma[0] * scale(sigma[0])
    noise = (sigma_hat**2 - sigma**2).clamp(min=0).sqrt() * scale(sigma_hat) * settings.S_noise

    t, t_hat = schedule.time(sigma), schedule.time(sigma_hat)
    length = torch.cat([t[1:], t.new_zeros(1)]) - t_hat

    def points(t: Tensor) -> list[FlowPoint]:
        sigma = schedule.sigma(t)
        rate = scale(sigma) * schedule.speed(t) / sigma
        return list(map(FlowPoint, sigma.tolist(), scale(sigma).tolist(), rate.tolist()))

    # The last step ends at noise level 0, where the flow has no slope: it is always Euler's.
    second: list[FlowPoint | None] = [None] * settings.num_steps
    if settings.solver == "heun":
        second[:-1] = points((t_hat + alpha * length)[:-1])
    return [
        Step(*numbers, alpha)
        for numbers in zip(rise.tolist(), noise.tolist(), points(t_hat), length.tolist(), second, strict=True)
    ]


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
    `dtype=torch.float32, draw_at_rest=False`, no limits, no rounding.

    Raises:
        RequestError: the network knows none of the noise levels asked for.
    """

    def slope(x: Tensor, at: FlowPoint) -> Tensor:
        sigma = torch.full((), at.sigma, dtype=dtype, device=x.device)
        return at.rate * (at.scale * x - denoise(x / at.scale, sigma).to(dtype))

    x = latents.to(dtype)
    for step in solver_steps(settings, sigma_limits, round_sigma):
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
