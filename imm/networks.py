"""The networks of IMM: a transformer (DiT) and a U-Net (SongUNet), each told of two times, from t down to s.

Names of classes, constructor keywords and parameters are those of the published checkpoints. Shapes: B images of
C channels and R x R positions; n tokens; D width of the transformer, E of the U-Net's embedding; K classes.
Times [B] or [1] and class rows [B, K] or [1, K] of one row hold for all images.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from neon.nn.unet import (
    SONG_INIT,
    FourierEmbedding,
    Linear,
    PositionalEmbedding,
    check_choice,
    drop_labels,
    run_song_layers,
    sine_first,
    song_layers,
)

EMBEDDING_TYPES = ("positional", "fourier")


class DiT(nn.Module):
    """The transformer of Peebles & Xie 2022 (arXiv 2212.09748) with a second time; unknown keywords are ignored.

    forward: x [B, in_channels, R, R], t_labels [B or 1] float32, s_labels alike or None (no second time),
    class_labels one-hot [B or 1, num_classes], a row of zeros or None standing for no class
    -> [B, in_channels, R, R]. `augment_labels` are ignored.

    Raises:
        ValueError: sizes that do not divide, or options that no published network uses and that are not built.
    """

    def __init__(
        self,
        img_resolution: int,
        patch_size: int = 2,
        in_channels: int = 4,
        hidden_size: int = 1152,
        depth: int = 28,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        class_dropout_prob: float = 0,
        num_classes: int = 1000,
        s_embed: bool = True,
        qk_norm: bool = False,
        embedding_kwargs: Mapping[str, Any] | None = None,
        dropout: float = 0,
        temb_mult: int = 1,
        **ignored: Any,
    ) -> None:
        if img_resolution % patch_size:
            raise ValueError(f"img_resolution is {img_resolution} and patch_size {patch_size}; expected whole patches")
        if hidden_size % num_heads or hidden_size % 4:
            raise ValueError(
                f"hidden_size is {hidden_size} and num_heads {num_heads}; expected a multiple of 4 and of num_heads"
            )
        if temb_mult != 1:
            raise ValueError(f"temb_mult is {temb_mult}; expected 1: no network with another one is known")
        super().__init__()
        self.patch_size = patch_size
        side = img_resolution // patch_size
        embedding: dict[str, Any] = dict(embedding_kwargs or {})

        self.pos_embed = nn.Parameter(grid_positions(side, hidden_size), requires_grad=False)
        self.s_embedder = TimestepEmbedder(hidden_size, **embedding) if s_embed else None
        self.x_embedder = PatchEmbedder(in_channels, patch_size, hidden_size)
        self.t_embedder = TimestepEmbedder(hidden_size, **embedding)
        self.y_embedder = LabelEmbedder(num_classes, hidden_size, class_dropout_prob)
        self.blocks = nn.ModuleList(DiTBlock(hidden_size, num_heads, mlp_ratio, qk_norm, dropout) for _ in range(depth))
        self.final_layer = FinalLayer(hidden_size, patch_size**2 * in_channels)
        self.initialise()

    @torch.no_grad()
    def initialise(self) -> None:
        """Values to train from scratch with: the residual branches and the output start at zero."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.flatten(1))
        assert self.x_embedder.proj.bias is not None
        nn.init.zeros_(self.x_embedder.proj.bias)
        nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)
        for embedder in (self.t_embedder, self.s_embedder):
            for layer in embedder.mlp if embedder is not None else ():
                if isinstance(layer, nn.Linear):
                    nn.init.normal_(layer.weight, std=0.02)
        for module in (*self.blocks, self.final_layer):
            nn.init.zeros_(module.adaLN_modulation[1].weight)
        nn.init.zeros_(self.final_layer.linear.weight)

    def forward(
        self,
        x: Tensor,
        t_labels: Tensor,
        s_labels: Tensor | None = None,
        class_labels: Tensor | None = None,
        augment_labels: Tensor | None = None,
    ) -> Tensor:
        condition = self.t_embedder(t_labels)
        if self.s_embedder is not None and s_labels is not None:
            condition = condition + self.s_embedder(s_labels)
        condition = condition + self.y_embedder(class_labels)
        tokens = self.x_embedder(x) + self.pos_embed
        for block in self.blocks:
            tokens = block(tokens, condition)
        return self.from_patches(self.final_layer(tokens, condition))

    def from_patches(self, tokens: Tensor) -> Tensor:
        """[B, n, p p C] -> [B, C, R, R]: tokens row by row, in each its rows, columns and channels."""
        side, p = math.isqrt(tokens.shape[1]), self.patch_size
        patches = tokens.unflatten(2, (p, p, -1)).unflatten(1, (side, side))  # [B, row, column, row, column, C]
        return patches.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)


class DiTBlock(nn.Module):
    """Attention, then an MLP, added to x [B, n, D], each shifted, scaled and gated by the condition [B or 1, D]."""

    def __init__(self, width: int, heads: int, mlp_ratio: float, qk_norm: bool, dropout: float) -> None:
        super().__init__()
        self.attn = Attention(width, heads, qk_norm)
        self.mlp = MLP(width, int(width * mlp_ratio), dropout)
        self.adaLN_modulation = modulation(width, 6)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(condition)[:, None].chunk(6, dim=-1)
        x = x + gate1 * self.attn(modulated(x, shift1, scale1))
        return x + gate2 * self.mlp(modulated(x, shift2, scale2))


