"""`neon features`: a feature network for images of one's own."""

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from neon.cli.command_line import at_least_one, between
from neon.cli.flags import Device
from neon.errors import RequestError, warn

if TYPE_CHECKING:
    from neon.data.images import TrainingImages
    from neon.metrics.small import SmallFeatures

Task = Literal["classes", "rotation", "random"]
TASKS: dict[Task, str] = {
    "classes": "learning the classes of images",
    "rotation": "learning by how many quarter turns images are turned",
    "random": "random weights, nothing is learned",
}
FEWEST = 50
"""images in all"""
FEWEST_OF_A_CLASS = 5
"""images, on average"""
PASSES, LEAST_TRAINED, MOST_TRAINED = 4, 25_600, 240_000
"""by default: passes over the images, and bounds of the images trained on"""
MOST_SCALED_BY = 512
"""images that random weights are scaled by"""
WORD = r"[A-Za-z0-9][A-Za-z0-9_-]{0,39}"


@dataclass(frozen=True, kw_only=True)
class MakeFeatures:
    """Train a small feature network on images of your own, for `--features` where Inception does not fit them.

    It learns to tell the classes of the images, by folders or dataset.json. Where there are none it learns by how many
    quarter turns an image was turned, and where images are not square, its weights are random. Scores by it, called
    fd_NAME, compare models of these images with each other, and with nothing published.

    Example: neon features real_images/ features.safetensors
    """

    images: tyro.conf.Positional[Path]
    """folder or zip of images of one size"""
    output: tyro.conf.Positional[Path]
    """file to write; ends in .safetensors"""
    task: Literal["auto", "classes", "rotation", "random"] = "auto"
    """what it learns; by default the first of these that the images allow"""
    dim: int = 64
    """number of features"""
    name: Annotated[str | None, tyro.conf.arg(metavar="NAME")] = None
    """the score is called fd_NAME; by default the name of the output"""
    total_images: int | None = None
    """how many images to train on, repeated ones included; by default four passes, but 25,600 to 240,000"""
    test: Annotated[Path | None, tyro.conf.arg(metavar="IMAGES")] = None
    """images to measure the accuracy on; by default a tenth of the others, which is left out of training"""
    seed: int = 0
    """of initial weights, the tenth and the order of images"""
    device: Device = None
    """by default a GPU where there is one"""
    overwrite: bool = False
    """replace an existing output"""

    def __call__(self) -> None:
        from neon.data.shards import open_images
        from neon.runtime.distributed import processes
        from neon.runtime.files import check_writable
        from neon.runtime.threads import use_threads

        name = self.checked_name()
        at_least_one(total_images=self.total_images)
        between(1, 16_384, dim=self.dim)
        between(0, 999_999, seed=self.seed)
        with processes(self.device) as group:
            if group.world_size > 1:
                raise RequestError("one process trains a small network; start it without torchrun")
            check_writable(self.output, overwrite=self.overwrite)
            dataset = open_images(self.images)
            task, why = self.choose(dataset)
            test = self.test_set(dataset, task)
            print(f"{TASKS[task]}{why and f': {why}'}", flush=True)
            extractor = self.drawn(name, dataset, task).to(group.device)
            use_threads(group.device, extractor)
            facts = {"task": task, "seed": str(self.seed)}
            if task == "random":
                self.scale(extractor, dataset)
            else:
                facts["accuracy"] = f"{self.train(extractor, dataset, test, task):.4f}"
            extractor.save(self.output, facts, overwrite=self.overwrite)
            print(f"{self.images} -> {self.output} ({self.dim} features; scores by them are called fd_{name})")

    def checked_name(self) -> str:
        """The name of the features; a RequestError if that cannot be one, or the output is no safetensors file."""
        from neon.metrics.reference import NETWORKS

        if self.output.suffix != ".safetensors":
            raise RequestError(f"{self.output}: features are written as safetensors; end the name in .safetensors")
        name = self.output.stem if self.name is None else self.name
        if not re.fullmatch(WORD, name) or name in NETWORKS:
            raise RequestError(
                f"--name {name}: becomes a part of the score's name, fd_NAME; expected up to 40 letters, digits, _ and "
                f"-, and not {' nor '.join(NETWORKS)}"
            )
        return name

    def choose(self, dataset: "TrainingImages") -> tuple[Task, str]:
        """What is learned of these images, and why nothing before it; a RequestError if they do not allow it."""
        if len(dataset) < FEWEST:
            raise RequestError(f"{dataset.path}: {len(dataset)} images are too few; expected at least {FEWEST}")
        _, height, width = dataset.image_shape
        no_classes = self.without_classes(dataset) if self.task in ("auto", "classes") else ""
        no_turns = "" if height == width else f"images of {width} x {height} pixels are not square"
        if self.task == "auto":
            if not no_classes:
                return "classes", ""
            return ("random", f"{no_classes}, and {no_turns}") if no_turns else ("rotation", no_classes)
        if self.task == "classes" and no_classes:
            raise RequestError(f"--task classes: {no_classes}; leave the flag out, to learn something else")
        if self.task == "rotation" and no_turns:
            raise RequestError(f"--task rotation: {dataset.path}: {no_turns}; crop them, or say --task random")
        return self.task, ""

    def without_classes(self, dataset: "TrainingImages") -> str:
        """Why there are no classes to learn; empty: there are some. A RequestError if files contradict each other."""
        try:
            labels = dataset.labels
        except RequestError as error:
            raise RequestError(f"{error}. Or say --task rotation, which needs no classes") from error
        if labels is None:
            return f"{dataset.path} has no classes"
        count = len(labels.unique())
        if count == 1:
            return f"{dataset.path} has one class only"
        if count * FEWEST_OF_A_CLASS > len(labels):
            return f"{dataset.path} has {count} classes of {len(labels)} images, too few of each to learn from"
        return ""

    def test_set(self, dataset: "TrainingImages", task: Task) -> "TrainingImages | None":
        """The images of `--test`; a RequestError if they cannot test what is learned of `dataset`."""
        from neon.data.shards import open_images

        if task == "random":
            for flag in ("test", "total_images"):
                if getattr(self, flag) is not None:
                    raise RequestError(f"--{flag}: random weights learn nothing from images; leave it out")
        if self.test is None:
            return None
        test = open_images(self.test)
        if test.image_shape != dataset.image_shape:
            raise RequestError(
                f"--test {self.test}: images of shape {test.image_shape} (C, H, W), those of {dataset.path} are "
                f"{dataset.image_shape}; expected the same"
            )
        if task == "classes":
            own, others = (set() if each.labels is None else set(each.labels.tolist()) for each in (test, dataset))
            if own != others:
                raise RequestError(
                    f"--test {self.test}: has {len(own) or 'no'} classes, not the {len(others)} of {dataset.path}; "
                    "expected images of each class, and of no other"
                )
        return test

    def drawn(self, name: str, dataset: "TrainingImages", task: Task) -> "SmallFeatures":
        """The network with the random weights of the seed."""
        import torch

        from neon.metrics.small import SmallFeatures, usual_stride

        answers = 1 if task == "random" else 4
        if task == "classes":
            assert dataset.labels is not None
            answers = len(dataset.labels.unique())
        torch.manual_seed(self.seed)
        shape = dataset.image_shape
        return SmallFeatures(name, shape, self.dim, answers, stride=usual_stride(shape))

    def scale(self, extractor: "SmallFeatures", dataset: "TrainingImages") -> None:
        """Let features of random weights vary over some of the images."""
        import torch

        some = torch.randperm(len(dataset))[:MOST_SCALED_BY]
        extractor.standardise(dataset.examples(some.tolist()).to(extractor.head.weight.device))

    def train(
        self, extractor: "SmallFeatures", dataset: "TrainingImages", test: "TrainingImages | None", task: Task
    ) -> float:
        """Train, then say the accuracy and return it."""
        import torch

        from neon.metrics.small import accuracy, classes_of, fit_classifier, quarter_turns

        lesson_of = classes_of if task == "classes" else quarter_turns
        places = torch.randperm(len(dataset))
        held_out = 0 if test is not None else len(places) // 10
        trained, asked = places[held_out:], places[:held_out] if test is None else torch.arange(len(test))
        total = self.total_images or min(max(PASSES * len(trained), LEAST_TRAINED), MOST_TRAINED)
        fit_classifier(extractor, lesson_of(dataset), trained, total / len(trained))
        right, chance = accuracy(extractor, lesson_of(dataset if test is None else test), asked)
        print(f"accuracy {right:.3f} on {len(asked):,} held-out images (chance {chance:.3f})")
        if right <= chance + 2 * math.sqrt(chance * (1 - chance) / len(asked)):
            warn(
                "these features have learned nothing that shows; scores by them say little: train on more images, "
                "longer (--total_images), or another task"
            )
        return right
