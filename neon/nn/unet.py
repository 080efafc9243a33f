"""U-Nets as EDM and IMM build them: layers, the residual block, and encoder and decoder of DDPM++ and NCSN++.

Shapes: B batch, C channels, H W pixels, E embedding width. Every layer casts its parameters to the dtype
of its input. Names of modules are those of the published checkpoints.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

INITIALISATIONS = ("xavier_uniform", "kaiming_uniform", "kaiming_normal")


def initial_values(shape: Sequence[int], mode: str, fan_in: int, fan_out: int) -> Tensor:
    """Random weights: uniform with variance 2/(fan_in+fan_out) or 1/fan_in, or normal with variance 1/fan_in."""
    if mode == "xavier_uniform":
        return math.sqrt(6 / (fan_in + fan_out)) * (torch.rand(*shape) * 2 - 1)
    if mode == "kaiming_uniform":
        return math.sqrt(3 / fan_in) * (torch.rand(*shape) * 2 - 1)
    if mode == "kaiming_normal":
        return math.sqrt(1 / fan_in) * torch.randn(*shape)
    raise ValueError(f"init_mode {mode!r} is unknown; expected one of {', '.join(INITIALISATIONS)}")


class Linear(nn.Module):
    """y = x W^T + b on [..., in_features]."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        init_mode: str = "kaiming_normal",
        init_weight: float = 1,
        init_bias: float = 0,
    ) -> None:
        super().__init__()
        self.in_features = in_features
        fans = (init_mode, in_features, out_features)
        self.weight = nn.Parameter(initial_values([out_features, in_features], *fans) * init_weight)
        self.bias = nn.Parameter(initial_values([out_features], *fans) * init_bias) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


class Conv2d(nn.Module):
    """A k x k convolution that can resample by 2 with a separable filter; kernel 0 only resamples.

    up: upsample, then convolve. down: downsample, then convolve; with `fused_resample` the order is
    convolve, then downsample. The bias is added last. `resample_filter` holds the 1-D filter taps.
    """

    resample_filter: Tensor | None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int,
        bias: bool = True,
        up: bool = False,
        down: bool = False,
        resample_filter: Sequence[float] = (1, 1),
        fused_resample: bool = False,
        init_mode: str = "kaiming_normal",
        init_weight: float = 1,
        init_bias: float = 0,
    ) -> None:
        super().__init__()
        if up and down:
            raise ValueError("a convolution resamples up or down, not both")
        self.up = up
        self.fused_resample = fused_resample
        fans = (init_mode, in_channels * kernel**2, out_channels * kernel**2)
        shape = [out_channels, in_channels, kernel, kernel]
        self.weight = nn.Parameter(initial_values(shape, *fans) * init_weight) if kernel else None
        self.bias = nn.Parameter(initial_values([out_channels], *fans) * init_bias) if kernel and bias else None
        taps = torch.as_tensor(resample_filter, dtype=torch.float32)
        kernel_2d = torch.outer(taps, taps)[None, None] / taps.sum().square()
        self.register_buffer("resample_filter", kernel_2d if up or down else None)

    def forward(self, x: Tensor) -> Tensor:
        weight = None if self.weight is None else self.weight.to(x.dtype)
        conv_pad = 0 if weight is None else weight.shape[-1] // 2
        if self.resample_filter is None:
            x = x if weight is None else F.conv2d(x, weight, padding=conv_pad)
        else:
            taps = self.resample_filter.to(x.dtype)
            filter_pad = (taps.shape[-1] - 1) // 2
            if self.up:
                fused = self.fused_resample and weight is not None
                x = upsample(x, taps, max(filter_pad - conv_pad, 0) if fused else filter_pad)
                if weight is not None:
                    x = F.conv2d(x, weight, padding=max(conv_pad - filter_pad, 0) if fused else conv_pad)
            elif self.fused_resample and weight is not None:
                x = downsample(F.conv2d(x, weight, padding=conv_pad + filter_pad), taps, 0)
            else:
                x = downsample(x, taps, filter_pad)
                if weight is not None:
                    x = F.conv2d(x, weight, padding=conv_pad)
        return x if self.bias is None else x.add_(self.bias.to(x.dtype)[:, None, None])


