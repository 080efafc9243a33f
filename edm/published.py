"""The nine networks that EDM published: how they are built, how they are sampled, and how well they do."""

import inspect
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from edm.precond import NETWORKS, PRECONDS
from edm.settings import EDMSettings, SamplerSettings
from neon.data.augment import AUGMENT_DIM
from neon.errors import warn
from neon.model import GenerativeModel
from neon.published import Evaluation, Published, row_sampled_as

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "ddpmpp": {
        "model_type": "SongUNet", "embedding_type": "positional", "encoder_type": "standard",
        "decoder_type": "standard", "channel_mult_noise": 1, "resample_filter": [1, 1],
        "model_channels": 128, "channel_mult": [2, 2, 2],
    },
    "ncsnpp": {
        "model_type": "SongUNet", "embedding_type": "fourier", "encoder_type": "residual",
        "decoder_type": "standard", "channel_mult_noise": 2, "resample_filter": [1, 3, 3, 1],
        "model_channels": 128, "channel_mult": [2, 2, 2],
    },
    "adm": {"model_type": "DhariwalUNet", "model_channels": 192, "channel_mult": [1, 2, 3, 4]},
}  # fmt: skip
"""Keywords of the U-Nets by the name that training programs know them by, sized as for CIFAR-10 (adm: ImageNet)."""

UNSEEN_IN_SAMPLING = ("dropout", "use_fp16")
"""Keywords that do not change how a network should be sampled."""


_CIFAR10 = {"img_resolution": 32, "img_channels": 3, "dropout": 0.13, "use_fp16": False, "augment_dim": AUGMENT_DIM}
_FFHQ = {
    "img_resolution": 64, "img_channels": 3, "label_dim": 0, "dropout": 0.05, "use_fp16": False,
    "augment_dim": AUGMENT_DIM, "channel_mult": [1, 2, 2, 2],
}  # fmt: skip
_AFHQV2 = {**_FFHQ, "dropout": 0.25}
_IMAGENET = {"img_resolution": 64, "img_channels": 3, "label_dim": 1000, "dropout": 0.10, "use_fp16": True}

_DDPMPP, _NCSNPP, _ADM = (ARCHITECTURES[arch] for arch in ("ddpmpp", "ncsnpp", "adm"))
_CIFAR10_STEPS = EDMSettings(num_steps=18)
_FACES_STEPS = EDMSettings(num_steps=40)
_IMAGENET_STEPS = EDMSettings(num_steps=256, S_churn=40, S_min=0.05, S_max=50, S_noise=1.003)

_EVALUATED = {
    name: Evaluation(
        checkpoint=f"Neon_EDM_{released}.pkl",
        statistics=statistics,
        program="edm.calculate_fid:ScoreEDM",
        flags=f"--network_pkl {{checkpoint}} --ref {{statistics}} --seeds 0-{{last}} --num_steps {num_steps}",
        calls=2 * num_steps - 1,
    )
    for name, released, statistics, num_steps in (
        ("edm-cifar10-32x32-cond-vp", "conditional_CIFAR10", "cifar10-32x32.npz", 18),
        ("edm-cifar10-32x32-uncond-vp", "unconditional_CIFAR10", "cifar10-32x32.npz", 18),
        ("edm-ffhq-64x64-uncond-vp", "FFHQ", "ffhq-64x64.npz", 40),
    )
}

PUBLISHED: dict[str, Published[EDMSettings]] = {
    name: Published(
        name=name,
        network=network,
        settings=settings,
        fid_base=fid_base,
        fid_neon=fid_neon,
        neon=_EVALUATED.get(name),
    )
    for name, network, settings, fid_base, fid_neon in (
        ("edm-cifar10-32x32-cond-vp", {**_DDPMPP, **_CIFAR10, "label_dim": 10}, _CIFAR10_STEPS, 1.78, 1.38),
        ("edm-cifar10-32x32-uncond-vp", {**_DDPMPP, **_CIFAR10, "label_dim": 0}, _CIFAR10_STEPS, 1.98, 1.38),
        ("edm-cifar10-32x32-cond-ve", {**_NCSNPP, **_CIFAR10, "label_dim": 10}, _CIFAR10_STEPS, 1.79, None),
        ("edm-cifar10-32x32-uncond-ve", {**_NCSNPP, **_CIFAR10, "label_dim": 0}, _CIFAR10_STEPS, 1.98, None),
        ("edm-ffhq-64x64-uncond-vp", {**_DDPMPP, **_FFHQ}, _FACES_STEPS, 2.39, 1.12),
        ("edm-ffhq-64x64-uncond-ve", {**_NCSNPP, **_FFHQ}, _FACES_STEPS, 2.53, None),
        ("edm-afhqv2-64x64-uncond-vp", {**_DDPMPP, **_AFHQV2}, _FACES_STEPS, 1.96, None),
        ("edm-afhqv2-64x64-uncond-ve", {**_NCSNPP, **_AFHQV2}, _FACES_STEPS, 2.16, None),
        ("edm-imagenet-64x64-cond-adm", {**_ADM, **_IMAGENET}, _IMAGENET_STEPS, 1.36, None),
    )
}
"""Settings are of EDM's README, as are names: vp and ve name the U-Net, DDPM++ or NCSN++. Scores are of Neon's README
where it has both, else `fid_base` is of the EDM paper's Tables 2 and 3."""


