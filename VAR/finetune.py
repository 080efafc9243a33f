"""Train a VAR transformer: briefly on its own samples (Neon's self-training), or from scratch.

    torchrun --standalone --nproc_per_node=8 VAR/finetune.py --preset d16 --var_ckpt var_d16.pth \\
        --data synthetic --outdir runs/self-training --precision fp16
    python VAR/finetune.py --vae_ckpt tokenizer.safetensors --data images.zip --outdir runs/base --depth 4 --classes 10

--data is a folder or zip of images, or a set of tokens made by `VAR/sample.py --tokens`. Snapshots of the weights
appear at growing budgets. A killed run goes on where it was; on a CPU to the bits of one that was never killed,
whatever the number of processes.
"""

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import tyro

from neon.cli.command_line import between, run_program
from neon.cli.flags import BudgetFlags, BudgetPlan, NetworkOfScratch, check_alternatives
from neon.cli.programs import TrainProgram
from neon.cli.refused import FIXED, NO_EFFECT, PLACE
from neon.errors import RequestError
from VAR.flags import VARFlags
from VAR.settings import ENLARGEMENT

if TYPE_CHECKING:
    from neon.data.images import TrainingImages
    from neon.recipe import Recipe
    from neon.runtime.distributed import Processes
    from VAR.model import VARModel
    from VAR.recipe import VARRecipe


@dataclass(frozen=True, kw_only=True)
class VARPlan(BudgetPlan):
    """How long, how fast and in what batches to train; by default as the published d16 was self-trained."""

    batch: int = 768
    target_lr: float = 1e-5
    """what the learning rate rises to over the whole run"""
    total_images: int = 7_500_000
    """budget, and the length of the rise"""
    save_interval: int = 250_000


PRESETS = {
    "d16": VARPlan(),
    "d36": VARPlan(batch=24, target_lr=1e-6, total_images=3_001_000, save_interval=200_000),
}


@dataclass(frozen=True, kw_only=True)
class VARScratchFlags(NetworkOfScratch):
    """From scratch (without --var_ckpt)."""

    usual: ClassVar[Mapping[str, Any]] = {
        "depth": 16, "width": None, "heads": None, "classes": 1000,
        "patch_nums": (1, 2, 3, 4, 5, 6, 8, 10, 13, 16), "shared_adaln": False,
    }  # fmt: skip

    depth: int | None = None
    """blocks; by default 16"""
    width: int | None = None
    """channels; by default 64 times the depth"""
    heads: int | None = None
    """attention heads; by default one per 64 channels"""
    classes: int | None = None
    """number of classes; by default 1000"""
    patch_nums: tuple[int, ...] | None = None
    """side lengths of the scales; by default the published of 256 pixels: 1 2 3 4 5 6 8 10 13 16"""
    shared_adaln: Annotated[bool | None, tyro.conf.arg(aliases=["--saln"], metavar="[0|1]")] = None
    """one modulation for all blocks; by default one for each"""


