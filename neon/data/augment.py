"""Augmentation of training images on which the network is conditioned, so that it does not leak into samples.

The transforms of EDM's appendix F.2 (arXiv 2206.00364): flips of pixels, then one affine map per image,
applied with the sym6 wavelet as low-pass filter. Shapes: N images, C channels, H W pixels.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from neon.errors import RequestError
from neon.noise import Noise

AUGMENT_DIM = 9
"""Augmentation labels that the published networks read: those of `edm_augment`."""
LOW_PASS = (
    0.015404109327027373, 0.0034907120842174702, -0.11799011114819057, -0.048311742585633,
    0.4910559419267466, 0.787641141030194, 0.3379294217276218, -0.07263748278646252,
    -0.021060292512300564, 0.04472490177066578, 0.0017677118642428036, -0.007800708325034148,
)  # fmt: skip
"""The decomposition filter of the sym6 wavelet."""
REACH = len(LOW_PASS) // 2
"""Pixels that filtering at doubled resolution, up and down again, sees to each side."""


@dataclass(frozen=True, kw_only=True)
class AugmentPipe:
    """Changes images at random: (images, noise) -> (changed images, labels [N, number of labels]).

    images: float32 [N, C, H, W] in [-1, 1]. labels: the parameters of the change; 0 where nothing changed.
    A transform happens with probability `p` times its multiplier; one with multiplier 0 draws nothing and
    has no label. Draws per image, in the order of the fields: the parameters, then a uniform that keeps or
    drops them (for aniso a second one, for its direction).
    """

    p: float
    """overall probability, above 0"""
    xflip: float = 0
    """multiplier of mirroring left-right, of a coin on top; 1 label"""
    yflip: float = 0
    """multiplier of mirroring up-down, of a coin on top; 1 label"""
    scale: float = 0
    """multiplier of scaling; 1 label"""
    rotate_frac: float = 0
    """multiplier of rotation; 2 labels"""
    aniso: float = 0
    """multiplier of anisotropic scaling; 2 labels"""
    translate_frac: float = 0
    """multiplier of shifting; 2 labels"""
    scale_std: float = 0.2
    """log2 standard deviation of scaling"""
    rotate_frac_max: float = 1
    """largest rotation, in half turns"""
    aniso_std: float = 0.2
    """log2 standard deviation of anisotropic scaling"""
    aniso_rotate_prob: float = 0.5
    """share of anisotropic scalings along a random direction; the others are along x and y"""
    translate_frac_std: float = 0.125
    """standard deviation of shifts, in image sizes"""

    def __post_init__(self) -> None:
        if not 0 < self.p <= 1:
            raise ValueError(f"p is {self.p}; expected a probability above 0 (to change no image, use no pipe)")

    def __call__(self, images: Tensor, noise: Noise) -> tuple[Tensor, Tensor]:
        labels = [images.new_zeros(len(images), 0)]
        for multiplier, axis in ((self.xflip, 3), (self.yflip, 2)):
            if multiplier:
                flip = noise.integers(2, 1, 1, 1) * (noise.uniform(1, 1, 1) < multiplier * self.p)
                images = torch.where(flip == 1, images.flip(axis), images)
                labels.append(flip.flatten(1).to(images.dtype))
        if self.scale or self.rotate_frac or self.aniso or self.translate_frac:
            matrices, geometry = self._affine_maps(images, noise)
            images = warp(images, matrices)
            labels += geometry
        return images, torch.cat(labels, dim=1)

    def _affine_maps(self, images: Tensor, noise: Noise) -> tuple[Tensor, list[Tensor]]:
        """The map of each image, for `warp`, and its labels."""
        height, width = images.shape[2:]
        matrices = affine(images)
        labels = []
        if self.scale:
            w = noise.normal() * (noise.uniform() < self.scale * self.p)
            size = torch.exp2(self.scale_std * w)
            matrices = matrices @ affine(images, xx=1 / size, yy=1 / size)
            labels.append(w[:, None])
        if self.rotate_frac:
            w = (2 * noise.uniform() - 1) * math.pi * self.rotate_frac_max
            w = w * (noise.uniform() < self.rotate_frac * self.p)
            matrices = matrices @ rotation(w)
            labels.append(torch.stack([w.cos() - 1, w.sin()], dim=1))
        if self.aniso:
            w = noise.normal()
            direction = (2 * noise.uniform() - 1) * math.pi
            w = w * (noise.uniform() < self.aniso * self.p)
            direction = direction * (noise.uniform() < self.aniso_rotate_prob)
            size = torch.exp2(self.aniso_std * w)
            matrices = matrices @ rotation(-direction) @ affine(w, xx=1 / size, yy=size) @ rotation(direction)
            labels.append(torch.stack([w * direction.cos(), w * direction.sin()], dim=1))
        if self.translate_frac:
            w = noise.normal(2) * (noise.uniform(1) < self.translate_frac * self.p)
            shift = w * self.translate_frac_std
            matrices = matrices @ affine(images, x0=-shift[:, 0] * width, y0=-shift[:, 1] * height)
            labels.append(w)
        return matrices, labels


def edm_augment(p: float) -> AugmentPipe | None:
    """EDM's augmentation with 9 labels: all geometric transforms; half of the images are mirrored whatever `p`.

    p = 0 is no augmentation: None.
    """
    if p == 0:
        return None
    return AugmentPipe(p=p, xflip=1e8, yflip=1, scale=1, rotate_frac=1, aniso=1, translate_frac=1)


def augment_dim(network: nn.Module) -> int:
    """How many augmentation labels a U-Net reads; 0: none."""
    entry = getattr(network, "map_augment", None)
    return 0 if entry is None else entry.in_features


def augmentation_for(network: nn.Module, p: float) -> AugmentPipe | None:
    """`edm_augment` with probability `p` for the images of a U-Net.

    Raises:
        RequestError: `p` is no probability, or the network does not read these labels.
    """
    if not 0 <= p <= 1:
        raise RequestError(f"--augment {p}: expected a probability, 0 to 1")
    known = augment_dim(network)
    if p and known != AUGMENT_DIM:
        raise RequestError(
            f"--augment {p}: the network reads {known} augmentation labels, not {AUGMENT_DIM}; "
            "train it without: --augment 0"
        )
    return edm_augment(p)


def affine(
    like: Tensor,
    xx: Tensor | float = 1,
    xy: Tensor | float = 0,
    x0: Tensor | float = 0,
    yx: Tensor | float = 0,
    yy: Tensor | float = 1,
    y0: Tensor | float = 0,
) -> Tensor:
    """(x, y) -> (xx x + xy y + x0, yx x + yy y + y0) as [N, 3, 3], N = len(like); a coefficient is one or [N].

    Numbers are filled in, not copied from the host, so that a GPU is not waited for.
    """
    matrices = like.new_zeros(len(like), 3, 3)
    for row, coefficients in enumerate(((xx, xy, x0), (yx, yy, y0), (0, 0, 1))):
        for column, coefficient in enumerate(coefficients):
            matrices[:, row, column] = coefficient
    return matrices


def rotation(angle: Tensor) -> Tensor:
    """Rotations by `angle` [N] (x right, y down), as [N, 3, 3]."""
    return affine(angle, xx=angle.cos(), xy=-angle.sin(), yx=angle.sin(), yy=angle.cos())


def warp(images: Tensor, matrices: Tensor) -> Tensor:
    """Images resampled at `matrices` [N, 3, 3] times their pixel positions, counted from the centre.

    Outside is the mirrored image. Resampling is bilinear at twice the resolution, between two low-pass
    filters; it costs rounding even if a matrix is the identity. The mirrored margin is as wide as the image
    that needs most: its width is the one value that the host waits for, and it makes an image depend on the
    others of its batch, in rounding.
    """
    n, channels, height, width = images.shape
    centre_x, centre_y = (width - 1) / 2, (height - 1) / 2
    spread = matrices[:, :2, 0].abs() * centre_x + matrices[:, :2, 1].abs() * centre_y
    shift = matrices[:, :2, 2]
    furthest = torch.cat([spread - shift, spread + shift], dim=1).amax(dim=0).tolist()
    left, top, right, bottom = (
        math.ceil(min(max(far - centre + REACH, 0), size - 1))
        for far, centre, size in zip(furthest, (centre_x, centre_y) * 2, (width, height) * 2, strict=True)
    )
    padded = F.pad(images, (left, right, top, bottom), mode="reflect")

    taps = torch.tensor(LOW_PASS, dtype=images.dtype, device="cpu").to(images.device, non_blocking=True)
    along_x = taps.expand(channels, 1, 1, -1)
    along_y = along_x.transpose(2, 3)
    doubled = F.conv_transpose2d(padded, along_x, stride=(1, 2), padding=(0, REACH - 1), groups=channels)
    doubled = F.conv_transpose2d(doubled, along_y, stride=(2, 1), padding=(REACH - 1, 0), groups=channels)

    # As many positions as the filter on the way down covers: REACH - 1 pixels more than the image on each side.
    out_width, out_height = 2 * (width + REACH - 1), 2 * (height + REACH - 1)
    # Positions in grid_sample's units, -1 to 1: in doubled images pixel i lies at 2 i + 1/2, and margins
    # that differ move the centre.
    to_image = affine(images, xx=out_width / 4, x0=1 / 4, yy=out_height / 4, y0=1 / 4)
    padded_height, padded_width = padded.shape[2:]
    from_image = affine(
        images,
        xx=2 / padded_width,
        x0=(left - right - 1 / 2) / padded_width,
        yy=2 / padded_height,
        y0=(top - bottom - 1 / 2) / padded_height,
    )
    grid = F.affine_grid(
        (from_image @ matrices @ to_image)[:, :2], [n, channels, out_height, out_width], align_corners=False
    )
    sampled = F.grid_sample(doubled, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    halved = F.conv2d(sampled, along_x, stride=(1, 2), groups=channels)
    return F.conv2d(halved, along_y, stride=(2, 1), groups=channels)
