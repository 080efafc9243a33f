"""Many small images as one picture, and back."""

import io
import math
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

GAP = 1
"""white pixels between two images"""


def image_grid(images: Tensor) -> Image.Image:
    """uint8 [N, 1 or 3, H, W] as one picture, about twice as many columns as rows."""
    count, channels, height, width = images.shape
    rows, columns = _layout(count)
    shape = (rows * (height + GAP) - GAP, columns * (width + GAP) - GAP, channels)
    pixels = np.full(shape, 255, np.uint8)
    for (top, left), image in zip(_places(images.shape), images.permute(0, 2, 3, 1).cpu().numpy(), strict=True):
        pixels[top : top + height, left : left + width] = image
    return Image.fromarray(pixels[..., 0] if channels == 1 else pixels)


def images_of(picture: Image.Image, shape: Sequence[int]) -> Tensor:
    """The images [N, C, H, W] = `shape` that `image_grid` made `picture` of; raises ValueError if it cannot have."""
    count, channels, height, width = shape
    rows, columns = _layout(count)
    pixels = np.array(picture).reshape(rows * (height + GAP) - GAP, columns * (width + GAP) - GAP, channels)
    images = [pixels[top : top + height, left : left + width] for top, left in _places(shape)]
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()


def as_png(picture: Image.Image) -> bytes:
    """The picture as a PNG file."""
    buffer = io.BytesIO()
    picture.save(buffer, format="png")
    return buffer.getvalue()


def _layout(count: int) -> tuple[int, int]:
    columns = math.ceil(math.sqrt(2 * count))
    return -(-count // columns), columns


def _places(shape: Sequence[int]) -> list[tuple[int, int]]:
    """Top and left of each image."""
    count, _, height, width = shape
    _, columns = _layout(count)
    return [(i // columns * (height + GAP), i % columns * (width + GAP)) for i in range(count)]
