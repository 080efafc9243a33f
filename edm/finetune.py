"""Train an EDM network: briefly on its own samples (Neon's self-training), or from scratch on real images.

    torchrun --standalone --nproc_per_node=8 edm/finetune.py --preset cifar10-cond \\
        --transfer edm-cifar10-32x32-cond-vp.pkl --data synthetic.zip --outdir runs/self-training
    python edm/finetune.py --data images.zip --outdir runs/base --cond --cbase 32 --cres 1 1 --duration 0.5

Snapshots of the averaged weights appear at growing budgets, as safetensors and, if the starting network is a
published .pkl, as a copy of it with new weights. A killed run goes on where it was; on a CPU to the bits of
one that was never killed, whatever the number of processes.
"""

import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import tyro

from edm.flags import EDMFlags
from neon.cli.command_line import at_least_one, between, positive, run_program
from neon.cli.flags import NetworkOfScratch, Plan, Switch
from neon.cli.programs import TrainProgram
from neon.cli.refused import FIXED, LOADING, PLACE, RESUMED
from neon.errors import RequestError

if TYPE_CHECKING:
    from edm.model import EDM
    from neon.data.images import TrainingImages
    from neon.recipe import Recipe
    from neon.runtime.distributed import Processes

EMA_RAMPUP_RATIO = 0.05
"""from scratch, the half-life of the average is at most this share of the images seen"""


@dataclass(frozen=True, kw_only=True)
class EDMPlan(Plan):
    """How a published network was self-trained, or (the defaults) how one is trained from scratch."""

    conditional: bool | None = None
    """None: either"""
    batch: int = 512
    """images per step, over all processes"""
    lr: float = 1e-3
    """learning rate that the ramp leads to"""
    augment: float = 0.12
    """probability of the augmentations"""
    duration: float = 10.0
    """budget in million images"""
    tick: int = 50
    """thousand images per tick"""
    snap: int = 50
    """ticks per snapshot"""


_CIFAR = EDMPlan(lr=1e-4, duration=6, snap=10)
# Of the unconditional CIFAR-10 network only the scores are published: its preset is that of the conditional one.
PRESETS = {
    "cifar10-cond": replace(_CIFAR, conditional=True),
    "cifar10-uncond": replace(_CIFAR, conditional=False),
    "ffhq": EDMPlan(conditional=False, batch=256, lr=4e-6, augment=0.15, duration=3, snap=5),
}


