"""Flags that programs of class-conditional architectures share: how many images, of which classes and seed."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import torch
import tyro

from neon import __version__
from neon.cli.score import Sampling, ScoringFlags
from neon.data.encoded import encode_set
from neon.data.images import ImageDataset
from neon.errors import RequestError
from neon.model import GenerativeModel, load_model
from neon.noise import Purpose, image_seeds
from neon.runtime.distributed import Processes
from neon.runtime.files import sha256_file
from neon.sampling import Label, balanced_labels, sample_set

PRECISIONS: dict[str, torch.dtype | None] = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
"""what `--precision` computes in, under autocast; None: float32, without"""

SomeModel = TypeVar("SomeModel", bound=GenerativeModel)


@dataclass(frozen=True, kw_only=True)
class EncodeFlags:
    """Encoding: images, and the set of tokens or latents that is made of them."""

    data: Path
    """folder or zip of images"""
    outdir: Path
    """folder of what they are encoded as"""
    batch_size: int = 64
    """images per forward pass of one process"""
    fresh: bool = False
    """replace what the output holds"""
    device: Literal["cpu", "cuda"] | None = None
    """by default a GPU where there is one"""

    def write(
        self,
        encode: Callable[[torch.Tensor], torch.Tensor],
        *,
        kind: str,
        side: int,
        identity: dict[str, Any],
        processes: Processes,
    ) -> None:
        """Encode all images, which must be 3 x `side` x `side`, into `outdir`; arguments as those of `encode_set`."""
        if self.batch_size < 1:
            raise RequestError(f"--batch_size {self.batch_size}: expected at least 1")
        encode_set(
            encode,
            ImageDataset(self.data),
            self.outdir,
            kind=kind,
            image_shape=(3, side, side),
            batch_size=self.batch_size,
            processes=processes,
            identity={"neon": __version__, **identity},
            fresh=self.fresh,
        )


@dataclass(frozen=True, kw_only=True)
class NetworkFlags:
    """The network; the flag that names it is the architecture's."""

    img_size: int | None = None
    """side of the images; checked against the checkpoint"""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """what networks compute in; VAR and xAR published: fp16"""
    key: Annotated[str | None, tyro.conf.arg(metavar="KEY")] = None
    """nesting of the state dict in the checkpoint; chosen if not given"""
    device: Literal["cpu", "cuda"] | None = None
    """by default a GPU where there is one"""

    def open(self, path: Path, kind: type[SomeModel], processes: Processes) -> SomeModel:
        """The model of checkpoint `path`; a RequestError if it is not of architecture `kind`."""
        model = load_model(path, self.key, device=processes.device)
        if not isinstance(model, kind):
            raise RequestError(f"{path}: a network of {model.architecture}; this program is for {kind.architecture}")
        return model

    def check_side(self, path: Path, model: GenerativeModel) -> None:
        """A RequestError if the images of `model` are not of `--img_size`."""
        side = model.image_shape[-1]
        if self.img_size not in (None, side):
            raise RequestError(f"--img_size {self.img_size}: {path} makes images of {side} pixels; leave the flag out")


@dataclass(frozen=True, kw_only=True)
class NumberedImages:
    """Images; they are numbered from 0, each with a generator of its own."""

    num_images: int
    """how many; every class equally often"""
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

    def labels(self, model: GenerativeModel) -> Label:
        """The class of each image."""
        if self.class_ is not None or model.num_classes == 0:
            return self.class_
        return balanced_labels(self.num_images, model.num_classes, self.seed)


@dataclass(frozen=True, kw_only=True)
class SampledImages(NumberedImages):
    """Output: numbered images of a network, a synthetic set."""

    outdir: Path
    """folder of the images, or a name that ends in .zip"""
    fresh: bool = False
    """replace what the output holds"""

    def identity(self, path: Path, settings: Any, facts: dict[str, Any], processes: Processes) -> dict[str, Any]:
        """What determines the set, as JSON: the network of checkpoint `path`, the sampler's `settings`, `facts`."""
        return {
            "neon": __version__,
            "network_sha256": processes.on_main(lambda: sha256_file(path)),
            "num_images": self.num_images,
            "seed": self.seed,
            "class": self.class_,
            "batch_size": self.batch_size,
            "settings": asdict(settings),
            **facts,
        }

    def write(self, model: GenerativeModel, settings: Any, identity: dict[str, Any], processes: Processes) -> None:
        """Sample the set into `outdir`, or what is missing of it."""
        sample_set(
            model,
            self.seeds(Purpose.SYNTHETIC),
            settings,
            self.outdir,
            batch_size=self.batch_size,
            processes=processes,
            identity=identity,
            label=self.labels(model),
            fresh=self.fresh,
        )
        if processes.is_main:
            print(f"{self.outdir}: {self.num_images} images")


@dataclass(frozen=True, kw_only=True)
class ScoredImages(NumberedImages, ScoringFlags):
    """Scored images: numbered, against real ones."""

    images_for: Literal["report", "selection"] = "report"
    """selection: others, to choose w or cfg with"""

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


def settings_with(default: Any, pairs: Sequence[str]) -> Any:
    """The sampler's settings `default` with `name=value` pairs in their place.

    Raises:
        RequestError: no such setting, or a value that makes no sense for it.
    """
    known = {field.name: getattr(default, field.name) for field in dataclasses.fields(default)}
    given: dict[str, Any] = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals or name not in known:
            raise RequestError(f"--set {pair}: expected NAME=VALUE with a NAME of {', '.join(known)}")
        given[name] = _parsed(pair, text, known[name])
    try:
        return replace(default, **given)
    except ValueError as error:
        raise RequestError(f"--set: {error}") from error


def _parsed(pair: str, text: str, like: Any) -> Any:
    """`text` as a value of the type of `like`."""
    if isinstance(like, bool):
        if text.lower() not in ("true", "false"):
            raise RequestError(f"--set {pair}: expected true or false")
        return text.lower() == "true"
    if isinstance(like, tuple):
        return tuple(_parsed(pair, part, 0.0) for part in text.split(",") if part)
    try:
        return type(like)(text)
    except (TypeError, ValueError):
        raise RequestError(f"--set {pair}: expected a value such as {like!r}") from None
