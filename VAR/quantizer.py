"""The multi-scale residual quantiser: a feature map as token maps from coarse to fine, and back.

Symbols: K scales of side p_1 .. p_K; L = sum of p_k^2 tokens; V codes of c channels. Tokens of all scales are
one sequence, coarse to fine, row by row inside a scale. Scales are counted from 0 in the code.
"""

from collections.abc import Sequence
from itertools import accumulate, pairwise

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

DISTANCES_AT_ONCE = 2**24
"""float32 distances held in memory while codes are looked up (64 MiB)"""


def scale_slices(patch_nums: Sequence[int]) -> list[slice]:
    """The positions of each scale in the sequence of tokens.

    Raises:
        ValueError: fewer than two scales, or sides that do not grow.
    """
    if len(patch_nums) < 2 or patch_nums[0] < 1 or any(a >= b for a, b in pairwise(patch_nums)):
        raise ValueError(f"patch_nums is {list(patch_nums)}; expected the growing sides of two scales or more")
    ends = list(accumulate(side**2 for side in patch_nums))
    return [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]


def phi_of_scales(num_scales: int, phi_count: int) -> list[int]:
    """Which of the residual convolutions each scale uses; `phi_count` 0: each its own, else the nearest tick.

    In float64 and in this order of operations: with four convolutions, scales at 2/9 and 7/9 of the way lie
    exactly between two ticks, and rounding gives them to the higher one, as in the published tokenizer.
    """
    if phi_count == 0:
        return list(range(num_scales))
    margin = 1 / 3 / phi_count if phi_count == 4 else 1 / 2 / phi_count
    ticks = np.linspace(margin, 1 - margin, phi_count)
    return [int(np.argmin(np.abs(ticks - scale / (num_scales - 1)))) for scale in range(num_scales)]


