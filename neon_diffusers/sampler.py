"""The loop of a sampler: a scheduler of diffusers, whose fresh noise comes from the generators of the images."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Predict = Callable[[Tensor, Tensor], Tensor]
"""what a network says of x [B, C, H, W] at timesteps [B]: [B, C, H, W], or [B, 2C, H, W] with a learned variance"""


def integrate(
    predict: Predict, noise: Tensor, scheduler: Any, generators: Sequence[torch.Generator], eta: float
) -> Tensor:
    """From unit normal `noise` [B, C, H, W] to what the scheduler ends at, float32 of the same shape.

    `scheduler` has its timesteps set. With equal draws this is what diffusers' own pipelines compute.

    Args:
        generators: one per row; a stochastic scheduler draws from them in every step.
        eta: of a scheduler that has one.
    """
    takes = inspect.signature(scheduler.step).parameters
    offered = {"generator": list(generators), "eta": eta}
    given = {name: value for name, value in offered.items() if name in takes}
    learns_variance = "learned" in str(scheduler.config.get("variance_type"))
    scaled = getattr(scheduler, "scale_model_input", lambda x, t: x)  # those of flows scale neither this
    x = noise * getattr(scheduler, "init_noise_sigma", 1.0)  # nor that
    for t in scheduler.timesteps:
        output = predict(scaled(x, t), t.expand(len(x)).to(x.device)).float()
        x = scheduler.step(output if learns_variance else output[:, : x.shape[1]], t, x, **given).prev_sample
    return x
