"""The training loss that a scheduler implies: noise an example, and compare what the network says with its target."""

from typing import Any

import torch
from torch import Tensor

from neon.noise import Noise
from neon_diffusers.sampler import Predict


def diffusion_loss(predict: Predict, clean: Tensor, scheduler: Any, noise: Noise, min_snr: float | None) -> Tensor:
    """Mean squared error per image, float32 [B], of the noise, the velocity or the example itself.

    Draws per image: a timestep, then the noise, both uniform over what the scheduler was trained on.

    Args:
        clean: examples [B, C, H, W].
        scheduler: with a table `alphas_cumprod`; its `prediction_type` says what the network is asked for. Of v see
            Salimans and Ho 2022 (arXiv 2202.00512), equation 20.
        min_snr: gamma of the weights min(SNR, gamma) (Hang et al. 2023, arXiv 2303.09556); None: all weigh the same.
    """
    t = noise.integers(scheduler.config["num_train_timesteps"])
    drawn = noise.normal(*clean.shape[1:])
    kind = scheduler.config["prediction_type"]
    target = {
        "epsilon": lambda: drawn,
        "v_prediction": lambda: scheduler.get_velocity(clean, drawn, t),
        "sample": lambda: clean,
    }[kind]()
    # A variance that is learned, too, follows these: its channels are left as they are.
    output = predict(scheduler.add_noise(clean, drawn, t), t)[:, : clean.shape[1]]
    error = (output.float() - target).square().flatten(1).mean(dim=1)
    return error if min_snr is None else error * min_snr_weight(scheduler.alphas_cumprod.to(t.device)[t], kind, min_snr)


def flow_loss(predict: Predict, clean: Tensor, scheduler: Any, noise: Noise) -> Tensor:
    """Mean squared error per image, float32 [B], of the velocity noise - example of the straight path between them.

    Draws per image: a time, logit-normal (Esser et al. 2024, arXiv 2403.03206, section 3.1), and the noise.

    Args:
        clean: examples [B, C, H, W].
        scheduler: of flow matching, with a table `sigmas` and the `timesteps` that the network is told, shifted as it
            says.
    """
    u = torch.sigmoid(noise.normal()).cpu()
    chosen = (u * len(scheduler.timesteps)).long().clamp(max=len(scheduler.timesteps) - 1)
    drawn = noise.normal(*clean.shape[1:])
    t, sigma = (table[chosen].to(clean.device) for table in (scheduler.timesteps, scheduler.sigmas))
    sigma = sigma.view(-1, 1, 1, 1)
    output = predict((1 - sigma) * clean + sigma * drawn, t)
    return (output.float() - (drawn - clean)).square().flatten(1).mean(dim=1)


def min_snr_weight(alphas_cumprod: Tensor, prediction: str, gamma: float) -> Tensor:
    """Weights by which an error of the `prediction` counts as min(SNR, gamma) times that of the example.

    The SNR is a / (1 - a) of `alphas_cumprod` a; noise is worth the SNR of the example, velocity SNR + 1.
    """
    snr = alphas_cumprod / (1 - alphas_cumprod)
    if prediction == "epsilon":
        return torch.where(snr > gamma, gamma / snr, torch.ones_like(snr))  # also where the SNR is 0
    clipped = snr.clamp(max=gamma)
    return clipped / (snr + 1) if prediction == "v_prediction" else clipped
