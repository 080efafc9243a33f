"""The transformer of xAR: from noisy cells of a latent, each with its time, to the velocity of their flow.

Attribute names are those of the published weights. Symbols: B images; a latent of G x G positions and c channels
is cut into m = s^2 square cells of P positions; n positions are given or asked for; C width; H heads of D channels;
N classes, class N standing for none. Time runs from 0 (data) to 1 (noise) and reaches the network in thousandths.

Positions are counted cell by cell, row by row within a cell, everywhere: learnt positions, rotations, mask.
It runs under autocast: matrix products in the lower precision; the residual stream, normalisations and rotations
in float32.
"""

import math
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import chain
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from neon.nn.transformer import BlockCausal, Generation, KVCache, modulation_layer
from xAR.settings import SIZES

CLEAN = 0
"""the time index of cells without noise"""
TIME_FEATURES = 256
"""what a time is spread over before the network sees it"""


class XAR(nn.Module):
    """Velocity of every cell, each position seeing its own cell and all earlier ones.

    The blocks are two stacks in a row, `encoder` and `decoder`. Dropout acts in train mode, drawn from torch's
    global generator. Defaults but for size are those of the published training.

    forward: cells float32 [B, m, P, c] (as many of the first as there are, see `to_cells`); times int64 [B, m] in
    thousandths; labels int64 [B] in [0, N] -> float32 [B, m, P, c].

    Raises:
        ValueError: sizes that do not divide.
    """

    mask: Tensor

    def __init__(
        self,
        classes: int = 1000,
        width: int = 768,
        encoder_depth: int = 8,
        decoder_depth: int = 8,
        heads: int = 12,
        latent_channels: int = 16,
        grid: int = 16,
        cells_per_side: int = 2,
        label_drop: float = 0.1,
        attn_dropout: float = 0.1,
        proj_dropout: float = 0.1,
    ) -> None:
        if width % (4 * heads):
            raise ValueError(f"width is {width} and heads {heads}; expected heads of a multiple of 4 channels")
        if cells_per_side < 2 or grid % cells_per_side:
            raise ValueError(
                f"grid is {grid} and cells_per_side {cells_per_side}; expected 2 or more cells of equal size per side"
            )
        super().__init__()
        self.classes = classes
        self.latent_channels = latent_channels
        self.grid = grid
        self.cells_per_side = cells_per_side
        self.label_drop = label_drop
        self.num_cells = cells_per_side**2
        self.length = grid**2
        self.cell_length = self.length // self.num_cells

        self.encoder_pos_embed_learned = nn.Parameter(torch.empty(1, self.length, width))
        self.decoder_pos_embed_learned = nn.Parameter(torch.empty(1, self.length, width))
        cell = torch.arange(self.num_cells).repeat_interleave(self.cell_length)
        seen = cell[:, None] >= cell
        mask = torch.zeros(seen.shape, dtype=torch.float32).masked_fill(~seen, -math.inf)
        self.register_buffer("mask", mask[None, None])

        def stack(depth: int) -> nn.ModuleList:
            raster = raster_of_positions(grid, cells_per_side)
            return nn.ModuleList(
                CellBlock(width, heads, rows=raster // grid, columns=raster % grid) for _ in range(depth)
            )

        self.class_emb = nn.Embedding(classes + 1, width)
        self.time_embed = TimeEmbedding(width)
        self.z_proj = nn.Linear(latent_channels, width)
        self.z_proj_ln = rms_norm(width)
        self.encoder_blocks = stack(encoder_depth)
        self.encoder_norm = rms_norm(width)
        self.decoder_embed = nn.Linear(width, width)
        self.decoder_blocks = stack(decoder_depth)
        self.decoder_norm = rms_norm(width)
        self.pred = nn.Linear(width, latent_channels)
        self.set_dropout(attn_dropout, proj_dropout)
        self.initialise()

    def set_dropout(self, attention: float, projection: float) -> None:
        """Shares dropped in train mode: of attention weights; of the outputs of both branches and the MLP's product."""
        for block in self.blocks():
            block.attn.weight_dropout = attention
            block.attn.dropout = block.mlp.dropout = projection

    @torch.no_grad()
    def initialise(self) -> None:
        """Values to train from scratch with: as published, where no layer starts at zero."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for table in (self.class_emb.weight, self.encoder_pos_embed_learned, self.decoder_pos_embed_learned):
            nn.init.normal_(table, std=0.02)

    def forward(self, cells: Tensor, times: Tensor, labels: Tensor) -> Tensor:
        n = cells.shape[1] * self.cell_length
        mask = BlockCausal(self.mask, tuple(range(self.cell_length, self.length + 1, self.cell_length))).first(n)
        return self._velocity(cells, self.condition(labels, times), slice(0, n), mask=mask)

    def condition(self, labels: Tensor, times: Tensor) -> Tensor:
        """What steers the blocks, [B, m, C], from `labels` int64 [B] and `times` int64 [B, m]."""
        return self.class_emb(labels)[:, None] + self.time_embed(times)

    def start(self, labels: Tensor) -> Generation[Tensor]:
        """Begin to generate for `labels` int64 [B] in [0, N]: `velocity` of a cell, then `remember`, and the next."""
        return Generation(labels, len(labels), len([*self.blocks()]), self.length)

    def velocity(self, generation: Generation[Tensor], cell: Tensor, time: int) -> Tensor:
        """Velocity of the next cell, float32 [b, P, c], at `time` in thousandths, given the finished ones.

        `cell` float32 [b, P, c] may be that of the first b images only. Equals the last cell of `forward` with the
        finished ones at time 0, without computing these again.
        """
        times = torch.full((len(cell), 1), time, device=cell.device)
        condition = self.condition(generation.given[: len(cell)], times)
        positions = slice(generation.finished, generation.finished + self.cell_length)
        return self._velocity(cell[:, None], condition, positions, memory=generation.memory)[:, 0]

    def remember(self, generation: Generation[Tensor], cell: Tensor) -> None:
        """Count `cell` float32 [B, P, c] of all images, now clean, among the finished ones.

        (The published sampler does this in one call with the first velocity of the next cell: the same numbers.)
        """
        self.velocity(generation, cell, CLEAN)
        generation.finished += self.cell_length

    def _velocity(
        self,
        cells: Tensor,
        condition: Tensor,
        positions: slice,
        mask: BlockCausal | None = None,
        memory: Iterable[KVCache] = (),
    ) -> Tensor:
        """Of `cells` [B, m, P, c] at `positions`, with `mask` or else with `memory` of all blocks."""
        kept = iter(memory)

        def run(blocks: nn.ModuleList, x: Tensor) -> Tensor:
            for block in blocks:
                x = block(x, condition, positions, mask=mask, memory=next(kept, None))
            return x

        def learnt(table: Tensor) -> Tensor:
            return table[:, positions].unflatten(1, (-1, self.cell_length))

        x = self.z_proj_ln(self.z_proj(cells) + learnt(self.encoder_pos_embed_learned))
        x = self.encoder_norm(run(self.encoder_blocks, x))
        x = self.decoder_embed(x) + learnt(self.decoder_pos_embed_learned)
        x = self.decoder_norm(run(self.decoder_blocks, x))
        return self.pred(x).float()

    def blocks(self) -> Iterator["CellBlock"]:
        """All blocks, in the order of computation."""
        return cast("Iterator[CellBlock]", chain(self.encoder_blocks, self.decoder_blocks))


xar_base, xar_large, xar_huge = (partial(XAR, **keywords) for keywords in SIZES.values())
"""the published networks, of 172,638,224, 608,397,968 and 1,186,024,096 parameters; they take keywords of XAR"""


class CellBlock(nn.Module):
    """Attention, then an MLP, added to x [B, m, P, C], each scaled, shifted and gated by its cell's condition."""

    def __init__(self, width: int, heads: int, rows: Tensor, columns: Tensor) -> None:
        super().__init__()
        self.attn = RotarySelfAttention(width, heads, rows, columns)
        self.mlp = GatedMLP(width)
        self.ada_lin = modulation_layer(width, 6)
        self.norm = rms_norm(width, weighted=False)

    def forward(
        self,
        x: Tensor,
        condition: Tensor,
        positions: slice,
        *,
        mask: BlockCausal | None = None,
        memory: KVCache | None = None,
    ) -> Tensor:
        """`mask` says who sees whom; `memory` holds the positions before x; `condition` is [B, m, C]."""
        gate1, gate2, scale1, scale2, shift1, shift2 = self.ada_lin(condition)[:, :, None].chunk(6, dim=-1)
        x = x + gate1 * self.attn(self.norm(x) * (1 + scale1) + shift1, positions, mask, memory)
        return x + gate2 * self.mlp(self.norm(x) * (1 + scale2) + shift2)


class RotarySelfAttention(nn.Module):
    """Attention between positions [B, m, P, C], whose queries and keys are rotated by where they are."""

    def __init__(self, width: int, heads: int, rows: Tensor, columns: Tensor) -> None:
        super().__init__()
        self.heads = heads
        self.weight_dropout = self.dropout = 0.0
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.rope = Rotation(width // heads, rows, columns)

    def forward(self, x: Tensor, positions: slice, mask: BlockCausal | None, memory: KVCache | None) -> Tensor:
        qkv = self.qkv(x.flatten(1, 2)).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        q, k = (self.rope(each, positions).to(v.dtype) for each in (q, k))
        if memory is not None:
            k, v = memory.extend(k, v, positions)
        dropout = self.weight_dropout if self.training else 0.0
        if mask is None:
            mixed = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)
        else:
            mixed = mask.attend(q, k, v, dropout=dropout)
        mixed = self.proj(mixed.transpose(1, 2).flatten(2))
        return F.dropout(mixed, self.dropout, self.training).view_as(x)


class Rotation(nn.Module):
    """Rotary positions on a grid: pairs of neighbouring channels turn by angles that grow with row or column.

    The first half of the channels turns with the row, the second with the column, the j-th pair of a half by
    10000^(-2j / (D/2)) per step. `rows` and `columns` int64 [G^2] say where each position lies.
    """

    freqs: Tensor
    freqs_cos: Tensor
    freqs_sin: Tensor

    def __init__(self, head_channels: int, rows: Tensor, columns: Tensor) -> None:
        super().__init__()
        half = head_channels // 2
        freqs = 1 / 10000 ** (torch.arange(0, half, 2, dtype=torch.float32) / half)
        angles = torch.cat([rows[:, None] * freqs, columns[:, None] * freqs], dim=1).repeat_interleave(2, dim=1)
        self.register_buffer("freqs", freqs)
        self.register_buffer("freqs_cos", angles.cos())
        self.register_buffer("freqs_sin", angles.sin())

    def forward(self, x: Tensor, positions: slice) -> Tensor:
        """x [B, H, n, D] at `positions` -> the same, in float32."""
        first, second = x.unflatten(-1, (-1, 2)).unbind(-1)
        quarter_turned = torch.stack([-second, first], dim=-1).flatten(-2)
        return x * self.freqs_cos[positions] + quarter_turned * self.freqs_sin[positions]


class GatedMLP(nn.Module):
    """A product of two linear maps, one through an exact GELU, and a third back to the width, on [..., C]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.dropout = 0.0
        hidden = 8 * width // 3
        self.fc1_g = nn.Linear(width, hidden)
        self.fc1_x = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        product = F.dropout(F.gelu(self.fc1_g(x)) * self.fc1_x(x), self.dropout, self.training)
        return F.dropout(self.fc2(product), self.dropout, self.training)


class TimeEmbedding(nn.Module):
    """Times int64 [...] in thousandths -> [..., C]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(TIME_FEATURES, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, times: Tensor) -> Tensor:
        return self.mlp(sinusoids(times))


def sinusoids(times: Tensor) -> Tensor:
    """Cosines, then sines, of `times` int64 [...] at frequencies from 1 down to 1/10000: float32 [..., 256]."""
    count = TIME_FEATURES // 2
    steps = torch.arange(count, dtype=torch.float32, device=times.device)
    angles = times[..., None].float() * torch.exp(-math.log(10000) * steps / count)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def time_index(times: Tensor) -> Tensor:
    """Times in [0, 1] -> int64 thousandths as the network was trained with: cut off, in float32."""
    return (times.float() * 1000).long()


def rms_norm(width: int, weighted: bool = True) -> nn.RMSNorm:
    """The normalisation of xAR, to a mean square of 1 over C."""
    return nn.RMSNorm(width, eps=1e-6, elementwise_affine=weighted)


def to_cells(latents: Tensor, cells_per_side: int) -> Tensor:
    """Latents [B, c, G, G] -> cells [B, m, P, c], both cells and their positions row by row."""
    parts = latents.unflatten(3, (cells_per_side, -1)).unflatten(2, (cells_per_side, -1))
    return parts.permute(0, 2, 4, 3, 5, 1).flatten(3, 4).flatten(1, 2)


def from_cells(cells: Tensor) -> Tensor:
    """The inverse of `to_cells`."""
    _, m, size, _ = cells.shape
    s, p = math.isqrt(m), math.isqrt(size)
    return cells.unflatten(2, (p, p)).unflatten(1, (s, s)).permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)


def raster_of_positions(grid: int, cells_per_side: int) -> Tensor:
    """Where each position lies when the whole latent is read row by row: int64 [G^2]."""
    return to_cells(torch.arange(grid**2).view(1, 1, grid, grid), cells_per_side).flatten()
