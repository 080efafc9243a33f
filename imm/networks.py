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

from neon.nn import unet
from neon.nn.transformer import modulated, modulation_layer
from neon.nn.unet import check_choice

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
        from timm.layers import PatchEmbed  # see DiTBlock

        super().__init__()
        self.patch_size = patch_size
        side = img_resolution // patch_size
        embedding: dict[str, Any] = dict(embedding_kwargs or {})

        self.pos_embed = nn.Parameter(grid_positions(side, hidden_size), requires_grad=False)
        self.s_embedder = TimestepEmbedder(hidden_size, **embedding) if s_embed else None
        self.x_embedder = PatchEmbed(img_resolution, patch_size, in_channels, hidden_size)
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
        from timm.layers import Mlp  # 1.4 s: only those who build a DiT pay for it
        from timm.models.vision_transformer import Attention

        # Under autocast queries and keys are normalised in float32 and rounded for the product.
        self.attn = Attention(width, heads, qkv_bias=True, qk_norm=qk_norm, norm_layer=nn.LayerNorm)
        gelu: Any = partial(nn.GELU, approximate="tanh")
        self.mlp = Mlp(width, int(width * mlp_ratio), act_layer=gelu, drop=dropout)
        self.adaLN_modulation = modulation_layer(width, 6)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(condition)[:, None].chunk(6, dim=-1)
        x = x + gate1 * self.attn(modulated(x, scale1, shift1))
        return x + gate2 * self.mlp(modulated(x, scale2, shift2))


class FinalLayer(nn.Module):
    """Tokens [B, n, D], modulated by the condition [B or 1, D], -> [B, n, features]."""

    def __init__(self, width: int, features: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, features)
        self.adaLN_modulation = modulation_layer(width, 2)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(condition)[:, None].chunk(2, dim=-1)
        return self.linear(modulated(x, scale, shift))


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


class SongUNet(unet.SongUNet):
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
        positional = embedding_type == "positional"
        super().__init__(
            img_resolution, in_channels, out_channels, label_dim, augment_dim, model_channels, channel_mult,
            channel_mult_emb, num_blocks, attn_resolutions, dropout, label_dropout, embedding_type,
            channel_mult_noise, encoder_type, decoder_type, resample_filter,
            second_time=s_embed,
            embedding_kwargs={**({} if positional else {"scale": 0.02}), **(embedding_kwargs or {})},
            embedding_dtype=torch.float64 if positional else torch.float32,
        )  # fmt: skip
        self.s_embed = s_embed

    def forward(  # type: ignore[override]  # two times
        self,
        x: Tensor,
        t_labels: Tensor,
        s_labels: Tensor | None = None,
        class_labels: Tensor | None = None,
        augment_labels: Tensor | None = None,
    ) -> Tensor:
        second = s_labels if self.s_embed else None
        return self.run(x, self.embed(t_labels, class_labels, augment_labels, second))


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