@dataclass(frozen=True, kw_only=True)
class TrainVAR(VARFlags, VARScratchFlags, BudgetFlags, TrainProgram):
    """Train a VAR transformer: briefly on its own samples (--var_ckpt), or from scratch.

    Example: python VAR/finetune.py --preset d16 --var_ckpt var_d16.pth --data synthetic --outdir runs/self-training
    """

    largest_micro_batch: ClassVar[int] = 96
    refused: ClassVar[Mapping[str, str]] = {
        **dict.fromkeys(("exp_name", "local_out_dir_path"), PLACE),
        **dict.fromkeys(("ini", "hd", "aln", "alng", "ep", "wp", "wp0", "wpe", "sche", "twd", "twde"), NO_EFFECT),
        **dict.fromkeys(("tblr", "tlr"), "give what the learning rate rises to: --target_lr"),
        **dict.fromkeys(("tclip", "opt", "afuse", "anorm", "fuse", "patch_size", "hflip"), FIXED),
        **dict.fromkeys(("pg", "pg0", "pgwp", "ls", "vfast", "tfast"), "it is not built here; leave it out"),
        "ac": "say with --batch_gpu how many images a forward pass takes",
        "fp16": "choose with --precision: fp16 (published 1), bf16 (2) or fp32 (0)",
        "pn": "the scales come from the checkpoint; from scratch give --patch_nums",
        "resume": "name the transformer to start from with --var_ckpt; the same command goes on where a run was killed",
        "same_seed_for_all_ranks": "noise belongs to images, not to processes; leave it out",
    }

    preset: Literal["d16", "d36"] = "d16"
    """values of a published self-training for what is not given"""
    target_lr: Annotated[float | None, tyro.conf.arg(aliases=["--lr"])] = None
    """what the learning rate rises to over the whole run"""
    constant_lr: bool = False
    """keep the learning rate at its target from the first step on"""
    mid_reso: float = ENLARGEMENT
    """enlargement of training images before they are cropped; 1: none"""
    weight_decay: float = 0.0
    """of matrices; the published self-training has none"""

    def check(self) -> None:
        if not 1 <= self.mid_reso < math.inf:
            raise RequestError(f"--mid_reso {self.mid_reso}: expected 1 or more")
        check_alternatives(self, "constant_lr", "lr_rampup")
        between(0, math.inf, weight_decay=self.weight_decay)

    def dataset(self) -> "TrainingImages":
        """Images, or tokens."""
        from neon.data.shards import images_or_examples
        from VAR.model import TOKENS

        return images_or_examples(self.data, TOKENS)

    def start(self, dataset: "TrainingImages", group: "Processes") -> "tuple[Path | None, VARModel]":
        if self.var_ckpt is None:
            return None, self.from_scratch(group)
        path, model = self.load(group, for_training=True, enlargement=self.mid_reso)
        self.check_built_so(path, model.config["transformer"])
        return path, model

    def plan(self, model: Any) -> VARPlan:
        return self.completed(PRESETS[self.preset])

    def recipe(self, model: Any, plan: VARPlan, dataset: "TrainingImages") -> "VARRecipe":
        from VAR.recipe import VARRecipe

        # As published the learning rate rises over the whole run, which a self-training shortens to.
        published = PRESETS[self.preset].total_images
        return VARRecipe(
            batch_size=plan.batch,
            lr=plan.target_lr,
            total_images=plan.total_images if self.var_ckpt is None else max(plan.total_images, published),
            weight_decay=self.weight_decay,
            scale_losses=model.precision.name == "fp16",
            budget_images=published,
        )

    def with_given(self, recipe: "Recipe") -> "Recipe":
        return super().with_given(recipe.with_rampup(0) if self.constant_lr else recipe)

    def facts(self, model: Any, group: "Processes") -> dict[str, Any]:
        return {**super().facts(model, group), "mid_reso": self.mid_reso}

    def from_scratch(self, group: "Processes") -> "VARModel":
        """A transformer with random weights, and its tokenizer."""
        from neon.model import initialised
        from VAR.model import VARModel, load_tokenizer

        path = self.tokenizer(group)
        tokenizer = load_tokenizer(path, self.scratch("patch_nums"))
        vocab, code_channels = tokenizer.quantize.embedding.weight.shape
        depth = self.scratch("depth")
        width = 64 * depth if self.width is None else self.width
        transformer = {
            "classes": self.scratch("classes"),
            "depth": depth,
            "width": width,
            "heads": max(width // 64, 1) if self.heads is None else self.heads,
            "patch_nums": list(self.scratch("patch_nums")),
            "shared_adaln": self.scratch("shared_adaln"),
            "vocab": vocab,
            "code_channels": code_channels,
        }
        model = initialised(
            VARModel, {"transformer": transformer}, self.seed, group.device, "change --width or --heads",
            precision=self.precision, tf32=self.tf32, enlargement=self.mid_reso,
        )  # fmt: skip
        model.set_tokenizer(tokenizer)
        return model


if __name__ == "__main__":
    sys.exit(run_program(TrainVAR))
