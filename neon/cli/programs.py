"""`neon sample`, `neon selftrain` and `neon evaluate`: for the network of any architecture, of your own too.

The programs of EDM, VAR, xAR and IMM do the same with the flags and the settings that were published for them.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from neon import __version__
from neon.cli.flags import NumberedImages, SampledImages, ScoredImages, settings_with
from neon.cli.score import score_network
from neon.cli.training import Plan, TrainingFlags
from neon.data.images import ImageDataset
from neon.errors import RequestError
from neon.model import GenerativeModel, code_file, load_model, open_autoencoder
from neon.recipe import Recipe
from neon.runtime.distributed import Processes, processes
from neon.runtime.download import shared_file
from neon.runtime.files import sha256_file
from neon.sampling import Label, check_enough, check_label

LARGEST_MICRO_BATCH = 64


@dataclass(frozen=True, kw_only=True)
class ModelFlags:
    """The network."""

    network: Annotated[str, tyro.conf.arg(metavar="FILE|URL")]
    """the network: a checkpoint"""
    model: Annotated[str | None, tyro.conf.arg(metavar="FILE.py:NAME")] = None
    """the class of a model of your own; by default as the checkpoint says"""
    vae: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """autoencoder or tokenizer; by default where it usually lies"""
    key: Annotated[str | None, tyro.conf.arg(metavar="KEY")] = None
    """nesting of the state dict in checkpoints, such as ema; chosen if not given"""
    device: Literal["cpu", "cuda"] | None = None
    """by default a GPU where there is one"""

    def load(self, group: Processes) -> tuple[Path, GenerativeModel]:
        """The checkpoint's path and its model, with the autoencoder; a RequestError if they do not fit."""
        path = shared_file(self.network, group)
        model = load_model(path, self.key, device=group.device, kind=self.model)
        open_autoencoder(model, self.vae)
        return path, model

    def facts(self, model: GenerativeModel, group: Processes) -> dict[str, Any]:
        """What, besides network and settings, determines images and training, as JSON."""
        files = {"model_sha256": code_file(self.model), "autoencoder_sha256": model.autoencoder_file(self.vae)}
        return group.on_main(
            lambda: {name: None if path is None else sha256_file(path) for name, path in files.items()}
        )


@dataclass(frozen=True, kw_only=True)
class ImageFlags(ModelFlags, NumberedImages):
    """Sampler."""

    num_images: int = field()
    """how many"""
    set: Annotated[list[str], tyro.conf.arg(metavar="NAME=VALUE ..")] = field(default_factory=list)
    """settings of the sampler, in place of the model's default_settings"""
    class_: Annotated[int | None, tyro.conf.arg(name="class")] = None
    """class of every image; by default by the rule of the model"""

    def labels(self, model: GenerativeModel) -> Label:
        """The class of each image; None: by the rule of the model."""
        return self.class_

    def start(self, group: Processes) -> tuple[Path, GenerativeModel, Any]:
        """The checkpoint's path, its model and the sampler's settings; a RequestError if flags and files disagree."""
        self.check()
        check_enough(self.num_images, group)
        path, model = self.load(group)
        check_label(model, self.class_)
        return path, model, settings_with(model.default_settings, self.set)


@dataclass(frozen=True, kw_only=True)
class Sample(ImageFlags, SampledImages):
    """Sample images of a network into a PNG folder or a zip, with their classes: the synthetic set S.

    A killed run goes on where it was. Under `torchrun -m neon.cli sample ...` the images are the same.

    Example: neon sample --network neon/demo/base.safetensors --num_images 1000 --outdir synthetic.zip --set num_steps=5
    """

    def __call__(self) -> None:
        with processes(self.device) as group:
            path, model, settings = self.start(group)
            self.write(model, settings, self.identity(path, settings, self.facts(model, group), group), group)


@dataclass(frozen=True, kw_only=True)
class Selftrain(ModelFlags, TrainingFlags):
    """Train a network briefly on its own samples, by the model's recipe; snapshots are what Neon merges.

    A killed run goes on where it was; on a CPU to the bits of one that was never killed, whatever the number of
    processes (`torchrun -m neon.cli selftrain ...`).

    Example: neon selftrain --network neon/demo/base.safetensors --data synthetic.zip --outdir runs/self
    --total_images 6400
    """

    total_images: int = field()
    """budget"""
    save_interval: int | None = None
    """images between snapshots; by default there is one, at the end"""
    batch: int | None = None
    """images per step, over all processes; by default as the recipe says"""
    lr: float | None = None
    """learning rate; by default as the recipe says"""

    def __call__(self) -> None:
        dataset = ImageDataset(self.data)
        with processes(self.device) as group:
            path, model = self.load(group)
            plan = self.completed(
                Plan(batch=model.recipe.batch_size, total_images=self.total_images, save_interval=self.total_images)
            )
            identity = {
                "neon": __version__,
                "base_sha256": group.on_main(lambda: sha256_file(path)),
                "config": model.config,
                "data": str(self.data),
                **self.facts(model, group),
            }
            self.run(
                model,
                dataset,
                plan,
                self.recipe(model.recipe, plan),
                identity,
                group,
                largest_micro_batch=LARGEST_MICRO_BATCH,
                title="self-training",
            )

    def recipe(self, usual: Recipe, plan: Plan) -> Recipe:
        """The model's recipe, with what was given in its place."""
        try:
            return replace(usual, batch_size=plan.batch, lr=usual.lr if self.lr is None else self.lr)
        except ValueError as error:
            raise RequestError(f"--lr: {error}") from error


@dataclass(frozen=True, kw_only=True)
class Evaluate(ImageFlags, ScoredImages):
    """FID, Inception Score, precision and recall of a network, or of merges of two.

    Example: neon evaluate --network neon/demo/base.safetensors --ref neon/demo/test-statistics.npz
    --features neon/demo/features.safetensors --num_images 2000 --set num_steps=5 solver=euler
    """

    def __call__(self) -> None:
        with processes(self.device) as group:
            path, model, settings = self.start(group)
            sampling = self.sampling(model, settings, self.facts(model, group))
            score_network(path, model, sampling, self, group)
