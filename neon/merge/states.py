"""Merging state dicts, and merging into a live network once per w of a sweep."""

import math
import warnings
from collections.abc import Collection, Mapping

import torch

from neon.checkpoint.common import specs_of
from neon.merge.entries import Roles, check_pair, roles_of
from neon.merge.extrapolate import MergeWarning, UpdateStats, check_mergeable, check_weight, differ, merge_tensor

State = Mapping[str, torch.Tensor]


def merge_state(
    base: State, self_trained: State, w: float, *, fixed: Collection[str] | None = None
) -> dict[str, torch.Tensor]:
    """Merge two state dicts into new tensors of the base's dtypes and devices; see `merge_tensor`.

    Emits a `MergeWarning` if both are equal or if rounding loses much of the update.

    Args:
        fixed: names copied from the base whatever their dtype (buffers of a network); by default told by their names.

    Raises:
        RequestError: names or shapes differ, as `roles_of`, or as `merge_tensor`.
        DegenerateError: as `merge_tensor`.
    """
    check_weight(w)
    check_pair(specs_of(base), specs_of(self_trained))
    roles = _roles(base, self_trained, fixed)
    merged, stats, any_differ = {}, UpdateStats(), False
    for name, b in base.items():
        if name not in roles.merged:
            merged[name] = b.detach().clone()
            continue
        s = self_trained[name].to(b.device)
        merged[name] = merge_tensor(b, s, w, name=name)
        stats.add(b, s, w, merged[name])
        any_differ = any_differ or differ(b, s)
    for message in [*stats.warnings(w, any_differ=any_differ), *roles.notes]:
        warnings.warn(message, MergeWarning, stacklevel=2)
    return merged


def _roles(base: State, self_trained: State, buffers: Collection[str] | None) -> Roles:
    def differs(name: str) -> bool:
        return differ(base[name], self_trained[name].to(base[name].device))

    return roles_of(specs_of(base), specs_of(self_trained), differs, buffers)


class LiveMerge:
    """Keeps base and self-trained weights resident and writes their merge into a live network, once per w.

        merge = LiveMerge(network, base_state, self_trained_state)
        for w in (0.0, 0.5, 1.0):
            merge.set(w)
            evaluate(network)

    The states move to the network's device once. Parameters are merged, in the network's own dtype; buffers are fixed
    and copied from the base. The states may be the network's own tensors: these are copied first.

    Raises:
        RequestError: names or shapes of the states and the network differ, or as `roles_of`.
    """

    def __init__(self, network: torch.nn.Module, base: State, self_trained: State) -> None:
        live = {name: tensor.detach() for name, tensor in network.state_dict().items()}
        check_pair(specs_of(base), specs_of(self_trained))
        check_pair(specs_of(base), specs_of(live), sides=("states", "network"))
        own = {tensor.untyped_storage().data_ptr() for tensor in live.values()}
        roles = _roles(base, self_trained, {name for name, _ in network.named_buffers(remove_duplicate=False)})
        for name in roles.merged:
            check_mergeable(name, base[name].dtype, live[name].dtype)
        self._tensors = [
            _Resident(name, name in roles.merged, target, *(_keep(s[name], target, own) for s in (base, self_trained)))
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


@torch.no_grad()
def merge_into(target: torch.Tensor, base: torch.Tensor, self_trained: torch.Tensor, w: float, name: str) -> None:
    """Write the merge of one tensor into that of a live network, to the bits of `LiveMerge`; errors as `merge_tensor`.

    The others may lie on another device.
    """
    base = base.to(target.device, target.dtype).contiguous()
    _Resident(name, True, target.detach(), base, self_trained.to(target.device).contiguous()).write(w)


class _Resident:
    """One tensor of a live network with its base and self-trained values."""

    def __init__(
        self, name: str, is_merged: bool, target: torch.Tensor, base: torch.Tensor, self_trained: torch.Tensor
    ) -> None:
        self.name, self.is_merged = name, is_merged
        self.target, self.base, self.self_trained = target, base, self_trained
        is_plain = base.dtype == self_trained.dtype == target.dtype == torch.float32
        self.magnitude = max(map(_largest_magnitude, (base, self_trained))) if is_plain else math.inf

    def write(self, w: float) -> None:
        # Finite weights whose merge cannot overflow need no check: one pass over memory, and no wait for a GPU.
        is_safe = self.magnitude * 2 * (1 + abs(w)) < torch.finfo(torch.float32).max
        if not self.is_merged:
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
