"""How the noise level runs with time: EDM's choice, and those it is compared with (arXiv 2206.00364, Table 1)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from edm.precond import vp_sigma, vp_time


class SigmaSchedule:
    """How the noise level runs with time; float64 tensors. EDM's choice: sigma(t) = t."""

    def sigma(self, t: Tensor) -> Tensor:
        return t

    def speed(self, t: Tensor) -> Tensor:
        """d sigma / dt."""
        return torch.ones_like(t)

    def time(self, sigma: Tensor) -> Tensor:
        """The inverse of `sigma`."""
        return sigma


@dataclass(frozen=True)
class VPSchedule(SigmaSchedule):
    """The variance-preserving process of Song et al. 2020 (arXiv 2011.13456)."""

    beta_d: float = 19.9
    beta_min: float = 0.1

    @classmethod
    def between(cls, sigma_min: float, sigma_max: float, epsilon_s: float) -> "VPSchedule":
        """The process that is at `sigma_min` at time epsilon_s and at `sigma_max` at time 1."""
        low, high = (torch.tensor([sigma_min, sigma_max], dtype=torch.float64).square() + 1).log().tolist()
        beta_d = 2 * (low / epsilon_s - high) / (epsilon_s - 1)
        return cls(beta_d, high - beta_d / 2)

    def sigma(self, t: Tensor) -> Tensor:
        return vp_sigma(t, self.beta_d, self.beta_min)

    def speed(self, t: Tensor) -> Tensor:
        sigma = self.sigma(t)
        return (self.beta_min + self.beta_d * t) / 2 * (sigma + 1 / sigma)

    def time(self, sigma: Tensor) -> Tensor:
        return vp_time(sigma, self.beta_d, self.beta_min)


class VESchedule(SigmaSchedule):
    """The variance-exploding process: sigma(t) = sqrt(t)."""

    def sigma(self, t: Tensor) -> Tensor:
        return t.sqrt()

    def speed(self, t: Tensor) -> Tensor:
        return 1 / (2 * t.sqrt())

    def time(self, sigma: Tensor) -> Tensor:
        return sigma.square()


def vp_scale(sigma: Tensor) -> Tensor:
    """The scale that keeps the variance of the state at 1."""
    return 1 / (1 + sigma.square()).sqrt()
