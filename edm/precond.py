"""Preconditioning: a raw U-Net F becomes a denoiser D(x, sigma) of unit-variance inputs and targets."""

from typing import Any

import torch
from torch import Tensor, nn

from edm.networks import DhariwalUNet, SongUNet

NETWORKS: dict[str, type[nn.Module]] = {"SongUNet": SongUNet, "DhariwalUNet": DhariwalUNet}


class EDMPrecond(nn.Module):
    """D(x, s) = c_skip x + c_out F(c_in x, c_noise), EDM Table 1 (arXiv 2206.00364).

    Extra keywords go to the U-Net named by `model_type`. `use_fp16` takes effect on CUDA devices only;
    the stored weights are float32 in either case.
    """

    def __init__(
        self,
        img_resolution: int,
        img_channels: int,
        label_dim: int = 0,
        use_fp16: bool = False,
        sigma_min: float = 0,
        sigma_max: float = float("inf"),
        sigma_data: float = 0.5,
        model_type: str = "DhariwalUNet",
        **model_kwargs: Any,
    ) -> None:
        if model_type not in NETWORKS:
            raise ValueError(f"model_type {model_type!r} is unknown; expected one of {', '.join(NETWORKS)}")
        super().__init__()
        self.img_resolution = img_resolution
        self.img_channels = img_channels
        self.label_dim = label_dim
        self.use_fp16 = use_fp16
        self.sigma_min = sigma_min
        self.sigma_max = sigma_max
        self.sigma_data = sigma_data
        self.model = NETWORKS[model_type](
            img_resolution=img_resolution,
            in_channels=img_channels,
            out_channels=img_channels,
            label_dim=label_dim,
            **model_kwargs,
        )

    def forward(
        self,
        x: Tensor,
        sigma: Tensor,
        class_labels: Tensor | None = None,
        force_fp32: bool = False,
        augment_labels: Tensor | None = None,
    ) -> Tensor:
        """Denoise x [B, C, R, R] at noise level `sigma` (one value or B) -> float32 [B, C, R, R].

        `class_labels` [B, label_dim] are one-hot; None is the all-zero row (no class).
        """
        x = x.to(torch.float32)
        sigma = sigma.to(torch.float32).reshape(-1, 1, 1, 1)
        if self.label_dim == 0:
            class_labels = None
        elif class_labels is None:
            class_labels = torch.zeros(1, self.label_dim, device=x.device)
        else:
            class_labels = class_labels.to(torch.float32).reshape(-1, self.label_dim)
        half = self.use_fp16 and not force_fp32 and x.is_cuda

        total = sigma.square() + self.sigma_data**2
        c_skip = self.sigma_data**2 / total
        c_out = sigma * self.sigma_data / total.sqrt()
        c_in = 1 / total.sqrt()
        c_noise = sigma.log().flatten() / 4
        raw = self.model((c_in * x).to(torch.float16 if half else torch.float32), c_noise, class_labels, augment_labels)
        return c_skip * x + c_out * raw.to(torch.float32)

    def round_sigma(self, sigma: Tensor) -> Tensor:
        """The nearest noise level that this network was trained for: any, here."""
        return torch.as_tensor(sigma)
