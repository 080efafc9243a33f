"""How far precisions and compilation move the images of small trained models, on equal noise, from float32.

Grey levels of 0 to 255. A VAR draws tokens: one that flips changes a whole patch, so the share of equal tokens stands
beside.
"""

from typing import Any

import torch

from gpu.networks import changed, trained
from gpu.rows import Figures, Rows
from gpu.timing import sample
from neon.model import GenerativeModel
from neon.noise import ImageNoise
from VAR.model import VARModel

SETTINGS: dict[str, dict[str, Any]] = {
    "edm": {"num_steps": 18},
    "VAR": {"guidance": 1.5, "top_k": 0, "top_p": 0.0},
    "xAR": {"guidance": 2.0, "num_steps": 8},
    "imm": {"guidance": 1.5, "num_steps": 8},
}
"""what these small models are sampled with"""
VARIANTS = (("tf32", False), ("bf16", False), ("fp16", False), ("fp32", True))
"""(precision, compiled)"""


def measure(rows: Rows) -> None:
    """A row for each small model and variant; those that compile last, for they take long."""
    batch = 2 if rows.tiny else 256
    for precision, compiled in VARIANTS:
        for name in SETTINGS:
            title = f"{name} {'compiled' if compiled else precision}"
            rows.add(title, lambda n=name, p=precision, c=compiled: _moved(rows, n, p, c, batch))  # type: ignore[misc]


def _moved(rows: Rows, name: str, precision: str, compiled: bool, batch: int) -> Figures:
    model = trained(name, rows.device)
    settings = changed(model, {**SETTINGS[name], **({"num_steps": 3} if rows.tiny and name != "VAR" else {})})
    expected, tokens = sample(model, batch, settings, rows.device).images, _tokens(model, batch, settings, rows.device)
    other = trained(name, rows.device, precision)
    if compiled:
        other.compile_parts()
    found, others = sample(other, batch, settings, rows.device).images, _tokens(other, batch, settings, rows.device)
    levels = (found.int() - expected.int()).abs()
    figures = {
        "images": batch,
        "mean_levels": levels.double().mean().item(),
        "largest": int(levels.max()),
        "moved_pixels": (levels > 0).double().mean().item(),
    }
    if tokens is not None and others is not None:
        figures["equal_tokens"] = (tokens == others).double().mean().item()
    return figures


def _tokens(model: GenerativeModel, batch: int, settings: Any, device: torch.device) -> torch.Tensor | None:
    if not isinstance(model, VARModel):
        return None
    noise = ImageNoise(range(batch), device)
    with model.precision.allowed_on(device):
        return model.sample_tokens(noise, model.labels(range(batch), noise), settings)
