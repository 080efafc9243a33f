"""The samplers of IMM: from noise at time T to data at time eps in a few network calls.

Pushforward takes the image from one time of a falling grid to the next. Restart takes it to eps from every
time of the grid but the last, and noises it anew up to the next time in between.
"""

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from imm.precond import IMMPrecond
from imm.settings import IMMSettings
from neon.errors import RequestError
from neon.model import of_both

RHO = 7
"""exponent of the grid that is spaced as EDM spaces its noise levels"""


def time_grid(network: IMMPrecond, settings: IMMSettings, dtype: torch.dtype) -> Tensor:
    """Times from T down to eps, of `dtype` on the CPU, [num_steps + 1].

    Raises:
        RequestError: `settings.mid_nt` leaves the times that the network knows.
    """
    ends = torch.tensor([network.T, network.eps], dtype=dtype, device="cpu")
    if settings.mid_nt:
        if not network.nt_high > settings.mid_nt[0] or not settings.mid_nt[-1] > network.nt_low:
            raise RequestError(
                f"mid_nt is {settings.mid_nt}, but the network knows noise-to-signal ratios from {network.nt_low:g} "
                f"to {network.nt_high:g}; expected ratios between"
            )
        # Through float32 whatever the dtype, as published.
        middle = network.schedule.time(torch.tensor(settings.mid_nt, dtype=torch.float32, device="cpu"))
        return torch.cat([ends[:1], middle.to(dtype), ends[1:]])
    if settings.discretization == "edm":
        high, low = network.schedule.ratio(ends) ** (1 / RHO)
        ramp = torch.linspace(0, 1, settings.num_steps + 1, dtype=dtype, device="cpu")
        return network.schedule.time((high + ramp * (low - high)) ** RHO)
    return torch.linspace(network.T, network.eps, settings.num_steps + 1, dtype=dtype, device="cpu")


@torch.no_grad()
def generate(
    network: IMMPrecond,
    latents: Tensor,
    class_labels: Tensor | None,
    settings: IMMSettings,
    *,
    draw_noise: Callable[[], Tensor] | None = None,
    dtype: torch.dtype = torch.float32,
    second: tuple[IMMPrecond, float] | None = None,
) -> Tensor:
    """Images of `dtype` [B, C, R, R] from the state `latents` at time T, normal of deviation `sigma_data`.

    `class_labels` one-hot [B, label_dim], or None. `draw_noise` returns a unit normal like `latents`; it is
    called between the steps of restart, else never. State and times are of `dtype`: float32 is how Neon's
    published scores were sampled, float64 is IMM's own. The device is never waited for in the loop.

    With a `second` network and its scale g every step goes to (1 + g) x_s - g x_s of the second. That is the step of
    (1 + g) F - g F_second: x_s = skip x_t + out F is linear in F, by coefficients of the times alone.

    Raises:
        RequestError: guidance of a network without classes, or as `time_grid`.
    """
    times = time_grid(network, settings, dtype).to(latents.device, non_blocking=True).unbind()
    cfg_scale = None if settings.guidance == 1 else settings.guidance
    jump = of_both(lambda network: network.cfg_forward, network, second)
    x = latents.to(dtype)
    for step, (t, s) in enumerate(pairwise(times)):
        if settings.restart:
            s = times[-1]
            if step > 0:
                assert draw_noise is not None, "restart needs a source of noise"
                x = network.schedule.mix(x, network.sigma_data * draw_noise().to(dtype), t)
        x = jump(x, t, s, class_labels, cfg_scale)
    return x