def recognised(keywords: Mapping[str, Any], precond: str = "EDMPrecond") -> Published[EDMSettings] | None:
    """The published network that the `keywords` of class `precond` build, whose `settings` it should be sampled with.

    Defaults may be spelled out or left out. Dropout does not count, since it does not change sampling; it
    only tells apart the networks of FFHQ and AFHQv2, which are sampled alike. None: nothing that is known.
    """
    given = {"precond": precond, **keywords}
    with_dropout = row_sampled_as(PUBLISHED, given, lambda found: (_sampled_by(found), in_full(found)["dropout"]))
    return with_dropout or row_sampled_as(PUBLISHED, given, _sampled_by)


def built_by(config: Mapping[str, Any]) -> dict[str, Any]:
    """What the flags of `edm/finetune.py` that build a network would say of that of a model's `config`."""
    network = in_full({"precond": config.get("precond", "EDMPrecond"), **config["network"]})
    kinds = {name: in_full(keywords) for name, keywords in ARCHITECTURES.items()}
    sizes = ("model_channels", "channel_mult")
    of_kind = [
        name
        for name, keywords in ARCHITECTURES.items()
        if all(network.get(key) == kinds[name][key] for key in keywords if key not in sizes)
    ]
    return {
        "arch": of_kind[0] if of_kind else None,
        "precond": {"EDMPrecond": "edm", "VPPrecond": "vp", "VEPrecond": "ve"}.get(network["precond"]),
        "cond": network["label_dim"] > 0,
        "cbase": network["model_channels"],
        "cres": network["channel_mult"],
        "num_blocks": network["num_blocks"],
        "attn_resolutions": network["attn_resolutions"],
        "label_dropout": config.get("label_dropout", 0.0),
        "fp16": network["use_fp16"],
    }


def warn_if_unusual(model: GenerativeModel, settings: SamplerSettings) -> None:
    """Warn if `settings` are not those that the published scores of this network hold for."""
    row = recognised(model.config["network"], model.config.get("precond", "EDMPrecond"))
    if row is None or settings == row.settings:
        return
    if type(settings) is EDMSettings:
        names = [field.name for field in fields(settings)]
        differ = [name for name in names if getattr(settings, name) != getattr(row.settings, name)]
        found = ", ".join(f"{name} {getattr(settings, name)} and not {getattr(row.settings, name)}" for name in differ)
    else:
        found = "another sampler than EDM's own"
    warn(f"{row.name} sampled with {found}; its published scores will not be met")


def in_full(keywords: Mapping[str, Any]) -> dict[str, Any]:
    """All keywords of the preconditioning (`precond`) and its U-Net, with defaults, in one spelling of sequences."""
    given: dict[str, Any] = {"precond": "EDMPrecond"}
    precond = keywords.get("precond", given["precond"])
    parameters = dict(inspect.signature(PRECONDS[precond].__init__).parameters)
    unet = keywords.get("model_type", parameters["model_type"].default)
    for name, parameter in (parameters | inspect.signature(NETWORKS[unet].__init__).parameters).items():
        if parameter.default is not parameter.empty:
            given[name] = parameter.default
    given |= keywords
    return {name: tuple(value) if isinstance(value, (list, tuple)) else value for name, value in given.items()}


def _sampled_by(keywords: Mapping[str, Any]) -> dict[str, Any]:
    """What of the keywords determines how the network should be sampled."""
    return {name: value for name, value in in_full(keywords).items() if name not in UNSEEN_IN_SAMPLING}
