"""How xAR samples, and the sizes it was published in: without torch, so that a program shows its flags at once."""

import math
from dataclasses import dataclass

SIZES: dict[str, dict[str, int]] = {
    "xar_base": {"width": 768, "encoder_depth": 8, "decoder_depth": 8, "heads": 12},
    "xar_large": {"width": 1024, "encoder_depth": 16, "decoder_depth": 16, "heads": 16},
    "xar_huge": {"width": 1280, "encoder_depth": 20, "decoder_depth": 20, "heads": 16},
}
"""Keywords of XAR by published name; all have 1000 classes and 16 x 16 positions in 2 x 2 cells."""


@dataclass(frozen=True, kw_only=True)
class XARSettings:
    """How to sample; the defaults are those of the published evaluation of xAR-B."""

    num_steps: int = 40
    """network evaluations per cell, at least 3"""
    guidance: float = 2.7
    """scale of the last cell, rising from 1 at the first; 1 or less: no guidance"""
    stochastic: bool = True
    """fresh noise in every step but the last; False: follow the flow itself"""

    def __post_init__(self) -> None:
        if self.num_steps < 3:
            raise ValueError(f"num_steps is {self.num_steps}; expected at least 3")
        if not math.isfinite(self.guidance):
            raise ValueError(f"guidance is {self.guidance}; expected a finite number")
