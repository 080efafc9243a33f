"""Flags that VAR's programs share, spelled as in the published ones, and the model they name."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from neon.cli.command_line import values_refused
from neon.cli.flags import FileOrURL, NetworkFlags, NumberedImages, OptionalFileOrURL, SizeFlags
from neon.errors import RequestError
from VAR.settings import VARSettings

if TYPE_CHECKING:
    from neon.runtime.distributed import Processes
    from VAR.model import VARModel


@dataclass(frozen=True, kw_only=True)
class VARFlags(SizeFlags, NetworkFlags):
    """Transformer and tokenizer."""

    var_ckpt: OptionalFileOrURL = None
    """transformer to start from; without: random weights"""
    vae_ckpt: OptionalFileOrURL = None
    """tokenizer; by default vae_ch160v4096z32.pth here, in checkpoints/ or pretrained/"""
    model_depth: int | None = None
    """blocks of the transformer; checked against the checkpoint"""

    def load(self, group: "Processes", **arguments: Any) -> "tuple[Path, VARModel]":
        """The checkpoint's path and its model with the tokenizer; a RequestError if flags and files disagree."""
        from VAR.model import VARModel

        path, model = self.open(self.var_ckpt, VARModel, group, **arguments)
        model.use_autoencoder(self.tokenizer(group))
        depth = len(model.network.blocks)
        if self.model_depth not in (None, depth):
            raise RequestError(f"--model_depth {self.model_depth}: {path} has {depth} blocks; leave the flag out")
        self.check_side(path, model)
        return path, model

    def facts(self, model: Any, group: "Processes") -> dict[str, Any]:
        from neon.runtime.files import sha256_file

        tokenizer = self.tokenizer(group)
        return {"tokenizer_sha256": group.on_main(lambda: sha256_file(tokenizer)), **self.recorded_precision(model)}

    def tokenizer(self, group: "Processes") -> Path:
        """Where the tokenizer lies."""
        from neon.runtime.download import shared_file
        from VAR.model import tokenizer_file

        return tokenizer_file(None if self.vae_ckpt is None else shared_file(self.vae_ckpt, group))


@dataclass(frozen=True, kw_only=True)
class VARImageFlags(VARFlags, NumberedImages):
    """Sampler."""

    var_ckpt: FileOrURL = field()
    """the transformer: published .pth, or safetensors by neon"""
    cfg: Annotated[float | None, tyro.conf.arg(aliases=["--guidance"])] = None
    """guidance, an extra weight that grows from 0 at the coarsest scale to this at the finest: the usual scale runs
    from 1 to 1 + cfg; by default the published 2.9 (256 pixels) or 4.0 (512)"""
    top_k: int = 900
    """draw among this many likeliest codes; 0: all"""
    top_p: float = 0.95
    """draw among the likeliest codes that make up this share; 0: all"""
    more_smooth: bool = False
    """mixtures of codes instead of codes: nicer pictures, never for scores"""
    temperature: float = 1.0
    """above 1 more diverse, below 1 less; the published sampler knows 1 only"""

    def settings_for(self, model: Any) -> VARSettings:
        with values_refused():
            return VARSettings(
                guidance=model.default_settings.guidance if self.cfg is None else self.cfg,
                top_k=self.top_k,
                top_p=self.top_p,
                smooth=self.more_smooth,
                temperature=self.temperature,
            )
