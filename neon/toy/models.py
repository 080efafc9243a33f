"""Two tiny generators of points in the plane whose samples have moments that are known without sampling.

Each has five weights and is trained with the usual loss of its kind on noisy batches. For Gaussian data that family
holds the truth, and the mean and the covariance of samples follow from the weights, with whatever factor on the score
or temperature. So a Fréchet distance carries no sampling noise.

Letters: N points, T noise levels.
"""

import math
from abc import ABC, abstractmethod

import numpy as np
import torch
from torch import Generator, Tensor, nn

from neon.metrics import Statistics


class ToyModel(nn.Module, ABC):
    """A generator of points float32 [N, 2] with one knob on its sampler; at 1 the sampler is the plain one."""

    @abstractmethod
    def loss(self, points: Tensor, generator: Generator) -> Tensor:
        """The mean training loss of points [N, 2]: a scalar."""

    @abstractmethod
    def sample(self, num: int, knob: float, generator: Generator) -> Tensor:
        """Points float32 [num, 2]."""

    @abstractmethod
    def moments(self, knob: float = 1.0) -> Statistics:
        """Mean and covariance of what `sample` draws, in float64."""


class Diffusion(ToyModel):
    """The denoiser of a Gaussian with learned mean and factor, and DDPM's ancestral sampler with a factor on the score.

    With Sigma = L L^T the best denoiser is D(x) = mean + Sigma (Sigma + sigma^2)^-1 (x - mean) at every noise level.
    It is affine, and so is every step of the sampler: mean and covariance of the samples follow from those of the
    noise.

    The score (D(x) - x) / sigma^2 (Vincent 2011) is multiplied by the knob, the score scale: above 1 the sampler
    pulls harder towards dense regions, so that it seeks modes; below 1 it seeks diversity.
    """

    SIGMA_MIN, SIGMA_MAX, LEVELS = 0.05, 20.0, 200

    def __init__(self, start: float) -> None:
        """Before training it samples the isotropic Gaussian of standard deviation `start`."""
        super().__init__()
        self.mean = nn.Parameter(torch.zeros(2))
        self.log_diagonal = nn.Parameter(torch.full((2,), math.log(start)))  # of L
        self.below = nn.Parameter(torch.zeros(()))  # L[1, 0]

    def _denoiser(self, sigma: Tensor) -> Tensor:
        """Sigma (Sigma + sigma^2)^-1 at levels [T]: [T, 2, 2]."""
        corner = self.below * torch.tensor([[0.0, 0.0], [1.0, 0.0]])
        factor = torch.diag(self.log_diagonal.exp()) + corner
        covariance = factor @ factor.T
        return torch.linalg.solve(covariance + (sigma**2)[:, None, None] * torch.eye(2), covariance)

    def loss(self, points: Tensor, generator: Generator) -> Tensor:
        """The squared error of the noise (Ho et al. 2020), at levels whose logarithms are uniform."""
        low, high = math.log(self.SIGMA_MIN), math.log(self.SIGMA_MAX)
        sigma = (low + (high - low) * torch.rand(len(points), generator=generator)).exp()
        noise = torch.randn(points.shape, generator=generator)
        shifted = points + sigma[:, None] * noise - self.mean
        denoised = (self._denoiser(sigma) @ shifted[:, :, None]).squeeze(2)
        return ((shifted - denoised) / sigma[:, None] - noise).square().mean()

    def _steps(self, knob: float) -> tuple[Tensor, Tensor]:
        """Each step of the sampler, x - mean -> A (x - mean) + noise: A [T, 2, 2] and the noise's deviations [T]."""
        sigma = torch.logspace(math.log10(self.SIGMA_MAX), math.log10(self.SIGMA_MIN), self.LEVELS)
        following = torch.cat([sigma[1:], torch.zeros(1)])
        taken = 1 - following**2 / sigma**2
        identity = torch.eye(2)
        a = identity + knob * taken[:, None, None] * (self._denoiser(sigma) - identity)
        return a, following * taken.sqrt()

    @torch.no_grad()
    def sample(self, num: int, knob: float, generator: Generator) -> Tensor:
        x = self.SIGMA_MAX * torch.randn(num, 2, generator=generator)
        for a, deviation in zip(*self._steps(knob), strict=True):
            x = x @ a.T + deviation * torch.randn(num, 2, generator=generator)
        return self.mean + x

    @torch.no_grad()
    def moments(self, knob: float = 1.0) -> Statistics:
        identity = np.eye(2)
        sigma = self.SIGMA_MAX**2 * identity
        for a, deviation in zip(*(step.double().numpy() for step in self._steps(knob)), strict=True):
            sigma = a @ sigma @ a.T + deviation**2 * identity
        return Statistics(mu=self.mean.double().numpy(), sigma=(sigma + sigma.T) / 2)


class Autoregressive(ToyModel):
    """p(x1) p(x2 | x1), both Gaussian, the mean of the second affine in x1: five weights.

    The knob is the temperature: each factor p is sampled as p^(1 / temperature), which multiplies its variance by the
    temperature. Below 1 the sampler seeks modes, above 1 diversity.
    """

    def __init__(self, start: float) -> None:
        """Before training it samples the isotropic Gaussian of standard deviation `start`."""
        super().__init__()
        self.mean = nn.Parameter(torch.zeros(2))  # of x1, and of x2 at x1 = 0
        self.log_deviation = nn.Parameter(torch.full((2,), math.log(start)))
        self.slope = nn.Parameter(torch.zeros(()))  # of the mean of x2 in x1

    def loss(self, points: Tensor, generator: Generator) -> Tensor:
        """The negative log-likelihood per point in nats, less log(2 pi); it draws nothing."""
        x1, x2 = points.unbind(1)
        residual = torch.stack([x1, x2 - self.slope * x1], 1) - self.mean
        return (self.log_deviation + (residual / self.log_deviation.exp()).square() / 2).sum(1).mean()

    @torch.no_grad()
    def sample(self, num: int, knob: float, generator: Generator) -> Tensor:
        drawn = math.sqrt(knob) * self.log_deviation.exp() * torch.randn(num, 2, generator=generator)
        x1, x2 = (self.mean + drawn).unbind(1)
        return torch.stack([x1, x2 + self.slope * x1], 1)

    @torch.no_grad()
    def moments(self, knob: float = 1.0) -> Statistics:
        mixing = np.array([[1.0, 0.0], [float(self.slope), 1.0]])
        variances = knob * np.exp(2 * self.log_deviation.double().numpy())
        return Statistics(mu=mixing @ self.mean.double().numpy(), sigma=(mixing * variances) @ mixing.T)
