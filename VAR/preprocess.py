"""What VAR makes of training images before the tokenizer sees them."""

import numpy as np
import torch
from PIL import Image
from torch import Tensor


def enlarge(image: Tensor, shorter: int) -> Tensor:
    """uint8 [3, H, W] with its shorter side resized to `shorter` pixels, by Pillow's Lanczos filter."""
    height, width = image.shape[1:]
    if min(height, width) == shorter:
        return image
    longer = int(shorter * max(height, width) / min(height, width))  # as torchvision rounds
    size = (shorter, longer) if width <= height else (longer, shorter)
    picture = Image.fromarray(image.permute(1, 2, 0).numpy())
    return torch.from_numpy(np.array(picture.resize(size, Image.Resampling.LANCZOS))).permute(2, 0, 1)
