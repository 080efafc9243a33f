"""Image files to pixels: the one place where they are decoded.

Only files of mode L (8-bit grey) are grey; all others become RGB. Transparency is dropped (the colours below it stay),
16-bit grey is scaled to 8 bits, of an animation the first frame counts. Colour profiles and orientation tags are not
applied: pixels are as they are stored.
"""

import contextlib
import io
import warnings
from collections.abc import Iterator
from typing import IO

import numpy as np
from PIL import Image

FORMATS = ("PNG", "JPEG", "BMP", "GIF", "WEBP")
"""what is decoded, whatever a file is called: of what else PIL knows, EPS starts a program"""
LARGEST_IMAGE = 1 << 26
"""pixels: 8192 x 8192"""
AS_RGB = frozenset({"1", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr"})
SIXTEEN_BITS = frozenset({"I", "I;16", "I;16B", "I;16L", "I;16N"})


def decode_image(data: bytes) -> np.ndarray:
    """The pixels of an image file: uint8 [C, H, W], C 1 (grey) or 3.

    Raises:
        ValueError: it is not of `FORMATS`, is damaged or too large, or has pixels that 8 bits do not hold.
    """
    picture = load_picture(data)
    if picture.mode == "L":
        return np.asarray(picture)[None]
    if picture.mode in SIXTEEN_BITS:
        return as_coloured(_eight_bits(np.asarray(picture))[None])
    if picture.mode not in AS_RGB:
        raise ValueError(f"its pixels are of mode {picture.mode}; convert it to 8 bits, grey or RGB")
    with _no_advice():
        return np.asarray(picture.convert("RGB")).transpose(2, 0, 1)


def as_coloured(grey: np.ndarray) -> np.ndarray:
    """A grey image [1, H, W] as r = g = b [3, H, W], laid out in memory as decoded colours are.

    The layout decides in which order a network adds up, so how its results are rounded.
    """
    return np.repeat(grey.transpose(1, 2, 0), 3, axis=2).transpose(2, 0, 1)


def load_picture(data: bytes) -> Image.Image:
    """An image file, decoded; a ValueError if it cannot be, or is too large."""
    with _opened(io.BytesIO(data)) as picture:
        picture.load()
    return picture


def is_grey(file: IO[bytes]) -> bool:
    """Whether an image file decodes to one channel, by its first bytes; a ValueError if they are of no image."""
    with _opened(file) as picture:
        return picture.mode == "L"


@contextlib.contextmanager
def _opened(file: IO[bytes]) -> Iterator[Image.Image]:
    """A picture of which only the header was read; whatever PIL raises, now or inside the block, is a ValueError.

    On foreign bytes its decoders raise nearly anything (SyntaxError, struct.error, IndexError, ...).
    """
    try:
        with _no_advice():
            picture = Image.open(file, formats=FORMATS)
            width, height = picture.size
            if width * height > LARGEST_IMAGE:
                raise ValueError(f"{width} x {height} pixels, expected at most {LARGEST_IMAGE}")
            yield picture
    except Image.UnidentifiedImageError:
        raise ValueError("neither PNG nor JPEG, BMP, GIF or WebP") from None
    except ValueError:
        raise
    except Exception as error:
        raise ValueError(str(error) or type(error).__name__) from error


@contextlib.contextmanager
def _no_advice() -> Iterator[None]:
    """PIL warns of colour profiles and tags, which are not used, and of sizes, which are limited here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _eight_bits(grey: np.ndarray) -> np.ndarray:
    """16-bit values [H, W] as 8 bits: value / 257, rounded."""
    if grey.min() < 0 or grey.max() > 65535:
        raise ValueError("its grey values are beyond 16 bits; convert it to 8 bits")
    return ((grey.astype(np.uint32) + 128) // 257).astype(np.uint8)
