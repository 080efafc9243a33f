"""Flags that xAR's programs share, spelled as in the published ones, and the model they name."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from neon.cli.command_line import values_refused
from neon.cli.flags import FileOrURL, NetworkFlags, NumberedImages, OptionalFileOrURL, SizeFlags
from neon.errors import RequestError, warn
from xAR.settings import SIZES, XARSettings

if TYPE_CHECKING:
    from neon.runtime.distributed import Processes
    from xAR.model import XARModel

NAMES = {**SIZES, "xar_small": {"width": 96, "encoder_depth": 2, "decoder_depth": 2, "heads": 3}}
"""keywords of XAR by what `--model` calls them: the published sizes, and one for small images"""


@dataclass(frozen=True, kw_only=True)
class XARFlags(SizeFlags, NetworkFlags):
    """Transformer and autoencoder."""

    model_ckpt: OptionalFileOrURL = None
    """transformer to start from; without: random weights"""
    model: str | None = None
    """xar_base, xar_large, xar_huge or xar_small; checked against the file"""
    vae_path: OptionalFileOrURL = None
    """by default kl16.ckpt in xAR/pretrained/, here, in checkpoints/ or pretrained/"""

    def load(self, group: "Processes", **arguments: Any) -> "tuple[Path, XARModel]":
        """The checkpoint's path and its model with the autoencoder; a RequestError if flags and files disagree."""
        from xAR.model import XARModel

        path, model = self.open(self.model_ckpt, XARModel, group, **arguments)
        if not model.pixel_patch:
            model.use_autoencoder(self.autoencoder(group))
        self.check_model(path, model)
        return path, model

    def check_model(self, path: Path, model: "XARModel") -> None:
        """A RequestError if the checkpoint is not what `--model` and `--img_size` say."""
        transformer = model.config["transformer"]
        known = [name for name, size in NAMES.items() if size.items() <= transformer.items()]
        if self.model is not None and self.model not in known:
            found = known[0] if known else f"a network of width {transformer['width']}"
            raise RequestError(f"--model {self.model}: {path} is {found}; leave the flag out, or name the other file")
        self.check_side(path, model)

    def facts(self, model: Any, group: "Processes") -> dict[str, Any]:
        from neon.runtime.files import hashes

        vae = None if model.pixel_patch else self.autoencoder(group)
        return {**group.on_main(lambda: hashes({"vae_sha256": vae})), **self.recorded_precision(model)}

    def autoencoder(self, group: "Processes") -> Path:
        """Where the autoencoder lies."""
        from neon.runtime.download import shared_file
        from xAR.model import vae_file

        return vae_file(None if self.vae_path is None else shared_file(self.vae_path, group))


@dataclass(frozen=True, kw_only=True)
class XARImageFlags(XARFlags, NumberedImages):
    """Sampler."""

    model_ckpt: FileOrURL = field()
    """the transformer: published .pth, or safetensors by neon"""
    cfg: Annotated[float | None, tyro.conf.arg(aliases=["--guidance"])] = None
    """guidance of the last cell, from 1 at the first; by default the published"""
    flow_steps: Annotated[int | None, tyro.conf.arg(aliases=["--num_steps"])] = None
    """network evaluations per cell, at least 3; by default the published"""
    deterministic: bool = False
    """follow the flow without fresh noise; published: with"""

    def settings_for(self, model: Any) -> XARSettings:
        default = model.default_settings
        guidance = default.guidance if self.cfg is None else self.cfg
        if guidance < 1:
            warn(f"--cfg {guidance:g} is below 1, where there is no guidance: the same as 1")
        with values_refused("--flow_steps or --cfg: "):
            return XARSettings(
                num_steps=default.num_steps if self.flow_steps is None else self.flow_steps,
                guidance=guidance,
                stochastic=not self.deterministic,
            )
