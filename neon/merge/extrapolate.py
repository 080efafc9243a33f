"""The extrapolation itself, tensor by tensor, and how much of it survives the rounding to the stored dtype."""

import cmath
import math
from dataclasses import dataclass

import torch

from neon.errors import DegenerateError, RequestError

# Elements merged at a time. On a CPU the result (16 MB in float32) is still in a shared cache when it is checked for
# non-finite elements, so that the check costs no pass over memory; smaller pieces are no faster on idle cores and much
# slower on busy ones, because torch's threads meet after each. On an accelerator the check costs a synchronisation.
_CHUNK = 1 << 22
_DEVICE_CHUNK = 1 << 26
# The largest piece that torch works on in the calling thread. Beside threads that hash, a parallel loop waits for
# cores it does not get: 19 s for two files of 1 GB on two busy cores, where this takes 3 s.
SERIAL_CHUNK = 1 << 15

# Both conditions mean the stored weights are not the merge that was asked for. An error of a tenth of the update is
# what a w off by a tenth would do; scores vary little within that and visibly beyond it.
_BAD_ERROR = 0.1
_BAD_LOSS = 0.1

# The statistics look at every element of a small piece and at one in 1021 of a large one: a prime, so that the sample
# walks over all columns whatever the width of a matrix. Of 1e8 elements that leaves 1e5, enough for two digits; each
# sampled element is a cache miss (one in 127 cost as much as the merge itself).
_SAMPLE_ALL = 1 << 16
_SAMPLE_STRIDE = 1021
_SAMPLE_PIECE = 1 << 24  # leaves samples that torch works on in the calling thread

_WORK_DTYPES = {
    torch.float64: torch.float64,
    torch.float32: torch.float32,
    torch.float16: torch.float32,
    torch.bfloat16: torch.float32,
    torch.float8_e4m3fn: torch.float32,
    torch.float8_e5m2: torch.float32,
    torch.float8_e4m3fnuz: torch.float32,
    torch.float8_e5m2fnuz: torch.float32,
    torch.complex64: torch.complex64,
    torch.complex128: torch.complex128,
}


class MergeWarning(UserWarning):
    """The merge was carried out and its result is not what it seems to be."""


def check_weight(w: float) -> None:
    """Raise a RequestError unless `w` is a finite number, in float32 too."""
    if not abs(w) <= torch.finfo(torch.float32).max:
        raise RequestError(
            f"w = {w}: the merge weight must be a finite number, in float32 too (0 is the base, -1 the self-trained)"
        )


def is_merged(dtype: torch.dtype) -> bool:
    """Whether tensors of this dtype are extrapolated; the others are copied from the base."""
    return dtype in _WORK_DTYPES


def check_mergeable(name: str, base: torch.dtype, self_trained: torch.dtype) -> None:
    """Raise a RequestError if a base and a self-trained tensor of these dtypes have no meaningful merge."""
    is_number = base.is_floating_point or base.is_complex
    if is_number and not (is_merged(base) and is_merged(self_trained)):
        raise RequestError(f"{name}: cannot extrapolate from {self_trained} (self-trained) past {base} (base)")
    if is_merged(base) and self_trained.is_complex and not base.is_complex:
        raise RequestError(f"{name}: the self-trained tensor is {self_trained} and the base {base}, which is real")


@torch.no_grad()
def merge_tensor(
    base: torch.Tensor, self_trained: torch.Tensor, w: float, out: torch.Tensor | None = None, *, name: str = "tensor"
) -> torch.Tensor:
    """(1 + w) base - w self_trained, computed in float32 (float64 if either is) and rounded once.

    Copied from the base: integer and boolean tensors, elements that are not finite in either tensor, elements equal in
    both. w = 0 gives the base and w = -1 the self-trained values, exactly.

    Args:
        out: where to write, on the base's device, of any float dtype; may be `base` or `self_trained` itself.
            By default a new contiguous tensor of the base's dtype.
        name: what to call the tensor in errors.

    Raises:
        RequestError: shapes differ, w is not finite, or a dtype has no extrapolation.
        DegenerateError: an element finite in both tensors is not finite in the result.
    """
    check_weight(w)
    check_mergeable(name, base.dtype, self_trained.dtype)
    if base.shape != self_trained.shape:
        raise RequestError(
            f"{name}: base has shape {tuple(base.shape)} and self-trained {tuple(self_trained.shape)}; they must agree"
        )
    if out is None:
        out = torch.empty(base.shape, dtype=base.dtype, device=base.device)
    if not is_merged(base.dtype):
        return out.copy_(base)
    target = out if out.is_contiguous() else torch.empty(base.shape, dtype=out.dtype, device=base.device)
    chunk = _CHUNK if base.device.type == "cpu" else _DEVICE_CHUNK
    merge_flat(base.reshape(-1), self_trained.reshape(-1), w, target.view(-1), name, chunk)
    return out if target is out else out.copy_(target)


