"""What VAR makes of training images before the tokenizer sees them."""

import numpy as np
import torch
from PIL import Image
from torch import Tensor

ENLARGEMENT = 1.125
"""training images are enlarged by this before they are cropped, as published"""


def enlarge(image: Tensor, shorter: int) -> Tensor:
    """uint8 [3, H, W] with its shorter side resized to `shorter` pixels, by Pillow's Lanczos filter."""
    _, height, width = image.shape
    if min(height, width) == shorter:
        return image
    small, large = sorted((height, width))
    longer = int(shorter * large / small)
    size = (shorter, longer) if width <= height else (longer, shorter)
    resized = Image.fromarray(image.permute(1, 2, 0).numpy()).resize(size, Image.Resampling.LANCZOS)
    return torch.from_numpy(np.asarray(resized).copy()).permute(2, 0, 1)


def as_input(images: Tensor) -> Tensor:
    """uint8 -> float32 in [-1, 1]."""
    return images.to(torch.float32) / 255 * 2 - 1
