"""Preconditioning: a raw U-Net F becomes a denoiser D(x, sigma) of unit-variance inputs and targets.

The four classes are the columns of EDM's Table 1 (arXiv 2206.00364). Their names, constructor keywords
and state dicts are those of the published checkpoints.
"""

import math
from abc import ABC, abstractmethod
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from edm.networks import DhariwalUNet, SongUNet

NETWORKS: dict[str, type[nn.Module]] = {"SongUNet": SongUNet, "DhariwalUNet": DhariwalUNet}


class Coefficients(NamedTuple):
    """Of D = skip x + out F(into x, noise), at noise levels [B, 1, 1, 1]."""

    skip: Tensor | float
    out: Tensor
    into: Tensor | float
    noise: Tensor
    """what F is told of the noise level, any shape of B values"""


class Precond(nn.Module, ABC):
    """D(x, s) = c_skip x + c_out F(c_in x, c_noise), with the coefficients of a subclass.

    Extra keywords go to the U-Net named by `model_type`. `use_fp16` takes effect on CUDA devices only;
    the stored weights are float32 in either case.
    """

    outputs_per_channel: ClassVar[int] = 1
    """channels of F for each channel of an image; the first are used"""
    sigma_min: float
    """lowest noise level that the network knows"""
    sigma_max: float
    """highest noise level that the network knows"""

    def __init__(
        self,
        img_resolution: int,
        img_channels: int,
        label_dim: int,
        use_fp16: bool,
        model_type: str,
        **model_kwargs: Any,
    ) -> None:
        if model_type not in NETWORKS:
            raise ValueError(f"model_type {model_type!r} is unknown; expected one of {', '.join(NETWORKS)}")
        super().__init__()
        self.img_resolution = img_resolution
        self.img_channels = img_channels
        self.label_dim = label_dim
        self.use_fp16 = use_fp16
        self.model = NETWORKS[model_type](
            img_resolution=img_resolution,
            in_channels=img_channels,
            out_channels=img_channels * self.outputs_per_channel,
            label_dim=label_dim,
            **model_kwargs,
        )

    @abstractmethod
    def coefficients(self, sigma: Tensor) -> Coefficients:
        """The coefficients at float32 levels [B, 1, 1, 1] (or [1, 1, 1, 1])."""

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
        dtype = torch.float16 if self.use_fp16 and not force_fp32 and x.is_cuda else torch.float32

        c = self.coefficients(sigma)
        raw = self.model((c.into * x).to(dtype), c.noise.flatten(), class_labels, augment_labels)
        return c.skip * x + c.out * raw[:, : self.img_channels].to(torch.float32)

    def round_sigma(self, sigma: Tensor | float) -> Tensor:
        """The nearest noise level that this network was trained for: any, unless a subclass says otherwise."""
        return torch.as_tensor(sigma)


class EDMPrecond(Precond):
    """EDM's own choice: inputs and targets of F have unit variance at every noise level."""

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
        super().__init__(img_resolution, img_channels, label_dim, use_fp16, model_type, **model_kwargs)
        self.sigma_min = sigma_min
        self.sigma_max = sigma_max
        self.sigma_data = sigma_data

    def coefficients(self, sigma: Tensor) -> Coefficients:
        total = sigma.square() + self.sigma_data**2
        return Coefficients(
            skip=self.sigma_data**2 / total,
            out=sigma * self.sigma_data / total.sqrt(),
            into=1 / total.sqrt(),
            noise=sigma.log() / 4,
        )


class VPPrecond(Precond):
    """Variance preserving (Song et al. 2020, arXiv 2011.13456): F is told M - 1 times the time of the level."""

    def __init__(
        self,
        img_resolution: int,
        img_channels: int,
        label_dim: int = 0,
        use_fp16: bool = False,
        beta_d: float = 19.9,
        beta_min: float = 0.1,
        M: int = 1000,
        epsilon_t: float = 1e-5,
        model_type: str = "SongUNet",
        **model_kwargs: Any,
    ) -> None:
        super().__init__(img_resolution, img_channels, label_dim, use_fp16, model_type, **model_kwargs)
        self.beta_d = beta_d
        self.beta_min = beta_min
        self.M = M
        self.epsilon_t = epsilon_t
        # float32 like the published limits: at small t this rounds visibly. Values, so never on a meta device.
        limits = self.sigma(torch.tensor([epsilon_t, 1.0], dtype=torch.float32, device="cpu"))
        self.sigma_min, self.sigma_max = limits.tolist()

    def coefficients(self, sigma: Tensor) -> Coefficients:
        return Coefficients(
            skip=1.0,
            out=-sigma,
            into=1 / (sigma.square() + 1).sqrt(),
            noise=(self.M - 1) * self.sigma_inv(sigma),
        )

    def sigma(self, t: Tensor) -> Tensor:
        """The noise level at time t in [0, 1]."""
        return vp_sigma(t, self.beta_d, self.beta_min)

    def sigma_inv(self, sigma: Tensor) -> Tensor:
        """The time of a noise level."""
        return vp_time(sigma, self.beta_d, self.beta_min)


