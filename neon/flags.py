"""Flags that programs of class-conditional architectures share: how many images, of which classes and seed."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro

from neon.errors import RequestError
from neon.model import GenerativeModel
from neon.noise import Purpose, image_seeds
from neon.sampling import balanced_labels
from neon.scoring import Sampling, ScoringFlags

PRECISIONS: dict[str, torch.dtype | None] = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
"""what `--precision` computes in, under autocast; None: float32, without"""


def usual_file(name: str, folders: Sequence[str], what: str, fetch: str, flag: str) -> Path:
    """The published file `name` where it usually lies.

    Raises:
        RequestError: it is in none of the folders; the message says how to fetch it, and the `flag` that names another.
    """
    places = [Path(folder) / name for folder in folders]
    for place in places:
        if place.exists():
            return place
    raise RequestError(
        f"{name}: {what} is missing; looked for {', '.join(map(str, places))}; fetch it with `{fetch}`, "
        f"or name it with {flag}"
    )


@dataclass(frozen=True, kw_only=True)
class NumberedImages:
    """Images numbered from 0, each with a generator of its own."""

    num_images: int
    """how many; every class equally often; also --N"""
    batch_size: int = 64
    """images per forward pass of one process"""
    seed: int = 0
    """of the images; each has its own generator"""
    class_: Annotated[int | None, tyro.conf.arg(name="class")] = None
    """class of every image; by default every class equally often"""

    def check(self) -> None:
        """A RequestError for numbers that make no sense."""
        for name in ("num_images", "batch_size"):
            if getattr(self, name) < 1:
                raise RequestError(f"--{name} {getattr(self, name)}: expected at least 1")

    def seeds(self, purpose: Purpose) -> list[int]:
        """The seed of each image."""
        return image_seeds(purpose, self.seed, self.num_images)

    def labels(self, model: GenerativeModel) -> int | torch.Tensor:
        """The class of each image."""
        return balanced_labels(self.num_images, model.num_classes, self.seed) if self.class_ is None else self.class_


@dataclass(frozen=True, kw_only=True)
class ScoredImages(NumberedImages, ScoringFlags):
    """Numbered images of a network, and what they are scored against."""

    images_for: Literal["report", "selection"] = "report"
    """selection: other images than those of the report, to choose w, cfg or the budget with"""

    def sampling(self, model: GenerativeModel, settings: Any, facts: dict[str, Any]) -> Sampling:
        """Which images are scored; `facts` as in `Sampling`."""
        return Sampling(
            seeds=self.seeds(Purpose.REPORT if self.images_for == "report" else Purpose.SELECTION),
            seeds_text=f"{self.images_for} images of seed {self.seed}",
            settings=settings,
            label=self.labels(model),
            batch_size=self.batch_size,
            facts=facts,
        )
