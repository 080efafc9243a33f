"""The networks that IMM published: how they are built, sampled, trained and recognised, and how well they do."""

import inspect
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from imm.loss import IMMLoss
from imm.networks import MODELS, SIZES, DiT, TimestepEmbedder
from imm.precond import IMMPrecond
from imm.settings import PRESETS, SIZE_FLAGS, IMMSettings
from neon.checkpoint import TensorSpec
from neon.published import Evaluation, Published, row_sampled_as

UNSEEN_IN_SAMPLING = ("augment_dim", "dropout", "label_dropout", "mixed_precision")
"""Keywords that do not change how a network should be sampled."""


@dataclass(frozen=True, kw_only=True)
class PublishedIMM(Published[IMMSettings]):
    """One published network: the base's score is of IMM's abstract, that of the merge of Neon's README."""

    loss: IMMLoss
    """what it was trained with"""


_IMAGENET = {
    "img_resolution": 32, "img_channels": 4, "label_dim": 1000, "noise_schedule": "fm", "model_type": "DiT_XL_2",
    "sigma_data": 0.5, "f_type": "euler_fm", "T": 0.994, "eps": 0.0, "time_scale": 1000.0,
}  # fmt: skip
_CIFAR10 = {
    "img_resolution": 32, "img_channels": 3, "label_dim": 0, "noise_schedule": "fm", "model_type": "SongUNet",
    "sigma_data": 0.5, "f_type": "simple_edm", "T": 0.994, "eps": 0.006, "temb_type": "identity",
    "time_scale": 1000.0, "model_channels": 128, "channel_mult": [2, 2, 2], "num_blocks": 4,
    "attn_resolutions": [16], "dropout": 0.2,
}  # fmt: skip

PUBLISHED: dict[str, PublishedIMM] = {
    row.name: row
    for row in (
        PublishedIMM(
            name="imagenet256_ts_a2",
            network={**_IMAGENET, "temb_type": "stride"},
            settings=PRESETS["8_steps_cfg1.5_pushforward_uniform"],
            loss=IMMLoss(),
            fid_base=1.99,
            fid_neon=1.46,
            neon=Evaluation(
                checkpoint="Neon_imm_imagenet256.pkl",
                statistics="adm_in256_stats.npz",
                program="imm.calculate_fid:ScoreIMM",
                flags="--network_pkl {checkpoint} --fid_stats {statistics} --num_images {count} --num_steps 8 "
                "--cfg_scale 1.8",
                calls=16,
            ),
        ),
        PublishedIMM(
            name="imagenet256_s_a1",
            network={**_IMAGENET, "temb_type": "identity"},
            settings=PRESETS["8_steps_cfg1.5_pushforward_uniform"],
            loss=IMMLoss(a=1),
        ),
        PublishedIMM(
            name="cifar10",
            network=_CIFAR10,
            settings=PRESETS["2_steps"],
            loss=IMMLoss(k=15, a=1, min_tr_gap=None),
            fid_base=1.98,
        ),
    )
}


def published_row(keywords: Mapping[str, Any]) -> PublishedIMM | None:
    """The published network that these `keywords` of IMMPrecond build; None: nothing that is known.

    Defaults may be spelled out or left out, and a DiT be named by its size or by its numbers. What changes no
    sample (`UNSEEN_IN_SAMPLING`) does not count.
    """
    return row_sampled_as(PUBLISHED, keywords, _sampled_by)


def canonical(keywords: Mapping[str, Any]) -> dict[str, Any]:
    """`keywords` of IMMPrecond as JSON that builds the same network, in one spelling: every default spelled out.

    What no constructor knows, and so ignores, is left out. With a `model_type` that is unknown: as they are.
    """
    given = {**_defaults(IMMPrecond), **keywords}
    if given["model_type"] not in MODELS:
        return dict(keywords)
    build = MODELS[given["model_type"]]
    known = _defaults(IMMPrecond).keys() | {"img_resolution", "img_channels"}
    own = {name: value for name, value in _defaults(build).items() if name not in ("in_channels", *known)}
    full = {**own, **{name: value for name, value in given.items() if name in known or name in own}}
    network = build.func if isinstance(build, partial) else build
    full["model_type"] = network.__name__
    embedding = _defaults(TimestepEmbedder) if network is DiT else {}
    full["embedding_kwargs"] = {**embedding, **(full["embedding_kwargs"] or {})}
    return {name: list(value) if isinstance(value, (list, tuple)) else value for name, value in full.items()}


def built_by(keywords: Mapping[str, Any]) -> dict[str, Any]:
    """What the flags of `imm/finetune.py` that build a network would say of that of these `keywords`."""
    network = canonical(keywords)
    sizes = {flag: network[keyword] for flag, keyword in SIZE_FLAGS[network["model_type"]].items()}
    return {"model": network["model_type"], **{name: network[name] for name in ("dropout", "f_type", "eps")}, **sizes}


