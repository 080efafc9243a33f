"""Many small images as one picture, and back; and pictures as files."""

import io
import math
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

GAP = 1
"""white pixels between two images"""
QUALITIES = (90, 75, 55, 35)
"""of WebP, from the best; what is still too large is halved"""
LARGEST_SIDE = 16383
"""pixels of a WebP file"""


def columns_of(count: int) -> int:
    """Columns of a grid of so many images, by default: about twice as many as rows."""
    return math.ceil(math.sqrt(2 * count))


def image_grid(images: Tensor, columns: int | None = None) -> Image.Image:
    """uint8 [N, 1 or 3, H, W] as one picture, row by row."""
    count, channels, height, width = images.shape
    columns = columns or columns_of(count)
    rows = -(-count // columns)
    shape = (rows * (height + GAP) - GAP, columns * (width + GAP) - GAP, channels)
    pixels = np.full(shape, 255, np.uint8)
    for (top, left), image in zip(
        _places(images.shape, columns), images.permute(0, 2, 3, 1).cpu().numpy(), strict=True
    ):
        pixels[top : top + height, left : left + width] = image
    return Image.fromarray(pixels[..., 0] if channels == 1 else pixels)


def images_of(picture: Image.Image, shape: Sequence[int]) -> Tensor:
    """The images [N, C, H, W] = `shape` that `image_grid` made `picture` of; raises ValueError if it cannot have."""
    count, channels, height, width = shape
    columns = columns_of(count)
    rows = -(-count // columns)
    pixels = np.array(picture).reshape(rows * (height + GAP) - GAP, columns * (width + GAP) - GAP, channels)
    images = [pixels[top : top + height, left : left + width] for top, left in _places(shape, columns)]
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()


def resized(images: Tensor, size: Sequence[int]) -> Tensor:
    """[N, C, H, W] of values from 0 to 255, as uint8 images of `size` (H, W)."""
    if tuple(images.shape[-2:]) != tuple(size):
        images = torch.nn.functional.interpolate(images.float(), list(size), mode="bilinear", antialias=True)
    return images.float().round().clamp(0, 255).to(torch.uint8)


def as_png(picture: Image.Image) -> bytes:
    """The picture as a PNG file."""
    buffer = io.BytesIO()
    picture.save(buffer, format="png")
    return buffer.getvalue()


def as_webp(picture: Image.Image, most: int) -> bytes:
    """The picture as a WebP file of at most `most` bytes: exact where that fits, else as good as does."""
    raw = picture.width * picture.height * len(picture.getbands())
    largest = max(picture.size)
    if raw <= 4 * most and largest <= LARGEST_SIDE:  # of photographs, about half of the bytes stay
        found = _webp(picture, lossless=True)
        if len(found) <= most:
            return found
    if largest <= LARGEST_SIDE:
        for quality in QUALITIES:
            found = _webp(picture, quality=quality)
            if len(found) <= most:
                return found
    halved = (max(picture.width // 2, 1), max(picture.height // 2, 1))
    if halved == picture.size:
        return found
    return as_webp(picture.resize(halved, Image.Resampling.LANCZOS), most)


def _webp(picture: Image.Image, **how: int) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format="webp", **how)
    return buffer.getvalue()


def _places(shape: Sequence[int], columns: int) -> list[tuple[int, int]]:
    """Top and left of each image."""
    count, _, height, width = shape
    return [(i // columns * (height + GAP), i % columns * (width + GAP)) for i in range(count)]
