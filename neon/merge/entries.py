"""What becomes of each entry of two state dicts: extrapolated, copied from the base, or not to be merged at all.

One rule for files, state dicts and live networks, so that a merged file scores as its sweep did. Parameters are
extrapolated. Buffers (running statistics, vectors of power iterations, tables, counters) are no weights: (1 + w) of one
variance less w of another may be below 0, and of two unit vectors is none. They are copied.
"""

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import torch

from neon.checkpoint import TensorSpec
from neon.checkpoint.common import listing
from neon.errors import RequestError
from neon.merge.extrapolate import check_mergeable, is_merged

Specs = Mapping[str, TensorSpec]

# By the last word of a name, buffers of torch's layers and of well-known code; no parameter is called so.
_BUFFERS = {
    # normalisation, power iteration and exponential averages
    *("running_mean", "running_var", "num_batches_tracked", "num_updates", "n_averaged", "global_step"),
    *("w_avg", "magnitude_ema", "cluster_size", "ema_cluster_size", "embed_avg"),
    # filters, positions and noise
    *("resample_filter", "up_filter", "down_filter", "noise_const", "inv_freq", "freqs_cos", "freqs_sin", "freqs_cis"),
    # schedules of diffusion
    *("alphas_cumprod", "alphas_cumprod_prev", "sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod"),
    *("log_one_minus_alphas_cumprod", "sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod"),
    *("posterior_variance", "posterior_log_variance_clipped", "posterior_mean_coef1", "posterior_mean_coef2"),
}
# Words that may name parameters too: buffers where the other entry stands beside them.
_BUFFERS_BESIDE = {
    "decay": "num_updates",
    "betas": "alphas_cumprod",
    "embed": "embed_avg",
    "freqs": "phases",
    "phases": "freqs",
    "sigmas": "log_sigmas",
    "log_sigmas": "sigmas",
}
_COUNTING = {
    *("n", "num", "count", "counts", "counter", "step", "steps", "iter", "iters", "iteration", "iterations", "epoch"),
    *("updates", "averaged", "tracked", "usage", "hits", "seen", "age", "ptr"),
}

# Of quantised weights: what their codes may be kept in, how such entries are called, and what the scales of them are.
_CODES = {
    *(torch.int8, torch.uint8, torch.int16, torch.int32),
    *(torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz),
}
_CODED = re.compile(r"weight|^W_q$")
_SCALE = re.compile(r"scale|absmax|scb|zero|quant", re.IGNORECASE)
_ADVICE = "merge the files as they were before they were quantised, or dequantise both"


def check_pair(base: Specs, self_trained: Specs, *, sides: tuple[str, str] = ("base", "self-trained")) -> None:
    """Raise a RequestError, listing both sides, unless names and shapes agree."""
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
            + "; both must come from the same network"
        )


@dataclass(frozen=True)
class Roles:
    """What becomes of the entries, by name; those in neither are integers and booleans, which are copied."""

    merged: frozenset[str]
    buffers: tuple[str, ...]
    """of a float dtype, copied from the base"""
    differing: tuple[str, ...]
    """booleans that are copied and differ between base and self-trained"""

    @property
    def notes(self) -> list[str]:
        """What a user should know, in sentences."""
        if not self.differing:
            return []
        return [f"copied from the base though base and self-trained differ in them: {listing(self.differing)}"]


def roles_of(
    base: Specs, self_trained: Specs, differ: Callable[[str], bool], buffers: Collection[str] | None = None
) -> Roles:
    """What becomes of each entry of a base and self-trained weights of the same names and shapes.

    Args:
        differ: whether the values of an entry differ; asked of integers and scales only.
        buffers: the network's, where it is known (others are then parameters); by default told by their names.

    Raises:
        RequestError: a dtype has no extrapolation, or the weights are quantised and not the same.
    """
    fixed = buffers_by_name(base) if buffers is None else buffers
    merged, kept, differing, coded = list[str](), list[str](), list[str](), list[str]()
    for name, spec in base.items():
        dtypes = spec.dtype, self_trained[name].dtype
        if all(dtype.is_floating_point or dtype.is_complex for dtype in dtypes):
            if name in fixed:
                kept.append(name)
            elif all(map(is_merged, dtypes)) or differ(name):
                check_mergeable(name, *dtypes)
                merged.append(name)
        elif _is_counter(name, spec) or not differ(name):
            continue
        elif torch.bool in dtypes:
            differing.append(name)
        else:
            coded.append(name)
    scales = _scales(base)
    coded += [name for name in (*merged, *kept) if name in scales and differ(name)]
    if coded:
        raise RequestError(
            "quantised weights: base and self-trained differ in integers, or in floats that belong to codes, which "
            f"have no extrapolation: {listing(coded)} ({_dtype_text(base, self_trained, coded[0])}); {_ADVICE}"
        )
    return Roles(frozenset(merged), tuple(kept), tuple(differing))


def buffers_by_name(names: Collection[str]) -> frozenset[str]:
    """Those names of a state dict that are a network's buffers, as far as names and their neighbours tell."""
    known = frozenset(names)
    return frozenset(name for name in known if _is_buffer(name, known))


def _is_buffer(name: str, names: Collection[str]) -> bool:
    front, word = name[: name.rfind(".") + 1], name[name.rfind(".") + 1 :]
    if word in _BUFFERS:
        return True
    if word in _BUFFERS_BESIDE:
        return front + _BUFFERS_BESIDE[word] in names
    # Vectors of spectral norm: as a parametrisation, as torch had it before (where weight norm calls a parameter
    # weight_v, beside weight_g), and as BigGAN has it; pruning keeps its mask in the same way.
    if word in ("_u", "_v"):
        return "parametrizations" in front.split(".")
    if match := re.fullmatch(r"(\w+)_(u|v|mask)", word):
        return f"{front}{match[1]}_orig" in names
    match = re.fullmatch(r"(?:u|sv)(\d+)", word)
    return match is not None and f"{front}u{match[1]}" in names and f"{front}sv{match[1]}" in names


def _is_counter(name: str, spec: TensorSpec) -> bool:
    """Whether an integer counts something, so that it may differ; a single one does, whatever it is called."""
    return spec.numel <= 1 or not _COUNTING.isdisjoint(name[name.rfind(".") + 1 :].lower().split("_"))


def _scales(specs: Specs) -> set[str]:
    """The floats that the codes of quantised weights are multiplied with or looked up in: beside or below them."""
    places = set[str]()
    for name, spec in specs.items():
        front, _, word = name.rpartition(".")
        if spec.dtype in _CODES and _CODED.search(word):
            places |= {front, name}
    split = ((name, *name.rpartition(".")) for name, spec in specs.items() if spec.dtype not in _CODES)
    return {name for name, front, _, word in split if front in places and _SCALE.search(word)}


def _dtype_text(base: Specs, self_trained: Specs, name: str) -> str:
    return " and ".join(dict.fromkeys(str(specs[name].dtype) for specs in (base, self_trained)))