def recognise(specs: Mapping[str, TensorSpec | Sequence[int]]) -> dict[str, Any] | None:
    """The keywords of IMMPrecond, as JSON, that a state dict of these shapes was built with; None: another network.

    A DiT or SongUNet of any size under `model.`, with the second time that is IMM's own. What shapes do not tell
    is as published: of a DiT the number of heads, else 64 channels each. `temb_type` of a DiT is left out, since
    the published networks differ in it.
    """
    shapes = {
        name.removeprefix("model."): spec.shape if isinstance(spec, TensorSpec) else tuple(spec)
        for name, spec in specs.items()
        if name.startswith("model.")
    }
    if {"pos_embed", "x_embedder.proj.weight", "s_embedder.mlp.0.weight", "blocks.0.attn.qkv.weight"} <= shapes.keys():
        return _recognise_transformer(shapes)
    if {"map_layer0_s.weight", "map_layer1_s.weight"} <= shapes.keys():
        return _recognise_unet(shapes)
    return None


def _recognise_transformer(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    width, channels, patch_size, _ = shapes["x_embedder.proj.weight"]
    classes = shapes["y_embedder.embedding_table.weight"][0] - 1
    qk_norm = "blocks.0.attn.q_norm.weight" in shapes
    if qk_norm:
        heads = width // shapes["blocks.0.attn.q_norm.weight"][0]
    else:
        published = {size["hidden_size"]: size["num_heads"] for size in SIZES.values()}
        heads = published.get(width, max(1, width // 64))
    return {
        "img_resolution": math.isqrt(shapes["pos_embed"][1]) * patch_size,
        "img_channels": channels,
        "label_dim": classes,
        "noise_schedule": "fm",
        "f_type": "euler_fm",
        "T": 0.994,
        "eps": 0.0,
        "model_type": "DiT",
        "patch_size": patch_size,
        "hidden_size": width,
        "depth": _count(shapes, r"blocks\.(\d+)\."),
        "num_heads": heads,
        "mlp_ratio": shapes["blocks.0.mlp.fc1.weight"][0] / width,
        "num_classes": classes,
        "qk_norm": qk_norm,
        "embedding_kwargs": {
            "frequency_embedding_size": shapes["t_embedder.mlp.0.weight"][1],
            "embedding_type": "fourier" if "t_embedder.freqs" in shapes else "positional",
        },
    }


def _recognise_unet(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    first = next(name for name in shapes if re.fullmatch(r"enc\.\d+x\d+_conv\.weight", name))
    model_channels, channels = shapes[first][:2]
    resolutions = [int(size) for size in _found(shapes, r"enc\.(\d+)x\d+_block0\.")]
    emb_channels, noise_channels = shapes["map_layer0.weight"]
    taps = next((shape[-1] for name, shape in shapes.items() if name.endswith("conv0.resample_filter")), 2)
    return {
        "img_resolution": resolutions[0],
        "img_channels": channels,
        "label_dim": shapes.get("map_label.weight", (0, 0))[1],
        "noise_schedule": "fm",
        "f_type": "simple_edm",
        "T": 0.994,
        "eps": 0.006,
        "temb_type": "identity",
        "model_type": "SongUNet",
        "augment_dim": shapes.get("map_augment.weight", (0, 0))[1],
        "model_channels": model_channels,
        "channel_mult": [shapes[f"enc.{r}x{r}_block0.conv0.weight"][0] // model_channels for r in resolutions],
        "channel_mult_emb": emb_channels // model_channels,
        "channel_mult_noise": noise_channels // model_channels,
        "num_blocks": _count(shapes, rf"enc\.{resolutions[0]}x{resolutions[0]}_block(\d+)\."),
        "attn_resolutions": [r for r in resolutions if f"enc.{r}x{r}_block0.qkv.weight" in shapes],
        "dropout": 0.2,
        "embedding_type": "fourier" if "map_noise.freqs" in shapes else "positional",
        "encoder_type": next((kind for kind in ("skip", "residual") if _found(shapes, rf"(aux_{kind})")), "standard"),
        "decoder_type": "skip" if _found(shapes, r"(aux_up)") else "standard",
        "resample_filter": [1, 3, 3, 1] if taps == 4 else [1, 1],
    }


def _found(shapes: Mapping[str, tuple[int, ...]], pattern: str) -> list[str]:
    """What the group of `pattern` matches in the names, each once, in their order."""
    matches = (re.search(pattern, name) for name in shapes)
    return list(dict.fromkeys(match[1] for match in matches if match))


def _count(shapes: Mapping[str, tuple[int, ...]], pattern: str) -> int:
    return len(_found(shapes, pattern))


def _sampled_by(keywords: Mapping[str, Any]) -> dict[str, Any]:
    """What of the keywords determines how the network should be sampled."""
    return {name: value for name, value in canonical(keywords).items() if name not in UNSEEN_IN_SAMPLING}


def _defaults(function: Callable[..., Any]) -> dict[str, Any]:
    parameters = inspect.signature(function).parameters.values()
    return {parameter.name: parameter.default for parameter in parameters if parameter.default is not parameter.empty}
