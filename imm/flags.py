"""Flags that IMM's programs share, spelled as in the published ones, and the model they name."""

import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import tyro

from imm.settings import PRESETS, IMMSettings
from neon.cli.command_line import values_refused
from neon.cli.flags import NetworkFlags, NumberedImages, SizeFlags
from neon.errors import RequestError, warn

if TYPE_CHECKING:
    from imm.model import IMM
    from neon.runtime.distributed import Processes

CONFIGURED = {"config_name": "there are no configuration files; use --preset and flags, called as their keys"}
"""flags of the published programs that are refused, and why"""
NAMED = {"s_a1": "identity", "ts_a2": "stride"}
"""the time embeddings of two published networks that nothing else tells apart, by what their files are called"""
EVALUATED = 50_000
"""images behind published scores"""


@dataclass(frozen=True, kw_only=True)
class IMMFlags(SizeFlags, NetworkFlags):
    """Network and, if it makes latents, autoencoder."""

    network_pkl: Annotated[str | None, tyro.conf.arg(metavar="FILE|URL", aliases=["--model_ckpt"])] = None
    """network to start from; without: random weights"""
    vae_path: Annotated[Path | None, tyro.conf.arg(metavar="FOLDER")] = None
    """autoencoder; by default sd-vae-ft-ema in imm/pretrained/, pretrained/, checkpoints/ or the cache of Hugging
    Face, as diffusers keeps it"""
    temb_type: Literal["identity", "stride"] | None = None
    """what a network is told of the end of a step; by default what the checkpoint says, stride if it does not;
    s_a1 needs identity"""

    def load(self, group: "Processes", *, needs_vae: bool = True, **arguments: Any) -> "tuple[Path, IMM]":
        """The checkpoint's path and its model; with the autoencoder, if its images are latents and it `needs_vae`.

        Raises:
            RequestError: flags and files disagree.
        """
        from imm.model import IMM
        from imm.vae import weights_file

        path, model = self.open(self.network_pkl, IMM, group, temb_type=self.temb_type, **arguments)
        self.check_time_embedding(path, model)
        if model.in_latents and needs_vae:
            model.use_autoencoder(weights_file(self.vae_path))
        self.check_side(path, model)
        return path, model

    def check_time_embedding(self, path: Path, model: "IMM") -> None:
        """A RequestError if the name of the file says that `temb_type` must be another."""
        from imm.model import ASSUMED

        used, stored = model.network.temb_type, model.stored_temb_type
        if self.temb_type is not None and stored not in (None, self.temb_type):
            warn(f"--temb_type {self.temb_type}: {path} says {stored}; the flag wins")
        elif self.temb_type is None and stored is None:
            warn(
                f"{path}: a bare state dict, taken as ts_a2 (--temb_type {ASSUMED['temb_type']}); "
                "weights made from s_a1 need --temb_type identity"
            )
        for name, needed in NAMED.items():
            if re.search(rf"(?<![a-z]){name}(?![0-9])", path.name) and used != needed:
                raise RequestError(
                    f"{path}: by its name this is {name}, whose temb_type is {needed}, but it would run with "
                    f"{used}; use --temb_type {needed}, or rename the file if it is another"
                )

    def facts(self, model: Any, group: "Processes") -> dict[str, Any]:
        from imm.vae import weights_file
        from neon.runtime.files import sha256_file

        uses_vae = model.codec is not None
        return {
            "temb_type": model.network.temb_type,
            "vae_sha256": group.on_main(lambda: sha256_file(weights_file(self.vae_path))) if uses_vae else None,
            **self.recorded_precision(model),
        }


@dataclass(frozen=True, kw_only=True)
class IMMImageFlags(IMMFlags, NumberedImages):
    """Sampler."""

    network_pkl: Annotated[str, tyro.conf.arg(metavar="FILE|URL", aliases=["--model_ckpt"])] = field()
    """the network: published .pkl or .pth, or safetensors by neon"""
    usual_count: ClassVar[int | None] = EVALUATED

    preset: Annotated[str | None, tyro.conf.arg(metavar="NAME")] = None
    """published: 1_steps_cfg1.5_pushforward_uniform (or 2, 4, 8), 1_step, 2_steps"""
    num_steps: Annotated[int | None, tyro.conf.arg(aliases=["--steps"])] = None
    """network evaluations; by default the published, else 8"""
    cfg_scale: Annotated[float | None, tyro.conf.arg(aliases=["--cfg", "--guidance"])] = None
    """guidance, 1: none; by default of the preset, 1.5, or none without classes"""
    discretization: Literal["uniform", "edm"] | None = None
    """times of the steps: even (the default), or as EDM's"""
    mid_nt: tuple[float, ...] | None = None
    """or the ratios of noise to signal at the ends of all steps but the last"""
    restart: bool = False
    """step to the end each time, with fresh noise in between"""

    def settings_for(self, model: Any) -> IMMSettings:
        """The sampler's settings for this model.

        Raises:
            RequestError: they contradict each other, or guide an unconditional network.
        """
        settings = self._preset() or self._stepped(model.default_settings)
        if self.cfg_scale is not None:
            settings = replace(settings, guidance=self.cfg_scale)
        if model.num_classes == 0 and settings.guidance != 1:
            if self.cfg_scale is not None:
                raise RequestError(
                    f"--cfg_scale {self.cfg_scale:g}: {self.network_pkl} is unconditional, there is nothing to guide "
                    "by; leave the flag out"
                )
            raise RequestError(
                f"--preset {self.preset}: guides by a class, and {self.network_pkl} is unconditional; use 1_step or "
                "2_steps, or --num_steps"
            )
        return settings

    def _preset(self) -> IMMSettings | None:
        """The settings of `--preset`, if one is named and no other flag contradicts it."""
        if self.preset is None:
            return None
        if self.preset not in PRESETS:
            raise RequestError(f"--preset {self.preset}: unknown; expected one of {', '.join(PRESETS)}")
        settings = PRESETS[self.preset]
        given = {
            "num_steps": self.num_steps,
            "discretization": self.discretization,
            "mid_nt": self.mid_nt,
            "restart": self.restart or None,
        }
        for name, value in given.items():
            if value not in (None, getattr(settings, name)):
                raise RequestError(
                    f"--{name} {value}: contradicts --preset {self.preset}, which has {getattr(settings, name)}; "
                    "leave one of them out"
                )
        return settings

    def _stepped(self, default: IMMSettings) -> IMMSettings:
        """`default` with the steps that the flags ask for."""
        if self.mid_nt is not None and self.discretization is not None:
            raise RequestError("--mid_nt and --discretization both say where steps end; leave one of them out")
        chosen: dict[str, Any] = {"restart": self.restart}
        if self.mid_nt is not None:
            chosen |= {"mid_nt": self.mid_nt, "num_steps": len(self.mid_nt) + 1}
        elif self.discretization is not None or self.num_steps not in (None, default.num_steps):
            chosen |= {"mid_nt": (), "discretization": self.discretization or default.discretization}
        if self.num_steps is not None:
            chosen["num_steps"] = self.num_steps
        with values_refused():
            return replace(default, **chosen)
