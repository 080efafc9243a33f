"""The published files that Neon's programs open: where they come from, and where programs look for them."""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from neon.errors import RequestError
from neon.runtime.download import cached_path, is_url, substitute, user_cache
from neon.runtime.files import sha256_file

Architecture = Literal["edm", "VAR", "xAR", "imm"]
"""what `--only` can name"""
Kind = Literal["neon", "base", "vae", "statistics", "inception"]
"""neon: a checkpoint of Neon; base: what it was made from"""

_ZIP = b"PK\x03\x04"
_TORCH_BEFORE_1_6 = bytes.fromhex("80028a0a6cfc9c46f9206aa85019")


@dataclass(frozen=True, kw_only=True)
class PublishedFile:
    """A file, as the environment finds it: NEON_MIRROR and the variables that move caches are taken into account."""

    name: str
    architectures: tuple[str, ...]
    """that need it"""
    kind: Kind
    megabytes: int | None
    """of its tensors in float32 (statistics: float64), so about the size of the file; None: not known"""
    source: str
    """hf:REPOSITORY, a URL, or by:PUBLISHER where no address is known"""
    places: tuple[str, ...]
    """where programs look for it, absolute or below the working directory; it is fetched to the first"""

    def flaw(self, path: Path) -> str | None:
        """What is wrong with the file at `path`, if anything: not what the name promises, cut short, or too small."""
        if (instead := substitute(path)) is not None:
            return instead
        size, suffix = path.stat().st_size, Path(self.name).suffix
        with open(path, "rb") as file:
            head = file.read(len(_TORCH_BEFORE_1_6))
        if not (
            (suffix in (".pth", ".ckpt", ".npz") and head.startswith(_ZIP))
            or (suffix == ".pkl" and re.match(rb"\x80[\x02-\x05]", head))
            or (suffix in (".pth", ".ckpt") and head == _TORCH_BEFORE_1_6)
            or (suffix == ".safetensors" and head[8:9] == b"{")
            or (suffix == ".json" and head[:1] == b"{")
        ):
            return f"not a {suffix} file, it begins with the bytes {head[:4].hex()}"
        if size < (self.megabytes or 0) * 400_000:  # half precision would be one half
            return f"only {size} bytes, expected about {self.megabytes} MB"
        hashed = re.search(r"-([0-9a-f]{8})\.pth$", self.name)  # the rule of torch.hub
        if hashed is not None and not sha256_file(path).startswith(hashed[1]):
            return f"its SHA-256 does not begin with {hashed[1]}, as its name says"
        return None


def usual_places(name: str) -> list[Path]:
    """Where programs look for the published file `name`."""
    return [Path(place) for file in published_files() if file.name == name for place in file.places]


def usual_file(name: str, what: str, fetch: str, flag: str, places: Sequence[Path] = ()) -> Path:
    """The published file (or folder) `name` where it usually lies: at one of `places`, by default those of the table.

    Raises:
        RequestError: it is nowhere there; the message says how to fetch it, and the `flag` that names another.
    """
    places = places or usual_places(name)
    for place in places:
        if place.exists():
            return place
    raise RequestError(
        f"{name}: {what} is missing; looked for {', '.join(map(str, places))}; fetch it with `{fetch}`, "
        f"or name it with {flag}"
    )


