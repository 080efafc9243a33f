"""Train an xAR transformer: briefly on its own samples (Neon's self-training), or from scratch.

    torchrun --standalone --nproc_per_node=8 xAR/finetune.py --preset xar_base --model_ckpt xAR-B.pth \\
        --data synthetic.zip --outdir runs/self-training --precision fp16
    python xAR/finetune.py --data images.zip --outdir runs/base --pixel_patch 2 --grid 8 --width 64 --classes 10

Snapshots of the averaged weights, which are what Neon merges, appear at growing budgets; the raw weights lie beside
them. A killed run goes on where it was; on a CPU to the bits of one that was never killed, whatever the number
of processes.
"""

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from neon.cli.command_line import between, positive, run_program
from neon.cli.flags import AverageFlags, BudgetFlags, BudgetPlan, NetworkOfScratch, check_alternatives
from neon.cli.programs import TrainProgram
from neon.cli.refused import BUDGET, FIXED, LOADING, NO_EFFECT, RESUMED, TORCHRUN
from neon.errors import RequestError
from xAR.flags import NAMES, XARFlags

if TYPE_CHECKING:
    from neon.data.images import TrainingImages
    from neon.recipe import Recipe
    from neon.runtime.distributed import Processes
    from xAR.model import XARModel
    from xAR.recipe import XARRecipe


@dataclass(frozen=True, kw_only=True)
class XARPlan(BudgetPlan):
    """How long, how fast and in what batches to train."""

    batch: int = 256
    lr: float = 1e-6
    """learning rate at the end of the warm-up"""
    warmup_epochs: float
    """epochs, of the 30,000 images of the published set, over which the learning rate rises from 0"""
    total_images: int = 7_500_000
    save_interval: int = 250_000


# As in the published scripts; the paper tells of a warm-up over 7 million images for both.
PRESETS = {"xar_base": XARPlan(warmup_epochs=250), "xar_large": XARPlan(warmup_epochs=10_000)}


@dataclass(frozen=True, kw_only=True)
class XARScratchFlags(NetworkOfScratch):
    """From scratch (without --model_ckpt); --model gives width, heads and depth."""

    usual: ClassVar[Mapping[str, Any]] = {
        "pixel_patch": None, "width": 768, "heads": None, "depth": 8, "classes": 1000, "grid": 16,
    }  # fmt: skip

    pixel_patch: int | None = None
    """squares of this many pixels in place of latents, for small images"""
    width: int | None = None
    """channels; by default 768"""
    heads: int | None = None
    """attention heads; by default one per 64 channels"""
    depth: int | None = None
    """blocks in each half; by default 8"""
    classes: int | None = None
    """number of classes; by default 1000"""
    grid: int | None = None
    """side of the map of latents; by default 16"""


