"""Flags that programs of class-conditional architectures share: how many images, of which classes and seed."""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
import tyro

from neon.errors import RequestError
from neon.model import GenerativeModel
from neon.noise import Purpose, image_seeds
from neon.sampling import balanced_labels
from neon.scoring import Sampling, ScoringFlags


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
