"""The training loss of IMM: moments of what is reached from two nearby times t > r must agree at time s.

A group of M images shares (t, r, s). Jumps from t to s (the student) and from r to s (the target, without a
gradient) of the same noised images are compared by a kernel, as the maximum mean discrepancy (arXiv 2503.07565).
Symbols as in `imm.precond`; nt is the noise-to-signal ratio.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from imm.precond import IMMPrecond
from imm.schedule import Schedule
from neon.noise import Noise

LEAST_SQUARED_DISTANCE = 1e-8
"""of two images in the kernel, which has no gradient where they are the same"""
LEAST_RATIO = 1e-8
"""of which the lognormal mode takes the logarithm"""


@dataclass(frozen=True, kw_only=True)
class IMMLoss:
    """The loss by its published keywords; the defaults are those of ImageNet-256."""

    sigma: float = 1.0
    """width of the kernel"""
    sample_t_mode: Literal["uniform", "lognormal"] = "uniform"
    """distribution of t, and of s below t: uniform in time, or the logarithm of nt truncated normal"""
    P_mean: float = -1.1
    """mean of that logarithm"""
    P_std: float = 2.0
    """its standard deviation"""
    matrix_size: int = 4
    """M, images per group"""
    label_dropout: float = 0.1
    """probability that the student is not told the class of an image; the target is"""
    k: float = 12
    """r lies 2^-k of the range of nt below t"""
    a: float = 2
    """exponent of alpha in the weight of t"""
    b: float = 4
    """log-SNR above which the weight of t fades"""
    min_tr_gap: float | None = 1e-4
    """r is at least this far below t where it can be; None: wherever k puts it"""

    def __post_init__(self) -> None:
        if self.matrix_size < 1:
            raise ValueError(f"matrix_size is {self.matrix_size}; expected at least 1")
        if self.sample_t_mode not in ("uniform", "lognormal"):
            raise ValueError(f"sample_t_mode is {self.sample_t_mode!r}; expected uniform or lognormal")
        for name in ("sigma", "P_std"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}; expected a positive number")
        for name in ("P_mean", "k", "a", "b"):
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"{name} is {getattr(self, name)}; expected a finite number")
        if not 0 <= self.label_dropout <= 1:
            raise ValueError(f"label_dropout is {self.label_dropout}; expected a probability")

    def __call__(
        self,
        network: IMMPrecond,
        latents: Tensor,
        class_labels: Tensor | None,
        noise: Noise,
        augment_labels: Tensor | None = None,
    ) -> Tensor:
        """Weighted discrepancies of the groups, float64 [B / M]; NaN counts as 0.

        `latents` float32 [B, C, R, R], M consecutive ones a group; `class_labels` one-hot [B, label_dim] or None.
        Draws per image, in this order: a uniform for t and one for s (float64; the first image of a group decides),
        a uniform below `label_dropout` of which the class is dropped (only with classes), the noise [C, R, R].
        """
        size = self.matrix_size
        draws = [noise.uniform(1, 1, 1, dtype=torch.float64)[::size] for _ in range(2)]
        t, r, s = self.times(network, draws[0], draws[1])
        told = class_labels
        if class_labels is not None:
            told = class_labels * (noise.uniform(1) >= self.label_dropout)
        pure = network.sigma_data * noise.normal(*latents.shape[1:])
        student, target = self.jumps(network, latents, pure, (t, r, s), (told, class_labels), augment_labels)
        within_student, within_target, between = self.similarities(network, student, target, t, s)
        discrepancy = within_student + within_target - 2 * between
        return (self.weight(network.schedule, t).flatten() * discrepancy).nan_to_num(0.0, math.inf, -math.inf)

    def times(self, network: IMMPrecond, u_t: Tensor, u_s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(t, r, s) with s <= r <= t, float64 in the shape of `u_t` and `u_s`, which are uniform in [0, 1)."""
        schedule = network.schedule
        if self.sample_t_mode == "uniform":
            t = network.eps + u_t * (network.T - network.eps)
            s = network.eps + u_s * (t - network.eps)
        else:
            lowest = max(network.nt_low, LEAST_RATIO)
            # The published lower limit of ln nt is the ratio itself, not its logarithm.
            log_nt = self._truncated_normal(u_t, lowest, math.log(network.nt_high))
            t = schedule.time(log_nt.exp())
            s = schedule.time(self._truncated_normal(u_s, math.log(lowest), log_nt).exp())
        closer = schedule.ratio(t) - (network.nt_high - network.nt_low) / 2**self.k
        r = schedule.time(closer.clamp(network.nt_low, network.nt_high))
        if self.min_tr_gap is not None:
            # The published lower limit is this ratio, not its time.
            r = r.minimum((t - self.min_tr_gap).clamp(min=network.nt_low))
        return t, r.maximum(s), s

    def _truncated_normal(self, uniform: Tensor, low: float, high: Tensor | float) -> Tensor:
        """Normal(P_mean, P_std) between `low` and `high`, at the quantiles `uniform`."""
        # Numbers are filled in, not copied from the host, so that a GPU is not waited for; through float32.
        given = (x if isinstance(x, Tensor) else torch.full((), x, device=uniform.device) for x in (low, high))
        below, above = (torch.special.ndtr((limit.to(uniform) - self.P_mean) / self.P_std) for limit in given)
        return self.P_mean + self.P_std * torch.special.ndtri(below + uniform * (above - below))

    def jumps(
        self,
        network: IMMPrecond,
        latents: Tensor,
        pure: Tensor,
        times: tuple[Tensor, Tensor, Tensor],
        labels: tuple[Tensor | None, Tensor | None],
        augment_labels: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """What student and target, with their `labels`, reach at s from t and r: float64 [B / M, M, C, R, R] each.

        `pure` is the noise of both; so are the draws of dropout inside the network. The target is float32 in any
        case and has no gradient.
        """
        t, r, s = (time.repeat_interleave(self.matrix_size, dim=0) for time in times)
        given: dict[str, Any] = {} if augment_labels is None else {"augment_labels": augment_labels}
        devices = [latents.device] if latents.device.type == "cuda" else []
        with torch.random.fork_rng(devices), torch.no_grad():
            target = network(network.schedule.mix(latents, pure, r), r, s, labels[1], force_fp32=True, **given)
        student = network(network.schedule.mix(latents, pure, t), t, s, labels[0], **given)
        return self._grouped(student), self._grouped(target)

    def _grouped(self, images: Tensor) -> Tensor:
        return images.unflatten(0, (-1, self.matrix_size))

    def similarities(
        self, network: IMMPrecond, student: Tensor, target: Tensor, t: Tensor, s: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Mean kernels [B / M] over all pairs of a group: of students, of targets, of a student and a target.

        The kernel of images x, y of D numbers is exp(-w |x - y| / (D sigma)).
        """
        scale = self.kernel_weight(network.coefficients(t, s).out) / (student[0, 0].numel() * self.sigma)

        def similarity(x: Tensor, y: Tensor) -> Tensor:
            squared = (x.flatten(2)[:, :, None] - y.flatten(2)[:, None]).square().sum(-1)
            distance = squared.clamp(min=LEAST_SQUARED_DISTANCE).sqrt()
            return (-scale.view(-1, 1, 1) * distance).exp().mean(dim=(1, 2))

        return similarity(student, student), similarity(target, target), similarity(student, target)

    @staticmethod
    def kernel_weight(out: Tensor) -> Tensor:
        """w in the kernel: distances are measured in units of how far F moves x_s."""
        return out.abs().reciprocal()

    def weight(self, schedule: Schedule, t: Tensor) -> Tensor:
        """The weight of a discrepancy from time t (arXiv 2503.07565)."""
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        falling = (self.b - schedule.log_snr(t)).sigmoid()
        return alpha**self.a / (alpha.square() + sigma.square()) * -schedule.log_snr_slope(t) / 2 * falling