@dataclass(frozen=True, kw_only=True)
class TrainXAR(XARFlags, XARScratchFlags, AverageFlags, BudgetFlags, TrainProgram):
    """Train an xAR transformer: briefly on its own samples (--model_ckpt), or from scratch.

    Example: python xAR/finetune.py --preset xar_base --model_ckpt xAR-B.pth --data synthetic.zip --outdir runs/self
    """

    largest_micro_batch: ClassVar[int] = 32
    keeps_raw: ClassVar[bool] = True
    refused: ClassVar[Mapping[str, str]] = {
        "batch_size": "published per process; give --batch over all of them, or --batch_gpu per forward pass",
        **dict.fromkeys(("epochs", "start_epoch"), BUDGET),
        "blr": "give the learning rate itself: --lr",
        **dict.fromkeys(("min_lr", "lr_schedule", "label_drop_prob"), FIXED),
        **dict.fromkeys(("vae_embed_dim", "vae_stride", "patch_size"), FIXED),
        "class_num": "the checkpoint knows its classes; from scratch give --classes",
        "resume": RESUMED,
        "pin_mem": LOADING,
        **dict.fromkeys(("use_cached", "cached_path"), "encode images with xAR/encode.py and name the set with --data"),
        **dict.fromkeys(
            ("num_iter", "num_images", "cfg", "cfg_schedule", "eval_freq", "save_last_freq", "epoch_save_freq",
             "online_eval", "evaluate", "eval_bsz"),
            NO_EFFECT,
        ),
        **TORCHRUN,
    }  # fmt: skip

    preset: Literal["xar_base", "xar_large"] = "xar_base"
    """values of a published self-training"""
    lr: float | None = None
    """learning rate at the end of the warm-up"""
    warmup_epochs: float | None = None
    """the same as --lr_rampup in epochs of the set; 0: constant"""
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

    def check(self) -> None:
        super().check()
        check_alternatives(self, "warmup_epochs", "lr_rampup")
        between(0, 1, attn_dropout=self.attn_dropout, proj_dropout=self.proj_dropout)
        between(0, math.inf, weight_decay=self.weight_decay)
        positive(grad_clip=self.grad_clip)

    def dataset(self) -> "TrainingImages":
        """Images, or moments of their latents."""
        from neon.data.shards import images_or_examples
        from xAR.model import MOMENTS

        return images_or_examples(self.data, MOMENTS)

    def start(self, dataset: "TrainingImages", group: "Processes") -> "tuple[Path | None, XARModel]":
        if self.model_ckpt is None:
            return None, self.from_scratch(group)
        path, model = self.load(group, for_training=True, **self.arguments())
        transformer = model.config["transformer"]
        halves = {transformer["encoder_depth"], transformer["decoder_depth"]}
        depth = transformer["encoder_depth"] if len(halves) == 1 else None
        self.check_built_so(path, {**transformer, "depth": depth, "pixel_patch": model.config.get("pixel_patch")})
        return path, model

    def arguments(self) -> dict[str, Any]:
        """What the model is built with for training."""
        return {"mirrors": not self.no_mirror, "dropout": (self.attn_dropout, self.proj_dropout)}

    def plan(self, model: Any) -> XARPlan:
        return self.completed(PRESETS[self.preset], zero=["warmup_epochs"])

    def recipe(self, model: Any, plan: XARPlan, dataset: "TrainingImages") -> "XARRecipe":
        from xAR.recipe import PUBLISHED_SET, XARRecipe, images_in_batches

        per_epoch, published = (images_in_batches(count, plan.batch) for count in (len(dataset), PUBLISHED_SET))
        warmup = plan.warmup_epochs
        if self.model_ckpt is not None and self.warmup_epochs is None and per_epoch != published:
            warmup = warmup * published / per_epoch  # a preset's epochs are those of the published set
        return XARRecipe(
            batch_size=plan.batch,
            lr=plan.lr,
            warmup_epochs=warmup,
            images_per_epoch=per_epoch,
            weight_decay=self.weight_decay,
            max_norm=self.grad_clip,
            scale_losses=model.precision.name == "fp16",
            budget_images=PRESETS[self.preset].total_images,
        )

    def with_given(self, recipe: "Recipe") -> "Recipe":
        given: dict[str, Any] = {"warmup_epochs": self.warmup_epochs, "ema_rate": self.ema_rate}
        recipe = replace(recipe, **{name: value for name, value in given.items() if value is not None})
        return super().with_given(recipe)

    def facts(self, model: Any, group: "Processes") -> dict[str, Any]:
        dropout = [self.attn_dropout, self.proj_dropout]
        return {**super().facts(model, group), "dropout": dropout, "mirrors": not self.no_mirror}

    def from_scratch(self, group: "Processes") -> "XARModel":
        """A transformer with random weights, and its autoencoder if there is one."""
        from neon.model import initialised
        from xAR.model import XARModel

        channels = 16 if self.pixel_patch is None else 3 * self.pixel_patch**2
        if self.model not in (None, *NAMES):
            raise RequestError(f"--model {self.model}: unknown; expected one of {', '.join(NAMES)}")
        if self.model is not None:
            self.check_of_use(("width", "heads", "depth"), f"--model {self.model} says it")
        width, depth = self.scratch("width"), self.scratch("depth")
        size = {
            "width": width,
            "heads": max(width // 64, 1) if self.heads is None else self.heads,
            "encoder_depth": depth,
            "decoder_depth": depth,
        }
        transformer = {
            **(size if self.model is None else NAMES[self.model]),
            "classes": self.scratch("classes"),
            "latent_channels": channels,
            "grid": self.scratch("grid"),
        }
        config: dict[str, Any] = {"transformer": transformer}
        if self.pixel_patch is not None:
            config["pixel_patch"] = self.pixel_patch
        model = initialised(
            XARModel, config, self.seed, group.device, "change --width, --heads or --grid",
            precision=self.precision, tf32=self.tf32, **self.arguments(),
        )  # fmt: skip
        if not model.pixel_patch:
            model.use_autoencoder(self.autoencoder(group))
        return model


if __name__ == "__main__":
    sys.exit(run_program(TrainXAR))
