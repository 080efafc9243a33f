"""The ways to resize images for a feature network, by the names that clean-fid gave them (Parmar et al. 2022).

Each is uint8 [B, C, H, W] -> float32 [B, C, side, side] with values in 0..255 that are not rounded, image by image.
Fréchet distances move with them: only those of one mode compare.
"""

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor


def legacy_tensorflow(images: Tensor, side: int) -> Tensor:
    """As TensorFlow 1 does it, in the graph of the published Inception: bilinear, corner to corner, no antialiasing."""
    # Imports torchvision: 1.7 s that only those who use it pay.
    from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

    return interpolate_bilinear_2d_like_tensorflow1x(images.to(torch.float32), size=(side, side), align_corners=False)


def legacy_pytorch(images: Tensor, side: int) -> Tensor:
    """As PyTorch does it by default: bilinear between centres of pixels, no antialiasing."""
    return F.interpolate(images.to(torch.float32), (side, side), mode="bilinear", align_corners=False)


def clean(images: Tensor, side: int) -> Tensor:
    """As PIL does it: bicubic with antialiasing, each channel as floats, cut off at 0 and 255.

    On the CPU, whatever the device of `images`, so that it is the same everywhere.
    """
    resized = [_bicubic(channel, side) for channel in images.cpu().numpy().reshape(-1, *images.shape[2:])]
    stacked = np.stack(resized).reshape(*images.shape[:2], side, side)
    return torch.from_numpy(stacked).to(images.device)


def _bicubic(channel: np.ndarray, side: int) -> np.ndarray:
    """uint8 [H, W] -> float32 [side, side]."""
    picture = Image.fromarray(channel.astype(np.float32))  # of mode F
    return np.asarray(picture.resize((side, side), Image.Resampling.BICUBIC)).clip(0, 255)


RESIZERS: dict[str, Callable[[Tensor, int], Tensor]] = {
    resize.__name__: resize for resize in (clean, legacy_pytorch, legacy_tensorflow)
}
