"""The files that travel with the package so that the demo needs no download."""

from pathlib import Path

import torch
from torch import Tensor

from neon.data.arrays import read_arrays

_HERE = Path(__file__).parent

BASE = _HERE / "base.safetensors"
"""the base model, an EDM U-Net of Fashion-MNIST at 14 x 14; made by `python -m neon.demo.train base`"""
FEATURES = _HERE / "features.safetensors"
"""the feature network; this and the rest made by `python -m neon.demo.train features`"""
TRAIN_STATISTICS = _HERE / "train-statistics.npz"
"""features of the 60,000 training images: w is selected against these"""
TEST_STATISTICS = _HERE / "test-statistics.npz"
"""features of the 10,000 test images: scores are reported against these"""
REAL_IMAGES = _HERE / "real-images.npz"
"""the first 2,000 test images, for precision and recall and for the eye"""


SECOND_FEATURES = _HERE / "second-features.safetensors"
"""another feature network, which has learned quarter turns and no classes: is a gain more than the first one's?"""
SECOND_TEST_STATISTICS = _HERE / "second-test-statistics.npz"
"""its features of the 10,000 test images"""


def real_images() -> Tensor:
    """uint8 [2000, 1, 14, 14]."""
    return torch.from_numpy(read_arrays(REAL_IMAGES, ["images"], contents="images")["images"])