def published_files() -> list[PublishedFile]:
    """The table of published files."""
    neon, var = "hf:sinaalemohammad/Neon", "hf:FoundationVision/var"
    nvidia = "https://nvlabs-fi-cdn.nvidia.com/edm"
    fidelity = "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/"
    checkpoints, fid_stats, here = ("checkpoints",), ("fid_stats",), (".", "checkpoints", "pretrained")
    torch_hub = (f"{os.environ.get('TORCH_HOME') or user_cache() / 'torch'}/hub/checkpoints",)
    sd = "hf:stabilityai/sd-vae-ft-ema"
    sd_folders = (
        *(f"{folder}/sd-vae-ft-ema" for folder in ("imm/pretrained", "pretrained", "checkpoints")),
        _hub_snapshot(sd),
    )
    # The published README also names Neon_IMM_imagenet256.pth; what was released is Neon_imm_imagenet256.pkl.
    return [
        _row("edm", "neon", 223, "Neon_EDM_conditional_CIFAR10.pkl", neon, checkpoints),
        _row("edm", "neon", 223, "Neon_EDM_unconditional_CIFAR10.pkl", neon, checkpoints),
        _row("edm", "neon", 247, "Neon_EDM_FFHQ.pkl", neon, checkpoints),
        _row("edm", "statistics", 34, "cifar10-32x32.npz", f"{nvidia}/fid-refs/"),
        _row("edm", "statistics", 34, "ffhq-64x64.npz", f"{nvidia}/fid-refs/"),
        _row("edm", "base", 223, "edm-cifar10-32x32-cond-vp.pkl", f"{nvidia}/pretrained/", here),
        _row("edm", "base", 223, "edm-cifar10-32x32-uncond-vp.pkl", f"{nvidia}/pretrained/", here),
        _row("edm", "base", 247, "edm-ffhq-64x64-uncond-vp.pkl", f"{nvidia}/pretrained/", here),
        _row("VAR", "neon", 1243, "Neon_VARd16_imagenet256.pth", neon, checkpoints),
        _row("VAR", "neon", 9436, "Neon_VARd36_imagenet512.pth", neon, checkpoints),
        _row("VAR", "vae", 436, "vae_ch160v4096z32.pth", var, here),
        _row("VAR", "base", 1243, "var_d16.pth", var, here),
        _row("VAR", "base", 9436, "var_d36.pth", var, here),
        _row("xAR", "neon", 693, "Neon_xARB_imagenet256.pth", neon, checkpoints),
        _row("xAR", "neon", 2438, "Neon_xARL_imagenet256.pth", neon, checkpoints),
        _row("xAR", "vae", 266, "kl16.ckpt", "hf:xwen99/mar-vae-kl16", ("xAR/pretrained", *here)),
        _row("xAR", "base", 693, "xAR-B.pth", "by:xAR", here),
        _row("xAR", "base", 2438, "xAR-L.pth", "by:xAR", here),
        _row("imm", "neon", 2707, "Neon_imm_imagenet256.pkl", neon, checkpoints),
        _row("imm", "vae", None, "config.json", sd, sd_folders),
        _row("imm", "vae", 335, "diffusion_pytorch_model.safetensors", sd, sd_folders),
        _row("imm", "base", 2707, "imagenet256_ts_a2.pkl", "by:IMM", here),
        _row("VAR xAR imm", "statistics", 34, "adm_in256_stats.npz", neon, fid_stats),
        _row("VAR", "statistics", 34, "adm_in512_stats.npz", neon, fid_stats),
        _row("edm VAR xAR imm", "inception", 95, "weights-inception-2015-12-05-6726825d.pth", fidelity, torch_hub),
    ]


def _row(
    architectures: str, kind: Kind, megabytes: int | None, name: str, source: str, folders: Sequence[str] = ()
) -> PublishedFile:
    """`source`: hf:REPOSITORY, by:PUBLISHER or the address of a folder; no `folders`: the cache of `local_file`."""
    places = [Path(folder, name) for folder in folders] or [cached_path(source + name)]
    mirror = os.environ.get("NEON_MIRROR")
    if not source.startswith("hf:") and mirror:
        source = f"{mirror.removesuffix('/')}/{name}"
    elif is_url(source):
        source += name
    return PublishedFile(
        name=name,
        architectures=tuple(architectures.split()),
        kind=kind,
        megabytes=megabytes,
        source=source,
        places=tuple(map(str, places)),
    )


def _hub_snapshot(source: str) -> str:
    """Where the cache of Hugging Face holds the files of a repository, as huggingface_hub names it."""
    home = os.environ.get("HF_HOME") or user_cache() / "huggingface"
    folder = Path(os.environ.get("HF_HUB_CACHE") or Path(home, "hub"))
    folder /= source.replace("hf:", "models--").replace("/", "--")
    main = folder / "refs/main"
    return str(folder / "snapshots" / (main.read_text().strip() if main.is_file() else "main"))
