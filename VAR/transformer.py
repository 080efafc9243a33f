"""The transformer of VAR: from a class and the coarser scales to logits of the tokens of the next scale.

Attribute names are those of the published weights. Symbols: B images; K scales of side p_1 .. p_K; L = sum of
p_k^2 positions; V tokens; c channels of a code; C width; H heads; N classes, class N standing for none.

It runs under autocast: matrix products in the lower precision; the residual stream, normalisations, normalised
queries and keys, and logits in float32.
"""

import math
from collections.abc import Iterable, Sequence
from typing import ClassVar, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from neon.nn.transformer import BlockCausal, Generation, KVCache, modulated, modulation_layer
from neon.noise import Noise
from VAR.quantizer import scale_slices

FIRST_GAMMA = 1e-5
"""factor on the initial weights of what the branches are multiplied by: an untrained block does next to nothing"""


class Modulation(NamedTuple):
    """What a block takes from the class, each [B, 1, C], in the order of the weights."""

    gamma1: Tensor
    gamma2: Tensor
    scale1: Tensor
    scale2: Tensor
    shift1: Tensor
    shift2: Tensor


class Conditioning(NamedTuple):
    """What all of the network takes from the class; the same at every scale."""

    start: Tensor
    """[B, p_1^2, C], the input at the first scale"""
    blocks: list[Modulation]
    head: tuple[Tensor, Tensor]
    """scale and shift, each [B, 1, C]"""


