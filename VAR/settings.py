"""How VAR samples, as settings: without torch, so that a program shows its flags at once."""

import math
from dataclasses import dataclass

ENLARGEMENT = 1.125
"""training images are enlarged by this before they are cropped, as published"""


@dataclass(frozen=True, kw_only=True)
class VARSettings:
    """How to sample; the defaults are those of the published evaluation at 256 pixels."""

    guidance: float = 2.9
    """extra weight g of the class; not the usual scale, which here rises from 1 at the first scale to 1 + g"""
    top_k: int = 900
    """only the k likeliest tokens are drawn; 0, or more than there are: all"""
    top_p: float = 0.95
    """of these, only the likeliest that together have this probability; 0: all"""
    smooth: bool = False
    """mix codes instead of drawing one: nicer to look at, never for scores"""
    temperature: float = 1.0
    """divides the logits; 1: as published"""

    def __post_init__(self) -> None:
        if not 0 <= self.guidance < math.inf:
            raise ValueError(f"guidance is {self.guidance}; expected 0 or more")
        if self.top_k < 0:
            raise ValueError(f"top_k is {self.top_k}; expected 0 (all tokens) or more")
        if not 0 <= self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}; expected 0 to 1")
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"temperature is {self.temperature}; expected a positive number")
