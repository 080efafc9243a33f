"""A tokenizer of VAR as a model that the training loop trains."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from neon.data.images import from_uint8
from neon.errors import RequestError
from neon.model import GenerativeModel
from neon.noise import Noise
from VAR.vqvae import VQVAE


class TokenizerModel(GenerativeModel):
    """A tokenizer as something that the training loop trains; it samples nothing."""

    architecture = "VAR tokenizer"
    network: VQVAE

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.config = config
        self.network = VQVAE(**config)
        self.image_shape = (3, self.network.image_side, self.network.image_side)
        self.num_classes = 0

    def labels(self, indices: Sequence[int], noise: Noise) -> None:
        """None: a tokenizer knows no classes."""

    def sample(self, noise: Noise, labels: Tensor | None, settings: Any) -> Tensor:
        """Refused: a tokenizer alone draws no images."""
        raise RequestError("a tokenizer alone draws no images; train a transformer on it with VAR/finetune.py")

    def encode(self, images: Tensor, noise: Noise) -> Tensor:
        """uint8 -> float32 in [-1, 1]; draws nothing."""
        return from_uint8(images)

    def training_loss(self, examples: Tensor, labels: Tensor | None, noise: Noise) -> Tensor:
        """Per image, the squared error of its reconstruction, plus the quantiser's loss: float32 [B]; draws nothing."""
        reconstruction, loss = self.network.training_forward(examples)
        return (reconstruction - examples).square().mean(dim=(1, 2, 3)) + loss
