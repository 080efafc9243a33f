"""Neon: improve a trained image generator by stepping away from its own self-training.

theta_neon = (1 + w) theta_r - w theta_s: w = 0 is the base, w = -1 the self-trained model, w > 0 Neon.

    base = neon.load("base.safetensors")
    synthetic = neon.sample_set(base, 1000, "synthetic")
    self_trained = neon.self_train(base, synthetic, "self-training", total_images=6400)
    improved = neon.extrapolate(base, self_trained, w=1.0)
    improved.save("neon.safetensors")

`neon.improve_model(base, "run", real="real.npz")` does all of it, and chooses w.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from neon.errors import RequestError, WorkError
    from neon.evaluate import Scores
    from neon.library.generator import Generator, extrapolate, load, sample_set, score, self_train
    from neon.library.improving import Improved, improve_model

__version__ = "0.1.0"

__all__ = [
    "Generator",
    "Improved",
    "RequestError",
    "Scores",
    "WorkError",
    "__version__",
    "extrapolate",
    "improve_model",
    "load",
    "sample_set",
    "score",
    "self_train",
]

_ELSEWHERE = {
    "RequestError": "neon.errors",
    "WorkError": "neon.errors",
    "Scores": "neon.evaluate",
    "Improved": "neon.library.improving",
    "improve_model": "neon.library.improving",
}


def __getattr__(name: str) -> Any:
    """Import torch only where it is needed: `import neon` is quick, and so is `--help`."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_ELSEWHERE.get(name, "neon.library.generator")), name)


def __dir__() -> list[str]:
    return list(__all__)