@torch.no_grad()
def merge_flat(
    base: torch.Tensor, self_trained: torch.Tensor, w: float, out: torch.Tensor, name: str, chunk: int
) -> None:
    """`merge_tensor` without its checks of the request, on 1-D tensors, `chunk` elements at a time."""
    for b, s, o in zip(base.split(chunk), self_trained.split(chunk), out.split(chunk), strict=True):
        _merge_piece(b, s, w, o, name)


def _merge_piece(base: torch.Tensor, self_trained: torch.Tensor, w: float, out: torch.Tensor, name: str) -> None:
    work = work_dtype(base.dtype, self_trained.dtype)
    b, s = base.to(work), self_trained.to(work)
    suspect = False
    if w == 0:
        result = b
    elif w == -1:
        result = s
        suspect = not _sum_is_finite(b)  # elsewhere such elements of the base show up in the result
    else:
        # base + weight (self_trained - base) in one pass; exact where both are equal.
        direct = out.dtype == work and out.data_ptr() not in (b.data_ptr(), s.data_ptr())
        result = torch.lerp(b, s, -w, out=out) if direct else torch.lerp(b, s, -w)
    if result is not out:
        # The repair needs both operands as they were, also when `out` is one of them.
        b, s = (t.clone() if t.data_ptr() == out.data_ptr() else t for t in (b, s))
        out.copy_(result)
    if suspect or not _sum_is_finite(out):
        _repair(b, s, out, w, name)


def _repair(b: torch.Tensor, s: torch.Tensor, out: torch.Tensor, w: float, name: str) -> None:
    """Put the base's value where either operand is not finite, and refuse results that overflowed."""
    finite = torch.isfinite(b) & torch.isfinite(s)
    out.copy_(torch.where(finite, out.to(b.dtype), b))
    overflowed = int((torch.isfinite(b) & ~torch.isfinite(out.to(b.dtype))).sum())
    if overflowed:
        raise DegenerateError(f"{name}: {overflowed} elements overflow {out.dtype} at w = {w:g}; use a w nearer to 0")


def _sum_is_finite(values: torch.Tensor) -> bool:
    # The sum of finite elements may overflow too, and of float8 has no kernel; then a careful second look decides.
    work = _WORK_DTYPES[values.dtype]
    return cmath.isfinite(values.to(work).sum().item())


def work_dtype(base: torch.dtype, self_trained: torch.dtype) -> torch.dtype:
    return torch.promote_types(_WORK_DTYPES[base], _WORK_DTYPES[self_trained])


def differ(base: torch.Tensor, self_trained: torch.Tensor) -> bool:
    """Whether any value of two tensors differs; integers beside floats are compared as these would hold them."""
    floats = [t.dtype for t in (base, self_trained) if is_merged(t.dtype)]
    if not floats and base.dtype == self_trained.dtype:  # bytes, which every dtype has
        return not torch.equal(*(t.reshape(-1).view(torch.uint8) for t in (base, self_trained)))
    if len(floats) == 1:
        base, self_trained = base.to(floats[0]), self_trained.to(floats[0])
    work = work_dtype(base.dtype, self_trained.dtype) if floats else torch.int64
    b, s = base.to(work), self_trained.to(work)
    return not torch.equal(b, s) and not bool(((b == s) | (b.isnan() & s.isnan())).all())


LEAST_CHANGE = 1e-5
"""of the norm of the weights: below it a self-training has gone nowhere, and no usual w changes a score"""


