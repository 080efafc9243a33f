"""Train an xAR transformer: briefly on its own samples (Neon's self-training), or from scratch.

    torchrun --standalone --nproc_per_node=8 xAR/finetune.py --preset xar_base --model_ckpt xAR-B.pth \\
        --data synthetic.zip --outdir runs/self-training --precision fp16
    python xAR/finetune.py --data images.zip --outdir runs/base --pixel_patch 2 --grid 8 --width 64 --classes 10

Snapshots of the averaged weights, which are what Neon merges, appear at growing budgets; the raw weights lie beside
them. A killed run goes on where it was; on a CPU to the bits of one that was never killed, whatever the number
of processes.
"""

import sys
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
import tyro

from neon import __version__
from neon.cli.command_line import run_program
from neon.cli.flags import PRECISIONS
from neon.cli.training import Plan, TrainingFlags
from neon.data.encoded import ExampleSet, is_example_set
from neon.data.images import ImageDataset, TrainingImages
from neon.errors import RequestError
from neon.runtime.distributed import Processes, processes
from neon.runtime.files import sha256_file
from xAR.flags import ALIASES, NAMES, ModelFlags
from xAR.model import MOMENTS, XARModel
from xAR.published import PUBLISHED
from xAR.recipe import XARRecipe, images_in_batches

LARGEST_MICRO_BATCH = 32


@dataclass(frozen=True, kw_only=True)
class XARPlan(Plan):
    """How long, how fast and in what batches to train."""

    lr: float
    """learning rate at the end of the warm-up"""
    warmup_epochs: float
    """epochs over which the learning rate rises from 0"""
    total_images: int = 7_500_000
    save_interval: int = 250_000


# As published; the two differ in the length of the rise of the learning rate.
PRESETS = {
    name: XARPlan(batch=recipe.batch_size, lr=recipe.lr, warmup_epochs=recipe.warmup_epochs)
    for name, row in PUBLISHED.items()
    if row.neon is not None and (recipe := row.neon.recipe)
}


@dataclass(frozen=True, kw_only=True)
class ScratchFlags:
    """From scratch (without --model_ckpt); --model gives width, heads and depth."""

    pixel_patch: int | None = None
    """squares of this many pixels in place of latents, for small images"""
    width: int = 768
    """channels"""
    heads: int | None = None
    """attention heads; by default one per 64 channels"""
    depth: int = 8
    """blocks in each half"""
    classes: int = 1000
    """number of classes"""
    grid: int = 16
    """side of the map of latents"""


@dataclass(frozen=True, kw_only=True)
class Finetune(ModelFlags, TrainingFlags, ScratchFlags):
    """Train an xAR transformer: briefly on its own samples (--model_ckpt), or from scratch."""

    model_ckpt: Annotated[str | None, tyro.conf.arg(metavar="FILE|URL")] = None  # type: ignore[assignment]  # needed by the other programs
    """transformer to start from; without: random weights"""
    preset: Literal["xar_base", "xar_large"] = "xar_base"
    """values of a published self-training"""
    lr: float | None = None
    """learning rate at the end of the warm-up"""
    warmup_epochs: float | None = None
    """epochs over which the learning rate rises from 0; 0: constant"""
    ema_rate: float = 0.9999
    """decay per step of the averaged weights; 0: no averaging"""
    weight_decay: float = 0.02
    """of matrices"""
    grad_clip: float = 1.0
    """gradients are shortened to this global norm"""
    attn_dropout: float = 0.1
    """of attention, while training"""
    proj_dropout: float = 0.1
    """of what follows attention, while training"""
    no_mirror: bool = False
    """mirror no training images; published: half of them"""

    def __call__(self) -> None:
        plan = self.plan()
        with processes(self.device) as group:
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
            torch.backends.cudnn.benchmark = True
            base, model = (None, self.from_scratch(group)) if self.model_ckpt is None else self.load(group)
            model.mirrors = not self.no_mirror
            model.network.set_dropout(self.attn_dropout, self.proj_dropout)
            identity = {
                "neon": __version__,
                "base_sha256": None if base is None else group.on_main(lambda: sha256_file(base)),
                "config": model.config,
                "dropout": [self.attn_dropout, self.proj_dropout],
                "mirrors": model.mirrors,
                "data": str(self.data),
                **self.facts(group, model),
            }
            dataset = self.examples()
            self.run(
                model,
                dataset,
                plan,
                self.recipe(plan, len(dataset)),
                identity,
                group,
                largest_micro_batch=LARGEST_MICRO_BATCH,
                title="training" if base is None else "self-training",
                keep_raw=True,
            )

    def plan(self) -> XARPlan:
        """The preset, with what was given in its place; a RequestError for values that make no sense."""
        if not 0 <= self.ema_rate < 1:
            raise RequestError(f"--ema_rate {self.ema_rate}: expected 0 (no averaging) or more, below 1")
        return self.completed(PRESETS[self.preset], zero=["warmup_epochs"])

    def examples(self) -> TrainingImages:
        """What is trained on: images, or moments of their latents."""
        return ExampleSet(self.data, MOMENTS) if is_example_set(self.data) else ImageDataset(self.data)

    def from_scratch(self, group: Processes) -> XARModel:
        """A transformer with random weights, and its autoencoder if there is one."""
        channels = 16 if self.pixel_patch is None else 3 * self.pixel_patch**2
        if self.model not in (None, *NAMES):
            raise RequestError(f"--model {self.model}: unknown; expected one of {', '.join(NAMES)}")
        size = {
            "width": self.width,
            "heads": self.heads or max(self.width // 64, 1),
            "encoder_depth": self.depth,
            "decoder_depth": self.depth,
        }
        transformer = {
            **(size if self.model is None else NAMES[self.model]),
            "classes": self.classes,
            "latent_channels": channels,
            "grid": self.grid,
        }
        config: dict[str, Any] = {"transformer": transformer}
        if self.pixel_patch is not None:
            config["pixel_patch"] = self.pixel_patch
        torch.manual_seed(self.seed)
        try:
            model = XARModel(config).to(group.device)
        except ValueError as error:
            raise RequestError(
                f"no such transformer can be built ({error}); change --width, --heads or --grid"
            ) from error
        if not model.pixel_patch:
            model.use_autoencoder(self.autoencoder(group))
        model.precision = PRECISIONS[self.precision]
        return model

    def recipe(self, plan: XARPlan, num_images: int) -> XARRecipe:
        """How to train on a set of `num_images`."""
        return XARRecipe(
            batch_size=plan.batch,
            lr=plan.lr,
            warmup_epochs=plan.warmup_epochs,
            images_per_epoch=images_in_batches(num_images, plan.batch),
            weight_decay=self.weight_decay,
            max_norm=self.grad_clip,
            ema_rate=self.ema_rate,
            scale_losses=self.precision == "fp16",
        )


if __name__ == "__main__":
    sys.exit(run_program(Finetune, ALIASES))
