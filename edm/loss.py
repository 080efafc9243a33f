"""Training losses: weighted denoising errors at noise levels of a distribution."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from edm.precond import Precond, VEPrecond, VPPrecond, vp_sigma
from neon.noise import Noise

Augment = Callable[[Tensor, Noise], tuple[Tensor, Tensor]]
"""(images [B, C, R, R], noise) -> (changed images, what the network is told of the change [B, L])."""


class DenoisingLoss(ABC):
    """weight * (D(y + sigma n) - y)^2 per element, float32 [B, C, R, R], not reduced.

    Draws per image: one number for the noise level, those of `augment`, then the noise n [C, R, R].
    """

    def __call__(
        self, network: nn.Module, images: Tensor, labels: Tensor | None, noise: Noise, augment: Augment | None = None
    ) -> Tensor:
        sigma = self.levels(noise)
        images, augment_labels = (images, None) if augment is None else augment(images, noise)
        noisy = images + noise.normal(*images.shape[1:]) * sigma
        denoised = network(noisy, sigma, labels, augment_labels=augment_labels)
        return self.weight(sigma) * (denoised - images).square()

    @abstractmethod
    def levels(self, noise: Noise) -> Tensor:
        """A noise level per image, [B, 1, 1, 1]."""

    def weight(self, sigma: Tensor) -> Tensor:
        """The weight of an error at `sigma`: that of the noise predicted, unless a subclass says otherwise."""
        return 1 / sigma.square()


@dataclass(frozen=True, kw_only=True)
class EDMLoss(DenoisingLoss):
    """ln sigma ~ N(P_mean, P_std^2), weight (sigma^2 + sigma_data^2) / (sigma sigma_data)^2 (EDM Table 1)."""

    P_mean: float = -1.2
    P_std: float = 1.2
    sigma_data: float = 0.5

    def levels(self, noise: Noise) -> Tensor:
        return (noise.normal(1, 1, 1) * self.P_std + self.P_mean).exp()

    def weight(self, sigma: Tensor) -> Tensor:
        return (sigma.square() + self.sigma_data**2) / (sigma * self.sigma_data).square()


@dataclass(frozen=True, kw_only=True)
class VPLoss(DenoisingLoss):
    """sigma at a uniform time of the variance-preserving process, weight 1 / sigma^2 (EDM Table 1)."""

    beta_d: float = 19.9
    beta_min: float = 0.1
    epsilon_t: float = 1e-5

    def levels(self, noise: Noise) -> Tensor:
        return vp_sigma(1 + noise.uniform(1, 1, 1) * (self.epsilon_t - 1), self.beta_d, self.beta_min)


@dataclass(frozen=True, kw_only=True)
class VELoss(DenoisingLoss):
    """ln sigma uniform between the limits, weight 1 / sigma^2 (EDM Table 1)."""

    sigma_min: float = 0.02
    sigma_max: float = 100

    def levels(self, noise: Noise) -> Tensor:
        return self.sigma_min * (self.sigma_max / self.sigma_min) ** noise.uniform(1, 1, 1)


def loss_of(network: Precond) -> DenoisingLoss:
    """The loss that networks of this preconditioning are trained with.

    EDM's own where nothing else was published (improved DDPM): it holds for every denoiser.
    """
    if isinstance(network, VPPrecond):
        return VPLoss(beta_d=network.beta_d, beta_min=network.beta_min, epsilon_t=network.epsilon_t)
    if isinstance(network, VEPrecond):
        return VELoss(sigma_min=network.sigma_min, sigma_max=network.sigma_max)
    return EDMLoss(sigma_data=getattr(network, "sigma_data", EDMLoss.sigma_data))