class MultiScaleQuantizer(nn.Module):
    """Codes and residual convolutions between feature maps [B, c, p_K, p_K], float32, and tokens [B, L], int64.

    A feature map is the sum over scales of their codes, enlarged to p_K and passed through phi(h) =
    (1 - r) h + r conv(h) with r = `phi_ratio`. Parameter names are those of the published tokenizer.
    """

    def __init__(
        self,
        vocab: int,
        code_channels: int,
        patch_nums: Sequence[int],
        phi_count: int = 4,
        phi_ratio: float = 0.5,
        cosine_lookup: bool = False,
    ) -> None:
        super().__init__()
        self.patch_nums = tuple(patch_nums)
        self.slices = scale_slices(patch_nums)
        self.phi_index = phi_of_scales(len(patch_nums), phi_count)
        self.phi_ratio = phi_ratio
        self.cosine_lookup = cosine_lookup
        # How often each scale met each code while the tokenizer was trained; nothing here reads it.
        self.register_buffer("ema_vocab_hit_SV", torch.zeros(len(patch_nums), vocab))
        convs = nn.ModuleList(
            nn.Conv2d(code_channels, code_channels, 3, padding=1) for _ in range(phi_count or len(patch_nums))
        )
        self.quant_resi: nn.Module = convs
        if phi_count == 1:
            self.quant_resi = nn.ModuleDict({"qresi": convs[0]})
        elif phi_count > 1:
            self.quant_resi = nn.ModuleDict({"qresi_ls": convs})
        self.embedding = nn.Embedding(vocab, code_channels)

    def empty_map(self, batch: int) -> Tensor:
        """The sum over no scales: zeros [B, c, p_K, p_K]."""
        codes, side = self.embedding.weight, self.patch_nums[-1]
        return torch.zeros(batch, codes.shape[1], side, side, dtype=torch.float32, device=codes.device)

    def accumulate(self, feature_map: Tensor, codes: Tensor, scale: int) -> Tensor:
        """`feature_map` [B, c, p_K, p_K] plus what the `codes` [B, p_k^2, c] of `scale` add to it."""
        return feature_map + self._enlarged(codes, scale)

    def next_input(self, feature_map: Tensor, scale: int) -> Tensor:
        """What the scale after `scale` is predicted from: the map seen at its size, [B, p_{k+1}^2, c]."""
        return _as_sequence(_area(feature_map, self.patch_nums[scale + 1]))

    def feature_maps(self, tokens: Tensor) -> list[Tensor]:
        """The sums over scales 1 .. k of `tokens` [B, L], for every k: K tensors [B, c, p_K, p_K]."""
        sums = [self.empty_map(len(tokens))]
        for scale, positions in enumerate(self.slices):
            sums.append(self.accumulate(sums[-1], self.embedding(tokens[:, positions]), scale))
        return sums[1:]

    def teacher_forcing_input(self, tokens: Tensor) -> Tensor:
        """What a transformer predicts scales 2 .. K of `tokens` [B, L] from: float32 [B, L - p_1^2, c]."""
        sums = self.feature_maps(tokens)[:-1]
        return torch.cat([self.next_input(feature_map, scale) for scale, feature_map in enumerate(sums)], dim=1)

    def encode(self, feature_map: Tensor) -> Tensor:
        """Tokens [B, L]: at every scale the codes nearest to what the coarser scales left over."""
        rest, tokens = feature_map, []
        for scale, side in enumerate(self.patch_nums):
            tokens.append(self._nearest(_as_sequence(_area(rest, side))))
            rest = rest - self._enlarged(self.embedding(tokens[-1]), scale)
        return torch.cat(tokens, dim=1)

    def training_forward(self, feature_map: Tensor) -> tuple[Tensor, Tensor]:
        """(quantised map with the gradient passed straight through, loss of codes and encoder, scalar).

        The loss is the mean over scales of 0.25 mse that draws the encoder to the partial sums, plus mse that
        draws codes and convolutions to the encoder.
        """
        with torch.no_grad():
            tokens = self.encode(feature_map)
        sums = self.feature_maps(tokens)
        target = feature_map.detach()
        losses = [0.25 * F.mse_loss(s.detach(), feature_map) + F.mse_loss(s, target) for s in sums]
        return feature_map + (sums[-1] - feature_map).detach(), torch.stack(losses).mean()

    def _enlarged(self, codes: Tensor, scale: int) -> Tensor:
        """Codes [B, p_k^2, c] as a map [B, c, p_K, p_K]."""
        side, last = self.patch_nums[scale], self.patch_nums[-1]
        enlarged = codes.transpose(1, 2).unflatten(2, (side, side))
        if side != last:
            enlarged = F.interpolate(enlarged, size=(last, last), mode="bicubic")
        convs = [module for module in self.quant_resi.modules() if isinstance(module, nn.Conv2d)]
        convolved = convs[self.phi_index[scale]](enlarged)
        return (1 - self.phi_ratio) * enlarged + self.phi_ratio * convolved

    def _nearest(self, vectors: Tensor) -> Tensor:
        """Index of the code nearest to each of `vectors` [B, N, c]: int64 [B, N], the first if several are."""
        codes = self.embedding.weight
        if self.cosine_lookup:
            vectors, codes = F.normalize(vectors, dim=-1), F.normalize(codes, dim=-1)
        found = []
        for some in vectors.flatten(0, 1).split(max(1, DISTANCES_AT_ONCE // len(codes))):
            if self.cosine_lookup:
                found.append((some @ codes.T).argmax(dim=1))
            else:
                # The square written out, as published: near ties then round alike.
                squares = some.square().sum(dim=1, keepdim=True) + codes.square().sum(dim=1)
                found.append(torch.addmm(squares, some, codes.T, alpha=-2).argmin(dim=1))
        return torch.cat(found).view(vectors.shape[:2])


def _area(feature_map: Tensor, side: int) -> Tensor:
    """Means over areas, to [B, c, side, side]."""
    return feature_map if feature_map.shape[-1] == side else F.interpolate(feature_map, size=(side, side), mode="area")


def _as_sequence(feature_map: Tensor) -> Tensor:
    """[B, c, p, p] -> [B, p^2, c], row by row."""
    return feature_map.flatten(2).transpose(1, 2)
