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
from dataclasses import dataclass
from typing import Annotated, Literal

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
from VAR.flags import ALIASES, ModelFlags
from VAR.model import TOKENS, VARModel, load_tokenizer
from VAR.preprocess import ENLARGEMENT
from VAR.recipe import VARRecipe

LARGEST_MICRO_BATCH = 96


@dataclass(frozen=True, kw_only=True)
class VARPlan(Plan):
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
class ScratchFlags:
    """From scratch (without --var_ckpt)."""

    depth: int = 16
    """blocks"""
    width: int | None = None
    """channels; by default 64 times the depth"""
    heads: int | None = None
    """attention heads; by default one per 64 channels"""
    classes: int = 1000
    """number of classes"""
    patch_nums: tuple[int, ...] = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
    """side lengths of the scales"""
    shared_adaln: bool = False
    """one modulation for all blocks"""


@dataclass(frozen=True, kw_only=True)
class Finetune(ModelFlags, TrainingFlags, ScratchFlags):
    """Train a VAR transformer: briefly on its own samples (--var_ckpt), or from scratch."""

    var_ckpt: Annotated[str | None, tyro.conf.arg(metavar="FILE|URL")] = None  # type: ignore[assignment]  # needed by the other programs
    """transformer to start from; without: random weights"""
    preset: Literal["d16", "d36"] = "d16"
    """values of a published self-training for what is not given"""
    target_lr: float | None = None
    """what the learning rate rises to over the whole run"""
    constant_lr: bool = False
    """keep the learning rate at its target from the first step on"""
    mid_reso: float = ENLARGEMENT
    """enlargement of training images before they are cropped; 1: none"""
    weight_decay: float = 0.0
    """of matrices; the published self-training has none"""

    def __call__(self) -> None:
        plan = self.plan()
        with processes(self.device) as group:
            # As published: matrix multiplications in TF32.
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
            torch.backends.cudnn.benchmark = True
            base, model = (None, self.from_scratch(group)) if self.var_ckpt is None else self.load(group)
            identity = {
                "neon": __version__,
                "base_sha256": None if base is None else group.on_main(lambda: sha256_file(base)),
                "config": model.config,
                **self.facts(group),
                "mid_reso": self.mid_reso,
                "data": str(self.data),
            }
            model.enlargement = self.mid_reso
            recipe = VARRecipe(
                batch_size=plan.batch,
                lr=plan.target_lr,
                total_images=0 if self.constant_lr else plan.total_images,
                weight_decay=self.weight_decay,
                scale_losses=self.precision == "fp16",
            )
            self.run(
                model,
                self.examples(),
                plan,
                recipe,
                identity,
                group,
                largest_micro_batch=LARGEST_MICRO_BATCH,
                title="training" if base is None else "self-training",
            )

    def plan(self) -> VARPlan:
        """The preset, with what was given in its place; a RequestError for values that make no sense."""
        if not 1 <= self.mid_reso < math.inf:
            raise RequestError(f"--mid_reso {self.mid_reso}: expected 1 or more")
        return self.completed(PRESETS[self.preset])

    def examples(self) -> TrainingImages:
        """What is trained on: images, or tokens."""
        return ExampleSet(self.data, TOKENS) if is_example_set(self.data) else ImageDataset(self.data)

    def from_scratch(self, group: Processes) -> VARModel:
        """A transformer with random weights, and its tokenizer."""
        path = self.tokenizer(group)
        tokenizer = load_tokenizer(path, self.patch_nums)
        vocab, code_channels = tokenizer.quantize.embedding.weight.shape
        width = self.width or 64 * self.depth
        transformer = {
            "classes": self.classes,
            "depth": self.depth,
            "width": width,
            "heads": self.heads or max(width // 64, 1),
            "patch_nums": list(self.patch_nums),
            "shared_adaln": self.shared_adaln,
            "vocab": vocab,
            "code_channels": code_channels,
        }
        torch.manual_seed(self.seed)
        try:
            model = VARModel({"transformer": transformer}).to(group.device)
        except ValueError as error:
            raise RequestError(f"no such transformer can be built ({error}); change --width or --heads") from error
        model.set_tokenizer(tokenizer)
        model.precision = PRECISIONS[self.precision]
        return model


if __name__ == "__main__":
    sys.exit(run_program(Finetune, ALIASES))
