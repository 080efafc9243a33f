"""Sets of latents on disk that IMM trains on: Neon's own, those that IMM's `dataset_tool encode` writes, or images.

What is kept of an image is the posterior of the autoencoder, float32 [8, h, w]: four means, then four standard
deviations. Training samples it afresh at every visit.
"""

import io
import os
from pathlib import Path

import numpy as np

from imm.vae import DOWNSAMPLING
from neon.data.arrays import read_array
from neon.data.encoded import is_example_set
from neon.data.images import FileDataset, ImageDataset, TrainingImages, has_suffix
from neon.data.shards import images_or_examples
from neon.data.storage import Storage

MOMENTS = "IMM moments"
"""what sets of encoded images hold: float32 [8, h, w] an image"""


class LatentSet(FileDataset):
    """The latents of a published folder or zip: one `.npy` file per image, float32 [8, h, w].

    Its subfolders hold a thousand files each and mean nothing; classes are in `dataset.json` or there are none.
    """

    encoded = True
    contents = one_of_them = "latents"
    suffixes = frozenset({".npy"})
    folders_are_classes = False

    def __init__(self, path: str | os.PathLike[str]) -> None:
        super().__init__(path)
        _, height, width = self.shape
        self.image_shape = (3, DOWNSAMPLING * height, DOWNSAMPLING * width)

    @staticmethod
    def decode(data: bytes) -> np.ndarray:
        latents = read_array(io.BytesIO(data), len(data))
        if latents.ndim != 3 or len(latents) != 8 or latents.dtype.kind != "f":
            raise ValueError(f"it holds {latents.dtype} of shape {latents.shape}, expected float32 [8, h, w]")
        return latents.astype(np.float32, copy=False)


def open_set(path: str | os.PathLike[str]) -> TrainingImages:
    """The training set at `path`, by what is there: a set of Neon's, published latents, or images.

    Raises:
        RequestError: none of them, or one that does not fit together.
    """
    if is_example_set(path):
        return images_or_examples(path, MOMENTS)
    return LatentSet(path) if _first_holds_latents(path) else ImageDataset(path)


def _first_holds_latents(path: str | os.PathLike[str]) -> bool:
    """Whether the first file found that is of either kind is one of latents: folders are large, one look is enough."""
    names = Storage(Path(path), "images or latents").names()
    either = LatentSet.suffixes | ImageDataset.suffixes
    return has_suffix(next((name for name in names if has_suffix(name, either)), ""), LatentSet.suffixes)
