"""Mean and covariance of features, streamed block by block, and the `.npz` file that keeps them.

Letters: B block rows, N samples, F features.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from neon.data.arrays import array_names, read_arrays
from neon.errors import DegenerateError, RequestError
from neon.runtime.files import atomic_write

# Largest |sigma - sigma^T| accepted, relative to the largest |sigma|. Covariances computed in float32 differ
# from their transpose by about 1e-7; a matrix that is not a covariance differs by about 1.
SYMMETRY_TOLERANCE = 1e-6

CACHED = 1 << 14
"""numbers of a matrix that are added to at a time on a CPU"""

NETWORK = "feature_network"
"""the array of a file of statistics that names the network whose features they are of"""


class Moments:
    """Count, mean and centred second moment of feature vectors, in float64 on `device`.

    Blocks are joined by the update of Chan, Golub and LeVeque (1979), which subtracts means before it
    squares, so a mean that is large beside the spread costs no digits. How the samples are cut into blocks
    changes the result by float64 rounding only.
    """

    def __init__(self, dim: int, device: torch.device | str = "cpu") -> None:
        # The scatter is the sum over samples of (x - mean) (x - mean)ᵀ.
        self._count = 0
        self._mean = torch.zeros(dim, dtype=torch.float64, device=device)  # [F]
        self._scatter = torch.zeros(dim, dim, dtype=torch.float64, device=device)  # [F, F]
        self._product: Tensor | None = None  # [F, F] of a block: new memory for each would cost as much as the product

    @property
    def count(self) -> int:
        """Number of samples seen."""
        return self._count

    @property
    def mean(self) -> Tensor:
        """Mean of the samples, float64 [F]; zeros while there are none."""
        return self._mean.clone()

    @property
    def covariance(self) -> Tensor:
        """Centred covariance with divisor N - 1, float64 [F, F].

        Raises:
            RequestError: fewer than two samples were seen.
        """
        if self._count < 2:
            raise RequestError(f"a covariance needs at least 2 samples, found {self._count}; use more images")
        return self._scatter / (self._count - 1)

    @torch.no_grad()
    def update(self, features: Tensor) -> None:
        """Add a block of features [B, F] of any float dtype, from any device; B = 0 changes nothing.

        Raises:
            RequestError: not floats of shape [B, F] with this object's F.
        """
        dim = len(self._mean)
        if features.ndim != 2 or features.shape[1] != dim or not features.is_floating_point():
            found = f"{features.dtype} {list(features.shape)}"
            raise RequestError(f"features must be floats of shape [B, {dim}], found {found}")
        if len(features) == 0:
            return
        block = features.to(self._mean.device, torch.float64)
        mean = block.mean(0)
        centred = block - mean
        if self._product is None:
            self._product = torch.empty_like(self._scatter)
        self._join(len(block), mean, torch.mm(centred.T, centred, out=self._product))

    def combine(self, other: "Moments") -> None:
        """Add all samples that `other` has seen, for example on another rank.

        Raises:
            RequestError: the feature sizes differ.
        """
        if len(other._mean) != len(self._mean):
            raise RequestError(f"cannot combine moments of {len(self._mean)} and of {len(other._mean)} features")
        device = self._mean.device
        self._join(other._count, other._mean.to(device), other._scatter.to(device))

    def _join(self, count: int, mean: Tensor, scatter: Tensor) -> None:
        total = self._count + count
        if total == 0:
            return
        shift = mean - self._mean
        weight = self._count * count / total
        # Rows that stay in a cache of the processor on their way through the three operations.
        rows = max(1, CACHED // len(shift)) if shift.device.type == "cpu" else len(shift)
        for sums, added, part in zip(self._scatter.split(rows), scatter.split(rows), shift.split(rows), strict=True):
            sums += added
            sums += torch.outer(part, shift).mul_(weight)
        self._mean += shift * (count / total)
        self._count = total

    def state(self) -> dict[str, Tensor]:
        """A copy of all it takes to go on later: `count` int64 [], `mean` float64 [F], `scatter` float64 [F, F]."""
        count = torch.tensor(self._count, dtype=torch.int64)
        return {"count": count, "mean": self._mean.clone(), "scatter": self._scatter.clone()}

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor], device: torch.device | str = "cpu") -> "Moments":
        """The moments that `state()` described; going on from them gives the same bits as never having stopped.

        Raises:
            RequestError: an entry is missing, or has another dtype or shape than `state()` writes.
        """
        missing = {"count", "mean", "scatter"} - state.keys()
        if missing:
            raise RequestError(f"saved moments lack {sorted(missing)}, found {sorted(state)}")
        count, mean, scatter = state["count"], state["mean"], state["scatter"]
        dim = mean.numel()
        layout = [(t.dtype, tuple(t.shape)) for t in (count, mean, scatter)]
        if layout != [(torch.int64, ()), (torch.float64, (dim,)), (torch.float64, (dim, dim))]:
            raise RequestError(
                f"saved moments must be count int64 [], mean float64 [F], scatter float64 [F, F], found {layout}"
            )
        moments = cls(dim, device)
        moments._count = int(count)
        moments._mean.copy_(mean)
        moments._scatter.copy_(scatter)
        return moments


@dataclass(frozen=True, kw_only=True, eq=False)
class Statistics:
    """Mean and covariance of a feature set: all that a Fréchet distance needs of it.

    Raises:
        RequestError: on construction, if shapes, values or symmetry are not those of a mean and a covariance.
    """

    mu: NDArray[np.float64]
    """Mean, float64 [F]."""
    sigma: NDArray[np.float64]
    """Covariance, float64 [F, F]."""
    count: int | None = None
    """Number of samples, where known."""
    name: str = "statistics"
    """What messages call these statistics: the path they came from, where there is one."""
    features: str | None = None
    """The `identity` of the network whose features these are; None: not known."""

    def __post_init__(self) -> None:
        for key in ("mu", "sigma"):
            array = np.asarray(getattr(self, key))
            if array.dtype.kind != "f":
                raise RequestError(f"{self.name}: {key} must hold floats, found {array.dtype}")
            object.__setattr__(self, key, array.astype(np.float64, copy=False))
        if self.mu.ndim != 1 or self.sigma.shape != (self.mu.size, self.mu.size) or self.mu.size == 0:
            found = f"{list(self.mu.shape)} and {list(self.sigma.shape)}"
            raise RequestError(f"{self.name}: expected mu [F] and sigma [F, F], found {found}")
        for key, array in (("mu", self.mu), ("sigma", self.sigma)):
            bad = array.size - np.count_nonzero(np.isfinite(array))
            if bad:
                raise RequestError(f"{self.name}: {bad} of the {array.size} entries of {key} are not finite")
        with np.errstate(over="ignore"):
            asymmetry, largest = np.abs(self.sigma - self.sigma.T).max(), np.abs(self.sigma).max()
        if asymmetry > SYMMETRY_TOLERANCE * largest:
            raise RequestError(
                f"{self.name}: sigma is not symmetric (it differs from its transpose by up to {asymmetry:.3g}, "
                f"its largest entry is {largest:.3g}), so it is no covariance"
            )

    @property
    def dim(self) -> int:
        """Number of features F."""
        return self.mu.size

    @classmethod
    def from_moments(cls, moments: Moments, name: str = "statistics", features: str | None = None) -> "Statistics":
        """Statistics of the samples seen by `moments`, of the network whose identity is `features`.

        Raises:
            RequestError: fewer than two samples were seen.
            DegenerateError: a feature was not finite.
        """
        mu, sigma = moments.mean.cpu().numpy(), moments.covariance.cpu().numpy()
        if not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
            raise DegenerateError(f"{name}: some of the features of {moments.count} images are not finite")
        return cls(mu=mu, sigma=sigma, count=moments.count, name=name, features=features)

    @classmethod
    def from_features(cls, features: Tensor, name: str = "statistics") -> "Statistics":
        """Statistics of features [N, F] of any float dtype, all at once; raises what `from_moments` does."""
        if features.ndim != 2:
            raise RequestError(f"{name}: features must be of shape [N, F], found {list(features.shape)}")
        moments = Moments(features.shape[1], features.device)
        moments.update(features)
        return cls.from_moments(moments, name)

    @classmethod
    def load(cls, path: str | os.PathLike[str], features: str | None = None) -> "Statistics":
        """Read `mu` and `sigma` (and `count`, where present) from an `.npz`.

        A file may hold statistics of the same images in several feature spaces, each with its name (`save_statistics`).

        Args:
            features: identity of the network whose statistics are wanted; None: the first that the file holds.

        Raises:
            RequestError: the file is missing, is no `.npz`, lacks an array, holds something else than statistics, or
                names other networks.
        """
        optional = ("count", NETWORK)
        arrays = read_arrays(path, ("mu", "sigma"), optional=optional, contents="statistics")
        own = _named(arrays.pop(NETWORK, None))
        others = _other_features(path) if features not in (None, own) else []
        if features in others:
            names = {name: f"{features}.{name}" for name in ("mu", "sigma", "count")}
            of_it = read_arrays(
                path, (names["mu"], names["sigma"]), optional=(names["count"],), contents="statistics"
            )  # fmt: skip
            arrays, own = {name: of_it[long] for name, long in names.items() if long in of_it}, features
        elif own is not None and features not in (None, own):
            raise RequestError(
                f"{path}: holds statistics of the features {' and '.join([own, *others])}, not of {features}; use "
                "statistics made with the same features (`neon stats`)"
            )
        count = arrays.pop("count", None)
        return cls(
            **arrays, count=None if count is None else _sample_count(path, count), name=str(path), features=own
        )  # fmt: skip

    def save(self, path: str | os.PathLike[str], *, overwrite: bool = True) -> None:
        """Write these alone, as `save_statistics`."""
        save_statistics(path, [self], overwrite=overwrite)


def save_statistics(path: str | os.PathLike[str], several: Sequence[Statistics], *, overwrite: bool = True) -> None:
    """Write statistics of the same images, in one feature space or in several, to `path` as an `.npz`, atomically.

    The first are `mu` and `sigma` (and `count`, where known), as everybody reads them, with the array
    `feature_network` that names theirs; the others have its name before theirs, as in `dinov2.mu`.
    """
    arrays: dict[str, Any] = {}
    for number, statistics in enumerate(several):
        prefix = f"{statistics.features}." if number else ""
        arrays |= {f"{prefix}mu": statistics.mu, f"{prefix}sigma": statistics.sigma}
        if statistics.count is not None:
            arrays[f"{prefix}count"] = np.int64(statistics.count)
    if several[0].features is not None:
        arrays[NETWORK] = np.array(several[0].features)
    with atomic_write(path, overwrite=overwrite) as file:
        np.savez(file, **arrays)


def load_all_statistics(path: str | os.PathLike[str]) -> list[Statistics]:
    """What a file of `save_statistics` holds, the first first; errors as of `Statistics.load`."""
    first = Statistics.load(path)
    return [first, *(Statistics.load(path, features) for features in _other_features(path))]


def _named(network: NDArray[Any] | None) -> str | None:
    """The network that a file of statistics names; None: it does not."""
    return str(network) if network is not None and network.dtype.kind == "U" and network.ndim == 0 else None


def _other_features(path: str | os.PathLike[str]) -> list[str]:
    """The networks whose features the other statistics of a file are of, in its order."""
    return [name.removesuffix(".mu") for name in array_names(path, contents="statistics") if name.endswith(".mu")]


def _sample_count(path: str | os.PathLike[str], count: NDArray[Any]) -> int:
    """The number of samples that a file of statistics states."""
    value = count.item() if count.size == 1 else None
    if value is None or not 1 <= value < 1 << 63 or value != int(value):
        raise RequestError(f"{path}: count is {count.tolist()!r:.40}, expected the number of samples")
    return int(value)