class VAR(nn.Module):
    """Logits of tokens at all scales, each position seeing its own scale and all coarser ones.

    `drop_path_max` is the rate of the last block, linear from 0 at the first; None: 0.1 depth / 24, as published.
    Published weights have heads of 64 channels and `l2_norm_attention`.

    forward: labels int64 [B] in [0, N]; codes [B, n - p_1^2, c], the quantiser's `teacher_forcing_input`, which
    may end after any scale; noise -> float32 [B, n, V]. From `noise` comes what training draws: one uniform per
    image, under `label_drop` of which the class is dropped (in eval mode too), and in train mode two per image
    and block with a rate, which drop its attention and its MLP. Without `noise` nothing is dropped.
    """

    lvl_1L: Tensor  # noqa: N815 - the name of the published weights
    attn_bias_for_masking: Tensor

    def __init__(
        self,
        classes: int = 1000,
        depth: int = 16,
        width: int = 1024,
        heads: int = 16,
        mlp_ratio: float = 4.0,
        shared_adaln: bool = False,
        l2_norm_attention: bool = True,
        norm_eps: float = 1e-6,
        label_drop: float = 0.1,
        drop_path_max: float | None = None,
        patch_nums: Sequence[int] = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16),
        vocab: int = 4096,
        code_channels: int = 32,
    ) -> None:
        if width % heads:
            raise ValueError(f"width is {width} and heads {heads}; expected a width that divides by the heads")
        super().__init__()
        self.classes = classes
        self.vocab = vocab
        self.code_channels = code_channels
        self.patch_nums = tuple(patch_nums)
        self.norm_eps = norm_eps
        self.label_drop = label_drop
        self.slices = scale_slices(patch_nums)
        self.length = self.slices[-1].stop
        first = self.slices[0].stop
        highest = 0.1 * depth / 24 if drop_path_max is None else drop_path_max
        self.drop_path_rates = [highest * i / max(1, depth - 1) for i in range(depth)]

        self.pos_start = nn.Parameter(torch.empty(1, first, width))
        self.pos_1LC = nn.Parameter(torch.empty(1, self.length, width))
        levels = torch.cat([torch.full((s.stop - s.start,), scale) for scale, s in enumerate(self.slices)])
        self.register_buffer("lvl_1L", levels[None])
        seen = levels[:, None] >= levels
        mask = torch.zeros(seen.shape, dtype=torch.float32).masked_fill(~seen, -math.inf)
        self.register_buffer("attn_bias_for_masking", mask[None, None])

        self.word_embed = nn.Linear(code_channels, width)
        self.class_emb = nn.Embedding(classes + 1, width)
        self.lvl_embed = nn.Embedding(len(patch_nums), width)
        self.shared_ada_lin = modulation_layer(width, 6) if shared_adaln else None
        self.blocks = nn.ModuleList(
            Block(width, heads, round(mlp_ratio * width), norm_eps, l2_norm_attention, shared_adaln)
            for _ in range(depth)
        )
        self.head_nm = Head(width)
        self.head = nn.Linear(width, vocab)
        self.initialise()

    @torch.no_grad()
    def initialise(self) -> None:
        """Values to train from scratch with: as published."""
        width, depth = self.pos_1LC.shape[-1], len(self.blocks)
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif name.endswith("scale_mul_1H11"):
                nn.init.constant_(parameter, math.log(4))
            elif name.endswith("ada_gss"):
                nn.init.normal_(parameter, std=1 / math.sqrt(width))
            else:
                nn.init.trunc_normal_(parameter, std=math.sqrt(1 / (3 * width)))

            if name.endswith(("attn.proj.weight", "ffn.fc2.weight")):
                parameter.div_(math.sqrt(2 * depth))
            elif name.startswith("blocks.") and name.endswith(("ada_lin.1.weight", "ada_gss")):
                gammas, others = parameter.view(6, -1).tensor_split([2])
                gammas.mul_(FIRST_GAMMA)
                others.mul_(0.5)
            elif name == "head_nm.ada_lin.1.weight":
                parameter.mul_(0.5)
            elif name == "head.weight":
                parameter.mul_(0.02)

    def forward(self, labels: Tensor, codes: Tensor, noise: Noise | None = None) -> Tensor:
        paths: list[Tensor | None] = [None] * len(self.blocks)
        if noise is not None:
            labels = torch.where(noise.uniform() < self.label_drop, self.classes, labels)
            if self.training:
                paths = self._draw_paths(noise)
        conditioning = self.condition(labels)
        x = torch.cat([conditioning.start, self.word_embed(codes)], dim=1)
        n = x.shape[1]
        positions = slice(0, n)
        x = x + self._positions(positions)
        mask = BlockCausal(self.attn_bias_for_masking, tuple(part.stop for part in self.slices)).first(n)
        for block, modulation, path in zip(self.blocks, conditioning.blocks, paths, strict=True):
            x = block(x, modulation, positions, mask=mask, path=path)
        return self._logits(x, conditioning)

    def condition(self, labels: Tensor) -> Conditioning:
        """What the network takes from `labels` int64 [B] in [0, N]."""
        classes = self.class_emb(labels)[:, None]
        shared = None if self.shared_ada_lin is None else modulation_of(self.shared_ada_lin, classes)
        return Conditioning(
            start=classes + self.pos_start,
            blocks=[block.modulation(classes, shared) for block in cast("Iterable[Block]", self.blocks)],
            head=self.head_nm(classes),
        )

    def start(self, labels: Tensor) -> Generation[Conditioning]:
        """Begin to generate for `labels` int64 [B] in [0, N]; `next_logits` then goes from scale to scale."""
        return Generation(self.condition(labels), len(labels), len(self.blocks), self.length)

    def next_logits(self, generation: Generation[Conditioning], codes: Tensor | None = None) -> Tensor:
        """Logits of the next scale, float32 [B, p_k^2, V]; nothing is dropped, in whatever mode.

        `codes` [B, p_k^2, c] is the quantiser's `next_input`, None at the first scale. Moves `generation` on;
        equals the part of `forward` that belongs to the scale, without computing coarser scales again.
        """
        x = generation.given.start if codes is None else self.word_embed(codes)
        positions = slice(generation.finished, generation.finished + x.shape[1])
        x = x + self._positions(positions)
        for block, modulation, memory in zip(self.blocks, generation.given.blocks, generation.memory, strict=True):
            x = block(x, modulation, positions, memory=memory)
        generation.finished = positions.stop
        return self._logits(x, generation.given)

    def _positions(self, part: slice) -> Tensor:
        """What is added to the input at each position, float32 [1, n, C]."""
        return self.lvl_embed(self.lvl_1L[:, part]) + self.pos_1LC[:, part]

    def _logits(self, x: Tensor, conditioning: Conditioning) -> Tensor:
        return self.head(modulated(x, *conditioning.head, self.norm_eps)).float()

    def _draw_paths(self, noise: Noise) -> list[Tensor | None]:
        """Factors of the two branches of each block, [2, B, 1, 1]: 0, or 1 over the probability to be kept."""
        rates = [rate for rate in self.drop_path_rates if rate > 0]
        if not rates:
            return [None] * len(self.blocks)
        draws = iter(noise.uniform(len(rates), 2).permute(1, 2, 0)[..., None, None])
        return [(next(draws) < 1 - rate) / (1 - rate) if rate > 0 else None for rate in self.drop_path_rates]


