"""How data turn into noise: x_t = alpha(t) y + sigma(t) n, for times t from 0 (data) to 1 (noise).

Both schedules of Inductive Moment Matching (arXiv 2503.07565). The noise-to-signal ratio is sigma / alpha;
the signal-to-noise ratio, of which logarithms are taken, is its inverse squared.
"""

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor


class Schedule(ABC):
    """One path from data to noise. Functions of float tensors of any shape, in their dtype."""

    @abstractmethod
    def alpha(self, t: Tensor) -> Tensor:
        """The factor on the data."""

    @abstractmethod
    def sigma(self, t: Tensor) -> Tensor:
        """The factor on the noise."""

    def log_snr(self, t: Tensor) -> Tensor:
        """ln (alpha / sigma)^2, infinite at the ends; computed in float64."""
        wide = t.to(torch.float64)
        return (2 * (self.alpha(wide).log() - self.sigma(wide).log())).to(t.dtype)

    @abstractmethod
    def log_snr_slope(self, t: Tensor) -> Tensor:
        """d log_snr / dt, negative."""

    def ratio(self, t: Tensor) -> Tensor:
        """The noise-to-signal ratio sigma / alpha, in [0, inf]."""
        return (-self.log_snr(t) / 2).exp()

    def time(self, ratio: Tensor) -> Tensor:
        """The inverse of `ratio`; computed in float64."""
        return self._time(ratio.to(torch.float64)).to(ratio.dtype)

    @abstractmethod
    def _time(self, ratio: Tensor) -> Tensor:
        """`time`, of float64."""

    def mix(self, clean: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """alpha(t) clean + sigma(t) noise."""
        return self.alpha(t) * clean + self.sigma(t) * noise


class FlowMatching(Schedule):
    """The straight line: alpha = 1 - t, sigma = t."""

    def alpha(self, t: Tensor) -> Tensor:
        return 1 - t

    def sigma(self, t: Tensor) -> Tensor:
        return t

    def log_snr_slope(self, t: Tensor) -> Tensor:
        return -2 / (t * (1 - t))

    def _time(self, ratio: Tensor) -> Tensor:
        return torch.nan_to_num(ratio / (1 + ratio), nan=1.0)  # an infinite ratio


class Cosine(Schedule):
    """The quarter circle: alpha = cos(pi t / 2), sigma = sin(pi t / 2)."""

    def alpha(self, t: Tensor) -> Tensor:
        return (math.pi / 2 * t).cos()

    def sigma(self, t: Tensor) -> Tensor:
        return (math.pi / 2 * t).sin()

    def log_snr_slope(self, t: Tensor) -> Tensor:
        return -math.pi / (self.alpha(t) * self.sigma(t))

    def _time(self, ratio: Tensor) -> Tensor:
        return ratio.arctan() / (math.pi / 2)


SCHEDULES: dict[str, Schedule] = {"fm": FlowMatching(), "vp_cosine": Cosine()}
"""by their published names"""