def silu(x: Tensor) -> Tensor:
    """SiLU of a tensor that nobody else holds: in place, unless its gradient needs what is in it."""
    return F.silu(x, inplace=not x.requires_grad)


def upsample(x: Tensor, taps: Tensor, padding: int) -> Tensor:
    """Zero-insertion by 2 followed by the filter times 4, each channel on its own."""
    channels = x.shape[1]
    return F.conv_transpose2d(x, (taps * 4).expand(channels, -1, -1, -1), groups=channels, stride=2, padding=padding)


def downsample(x: Tensor, taps: Tensor, padding: int) -> Tensor:
    """The filter at every second pixel, each channel on its own."""
    channels = x.shape[1]
    return F.conv2d(x, taps.expand(channels, -1, -1, -1), groups=channels, stride=2, padding=padding)


class GroupNorm(nn.Module):
    """Group normalisation with at least four channels a group and at most 32 groups."""

    def __init__(self, num_channels: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.num_groups = min(32, num_channels // 4)
        if self.num_groups == 0 or num_channels % self.num_groups:
            raise ValueError(
                f"{num_channels} channels cannot be normalised in {self.num_groups} groups; "
                "use a multiple of 4, and above 128 a multiple of 32"
            )
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(num_channels))
        self.bias = nn.Parameter(torch.zeros(num_channels))

    def forward(self, x: Tensor) -> Tensor:
        return F.group_norm(x, self.num_groups, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


class PositionalEmbedding(nn.Module):
    """[B] noise labels -> [B, num_channels] as [cos, sin] of geometrically spaced frequencies, in the labels' dtype."""

    def __init__(self, num_channels: int, max_positions: int = 10000, endpoint: bool = False) -> None:
        super().__init__()
        self.num_channels = num_channels
        self.max_positions = max_positions
        self.endpoint = endpoint

    def forward(self, x: Tensor) -> Tensor:
        half = self.num_channels // 2
        exponents = torch.arange(half, dtype=x.dtype, device=x.device) / (half - (1 if self.endpoint else 0))
        angles = torch.outer(x, (1 / self.max_positions) ** exponents)
        return torch.cat([angles.cos(), angles.sin()], dim=1)


class FourierEmbedding(nn.Module):
    """[B] noise labels -> [B, num_channels] as [cos, sin] of fixed random frequencies."""

    freqs: Tensor

    def __init__(self, num_channels: int, scale: float = 16) -> None:
        super().__init__()
        self.register_buffer("freqs", torch.randn(num_channels // 2) * scale)

    def forward(self, x: Tensor) -> Tensor:
        angles = torch.outer(x, (2 * math.pi * self.freqs).to(x.dtype))
        return torch.cat([angles.cos(), angles.sin()], dim=1)


class UNetBlock(nn.Module):
    """Residual block [B, in, H, W] x [B, E] -> [B, out, H', W'], with optional resampling and self-attention."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        emb_channels: int,
        up: bool = False,
        down: bool = False,
        attention: bool = False,
        num_heads: int | None = None,
        channels_per_head: int = 64,
        dropout: float = 0,
        skip_scale: float = 1,
        eps: float = 1e-5,
        resample_filter: Sequence[float] = (1, 1),
        resample_proj: bool = False,
        adaptive_scale: bool = True,
        init: dict[str, Any] | None = None,
        init_zero: dict[str, Any] | None = None,
        init_attn: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        init = init or {}
        init_zero = {"init_weight": 0} if init_zero is None else init_zero
        self.in_channels = in_channels
        if num_heads is None:
            num_heads = out_channels // channels_per_head
        self.num_heads = num_heads if attention else 0
        self.dropout = dropout
        self.skip_scale = skip_scale
        self.adaptive_scale = adaptive_scale
        resample: dict[str, Any] = {"up": up, "down": down, "resample_filter": resample_filter}

        self.norm0 = GroupNorm(in_channels, eps)
        self.conv0 = Conv2d(in_channels, out_channels, kernel=3, **resample, **init)
        self.affine = Linear(emb_channels, out_channels * (2 if adaptive_scale else 1), **init)
        self.norm1 = GroupNorm(out_channels, eps)
        self.conv1 = Conv2d(out_channels, out_channels, kernel=3, **init_zero)
        self.skip = None
        if out_channels != in_channels or up or down:
            kernel = 1 if resample_proj or out_channels != in_channels else 0
            self.skip = Conv2d(in_channels, out_channels, kernel=kernel, **resample, **init)
        if self.num_heads:
            self.norm2 = GroupNorm(out_channels, eps)
            self.qkv = Conv2d(out_channels, out_channels * 3, kernel=1, **(init if init_attn is None else init_attn))
            self.proj = Conv2d(out_channels, out_channels, kernel=1, **init_zero)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        # What convolutions and normalisations return is nobody else's: it is written over, as new memory for every
        # sum and product is a tenth of the time that a small network takes on a CPU.
        h = self.conv0(silu(self.norm0(x)))
        params = self.affine(emb)[:, :, None, None].to(x.dtype)
        if self.adaptive_scale:
            scale, shift = params.chunk(2, dim=1)
            h = silu(torch.addcmul(shift, self.norm1(h), scale + 1))
        else:
            h = silu(self.norm1(h.add_(params)))
        h = self.conv1(F.dropout(h, self.dropout, training=self.training))
        h = h.add_(x if self.skip is None else self.skip(x)).mul_(self.skip_scale)
        if self.num_heads:
            h = self.proj(self.attend(self.norm2(h))).add_(h).mul_(self.skip_scale)
        return h

    def attend(self, h: Tensor) -> Tensor:
        """Self-attention over pixels; the qkv channel index is (head * C/heads + c) * 3 + {0: q, 1: k, 2: v}."""
        b, c, height, width = h.shape
        qkv = self.qkv(h).reshape(b, self.num_heads, c // self.num_heads, 3, height * width)
        q, k, v = qkv.transpose(2, 4).unbind(3)  # each [B, heads, HW, C/heads]
        attended = F.scaled_dot_product_attention(q, k, v).transpose(2, 3).reshape(b, c, height, width)
        # One head comes out with its channels innermost, a layout that spreads through the network from here and makes
        # the norms of the demo's 20 times slower; where all is laid out so, it stays.
        return attended.contiguous() if not torch.is_grad_enabled() and h.is_contiguous() else attended


class SongUNet(nn.Module):
    """DDPM++ (both types "standard") and NCSN++ of Song et al. 2020 (arXiv 2011.13456), as EDM builds them.

    forward: x [B, in_channels, R, R], noise_labels [B] or [1] float32, class_labels [B or 1, label_dim] or None,
    augment_labels [B, augment_dim] or None -> [B, out_channels, R, R].

    `second_time` adds what `embed` needs for labels of a second time, `embedding_kwargs` change the embedding of
    both, and `embedding_dtype` is what labels are embedded in.

    Raises:
        ValueError: a type is unknown.
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
        *,
        second_time: bool = False,
        embedding_kwargs: Mapping[str, Any] | None = None,
        embedding_dtype: torch.dtype = torch.float32,
    ) -> None:
        check_choice("embedding_type", embedding_type, ("positional", "fourier"))
        check_choice("encoder_type", encoder_type, ("standard", "skip", "residual"))
        check_choice("decoder_type", decoder_type, ("standard", "skip"))
        super().__init__()
        self.label_dropout = label_dropout
        self.embedding_dtype = embedding_dtype
        emb_channels = model_channels * channel_mult_emb
        noise_channels = model_channels * channel_mult_noise
        init: dict[str, Any] = {"init_mode": "xavier_uniform"}

        def features() -> nn.Module:
            if embedding_type == "positional":
                return PositionalEmbedding(noise_channels, endpoint=True, **(embedding_kwargs or {}))
            return FourierEmbedding(noise_channels, **(embedding_kwargs or {}))

        self.map_noise = features()
        self.map_label = Linear(label_dim, noise_channels, **init) if label_dim else None
        self.map_augment = Linear(augment_dim, noise_channels, bias=False, **init) if augment_dim else None
        self.map_layer0 = Linear(noise_channels, emb_channels, **init)
        self.map_layer1 = Linear(emb_channels, emb_channels, **init)
        if second_time:
            self.map_noise_s = features()
            self.map_layer0_s = Linear(noise_channels, emb_channels, **init)
            self.map_layer1_s = Linear(emb_channels, emb_channels, **init)

        init_zero: dict[str, Any] = {**init, "init_weight": 1e-5}
        init_attn: dict[str, Any] = {**init, "init_weight": math.sqrt(0.2)}
        block: dict[str, Any] = {
            "emb_channels": emb_channels, "num_heads": 1, "dropout": dropout, "skip_scale": math.sqrt(0.5),
            "eps": 1e-6, "resample_filter": resample_filter, "resample_proj": True, "adaptive_scale": False,
            "init": init, "init_zero": init_zero, "init_attn": init_attn,
        }  # fmt: skip

        self.enc = enc = nn.ModuleDict()
        channels = aux_channels = in_channels
        skips: list[int] = []  # channels of the connections from encoder to decoder
        for level, mult in enumerate(channel_mult):
            res = f"{img_resolution >> level}x{img_resolution >> level}"
            if level == 0:
                enc[f"{res}_conv"] = Conv2d(channels, model_channels, kernel=3, **init)
                channels = model_channels
            else:
                enc[f"{res}_down"] = UNetBlock(channels, channels, down=True, **block)
                aux: dict[str, Any] = {"down": True, "resample_filter": resample_filter}
                if encoder_type == "skip":
                    enc[f"{res}_aux_down"] = Conv2d(aux_channels, aux_channels, kernel=0, **aux)
                    enc[f"{res}_aux_skip"] = Conv2d(aux_channels, channels, kernel=1, **init)
                if encoder_type == "residual":
                    residual = Conv2d(aux_channels, channels, kernel=3, fused_resample=True, **aux, **init)
                    enc[f"{res}_aux_residual"] = residual
                    aux_channels = channels
            skips.append(channels)
            attention = [img_resolution >> level in attn_resolutions] * num_blocks
            channels = add_encoder_blocks(enc, res, channels, model_channels * mult, skips, attention, block)

        self.dec = dec = nn.ModuleDict()
        deepest = len(channel_mult) - 1
        for level in range(deepest, -1, -1):
            res = f"{img_resolution >> level}x{img_resolution >> level}"
            attention = [False] * num_blocks + [img_resolution >> level in attn_resolutions]
            out = model_channels * channel_mult[level]
            channels = add_decoder_blocks(dec, res, channels, out, skips, attention, level == deepest, block)
            if decoder_type == "skip" and level < deepest:
                up: dict[str, Any] = {"up": True, "resample_filter": resample_filter}
                dec[f"{res}_aux_up"] = Conv2d(out_channels, out_channels, kernel=0, **up)
            if decoder_type == "skip" or level == 0:
                dec[f"{res}_aux_norm"] = GroupNorm(channels, eps=1e-6)
                dec[f"{res}_aux_conv"] = Conv2d(channels, out_channels, kernel=3, **init_zero)

    def embed(
        self,
        noise_labels: Tensor,
        class_labels: Tensor | None,
        augment_labels: Tensor | None,
        second_labels: Tensor | None = None,
    ) -> Tensor:
        """The conditioning vector [B or 1, E]; classes and augmentation join the first time only."""
        dtype = self.embedding_dtype
        emb = sine_first(self.map_noise(noise_labels.to(dtype)))
        if self.map_label is not None and class_labels is not None:
            labels = drop_labels(class_labels.to(dtype), self.label_dropout if self.training else 0)
            emb = emb + self.map_label(labels * math.sqrt(self.map_label.in_features))
        if self.map_augment is not None and augment_labels is not None:
            emb = emb + self.map_augment(augment_labels.to(dtype))
        emb = self.map_layer1(F.silu(self.map_layer0(emb)))
        if second_labels is not None:
            second = sine_first(self.map_noise_s(second_labels.to(dtype)))
            emb = emb + self.map_layer1_s(F.silu(self.map_layer0_s(second)))
        return F.silu(emb)

    def forward(
        self, x: Tensor, noise_labels: Tensor, class_labels: Tensor | None, augment_labels: Tensor | None = None
    ) -> Tensor:
        return self.run(x, self.embed(noise_labels, class_labels, augment_labels))

    def run(self, x: Tensor, emb: Tensor) -> Tensor:
        """x [B, in_channels, R, R] through encoder and decoder, steered by emb [B or 1, E]."""
        skips: list[Tensor] = []
        aux = x
        for name, entry in self.enc.items():
            if "aux_down" in name:
                aux = entry(aux)
            elif "aux_skip" in name:
                x = skips[-1] = x + entry(aux)
            elif "aux_residual" in name:
                x = skips[-1] = aux = (x + entry(aux)) / math.sqrt(2)
            else:
                x = entry(x, emb) if isinstance(entry, UNetBlock) else entry(x)
                skips.append(x)

        out: Tensor | None = None
        normed = x
        for name, entry in self.dec.items():
            if "aux_up" in name:
                out = entry(out)
            elif "aux_norm" in name:
                normed = entry(x)
            elif "aux_conv" in name:
                here = entry(silu(normed))
                out = here if out is None else here + out
            else:
                x = entry(join_skip(x, skips, entry), emb)
        assert out is not None
        return out


def add_encoder_blocks(
    enc: nn.ModuleDict,
    res: str,
    channels: int,
    out: int,
    skips: list[int],
    attention: Sequence[bool],
    block: dict[str, Any],
) -> int:
    """Append the blocks of one resolution on the way down, one per entry of `attention`; returns their channels."""
    for i, attend in enumerate(attention):
        enc[f"{res}_block{i}"] = UNetBlock(channels, out, attention=attend, **block)
        channels = out
        skips.append(channels)
    return channels


def add_decoder_blocks(
    dec: nn.ModuleDict,
    res: str,
    channels: int,
    out: int,
    skips: list[int],
    attention: Sequence[bool],
    deepest: bool,
    block: dict[str, Any],
) -> int:
    """Append the blocks of one resolution on the way up, each taking a connection from `skips`; their channels."""
    if deepest:
        dec[f"{res}_in0"] = UNetBlock(channels, channels, attention=True, **block)
        dec[f"{res}_in1"] = UNetBlock(channels, channels, **block)
    else:
        dec[f"{res}_up"] = UNetBlock(channels, channels, up=True, **block)
    for i, attend in enumerate(attention):
        dec[f"{res}_block{i}"] = UNetBlock(channels + skips.pop(), out, attention=attend, **block)
        channels = out
    return channels


def join_skip(x: Tensor, skips: list[Tensor], entry: nn.Module) -> Tensor:
    """x, with the last skip connection beside it if `entry` expects more channels than x has."""
    return x if x.shape[1] == entry.in_channels else torch.cat([x, skips.pop()], dim=1)


def drop_labels(labels: Tensor, probability: float) -> Tensor:
    """Zero each row of `labels` [B, L] with `probability`: what trains the unconditional branch for guidance."""
    if probability <= 0:
        return labels
    return labels * (torch.rand(labels.shape[0], 1, device=labels.device) >= probability).to(labels.dtype)


def sine_first(features: Tensor) -> Tensor:
    """[cos, sin] of an embedding as [sin, cos], the order that DDPM++ and NCSN++ are trained with."""
    return torch.cat(features.chunk(2, dim=1)[::-1], dim=1)


def check_choice(keyword: str, value: str, known: Sequence[str]) -> None:
    """Raise a ValueError unless `value` is among the `known` ones."""
    if value not in known:
        raise ValueError(f"{keyword} {value!r} is unknown; expected one of {', '.join(known)}")
