"""Preconditioning: a raw network F becomes a map from a noisy image at time t to one at an earlier time s.

IMM (arXiv 2503.07565) trains f_{s,t}(x_t), whose samples should be distributed like the data noised to time s.
Names, constructor keywords and state dicts are those of the published checkpoints. Symbols: alpha, sigma and
times as in `imm.schedule`; sd is `sigma_data`, the standard deviation of data and noise.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from imm.networks import MODELS
from imm.schedule import SCHEDULES, Schedule
from neon.errors import RequestError

PRECISIONS = {None: None, "bf16": torch.bfloat16, "fp16": torch.float16}
"""What the network computes in, by its published name; None: float32."""


class JumpCoefficients(NamedTuple):
    """Of x_s = skip x_t + out F."""

    skip: Tensor | float
    out: Tensor


def _data_prediction(schedule: Schedule, t: Tensor, s: Tensor, sigma_data: float) -> JumpCoefficients:
    """F predicts the data; the noise is what x_t holds besides (DDIM)."""
    skip = schedule.sigma(s) / schedule.sigma(t)
    return JumpCoefficients(skip, schedule.alpha(s) - schedule.alpha(t) * skip)


def _simple_edm(schedule: Schedule, t: Tensor, s: Tensor, sigma_data: float) -> JumpCoefficients:
    """Unit variance in and out of F where the data have variance sd^2 (IMM's Simple-EDM)."""
    alpha_t, sigma_t, alpha_s, sigma_s = schedule.alpha(t), schedule.sigma(t), schedule.alpha(s), schedule.sigma(s)
    total = alpha_t.square() + sigma_t.square()
    turn = alpha_s * sigma_t - alpha_t * sigma_s
    return JumpCoefficients((alpha_t * alpha_s + sigma_t * sigma_s) / total, -turn * sigma_data / total.sqrt())


def _euler(schedule: Schedule, t: Tensor, s: Tensor, sigma_data: float) -> JumpCoefficients:
    """One Euler step along the velocity sd F."""
    return JumpCoefficients(1.0, -(t - s) * sigma_data)


F_TYPES: dict[str, Callable[[Schedule, Tensor, Tensor, float], JumpCoefficients]] = {
    "identity": _data_prediction,
    "simple_edm": _simple_edm,
    "euler_fm": _euler,
}
"""(schedule, t, s, sd) -> coefficients in the shape and dtype of the times, by published name"""


class IMMPrecond(nn.Module):
    """x_s = skip(t, s) x_t + out(t, s) F(c_in x_t, t, s); `f_type` names the coefficients.

    Keywords it does not know go to the network that `model_type` names in `imm.networks.MODELS`.

    Attributes:
        nt_low, nt_high: the noise-to-signal ratios at `eps` and `T`, the first and last times it knows.
        temb_type: what F is told besides t: "identity": s, "stride": t - s. May be set.
        mixed_precision: what F computes in, by autocast; None: float32, under any autocast. May be set.
    """

    def __init__(
        self,
        img_resolution: int,
        img_channels: int,
        label_dim: int = 0,
        mixed_precision: str | None = None,
        noise_schedule: str = "fm",
        model_type: str = "SongUNet",
        sigma_data: float = 0.5,
        f_type: str = "euler_fm",
        T: float = 0.994,
        eps: float = 0.0,
        temb_type: str = "identity",
        time_scale: float = 1000.0,
        **model_kwargs: Any,
    ) -> None:
        for name, value, known in (
            ("mixed_precision", mixed_precision, PRECISIONS),
            ("noise_schedule", noise_schedule, SCHEDULES),
            ("model_type", model_type, MODELS),
            ("f_type", f_type, F_TYPES),
            ("temb_type", temb_type, ("identity", "stride")),
        ):
            if value not in known:
                raise ValueError(f"{name} is {value!r}; expected one of {', '.join(map(str, known))}")
        if f_type == "euler_fm" and noise_schedule != "fm":
            raise ValueError(f"f_type 'euler_fm' with noise_schedule {noise_schedule!r}; expected 'fm'")
        if not 0 <= eps < T <= 1:
            raise ValueError(f"eps is {eps} and T {T}; expected 0 <= eps < T <= 1")
        super().__init__()
        self.img_resolution = img_resolution
        self.img_channels = img_channels
        self.label_dim = label_dim
        self.mixed_precision = PRECISIONS[mixed_precision]
        self.schedule = SCHEDULES[noise_schedule]
        self.f_type = f_type
        self.sigma_data = sigma_data
        self.T = T
        self.eps = eps
        self.temb_type = temb_type
        self.time_scale = time_scale
        # Values, so never on a meta device.
        ends = torch.tensor([eps, T], dtype=torch.float64, device="cpu")
        self.nt_low, self.nt_high = self.schedule.ratio(ends).tolist()
        self.model = MODELS[model_type](
            img_resolution=img_resolution,
            in_channels=img_channels,
            out_channels=img_channels,
            label_dim=label_dim,
            **model_kwargs,
        )

    def coefficients(self, t: Tensor, s: Tensor) -> JumpCoefficients:
        """The coefficients of the step from t to s, in the shape and dtype of the times."""
        return F_TYPES[self.f_type](self.schedule, t, s, self.sigma_data)

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        s: Tensor,
        class_labels: Tensor | None = None,
        force_fp32: bool = False,
        **model_kwargs: Any,
    ) -> Tensor:
        """Take x [B, C, R, R] at time t to time s <= t.

        Times are scalars or [B, 1, 1, 1], of any float dtype: F is computed from float32 and combined with x in
        theirs. `class_labels` [B, label_dim] are one-hot; None or a row of zeros is no class. `force_fp32` keeps
        F from `mixed_precision`. Further keywords go to the network.
        """
        skip, out = self.coefficients(t, s)
        return skip * x + out * self._raw(x, t, s, self._rows(class_labels, x), force_fp32, **model_kwargs)

    def cfg_forward(
        self,
        x: Tensor,
        t: Tensor,
        s: Tensor,
        class_labels: Tensor | None = None,
        cfg_scale: float | None = None,
        force_fp32: bool = False,
        **model_kwargs: Any,
    ) -> Tensor:
        """`forward` with F = F_none + cfg_scale (F_class - F_none), from one pass over twice the batch.

        `cfg_scale` None: `forward` itself. `t` and `s` are scalars.

        Raises:
            RequestError: guidance of a network without classes.
        """
        if cfg_scale is None:
            return self(x, t, s, class_labels, force_fp32, **model_kwargs)
        if self.label_dim == 0:
            raise RequestError(f"guidance is {cfg_scale}, but the network knows no classes; expected none (1)")
        rows = self._rows(class_labels, x)
        assert rows is not None
        rows = rows.expand(len(x), -1)
        both = torch.cat([torch.zeros_like(rows), rows])
        raw = self._raw(torch.cat([x, x]), t, s, both, force_fp32, **model_kwargs)
        without, with_class = raw.chunk(2)
        skip, out = self.coefficients(t, s)
        return skip * x + out * (without + cfg_scale * (with_class - without))

    def _rows(self, class_labels: Tensor | None, x: Tensor) -> Tensor | None:
        """What the network is told of classes: None if it knows none, else float32 [B or 1, label_dim]."""
        if self.label_dim == 0:
            return None
        if class_labels is None:
            return torch.zeros(1, self.label_dim, device=x.device)
        return class_labels.to(torch.float32).reshape(-1, self.label_dim)

    def _raw(
        self, x: Tensor, t: Tensor, s: Tensor, rows: Tensor | None, force_fp32: bool, **model_kwargs: Any
    ) -> Tensor:
        """F, in the dtype of `t`. Everything is rounded to float32 before it is used."""
        dtype = t.dtype
        x, t, s = (
            x.to(torch.float32),
            t.to(torch.float32).reshape(-1, 1, 1, 1),
            s.to(torch.float32).reshape(-1, 1, 1, 1),
        )
        c_in = 1 / ((self.schedule.alpha(t).square() + self.schedule.sigma(t).square()).sqrt() * self.sigma_data)
        second = t - s if self.temb_type == "stride" else s
        t_labels, s_labels = (t * self.time_scale).flatten(), (second * self.time_scale).flatten()
        enabled = self.mixed_precision is not None and not force_fp32
        with torch.autocast(x.device.type, dtype=self.mixed_precision, enabled=enabled):
            raw = self.model(c_in * x, t_labels, s_labels, rows, **model_kwargs)
        return raw.to(dtype)
