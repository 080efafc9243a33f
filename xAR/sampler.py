"""The sampler of xAR: cell after cell, each from noise to data along its flow, with classifier-free guidance.

Symbols as in `xAR.transformer`. The path of a cell is x = (1 - t) data + t noise and the network gives its
velocity v. Any diffusion may be added if the drift takes it back: with the one used here, of variance 2t per unit
of time, dx = ((2 - t) v + x) dt + sqrt(2t) dW, for the score of the path is -((1 - t) v + x) / t.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from neon.model import of_both
from neon.noise import Noise
from xAR.settings import XARSettings
from xAR.transformer import XAR, from_cells, time_index

Velocity = Callable[[list[Tensor], Tensor, int], Tensor]
"""(finished cells, each float32 [B, P, c]; the next one, noisy; its time) -> its velocity, float64 [B, P, c]"""

LAST_TIME = 0.04
"""where the stochastic sampler stops adding noise and goes to 0 in one step"""


class FlowStep(NamedTuple):
    """One step x <- x_factor x + v_factor v + noise e, in Python numbers: on a GPU the loop never waits for it."""

    time: int
    """in thousandths, as the network takes it"""
    x_factor: float
    v_factor: float
    noise: float


def flow_times(settings: XARSettings) -> Tensor:
    """Times from 1 to 0, float64 [num_steps + 1]."""
    if not settings.stochastic:
        return torch.linspace(1, 0, settings.num_steps + 1, dtype=torch.float64, device="cpu")
    noisy = torch.linspace(1, LAST_TIME, settings.num_steps, dtype=torch.float64, device="cpu")
    return torch.cat([noisy, noisy.new_zeros(1)])


def flow_steps(settings: XARSettings) -> list[FlowStep]:
    """The steps of every cell."""
    times = flow_times(settings)
    starts, lengths, indices = times.tolist(), times.diff().tolist(), time_index(times).tolist()
    if not settings.stochastic:
        return [FlowStep(index, 1.0, dt, 0.0) for index, dt in zip(indices, lengths, strict=False)]
    noises = [math.sqrt(2 * t * -dt) for t, dt in zip(starts, lengths[:-1], strict=False)]
    return [
        FlowStep(index, 1 + dt, (2 - t) * dt, noise)
        for index, t, dt, noise in zip(indices, starts, lengths, [*noises, 0.0], strict=False)
    ]


@torch.no_grad()
def generate_latents(
    transformer: XAR, labels: Tensor, noise: Noise, settings: XARSettings, second: tuple[XAR, float] | None = None
) -> Tensor:
    """Latents float32 [B, c, G, G] of classes `labels` int64 [B] in [0, N]; N stands for no class.

    Latent b depends on row b of `labels` and `noise` only. Draws per image and cell: the start, float32 [P, c];
    then, if stochastic, the noise of all steps but the last, float64 [num_steps - 1, P, c]. The network should be
    in eval mode. With a `second` network and its scale g cells follow (1 + g) v - g v_second of guided velocities.
    The device is never waited for.
    """
    velocity = of_both(lambda network: guided_velocity(network, labels, settings.guidance), transformer, second)
    shape = transformer.cell_length, transformer.latent_channels
    steps, cells = flow_steps(settings), list[Tensor]()
    for _ in range(transformer.num_cells):
        cells.append(_sample_cell(velocity, cells, shape, noise, steps))
    return from_cells(torch.stack(cells, dim=1))


def _sample_cell(
    velocity: Velocity, finished: list[Tensor], shape: tuple[int, int], noise: Noise, steps: list[FlowStep]
) -> Tensor:
    """The cell behind the `finished` ones, float32 [B, P, c]; the state of the loop is float64."""
    x = noise.normal(*shape).double()
    noisy = sum(step.noise > 0 for step in steps)
    fresh = iter(noise.normal(noisy, *shape, dtype=torch.float64).unbind(1) if noisy else ())
    for step in steps:
        x = step.x_factor * x + step.v_factor * velocity(finished, x.float(), step.time)
        if step.noise > 0:
            x = x + step.noise * next(fresh)
    return x.float()


def guided_velocity(transformer: XAR, labels: Tensor, guidance: float) -> Velocity:
    """The velocity of cell after cell of classes `labels`, its guidance rising from 1 at the first to `guidance`.

    Finished cells are remembered as they come.
    """
    guided = guidance > 1
    # The same images once more, without a class: behind those with one, so that these can be computed alone.
    everyone = torch.cat([labels, torch.full_like(labels, transformer.classes)]) if guided else labels
    generation = transformer.start(everyone)

    def velocity(finished: list[Tensor], x: Tensor, time: int) -> Tensor:
        if generation.finished < len(finished) * transformer.cell_length:
            transformer.remember(generation, finished[-1].repeat(2 if guided else 1, 1, 1))
        scale = 1 + (guidance - 1) * len(finished) / (transformer.num_cells - 1) if guided else 1.0
        if scale == 1:  # the part without a class would change nothing
            return transformer.velocity(generation, x, time).double()
        conditional, unconditional = transformer.velocity(generation, x.repeat(2, 1, 1), time).double().chunk(2)
        return unconditional + scale * (conditional - unconditional)

    return velocity