@dataclass(kw_only=True)
class Change:
    """How far self-trained weights lie from the base, tensor by tensor: sums in float64 of squares of float32."""

    moved: float = 0.0  # sum of squares of the differences
    norm: float = 0.0  # sum of squares of the base

    @property
    def relative(self) -> float:
        """|theta_s - theta_r| / |theta_r|"""
        return math.sqrt(self.moved / self.norm) if self.norm else math.inf if self.moved else 0.0

    @torch.no_grad()
    def add(self, base: torch.Tensor, self_trained: torch.Tensor) -> None:
        """Count one tensor, or a part of one; elements that are not finite in both count for nothing."""
        chunk = SERIAL_CHUNK if base.device.type == "cpu" else _DEVICE_CHUNK
        work = work_dtype(base.dtype, self_trained.dtype)
        for b, s in zip(base.reshape(-1).split(chunk), self_trained.reshape(-1).split(chunk), strict=True):
            self._add_piece(b.to(work), s.to(work))

    def _add_piece(self, base: torch.Tensor, self_trained: torch.Tensor) -> None:
        moved, norm = (float(torch.linalg.vector_norm(t)) for t in (self_trained - base, base))
        if not math.isfinite(moved + norm):  # an element is not, or a square overflows
            finite = torch.isfinite(base) & torch.isfinite(self_trained)
            wide = torch.promote_types(base.dtype, torch.float64)
            b, s = (torch.where(finite, t, 0).to(wide) for t in (base, self_trained))
            moved, norm = (float(torch.linalg.vector_norm(t)) for t in (s - b, b))
        self.moved += moved * moved
        self.norm += norm * norm

    def warning(self) -> str | None:
        """What a user should know of weights that hardly moved; None if they did."""
        if not self.relative < LEAST_CHANGE:
            return None
        return (
            f"the self-trained weights lie {self.relative:.1e} of the base's norm away from it, less than "
            f"{LEAST_CHANGE:g}: every merge is the base but for rounding; train longer or at a higher learning rate"
        )


