"""The schedulers that are served, by an allow-list, and what they imply: timesteps, noise, and what a network predicts.

A scheduler is always diffusers' own class, made of the configuration that the pipeline carries.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from neon.errors import RequestError
from neon_diffusers.library import library

DIFFUSION = (
    *("DDPMScheduler", "DDIMScheduler", "PNDMScheduler"),
    *("DPMSolverMultistepScheduler", "UniPCMultistepScheduler"),
    *("DEISMultistepScheduler", "LMSDiscreteScheduler", "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler"),
    *("HeunDiscreteScheduler", "KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler"),
)
"""of networks that were trained on a table of noise levels, `alphas_cumprod`; any of them samples such a network"""
FLOW = "FlowMatchEulerDiscreteScheduler"
"""of networks that were trained to tell the velocity of a straight path from noise to image"""
SCHEDULERS = (*DIFFUSION, FLOW)
SPACINGS = ("leading", "linspace", "trailing")
WITH_ETA = ("DDIMScheduler",)
SEARCHED = ("DDIMScheduler", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler", "EulerDiscreteScheduler")
"""deterministic ones that a search for the best sampler tries beside the pipeline's own"""
PREDICTIONS = ("epsilon", "v_prediction", "sample")
FLOW_PREDICTION = "flow"
"""what `FLOW` asks of its network: noise minus example"""
_OTHER_FLOWS = ("stochastic_sampling", "use_dynamic_shifting", "invert_sigmas")
"""settings of `FLOW` by which it samples otherwise than here"""
UNABLE: Mapping[str, tuple[str, ...]] = {
    "sample": (
        *("PNDMScheduler", "EulerAncestralDiscreteScheduler"),
        *("KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler"),
    )
}
"""schedulers that do not know a prediction, by its name"""


def check_scheduler(name: str, config: Mapping[str, Any], source: str, served: Sequence[str]) -> str:
    """What the scheduler of the pipeline `source` asks of its network, one of `PREDICTIONS` or `FLOW_PREDICTION`.

    Raises:
        RequestError: the scheduler, or what it asks, is not served.
    """
    if name not in served:
        raise RequestError(
            f"{source}: its scheduler is {name}, which is not served, neither to sample nor to train by; expected one "
            f"of {', '.join(served)}"
        )
    if name == FLOW:
        if other := [key for key in _OTHER_FLOWS if config.get(key)]:
            raise RequestError(f"{source}: its scheduler has {', '.join(other)}, which is not served; expected neither")
        return FLOW_PREDICTION
    prediction = config.get("prediction_type", "epsilon")
    if prediction not in PREDICTIONS:
        raise RequestError(
            f"{source}: its scheduler has prediction_type {str(prediction)[:100]}; expected {', '.join(PREDICTIONS)}"
        )
    return str(prediction)


def made(name: str, config: Mapping[str, Any], **changed: Any) -> Any:
    """The scheduler of class `name`, one of `SCHEDULERS`, with the configuration of the same or another one.

    `changed` takes the place of what the configuration says.

    Raises:
        RequestError: diffusers is not installed, or knows no such scheduler.
        ValueError, TypeError and others: the configuration makes no sense.
    """
    assert name in SCHEDULERS, name
    kind = getattr(library(), name, None)
    if kind is None:
        raise RequestError(f"scheduler {name}: this version of diffusers has none; install a newer one")
    return kind.from_config({**config, **changed})