class FinalLayer(nn.Module):
    """Tokens [B, n, D], modulated by the condition [B or 1, D], -> [B, n, features]."""

    def __init__(self, width: int, features: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, features)
        self.adaLN_modulation = modulation(width, 2)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(condition)[:, None].chunk(2, dim=-1)
        return self.linear(modulated(x, shift, scale))


class Attention(nn.Module):
    """Self-attention of tokens [B, n, D], with normalised queries and keys if `qk_norm`."""

    def __init__(self, width: int, heads: int, qk_norm: bool) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.q_norm = nn.LayerNorm(width // heads) if qk_norm else None
        self.k_norm = nn.LayerNorm(width // heads) if qk_norm else None
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype)  # autocast normalises in float32
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """Two linear maps around a GELU (tanh approximation), each followed by dropout, on [B, n, D]."""

    def __init__(self, width: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.dropout = dropout
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        x = F.dropout(F.gelu(self.fc1(x), approximate="tanh"), self.dropout, self.training)
        return F.dropout(self.fc2(x), self.dropout, self.training)


class PatchEmbedder(nn.Module):
    """x [B, C, R, R] -> one token per patch, row by row: [B, n, D]."""

    def __init__(self, channels: int, patch_size: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, width, patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class TimestepEmbedder(nn.Module):
    """Time labels [B] -> [B, D]: cosines, then sines, in float64, through two linear maps in the labels' dtype.

    Frequencies fall geometrically from 1 to 1 / 10000 ("positional") or are `scale` times normal, in turns ("fourier").
    """

    freqs: Tensor | None

    def __init__(
        self,
        width: int,
        frequency_embedding_size: int = 256,
        embedding_type: str = "positional",
        use_mlp: bool = True,
        scale: float = 1.0,
    ) -> None:
        check_choice("embedding_type", embedding_type, EMBEDDING_TYPES)
        if not use_mlp:
            raise ValueError("use_mlp is False; expected True: no network without the linear maps is known")
        super().__init__()
        self.size = frequency_embedding_size
        fourier = embedding_type == "fourier"
        self.register_buffer("freqs", torch.randn(self.size // 2) * scale if fourier else None)
        self.mlp = nn.Sequential(nn.Linear(self.size, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, labels: Tensor) -> Tensor:
        angles = torch.outer(labels.double(), self.frequencies(labels.device))
        features = torch.cat([angles.cos(), angles.sin()], dim=1)
        return self.mlp(F.pad(features, (0, self.size % 2)).to(labels.dtype))

    def frequencies(self, device: torch.device) -> Tensor:
        """Of one unit of a label, in radians: float64 [size // 2]."""
        if self.freqs is not None:
            return 2 * math.pi * self.freqs.double()
        half = self.size // 2
        return torch.exp(-math.log(10000) / half * torch.arange(half, dtype=torch.float64, device=device))


class LabelEmbedder(nn.Module):
    """Rows of a table by class: one-hot [B, K], a row of zeros or None standing for no class, -> [B or 1, D].

    In train mode a label is replaced with `dropout` by one of its own, as nobody trains.
    """

    def __init__(self, num_classes: int, width: int, dropout: float) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.dropout = dropout
        self.embedding_table = nn.Embedding(num_classes + (2 if dropout > 0 else 1), width)

    def forward(self, one_hot: Tensor | None) -> Tensor:
        table = self.embedding_table.weight
        if one_hot is None:
            return table[self.num_classes, None]
        none = 1 - one_hot.sum(dim=1, keepdim=True)
        index = torch.cat([one_hot, none], dim=1).argmax(dim=1)
        if self.dropout > 0 and self.training:
            dropped = torch.rand(index.shape, device=index.device) < self.dropout
            index = index.masked_fill(dropped, self.num_classes + 1)
        return self.embedding_table(index)


def modulation(width: int, count: int) -> nn.Sequential:
    """From a condition to `count` vectors of its width."""
    return nn.Sequential(nn.SiLU(), nn.Linear(width, count * width))


def modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x [B, n, D], each token normalised, times 1 + scale plus shift, both [B or 1, 1, D]."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift


def grid_positions(side: int, width: int) -> Tensor:
    """Where each of side x side tokens lies, float32 [1, side^2, width]: first its column, then its row.

    Each as sines, then cosines, at width / 4 frequencies from 1 down towards 1 / 10000.
    """
    count = width // 4
    frequencies = 10000.0 ** (-torch.arange(count, dtype=torch.float64) / count)
    angles = torch.outer(torch.arange(side, dtype=torch.float64), frequencies)
    along = torch.cat([angles.sin(), angles.cos()], dim=1)
    columns, rows = along.repeat(side, 1), along.repeat_interleave(side, dim=0)
    return torch.cat([columns, rows], dim=1)[None].to(torch.float32)


class SongUNet(nn.Module):
    """DDPM++ and NCSN++ of Song et al. 2020 (arXiv 2011.13456) with a second time; unknown keywords are ignored.

    The embedding of positional times is float64 throughout: float32 would change the output by up to 5e-6.

    forward: x [B, in_channels, R, R], t_labels [B or 1] float32, s_labels alike or None (no second time),
    class_labels [B or 1, label_dim] or None, augment_labels [B, augment_dim] or None -> [B, out_channels, R, R].
    """

    def __init__(
        self,
        img_resolution: int,
        in_channels: int,
        out_channels: int,
        label_dim: int = 0,
        augment_dim: int = 0,
        model_channels: int = 128,
        channel_mult: Sequence[int] = (1, 2, 2, 2),
        channel_mult_emb: int = 4,
        num_blocks: int = 4,
        attn_resolutions: Sequence[int] = (16,),
        dropout: float = 0.10,
        label_dropout: float = 0,
        embedding_type: str = "positional",
        channel_mult_noise: int = 1,
        encoder_type: str = "standard",
        decoder_type: str = "standard",
        resample_filter: Sequence[float] = (1, 1),
        s_embed: bool = True,
        embedding_kwargs: Mapping[str, Any] | None = None,
        **ignored: Any,
    ) -> None:
        check_choice("embedding_type", embedding_type, EMBEDDING_TYPES)
        super().__init__()
        self.label_dropout = label_dropout
        self.s_embed = s_embed
        emb_channels = model_channels * channel_mult_emb
        noise_channels = model_channels * channel_mult_noise
        positional = embedding_type == "positional"
        self.embedding_dtype = torch.float64 if positional else torch.float32

        def features() -> nn.Module:
            if positional:
                return PositionalEmbedding(noise_channels, endpoint=True, **(embedding_kwargs or {}))
            return FourierEmbedding(noise_channels, **{"scale": 0.02, **(embedding_kwargs or {})})

        self.map_noise = features()
        self.map_label = Linear(label_dim, noise_channels, **SONG_INIT) if label_dim else None
        self.map_augment = Linear(augment_dim, noise_channels, bias=False, **SONG_INIT) if augment_dim else None
        self.map_layer0 = Linear(noise_channels, emb_channels, **SONG_INIT)
        self.map_layer1 = Linear(emb_channels, emb_channels, **SONG_INIT)
        if s_embed:
            self.map_noise_s = features()
            self.map_layer0_s = Linear(noise_channels, emb_channels, **SONG_INIT)
            self.map_layer1_s = Linear(emb_channels, emb_channels, **SONG_INIT)
        self.enc, self.dec = song_layers(
            img_resolution, in_channels, out_channels, emb_channels, model_channels, channel_mult, num_blocks,
            attn_resolutions, dropout, encoder_type, decoder_type, resample_filter,
        )  # fmt: skip

    def embed(
        self, t_labels: Tensor, s_labels: Tensor | None, class_labels: Tensor | None, augment_labels: Tensor | None
    ) -> Tensor:
        """The conditioning vector [B or 1, E]; classes and augmentation join the first time only."""
        dtype = self.embedding_dtype
        emb = sine_first(self.map_noise(t_labels.to(dtype)))
        if self.map_label is not None and class_labels is not None:
            labels = drop_labels(class_labels.to(dtype), self.label_dropout if self.training else 0)
            emb = emb + self.map_label(labels * math.sqrt(self.map_label.in_features))
        if self.map_augment is not None and augment_labels is not None:
            emb = emb + self.map_augment(augment_labels.to(dtype))
        emb = self.map_layer1(F.silu(self.map_layer0(emb)))
        if self.s_embed and s_labels is not None:
            second = sine_first(self.map_noise_s(s_labels.to(dtype)))
            emb = emb + self.map_layer1_s(F.silu(self.map_layer0_s(second)))
        return F.silu(emb)

    def forward(
        self,
        x: Tensor,
        t_labels: Tensor,
        s_labels: Tensor | None = None,
        class_labels: Tensor | None = None,
        augment_labels: Tensor | None = None,
    ) -> Tensor:
        return run_song_layers(self.enc, self.dec, x, self.embed(t_labels, s_labels, class_labels, augment_labels))


SIZES: dict[str, dict[str, Any]] = {
    "XL": {"hidden_size": 1152, "depth": 28, "num_heads": 16},
    "L": {"hidden_size": 1024, "depth": 24, "num_heads": 16},
    "B": {"hidden_size": 768, "depth": 12, "num_heads": 12},
    "S": {"hidden_size": 384, "depth": 12, "num_heads": 6},
}
"""Keywords of DiT by size."""

MODELS: dict[str, Callable[..., nn.Module]] = {
    "DiT": DiT,
    **{
        f"DiT_{size}_{patch_size}": partial(DiT, patch_size=patch_size, **keywords)
        for size, keywords in SIZES.items()
        for patch_size in (2, 4, 8)
    },
    "SongUNet": SongUNet,
}
"""Constructors by the name that `model_type` and published checkpoints know them by."""
