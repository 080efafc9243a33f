"""The sampler of VAR: one draw of all tokens per scale, from coarse to fine, with classifier-free guidance.

Symbols as in `VAR.transformer`; progress r runs from 0 at the first scale to 1 at the last.
"""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from neon.model import of_both
from neon.noise import Noise
from VAR.settings import VARSettings
from VAR.transformer import VAR
from VAR.vqvae import VQVAE

Logits = Callable[[Tensor | None, float], Tensor]
"""(the quantiser's `next_input` [B, p_k^2, c], None at the first scale; progress) -> logits, float32 [B, p_k^2, V]"""
Second = tuple[VAR, float] | None
"""another transformer and its scale g, for logits (1 + g) l - g l_second"""


class Scale(NamedTuple):
    """What was sampled at one scale."""

    logits: Tensor
    """float32 [B, p_k^2, V], guided, neither tempered nor filtered"""
    tokens: Tensor
    """int64 [B, p_k^2]"""
    feature_map: Tensor
    """float32 [B, c, p_K, p_K], the sum over the scales so far"""


@torch.no_grad()
def generate(
    transformer: VAR, vqvae: VQVAE, labels: Tensor, noise: Noise, settings: VARSettings, second: Second = None
) -> Tensor:
    """Images float32 [B, 3, H, H] in [0, 1] of classes `labels` int64 [B] in [0, N]; N stands for no class.

    Image b depends on row b of `labels` and `noise` only. (The published evaluation gave every process the same
    seeds, so that as many images as there were processes shared their noise; that is not repeated here.)
    """
    for scale in sample_scales(transformer, vqvae, labels, noise, settings, second):
        feature_map = scale.feature_map
    return (vqvae.decode(feature_map).float() + 1) / 2


def generate_tokens(
    transformer: VAR, vqvae: VQVAE, labels: Tensor, noise: Noise, settings: VARSettings, second: Second = None
) -> Tensor:
    """The tokens int64 [B, L] of the images that `generate` makes.

    Raises:
        ValueError: `settings.smooth`; images are then not made of tokens.
    """
    if settings.smooth:
        raise ValueError("smooth is True; expected False, for codes that are mixed have no tokens")
    scales = sample_scales(transformer, vqvae, labels, noise, settings, second)
    return torch.cat([scale.tokens for scale in scales], dim=1)


@torch.no_grad()
def sample_scales(
    transformer: VAR, vqvae: VQVAE, labels: Tensor, noise: Noise, settings: VARSettings, second: Second = None
) -> Iterator[Scale]:
    """Sample scale after scale; arguments as in `generate`.

    Per scale and image, `noise` gives exponential draws [p_k^2, V] that pick the tokens and, if smooth, as many
    again that mix the codes. The device is never waited for.
    """
    quantize = vqvae.quantize
    next_logits = of_both(lambda network: guided_logits(network, labels, settings.guidance), transformer, second)
    feature_map, codes = quantize.empty_map(len(labels)), None
    for k, side in enumerate(quantize.patch_nums):
        progress = k / (len(quantize.patch_nums) - 1)
        logits = next_logits(codes, progress)
        kept = filter_logits(logits / settings.temperature, settings.top_k, settings.top_p)
        tokens = draw_tokens(kept, noise.exponential(side**2, logits.shape[2]))
        if settings.smooth:
            draws = noise.exponential(side**2, logits.shape[2])
            chosen = smooth_codes(kept, draws, quantize.embedding.weight, progress)
        else:
            chosen = quantize.embedding(tokens)
        feature_map = quantize.accumulate(feature_map, chosen, k)
        yield Scale(logits, tokens, feature_map)
        if progress < 1:
            codes = quantize.next_input(feature_map, k)


def guided_logits(transformer: VAR, labels: Tensor, guidance: float) -> Logits:
    """The logits of scale after scale of classes `labels`, guidance growing with progress; what is behind is kept."""
    guided, batch = guidance > 0, len(labels)
    if guided:  # the same images once more, without a class
        labels = torch.cat([labels, torch.full_like(labels, transformer.classes)])
    generation = transformer.start(labels)

    def next_logits(codes: Tensor | None, progress: float) -> Tensor:
        if not guided:
            return transformer.next_logits(generation, codes)
        both = transformer.next_logits(generation, None if codes is None else codes.repeat(2, 1, 1))
        extra = guidance * progress
        return (1 + extra) * both[:batch] - extra * both[batch:]

    return next_logits


def filter_logits(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """A copy of `logits` [..., V], minus infinity where a token is not to be drawn.

    First go those below the k-th largest (equals of it stay), then the least likely of the rest, as many as have
    at most the probability 1 - top_p together; the likeliest always stays. 0 leaves a step out.
    """
    if 0 < top_k < logits.shape[-1]:
        lowest = logits.topk(top_k, dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < lowest, -math.inf)
    if top_p > 0:
        # Stable, so that which of several equals goes depends on nothing else.
        ascending, order = logits.sort(dim=-1, stable=True)
        dropped = ascending.softmax(dim=-1).cumsum(dim=-1) <= 1 - top_p
        dropped[..., -1] = False
        logits = logits.masked_fill(dropped.scatter(-1, order, dropped), -math.inf)
    return logits


def draw_tokens(logits: Tensor, draws: Tensor) -> Tensor:
    """Tokens int64 [...] with the probabilities softmax(`logits` [..., V]), by unit-rate exponential `draws`.

    The race of exponential clocks: argmax of probability / draw, as torch.multinomial takes one sample.
    """
    return (logits.softmax(dim=-1) / draws).argmax(dim=-1)


def smooth_codes(logits: Tensor, draws: Tensor, table: Tensor, progress: float) -> Tensor:
    """Mixtures [..., c] of the codes in `table` [V, c], instead of one of them.

    Weights are softmax(((1 + r) logits + Gumbel noise) / tau), the noise being minus the log of the unit-rate
    exponential `draws` [..., V]; sharper with progress r.
    """
    sharpened = ((1 + progress) * logits - draws.log()) / smooth_temperature(progress)
    return F.softmax(sharpened, dim=-1) @ table


def smooth_temperature(progress: float) -> float:
    """tau of `smooth_codes`: 0.27 at the first scale, falling linearly to 0.0135 at the last."""
    return max(0.27 * (1 - 0.95 * progress), 0.005)