def tick_steps(batch: int, duration: float, tick: float, snap: int) -> list[int]:
    """The steps after which the published loop saves a snapshot, ascending; the last is the end of training.

    A tick ends with the first step that completes `tick` thousand images since the last one ended; every
    `snap`-th tick from the first on is saved, and the end (`duration` million images).
    """
    steps_per_tick = max(-(-round(tick * 1000) // batch), 1)
    last = -(-round(duration * 1e6) // batch)
    return sorted({*range(steps_per_tick, last, steps_per_tick * snap), last})


@dataclass(frozen=True, kw_only=True)
class EDMScratchFlags(NetworkOfScratch):
    """From scratch (without --transfer)."""

    usual: ClassVar[Mapping[str, Any]] = {
        "arch": "ddpmpp", "precond": "edm", "cond": False, "label_dropout": 0.0, "fp16": False,
        **dict.fromkeys(("cbase", "cres", "num_blocks", "attn_resolutions")),
    }  # fmt: skip

    arch: Literal["ddpmpp", "ncsnpp", "adm"] | None = None
    """architecture; by default ddpmpp"""
    precond: Literal["edm", "vp", "ve"] | None = None
    """preconditioning and loss; by default edm"""
    cond: Switch = None
    """class-conditional; by default not"""
    cbase: int | None = None
    """channels of the first level"""
    cres: tuple[int, ...] | None = None
    """channels of each level, in multiples of the first"""
    num_blocks: int | None = None
    """residual blocks per level"""
    attn_resolutions: tuple[int, ...] | None = None
    """resolutions with attention"""
    label_dropout: float | None = None
    """share of images shown without their class, for guidance; by default none"""
    fp16: Switch = None
    """half precision on GPUs; by default not"""


@dataclass(frozen=True, kw_only=True)
class TrainEDM(EDMFlags, EDMScratchFlags, TrainProgram):
    """Train an EDM network: briefly on its own samples (--transfer), or from scratch.

    Example: python edm/finetune.py --preset cifar10-cond --transfer base.pkl --data synthetic.zip --outdir runs/self
    """

    refused: ClassVar[Mapping[str, str]] = {
        "xflip": "no mirrored copies are made of a set; --augment mirrors half of the images as it comes to them",
        "bench": FIXED,
        "cache": LOADING,
        **dict.fromkeys(("desc", "nosubdir"), PLACE),
        "dump": "say with --state_every how often, in seconds, the state is saved",
        "resume": RESUMED,
        **dict.fromkeys(("dry_run", "n"), "what is wrong with a request is said before any work; leave it out"),
    }

    schedule_unit: ClassVar[float] = 1000.0
    budget_flag: ClassVar[str] = "--duration"

    preset: Literal["cifar10-cond", "cifar10-uncond", "ffhq"] | None = None
    """values of a published self-training"""
    duration: Annotated[float | None, tyro.conf.arg(metavar="MIMG")] = None
    """budget in million images"""
    lr: float | None = None
    """learning rate that the ramp leads to"""
    lr_rampup: Annotated[float | None, tyro.conf.arg(metavar="MIMG")] = None
    """million images over which that rises from 0; 0: none. By default the published 10; a self-training of fewer
    images than published shortens it in proportion"""
    ema: Annotated[float | None, tyro.conf.arg(metavar="MIMG")] = None
    """half-life of averaged weights in million images; 0: none. By default the published 0.5, or shortened likewise"""
    augment: float | None = None
    """probability of the augmentations; 0: none"""
    dropout: float | None = None
    """while training; by default that of the network started from, else 0.13"""
    ls: float = 1.0
    """loss scaling, for half precision"""
    tick: Annotated[float | None, tyro.conf.arg(metavar="KIMG")] = None
    """thousand images per tick"""
    snap: int | None = None
    """ticks per snapshot"""
    max_size: int | None = None
    """train on a random subset of this many images"""

    def check(self) -> None:
        if self.preset and self.network_pkl is None:
            raise RequestError(f"--preset {self.preset}: is of a self-training; name the base network with --transfer")
        at_least_one(max_size=self.max_size)
        between(0, 1, dropout=self.dropout, label_dropout=self.label_dropout)
        positive(ls=self.ls)
        if self.budget(self.plan()) < 1:
            raise RequestError(f"--duration {self.duration}: is less than an image; it counts them in millions")

    def plan(self, model: Any = None) -> EDMPlan:
        return self.completed(PRESETS[self.preset] if self.preset else EDMPlan(), zero=["augment"])

    def budget(self, plan: EDMPlan) -> int:
        return round(plan.duration * 1e6)

    def snapshot_steps(self, plan: EDMPlan) -> list[int]:
        return tick_steps(plan.batch, plan.duration, plan.tick, plan.snap)

    def dataset(self) -> "TrainingImages":
        from neon.data.images import Subset
        from neon.data.shards import open_images

        dataset = open_images(self.data)
        return dataset if self.max_size is None else Subset(dataset, self.max_size, self.seed)

    def start(self, dataset: "TrainingImages", group: "Processes") -> "tuple[Path | None, EDM]":
        from edm.published import built_by
        from neon.data.augment import augmentation_for

        plan = self.plan()
        if self.network_pkl is None:
            return None, self.from_scratch(dataset, group, plan)
        path, model = self.load(group, for_training=True, dropout=self.dropout)
        if plan.conditional is not None and plan.conditional != (model.num_classes > 0):
            kind = "conditional" if plan.conditional else "unconditional"
            raise RequestError(f"--preset {self.preset}: is of a {kind} network, {self.network_pkl} is not one")
        # Not before: of a preset for another network it would say something else.
        model.augment = augmentation_for(model.network.model, plan.augment)
        self.check_built_so(path, built_by(model.config))
        return path, model

    def recipe(self, model: Any, plan: EDMPlan, dataset: "TrainingImages") -> "Recipe":
        return replace(
            model.recipe,
            batch_size=plan.batch,
            lr=plan.lr,
            lr_rampup_kimg=10_000.0,
            loss_scaling=self.ls,
            ema_halflife_kimg=500.0,
            ema_rampup_ratio=EMA_RAMPUP_RATIO if self.network_pkl is None else None,
            budget_images=self.budget(PRESETS[self.preset]) if self.preset else model.recipe.budget_images,
        )

    def facts(self, model: Any, group: "Processes") -> dict[str, Any]:
        plan = self.plan()
        return {
            **super().facts(model, group),
            "augment": plan.augment,
            "dropout": self.dropout,
            "max_size": self.max_size,
        }

    def from_scratch(self, dataset: "TrainingImages", group: "Processes", plan: EDMPlan) -> "EDM":
        """A network with random weights for the images of `dataset`."""
        from edm.model import EDM
        from edm.published import ARCHITECTURES
        from neon.data.augment import AUGMENT_DIM
        from neon.model import initialised

        channels, height, width = dataset.image_shape
        if height != width:
            raise RequestError(f"{self.data}: images of {width} x {height} pixels; expected square ones")
        classes = 0
        if self.cond:
            if dataset.labels is None:
                raise RequestError(f"{self.data}: no labels for --cond; expected dataset.json or a folder per class")
            classes = int(dataset.labels.max()) + 1
        given = {
            "model_channels": self.cbase,
            "channel_mult": self.cres,
            "num_blocks": self.num_blocks,
            "attn_resolutions": self.attn_resolutions,
        }
        network: dict[str, Any] = {
            "img_resolution": height,
            "img_channels": channels,
            "label_dim": classes,
            **ARCHITECTURES[self.scratch("arch")],
            **{name: list(v) if isinstance(v, tuple) else v for name, v in given.items() if v is not None},
            "dropout": 0.13 if self.dropout is None else self.dropout,
            "augment_dim": AUGMENT_DIM if plan.augment else 0,
            "use_fp16": self.scratch("fp16"),
        }
        precond = {"edm": "EDMPrecond", "vp": "VPPrecond", "ve": "VEPrecond"}[self.scratch("precond")]
        config = {"precond": precond, "network": network, "label_dropout": self.scratch("label_dropout")}
        advice = "change --cbase or --cres"
        return initialised(
            EDM, config, self.seed, group.device, advice, precision=self.precision, tf32=self.tf32, augment=plan.augment
        )


if __name__ == "__main__":
    sys.exit(run_program(TrainEDM))
