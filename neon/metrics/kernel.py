"""Kernel distance of generated and real features; of Inception's it is the KID (Bińkowski et al. 2018).

The squared maximum mean discrepancy of the polynomial kernel k(x, y) = (x·y / F + 1)³, estimated without bias (so it
may fall below 0, and says something of few images, too): the mean over random subsets of both sides. Computed by
torch-fidelity, subsets and their seed as there.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from neon.errors import DegenerateError, RequestError

SUBSETS, SUBSET_SIZE, SEED = 100, 1000, 2020
"""torch-fidelity's; a subset has fewer images where there are fewer"""


KERNEL_PROTOCOL = {
    "kernel": "(x . y / F + 1)^3, unbiased",
    "kernel_subsets": SUBSETS,
    "kernel_subset_size": SUBSET_SIZE,
    "kernel_seed": SEED,
}
"""what records say of it"""


@dataclass(frozen=True, kw_only=True)
class KernelScores:
    """A kernel distance over several subsets."""

    mean: float
    std: float
    """over the subsets"""
    subset_size: int
    """images of each side in one of them"""


def kernel_distance(real: Tensor, generated: Tensor) -> KernelScores:
    """The kernel distance of features [N, F] and [M, F] of any float dtype, computed in float64 on the CPU.

    Raises:
        RequestError: not floats of these shapes, or fewer than two of a side.
        DegenerateError: a feature is not finite.
    """
    for side, features in (("real", real), ("generated", generated)):
        if features.ndim != 2 or not features.is_floating_point() or features.shape[1] != real.shape[-1]:
            found = f"{features.dtype} {list(features.shape)}"
            raise RequestError(f"{side} features must be floats of shape [N, F], F as of the others, found {found}")
        if len(features) < 2:
            raise RequestError(f"a kernel distance needs at least 2 {side} images, found {len(features)}")
        if not features.isfinite().all():
            raise DegenerateError(f"some of the {len(features)} {side} features are not finite")
    # Imports torchvision: 1.7 s that only those who use it pay.
    from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, KEY_METRIC_KID_STD, kid_features_to_metric

    size = min(SUBSET_SIZE, len(real), len(generated))
    found = kid_features_to_metric(
        generated.detach().to(torch.float64),
        real.detach().to(torch.float64),
        kid_subsets=SUBSETS,
        kid_subset_size=size,
        kid_kernel="poly",
        kid_kernel_poly_degree=3,
        kid_kernel_poly_gamma=None,
        kid_kernel_poly_coef0=1,
        rng_seed=SEED,
        verbose=False,
    )
    return KernelScores(mean=found[KEY_METRIC_KID_MEAN], std=found[KEY_METRIC_KID_STD], subset_size=size)
