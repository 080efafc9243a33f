"""Merging state dicts, and merging into a live network once per w of a sweep."""

import math
import warnings
from collections.abc import Collection, Mapping

import torch

from neon.checkpoint import TensorSpec
from neon.checkpoint.common import listing, specs_of
from neon.errors import RequestError
from neon.merge.extrapolate import (
    EQUAL_WARNING,
    MergeWarning,
    UpdateStats,
    check_mergeable,
    check_weight,
    differ,
    is_merged,
    merge_tensor,
)

State = Mapping[str, torch.Tensor]


def merge_state(
    base: State, self_trained: State, w: float, *, fixed: Collection[str] = frozenset()
) -> dict[str, torch.Tensor]:
    """Merge two state dicts into new tensors of the base's dtypes and devices; see `merge_tensor`.

    Emits a `MergeWarning` if both are equal or if rounding loses much of the update.

    Args:
        fixed: names copied from the base whatever their dtype (buffers of a network).

    Raises:
        RequestError: names or shapes differ, or as `merge_tensor`.
        DegenerateError: as `merge_tensor`.
    """
    check_weight(w)
    check_pair(specs_of(base), specs_of(self_trained))
    merged, stats, any_differ = {}, UpdateStats(), False
    for name, b in base.items():
        if name in fixed or not is_merged(b.dtype):
            merged[name] = b.detach().clone()
            continue
        s = self_trained[name].to(b.device)
        merged[name] = merge_tensor(b, s, w, name=name)
        stats.add(b, s, w, merged[name])
        any_differ = any_differ or differ(b, s)
    for message in [*stats.warnings(w), *([] if any_differ else [EQUAL_WARNING])]:
        warnings.warn(message, MergeWarning, stacklevel=2)
    return merged


class LiveMerge:
    """Keeps base and self-trained weights resident and writes their merge into a live network, once per w.

        merge = LiveMerge(network, base_state, self_trained_state)
        for w in (0.0, 0.5, 1.0):
            merge.set(w)
            evaluate(network)

    The states move to the network's device once. Parameters are merged, in the network's own dtype; buffers are fixed
    and copied from the base. The states may be the network's own tensors: these are copied first.

    Raises:
        RequestError: names or shapes of the states and the network differ.
    """

    def __init__(self, network: torch.nn.Module, base: State, self_trained: State) -> None:
        live = {name: tensor.detach() for name, tensor in network.state_dict().items()}
        check_pair(specs_of(base), specs_of(self_trained))
        check_pair(specs_of(base), specs_of(live), sides=("states", "network"))
        own = {tensor.untyped_storage().data_ptr() for tensor in live.values()}
        buffers = {name for name, _ in network.named_buffers(remove_duplicate=False)}
        self._tensors = [
            _Resident(name, name in buffers, target, *(_keep(s[name], target, own) for s in (base, self_trained)))
            for name, target in live.items()
        ]

    @torch.no_grad()
    def set(self, w: float) -> None:
        """Put (1 + w) base - w self_trained into the network, in place; errors as `merge_tensor`.

        Nothing is allocated but temporaries of a chunk, and those only below float32.
        """
        check_weight(w)
        for tensor in self._tensors:
            tensor.write(w)


class _Resident:
    """One tensor of a live network with its base and self-trained values."""

    def __init__(
        self, name: str, is_buffer: bool, target: torch.Tensor, base: torch.Tensor, self_trained: torch.Tensor
    ) -> None:
        self.name, self.is_buffer = name, is_buffer
        self.target, self.base, self.self_trained = target, base, self_trained
        is_plain = base.dtype == self_trained.dtype == target.dtype == torch.float32
        self.magnitude = max(map(_largest_magnitude, (base, self_trained))) if is_plain else math.inf

    def write(self, w: float) -> None:
        # Finite weights whose merge cannot overflow need no check: one pass over memory, and no wait for a GPU.
        is_safe = self.magnitude * 2 * (1 + abs(w)) < torch.finfo(torch.float32).max
        if self.is_buffer:
            self.target.copy_(self.base)
        elif not is_safe:
            merge_tensor(self.base, self.self_trained, w, out=self.target, name=self.name)
        elif w in (0, -1):
            self.target.copy_(self.base if w == 0 else self.self_trained)
        else:
            torch.lerp(self.base, self.self_trained, -w, out=self.target)


def _largest_magnitude(tensor: torch.Tensor) -> float:
    """The largest absolute value; infinite if any element is not finite."""
    if tensor.numel() == 0:
        return 0.0
    low, high = (float(bound) for bound in torch.aminmax(tensor))
    return max(-low, high) if math.isfinite(low) and math.isfinite(high) else math.inf


def _keep(tensor: torch.Tensor, target: torch.Tensor, own: set[int]) -> torch.Tensor:
    tensor = tensor.detach()
    if tensor.untyped_storage().data_ptr() in own:
        tensor = tensor.clone()
    return tensor.to(target.device).contiguous()


def check_pair(
    base: Mapping[str, TensorSpec],
    self_trained: Mapping[str, TensorSpec],
    *,
    sides: tuple[str, str] = ("base", "self-trained"),
) -> None:
    """Raise a RequestError, listing both sides, unless names and shapes agree and every dtype can be merged."""
    ours, theirs = sides
    problems = []
    for side, mine, other in ((ours, base, self_trained), (theirs, self_trained, base)):
        if extra := [name for name in mine if name not in other]:
            problems.append(f"only in {side}: {listing(extra)}")
    shapes = [
        f"{name} {list(base[name].shape)} / {list(self_trained[name].shape)}"
        for name in base
        if name in self_trained and base[name].shape != self_trained[name].shape
    ]
    if shapes:
        problems.append(f"different shapes ({ours} / {theirs}): {listing(shapes)}")
    if problems:
        raise RequestError(
            f"{ours} and {theirs} do not fit each other ({len(base)} and {len(self_trained)} tensors): "
            + "; ".join(problems)
            + "; both must come from the same network (is a --key wrong?)"
        )
    for name, spec in base.items():
        check_mergeable(name, spec.dtype, self_trained[name].dtype)
