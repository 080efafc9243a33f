"""What is asked for of a LoRA; imports nothing heavy, so that the command line can state its flags by it."""

import importlib.util
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from neon.errors import RequestError

EVERY = "all"
"""what targets are called that are every linear layer and convolution"""
RECORD = "lora"
"""in records of runs and the metadata of snapshots, what was asked for"""


@dataclass(frozen=True, kw_only=True)
class LoRA:
    """Two factors of `rank` for each target, whose product times `alpha` / `rank` is added to its weight."""

    rank: int
    alpha: float
    targets: tuple[str, ...]
    """names of layers, or the last words of them; (EVERY,): every linear layer and convolution"""

    @property
    def scale(self) -> float:
        """What the product is multiplied with."""
        return self.alpha / self.rank

    @property
    def facts(self) -> dict[str, Any]:
        """As JSON."""
        return {**asdict(self), "targets": list(self.targets)}

    @property
    def text(self) -> str:
        """In words."""
        on = "every linear layer and convolution" if self.targets == (EVERY,) else ", ".join(self.targets)
        return f"LoRA of rank {self.rank} (alpha {self.alpha:g}) on {on}"


def check_lora(rank: int | None, alpha: float | None, targets: Sequence[str]) -> None:
    """Raise a RequestError for numbers that make no sense, or as `check_peft`."""
    if rank is None:
        for flag, given in (("--lora_alpha", alpha is not None), ("--lora_targets", bool(targets))):
            if given:
                raise RequestError(f"{flag}: goes with --lora_rank, which trains by LoRA")
        return
    if rank < 1:
        raise RequestError(f"--lora_rank {rank}: expected at least 1, such as 8")
    if alpha is not None and not 0 < alpha < math.inf:
        raise RequestError(f"--lora_alpha {alpha:g}: expected a positive number, such as the rank")
    check_peft()


def check_peft() -> None:
    """Raise a RequestError where PEFT, which makes the layers, is not installed."""
    if importlib.util.find_spec("peft") is None:
        raise RequestError(
            "training by LoRA needs PEFT, which is not installed; pip install 'neon-extrapolation[huggingface]' or "
            "[diffusers], with Python 3.11 or later"
        )


def lora_of(rank: int | None, alpha: float | None, targets: Sequence[str], usual: Sequence[str]) -> LoRA | None:
    """What is asked for, with the targets that are `usual` for the network if none are; None: no LoRA."""
    if rank is None:
        return None
    alpha = float(rank if alpha is None else alpha)
    return LoRA(rank=rank, alpha=alpha, targets=tuple(targets) or tuple(usual) or (EVERY,))


def recorded_lora(facts: Any) -> LoRA | None:
    """The LoRA that `facts` were taken of; None: they are none that can be read."""
    try:
        found = LoRA(rank=int(facts["rank"]), alpha=float(facts["alpha"]), targets=tuple(map(str, facts["targets"])))
    except (TypeError, LookupError, ValueError, ArithmeticError):
        return None
    return found if found.rank > 0 < found.alpha < math.inf and found.targets else None


def record_of(lora: LoRA | None) -> Mapping[str, Any]:
    """The entry of a record; nothing for runs without LoRA, as in those of before there was one."""
    return {} if lora is None else {RECORD: lora.facts}
