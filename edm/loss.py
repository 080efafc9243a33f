"""Training losses: weighted denoising errors."""

from dataclasses import dataclass

from torch import Tensor, nn

from neon.noise import Noise


@dataclass(frozen=True, kw_only=True)
class EDMLoss:
    """ln sigma ~ N(P_mean, P_std^2), weight (sigma^2 + sigma_data^2) / (sigma sigma_data)^2 (EDM Table 1).

    Draws per image: one normal for the noise level, then the noise [C, R, R].
    Returns float32 [B, C, R, R], weight * (D(y + n) - y)^2 per element, not reduced.
    """

    P_mean: float = -1.2
    P_std: float = 1.2
    sigma_data: float = 0.5

    def __call__(
        self,
        network: nn.Module,
        images: Tensor,
        labels: Tensor | None,
        noise: Noise,
        augment_labels: Tensor | None = None,
    ) -> Tensor:
        sigma = (noise.normal(1, 1, 1) * self.P_std + self.P_mean).exp()
        weight = (sigma**2 + self.sigma_data**2) / (sigma * self.sigma_data) ** 2
        noisy = images + noise.normal(*images.shape[1:]) * sigma
        return weight * (network(noisy, sigma, labels, augment_labels=augment_labels) - images).square()