@dataclass(kw_only=True)
class UpdateStats:
    """What became of the update w (base - self_trained) when the result was rounded to its dtype.

    Totals over all merged elements, estimated from a fixed sample of the large tensors.
    """

    wanted: float = 0.0  # elements whose update is not zero
    lost: float = 0.0  # of these, elements where the result equals the base
    exact: float = 0.0  # sum of squares of the update
    error: float = 0.0  # sum of squares of (realised - exact update)
    along: float = 0.0  # inner product of the realised and the exact update
    moved: float = 0.0  # sum of squares of self-trained - base
    norm: float = 0.0  # sum of squares of the base
    noise: float = 0.0  # sum of squares of what of the update may be the rounding of the file of the smaller dtype

    @property
    def share_lost(self) -> float:
        """Share of the elements that should have moved and did not."""
        return self.lost / self.wanted if self.wanted else 0.0

    @property
    def relative_error(self) -> float:
        """Norm of the error of the realised update over the norm of the exact one."""
        return math.sqrt(self.error / self.exact) if self.exact else 0.0

    @property
    def share_kept(self) -> float:
        """The realised update along the exact one, over its length: near 1 where rounding errs about a right mean."""
        return self.along / self.exact if self.exact else 1.0

    @property
    def relative_noise(self) -> float:
        """Norm of the rounding of whichever weights have the smaller dtype over that of base - self_trained."""
        return math.sqrt(self.noise / self.exact) if self.exact else 0.0

    @torch.no_grad()
    def add(self, base: torch.Tensor, self_trained: torch.Tensor, w: float, merged: torch.Tensor) -> None:
        """Count one merged tensor, or a part of one; a tensor that is copied counts for nothing."""
        if w == 0 or base.numel() == 0 or not is_merged(base.dtype):
            return
        for b, s, m in zip(*(t.reshape(-1).split(_SAMPLE_PIECE) for t in (base, self_trained, merged)), strict=True):
            self._add_piece(b, s, w, m)

    @torch.no_grad()
    def add_kept_in(self, dtype: torch.dtype, base: torch.Tensor, self_trained: torch.Tensor) -> None:
        """Count what would be left of a part of the update at w = 1 if base and result were kept in `dtype`.

        Raises:
            DegenerateError: the base or the result overflows it.
        """
        for b, s in zip(*(t.reshape(-1).split(_SAMPLE_PIECE) for t in (base, self_trained)), strict=True):
            if b.numel():
                stride = _stride(b)
                sample, kept = b[::stride], b[::stride].to(dtype)
                if not torch.equal(torch.isfinite(kept), torch.isfinite(sample)):
                    raise DegenerateError(f"the weights overflow {dtype}")
                moved = kept.double() - (sample - s[::stride])
                self._count(kept, moved, 1.0, merge_tensor(kept, moved, 1.0), b.numel() / kept.numel())

    def _add_piece(self, base: torch.Tensor, self_trained: torch.Tensor, w: float, merged: torch.Tensor) -> None:
        stride = _stride(base)
        b, s, m = (t[::stride] for t in (base, self_trained, merged))
        self._count(b, s, w, m, base.numel() / b.numel())

    def _count(
        self, base: torch.Tensor, self_trained: torch.Tensor, w: float, merged: torch.Tensor, stands_for: float
    ) -> None:
        """Count a sample, of which each element stands for so many of the tensor."""
        wide = torch.promote_types(work_dtype(base.dtype, self_trained.dtype), torch.float64)
        b, s, m = (t.to(wide) for t in (base, self_trained, merged))
        update, realised = w * (b - s), m - b
        if base.dtype != self_trained.dtype and not (base.is_complex() or self_trained.is_complex()):
            self.noise += stands_for * _rounding(base, self_trained) * w**2
        finite = torch.isfinite(update) & torch.isfinite(realised)
        update, realised = torch.where(finite, update, 0), torch.where(finite, realised, 0)
        self.wanted += stands_for * int(torch.count_nonzero(update))
        stayed = m == base.to(merged.dtype).to(wide)
        self.lost += stands_for * int(torch.count_nonzero((update != 0) & stayed))
        self.along += stands_for * float((realised * update.conj()).sum().real)
        squares = stands_for * float(update.abs().square().sum())
        self.exact += squares
        self.moved += squares / w**2
        self.norm += stands_for * float(torch.where(torch.isfinite(b), b, 0).abs().square().sum())
        self.error += stands_for * float((realised - update).abs().square().sum())

    def warnings(
        self,
        w: float,
        *,
        any_differ: bool,
        is_added: bool = False,
        advice: str = "merge float32 weights if there are any",
        is_random: bool = False,
    ) -> list[str]:
        """What a user should know about the merge at this w, in sentences with figures.

        Args:
            any_differ: whether base and self-trained do, anywhere.
            is_added: the self-trained weights are the base's with an adapter on them: of no other file's rounding.
            advice: what to do where rounding spoils the update.
            is_random: rounded stochastically, which moves few elements, and these too far.
        """
        found = []
        if is_random and self.relative_error > _BAD_ERROR:
            found.append(
                f"w = {w:g}: stochastic rounding adds noise of {self.relative_error:.1%} of the update, of mean 0; "
                f"{advice}"
            )
        elif not is_random and (self.share_lost > _BAD_LOSS or self.relative_error > _BAD_ERROR):
            found.append(
                f"w = {w:g}: rounding spoils the update: {self.share_lost:.1%} of the elements that should move do "
                f"not, and the realised update is {self.relative_error:.1%} off; {advice}"
            )
        if self.relative_noise > _BAD_ERROR and not is_added:
            found.append(
                "base and self-trained differ in dtype, and rounding to the smaller one is "
                f"{self.relative_noise:.1%} of what they differ by, which w multiplies; merge weights of one dtype"
            )
        if not any_differ:
            found.append("base and self-trained are equal: nothing to extrapolate")
        elif w != 0 and (text := Change(moved=self.moved, norm=self.norm).warning()):
            found.append(text)
        return found


def _stride(piece: torch.Tensor) -> int:
    return 1 if piece.numel() <= _SAMPLE_ALL else _SAMPLE_STRIDE


def _rounding(a: torch.Tensor, b: torch.Tensor) -> float:
    """Sum of squares of what rounding to the dtype of the one takes from the other, whose dtype holds more."""
    fine, coarse = sorted((a, b), key=lambda t: torch.finfo(t.dtype).eps)
    wide = torch.promote_types(_WORK_DTYPES[fine.dtype], torch.float64)
    lost = fine.to(wide) - fine.to(coarse.dtype).to(wide)
    return float(torch.where(torch.isfinite(lost), lost, 0).abs().square().sum())
