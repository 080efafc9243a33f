"""The training loss of xAR: flow matching, each cell given earlier ones that are noisy themselves."""

import torch
from torch import Tensor

from neon.noise import Noise
from xAR.transformer import XAR, time_index, to_cells


def flow_loss(transformer: XAR, latents: Tensor, labels: Tensor, noise: Noise) -> Tensor:
    """Per image, the mean squared error of the velocity: float32 [B].

    `latents` float32 [B, c, G, G], as the autoencoder scales them; `labels` int64 [B] in [0, N]. A cell x at time t
    is (1 - t) x + t e with unit normal e, of velocity e - x; the logarithm of t / (1 - t) is unit normal, one per
    cell. Draws per image, in this order: a uniform, below `label_drop` of which the class is dropped; one normal
    per cell (float64) for its time; then e for all cells.
    """
    labels = torch.where(noise.uniform() < transformer.label_drop, transformer.classes, labels)
    times = noise.normal(transformer.num_cells, dtype=torch.float64).sigmoid().float()
    clean = to_cells(latents, transformer.cells_per_side)
    pure = noise.normal(*clean.shape[1:])
    t = times[..., None, None]
    velocity = transformer((1 - t) * clean + t * pure, time_index(times), labels)
    return (velocity - (pure - clean)).square().mean(dim=(1, 2, 3))
