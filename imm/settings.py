"""How IMM samples, as settings: without torch, so that a program shows its flags at once."""

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class IMMSettings:
    """How to sample; the defaults are the published ones for ImageNet-256."""

    num_steps: int = 8
    """network calls, at least 1; with guidance, of twice the batch"""
    guidance: float = 1.5
    """scale g of F_none + g (F_class - F_none); 1: no guidance"""
    discretization: Literal["uniform", "edm"] = "uniform"
    """of the time from T to eps: equal steps, or EDM's spacing of noise-to-signal ratios"""
    mid_nt: tuple[float, ...] = ()
    """noise-to-signal ratios between start and end, falling, instead of a `discretization`; () leaves it to that"""
    restart: bool = False
    """go to the end in every step, and noise the image again for the next"""

    def __post_init__(self) -> None:
        if self.num_steps < 1:
            raise ValueError(f"num_steps is {self.num_steps}; expected at least 1")
        if not math.isfinite(self.guidance):
            raise ValueError(f"guidance is {self.guidance}; expected a finite number")
        if self.discretization not in ("uniform", "edm"):
            raise ValueError(f"discretization is {self.discretization!r}; expected uniform or edm")
        if self.mid_nt and self.num_steps != len(self.mid_nt) + 1:
            raise ValueError(
                f"num_steps is {self.num_steps} with {len(self.mid_nt)} ratios in mid_nt; "
                f"expected {len(self.mid_nt) + 1}, one more than ratios"
            )
        if not all(high > low for high, low in pairwise((math.inf, *self.mid_nt, 0.0))):
            raise ValueError(f"mid_nt is {self.mid_nt}; expected falling positive numbers")


PRESETS: dict[str, IMMSettings] = {
    **{f"{n}_steps_cfg1.5_pushforward_uniform": IMMSettings(num_steps=n, guidance=1.5) for n in (1, 2, 4, 8)},
    "1_step": IMMSettings(num_steps=1, guidance=1.0),
    "2_steps": IMMSettings(num_steps=2, guidance=1.0, mid_nt=(1.4,)),
    "2_step": IMMSettings(num_steps=2, guidance=1.0, mid_nt=(1.4,)),
}
"""Ways of sampling by their published names; `2_step` is how the training configuration spells `2_steps`."""

SIZE_FLAGS: dict[str, dict[str, str]] = {
    "DiT": {"width": "hidden_size", "depth": "depth", "heads": "num_heads", "patch_size": "patch_size"},
    "SongUNet": {
        "width": "model_channels", "channel_mult": "channel_mult", "depth": "num_blocks",
        "attn_resolutions": "attn_resolutions",
    },
}  # fmt: skip
"""Keywords that tell the size of a network from scratch, by flags of `imm/finetune.py`; other kinds have their own."""