class Block(nn.Module):
    """Attention, then an MLP, each modulated by the class and added to x [B, n, C]."""

    also_called: ClassVar = ("modulation",)
    """methods that use weights, beside `forward`: `neon.selftrain.engine` has them gathered for these, too"""

    def __init__(
        self, width: int, heads: int, hidden: int, norm_eps: float, l2_norm_attention: bool, shared_adaln: bool
    ) -> None:
        super().__init__()
        self.norm_eps = norm_eps
        self.ada_gss = nn.Parameter(torch.empty(1, 1, 6, width)) if shared_adaln else None
        self.attn = SelfAttention(width, heads, l2_norm_attention)
        self.ffn = MLP(width, hidden)
        self.ada_lin = None if shared_adaln else modulation_layer(width, 6)

    def modulation(self, classes: Tensor, shared: Tensor | None) -> Modulation:
        """From class vectors [B, 1, C]; `shared` [B, 1, 6, C] is what all blocks have in common, if anything."""
        if self.ada_lin is not None:
            return Modulation(*modulation_of(self.ada_lin, classes).unbind(2))
        assert self.ada_gss is not None and shared is not None
        return Modulation(*(self.ada_gss + shared).unbind(2))

    def forward(
        self,
        x: Tensor,
        m: Modulation,
        positions: slice,
        *,
        mask: BlockCausal | None = None,
        memory: KVCache | None = None,
        path: Tensor | None = None,
    ) -> Tensor:
        """`mask` says who sees whom; `memory` holds the positions before x; `path` multiplies the branches."""
        gamma1, gamma2 = (m.gamma1, m.gamma2) if path is None else (m.gamma1 * path[0], m.gamma2 * path[1])
        x = x + gamma1 * self.attn(modulated(x, m.scale1, m.shift1, self.norm_eps), positions, mask, memory)
        return x + gamma2 * self.ffn(modulated(x, m.scale2, m.shift2, self.norm_eps))


class SelfAttention(nn.Module):
    """Attention between positions [B, n, C]. With `l2_norm` on the angles between queries and keys, at a learnt scale.

    Keys have a bias in name only: a buffer of zeros.
    """

    MAX_LOG_SCALE = math.log(100)

    zero_k_bias: Tensor

    def __init__(self, width: int, heads: int, l2_norm: bool) -> None:
        super().__init__()
        self.heads = heads
        # A quarter of the usual scale, as published.
        self.scale = 1.0 if l2_norm else 0.25 / math.sqrt(width // heads)
        self.scale_mul_1H11 = nn.Parameter(torch.empty(1, heads, 1, 1)) if l2_norm else None
        self.q_bias = nn.Parameter(torch.empty(width))
        self.v_bias = nn.Parameter(torch.empty(width))
        self.register_buffer("zero_k_bias", torch.zeros(width))
        self.mat_qkv = BiasedLater(width, 3 * width, bias=False)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, positions: slice, mask: BlockCausal | None, memory: KVCache | None) -> Tensor:
        bias = torch.cat([self.q_bias, self.zero_k_bias, self.v_bias])
        qkv = self.mat_qkv(x, bias).unflatten(2, (3, self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each [B, H, n, d]
        if self.scale_mul_1H11 is not None:
            length = self.scale_mul_1H11.clamp(max=self.MAX_LOG_SCALE).exp()
            q = (F.normalize(q.float(), dim=-1) * length).to(v.dtype)
            k = F.normalize(k.float(), dim=-1).to(v.dtype)
        if memory is not None:
            k, v = memory.extend(k, v, positions)
        if mask is None:
            mixed = F.scaled_dot_product_attention(q, k, v, scale=self.scale)
        else:
            mixed = mask.attend(q, k, v, scale=self.scale)
        return self.proj(mixed.transpose(1, 2).flatten(2))


class BiasedLater(nn.Linear):
    """A linear layer that is told its bias when it is called."""

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:  # type: ignore[override]
        return F.linear(x, self.weight, bias)


class MLP(nn.Module):
    """Two linear maps around a GELU (tanh approximation), on [B, n, C]."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class Head(nn.Module):
    """Scale and shift of the last normalisation, each [B, 1, C], from class vectors [B, 1, C]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.ada_lin = modulation_layer(width, 2)

    def forward(self, classes: Tensor) -> tuple[Tensor, Tensor]:
        scale, shift = modulation_of(self.ada_lin, classes).unbind(2)
        return scale, shift


def modulation_of(layer: nn.Sequential, classes: Tensor) -> Tensor:
    """Class vectors [B, 1, C] -> float32 [B, 1, count, C]."""
    return layer(classes).float().unflatten(2, (-1, classes.shape[2]))