class VEPrecond(Precond):
    """Variance exploding (Song et al. 2020, arXiv 2011.13456): F predicts the noise from unscaled inputs."""

    def __init__(
        self,
        img_resolution: int,
        img_channels: int,
        label_dim: int = 0,
        use_fp16: bool = False,
        sigma_min: float = 0.02,
        sigma_max: float = 100,
        model_type: str = "SongUNet",
        **model_kwargs: Any,
    ) -> None:
        super().__init__(img_resolution, img_channels, label_dim, use_fp16, model_type, **model_kwargs)
        self.sigma_min = sigma_min
        self.sigma_max = sigma_max

    def coefficients(self, sigma: Tensor) -> Coefficients:
        return Coefficients(skip=1.0, out=sigma, into=1.0, noise=(sigma / 2).log())


class iDDPMPrecond(Precond):  # noqa: N801 - the name in published checkpoints
    """Improved DDPM (Nichol & Dhariwal 2021, arXiv 2102.09672): F knows a table `u` of levels by their index.

    F also predicts variances, in a second set of channels; they are not used.
    """

    outputs_per_channel = 2
    u: Tensor
    """float32 [M + 1], falling from sigma_max to 0"""

    def __init__(
        self,
        img_resolution: int,
        img_channels: int,
        label_dim: int = 0,
        use_fp16: bool = False,
        C_1: float = 0.001,
        C_2: float = 0.008,
        M: int = 1000,
        model_type: str = "DhariwalUNet",
        **model_kwargs: Any,
    ) -> None:
        super().__init__(img_resolution, img_channels, label_dim, use_fp16, model_type, **model_kwargs)
        self.C_1 = C_1
        self.C_2 = C_2
        self.M = M
        levels = iddpm_levels(M, C_1, C_2, torch.float32)
        self.sigma_min, self.sigma_max = float(levels[M - 1]), float(levels[0])
        self.register_buffer("u", levels.to(torch.get_default_device()))

    def coefficients(self, sigma: Tensor) -> Coefficients:
        return Coefficients(
            skip=1.0,
            out=-sigma,
            into=1 / (sigma.square() + 1).sqrt(),
            noise=self.M - 1 - self.round_sigma(sigma, return_index=True).to(torch.float32),
        )

    def round_sigma(self, sigma: Tensor | float, return_index: bool = False) -> Tensor:
        """The nearest entry of `u`, in the shape, dtype and device of `sigma`; or its index, int64."""
        sigma = torch.as_tensor(sigma)
        # A sampler asks for levels on the CPU: fetching the table is one wait for a GPU, sending them there two.
        table = self.u.to(sigma.device)
        index = (sigma.to(table).reshape(-1, 1) - table).abs().argmin(dim=1).reshape(sigma.shape)
        return index if return_index else table[index].to(sigma)


PRECONDS: dict[str, type[Precond]] = {
    precond.__name__: precond for precond in (EDMPrecond, VPPrecond, VEPrecond, iDDPMPrecond)
}


def vp_sigma(t: Tensor, beta_d: float, beta_min: float) -> Tensor:
    """The noise level of the variance-preserving process at time t (EDM Table 1)."""
    return ((beta_d * t.square() / 2 + beta_min * t).exp() - 1).sqrt()


def vp_time(sigma: Tensor, beta_d: float, beta_min: float) -> Tensor:
    """The inverse of `vp_sigma`."""
    return ((beta_min**2 + 2 * beta_d * (1 + sigma.square()).log()).sqrt() - beta_min) / beta_d


def iddpm_levels(M: int, C_1: float, C_2: float, dtype: torch.dtype) -> Tensor:
    """The noise levels of improved DDPM, [M + 1] from the highest to 0, on the CPU (EDM Table 1).

    The recursion runs in `dtype`: in float32 its rounding is part of the published table.
    """
    angles = 0.5 * math.pi * torch.arange(M + 1, dtype=dtype, device="cpu") / M / (C_2 + 1)
    alpha_bar = angles.sin().square()
    ratios = (alpha_bar[:-1] / alpha_bar[1:]).clip(min=C_1)
    levels = [torch.zeros((), dtype=dtype, device="cpu")]
    for ratio in ratios.flip(0):
        levels.append(((levels[-1].square() + 1) / ratio - 1).sqrt())
    return torch.stack(levels).flip(0)
