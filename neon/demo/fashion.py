"""Fashion-MNIST (Xiao et al. 2017, MIT licence) at 14 x 14 pixels: the demo's real images."""

import gzip
import zlib
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from neon.data.images import ArrayDataset
from neon.errors import RequestError

DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")
CLASS_NAMES = ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")


def load_fashion(folder: Path, split: str) -> ArrayDataset:
    """`split` "train" (60,000 images) or "test" (10,000), each pixel the mean of 2 x 2: uint8 [N, 1, 14, 14].

    `folder` holds the four original `*-ubyte.gz` files.

    Raises:
        RequestError: a file is missing or is not what it should be.
    """
    prefix = {"train": "train", "test": "t10k"}[split]
    images = torch.from_numpy(_read_idx(folder / f"{prefix}-images-idx3-ubyte.gz", 3))
    labels = torch.from_numpy(_read_idx(folder / f"{prefix}-labels-idx1-ubyte.gz", 1)).to(torch.int64)
    return ArrayDataset(halve(images[:, None]), labels, folder)


def halve(images: Tensor) -> Tensor:
    """uint8 [N, C, H, W] -> uint8 [N, C, H/2, W/2], means of 2 x 2 pixels, rounded."""
    return F.avg_pool2d(images.float(), 2).round().to(torch.uint8)


def _read_idx(path: Path, num_dims: int) -> np.ndarray:
    """The array of an IDX file: magic (0, 0, 8 = uint8, dimensions), big-endian sizes, then the data."""
    if not path.is_file():
        raise RequestError(
            f"{path}: no such file; install the Debian package dataset-fashion-mnist, or name with --data "
            "a folder that holds the four Fashion-MNIST files"
        )
    try:
        data = gzip.decompress(path.read_bytes())
    except (OSError, EOFError, zlib.error) as error:
        raise RequestError(f"{path}: not a whole gzip file ({error}); fetch it again") from error
    header = np.frombuffer(data, ">i4", num_dims + 1)
    if header[0] != 0x0800 + num_dims or len(data) != 4 * len(header) + np.prod(header[1:]):
        raise RequestError(f"{path}: not an IDX file of {num_dims}-dimensional bytes; fetch it again")
    return np.frombuffer(data, np.uint8, offset=4 * len(header)).reshape(header[1:]).copy()
