"""The nine networks that EDM published: how they are built, how they are sampled, and how well they do."""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from edm.precond import NETWORKS, PRECONDS
from edm.sampler import EDMSettings, SamplerSettings
from neon.data.augment import AUGMENT_DIM
from neon.errors import warn
from neon.model import GenerativeModel

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


@dataclass(frozen=True, kw_only=True)
class Published:
    """One published network. `name` is its file without `.pkl`; vp and ve in it name the U-Net, DDPM++ or NCSN++."""

    name: str
    network: dict[str, Any]
    """keywords of EDMPrecond, as the file holds them"""
    settings: EDMSettings
    """EDM's README"""
    fid_base: float
    """50,000 images: Neon's README where `fid_neon` is given, else the EDM paper's Tables 2 and 3"""
    fid_neon: float | None = None
    """Neon's README; None: not published"""


def architecture_keywords(arch: str) -> dict[str, Any]:
    """A copy of the keywords of architecture `arch`: ddpmpp, ncsnpp or adm."""
    return dict(ARCHITECTURES[arch])


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

PUBLISHED: dict[str, Published] = {
    name: Published(name=name, network=network, settings=settings, fid_base=fid_base, fid_neon=fid_neon)
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


def published_settings(keywords: Mapping[str, Any], precond: str = "EDMPrecond") -> Published | None:
    """The published network that the `keywords` of class `precond` build, whose `settings` it should be sampled with.

    Defaults may be spelled out or left out. Dropout does not count, since it does not change sampling; it
    only tells apart the networks of FFHQ and AFHQv2, which are sampled alike. None: nothing that is known.
    """
    wanted = _in_full(keywords, precond)
    found = [row for row in PUBLISHED.values() if _sampled_alike(_in_full(row.network, "EDMPrecond"), wanted)]
    found.sort(key=lambda row: row.network["dropout"] != wanted["dropout"])
    return found[0] if found else None


def warn_if_unusual(model: GenerativeModel, settings: SamplerSettings) -> None:
    """Warn if `settings` are not those that the published scores of this network hold for."""
    row = published_settings(model.config["network"], model.config.get("precond", "EDMPrecond"))
    if row is None or settings == row.settings:
        return
    if type(settings) is EDMSettings:
        names = [field.name for field in fields(settings)]
        differ = [name for name in names if getattr(settings, name) != getattr(row.settings, name)]
        found = ", ".join(f"{name} {getattr(settings, name)} and not {getattr(row.settings, name)}" for name in differ)
    else:
        found = "another sampler than EDM's own"
    warn(f"{row.name} sampled with {found}; its published scores will not be met")


def _in_full(keywords: Mapping[str, Any], precond: str) -> dict[str, Any]:
    """All keywords of the preconditioning and its U-Net, defaults included, in one spelling of sequences."""
    given: dict[str, Any] = {"precond": precond}
    parameters = dict(inspect.signature(PRECONDS[precond].__init__).parameters)
    unet = keywords.get("model_type", parameters["model_type"].default)
    for name, parameter in (parameters | inspect.signature(NETWORKS[unet].__init__).parameters).items():
        if parameter.default is not parameter.empty:
            given[name] = parameter.default
    given |= keywords
    return {name: tuple(value) if isinstance(value, (list, tuple)) else value for name, value in given.items()}


def _sampled_alike(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return {k: v for k, v in one.items() if k not in UNSEEN_IN_SAMPLING} == {
        k: v for k, v in other.items() if k not in UNSEEN_IN_SAMPLING
    }
