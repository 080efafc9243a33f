"""Train an EDM network: briefly on its own samples (Neon's self-training), or from scratch on real images.

    torchrun --standalone --nproc_per_node=8 edm/finetune.py --preset cifar10-cond \\
        --transfer edm-cifar10-32x32-cond-vp.pkl --data synthetic.zip --outdir runs/self-training
    python edm/finetune.py --data images.zip --outdir runs/base --cond --cbase 32 --cres 1 1 --duration 0.5

Snapshots of the averaged weights appear at growing budgets, as safetensors and, if the starting network is a
published .pkl, as a copy of it with new weights. A killed run goes on where it was; on a CPU to the bits of
one that was never killed, whatever the number of processes.
"""

import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro

from edm.model import EDM
from edm.published import architecture_keywords
from neon import __version__
from neon.cli.command_line import run_program
from neon.cli.training import pickle_copies
from neon.data.augment import AUGMENT_DIM, augmentation_for
from neon.data.images import ImageDataset, Subset, TrainingImages
from neon.errors import RequestError
from neon.model import load_model
from neon.nn.unet import UNetBlock
from neon.runtime.distributed import Processes, processes
from neon.runtime.download import shared_file
from neon.runtime.files import sha256_file
from neon.selftrain import largest_divisor, train_in_folder

ALIASES = {"--batch-gpu": "--batch_gpu", "--ref": "--transfer"}
LARGEST_MICRO_BATCH = 64
EMA_RAMPUP_RATIO = 0.05
"""from scratch, the half-life of the average is at most this share of the images seen"""


@dataclass(frozen=True, kw_only=True)
class Preset:
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


_CIFAR = Preset(lr=1e-4, duration=6, snap=10)
# Of the unconditional CIFAR-10 network only the scores are published: its preset is that of the conditional one.
PRESETS = {
    "cifar10-cond": replace(_CIFAR, conditional=True),
    "cifar10-uncond": replace(_CIFAR, conditional=False),
    "ffhq": Preset(conditional=False, batch=256, lr=4e-6, augment=0.15, duration=3, snap=5),
}


def snapshot_steps(batch: int, duration: float, tick: float, snap: int) -> list[int]:
    """The steps after which the published loop saves a snapshot, ascending; the last is the end of training.

    A tick ends with the first step that completes `tick` thousand images since the last one ended; every
    `snap`-th tick from the first on is saved, and the end (`duration` million images).
    """
    steps_per_tick = -(-round(tick * 1000) // batch)
    last = -(-round(duration * 1e6) // batch)
    return sorted({*range(steps_per_tick, last, steps_per_tick * snap), last})


@dataclass(frozen=True, kw_only=True)
class ScratchFlags:
    """From scratch (without --transfer)."""

    arch: Literal["ddpmpp", "ncsnpp", "adm"] = "ddpmpp"
    """architecture"""
    precond: Literal["edm", "vp", "ve"] = "edm"
    """preconditioning and loss"""
    cond: bool = False
    """class-conditional"""
    cbase: int | None = None
    """channels of the first level"""
    cres: tuple[int, ...] | None = None
    """channels of each level, in multiples of the first"""
    num_blocks: int | None = None
    """residual blocks per level"""
    attn_resolutions: tuple[int, ...] | None = None
    """resolutions with attention"""
    label_dropout: float = 0.0
    """share of images shown without their class, for guidance"""
    fp16: bool = False
    """half precision on GPUs"""


@dataclass(frozen=True, kw_only=True)
class Finetune(ScratchFlags):
    """Train an EDM network: briefly on its own samples (--transfer), or from scratch."""

    data: Path
    """folder or zip of training images, with dataset.json if conditional"""
    outdir: Path
    """folder of snapshots, log and state"""
    transfer: Annotated[str | None, tyro.conf.arg(metavar="FILE|URL")] = None
    """network to start from; without: random weights"""
    preset: Literal["cifar10-cond", "cifar10-uncond", "ffhq"] | None = None
    """values of a published self-training"""
    duration: Annotated[float | None, tyro.conf.arg(metavar="MIMG")] = None
    """budget in million images"""
    batch: int | None = None
    """images per step, over all processes"""
    batch_gpu: int | None = None
    """images per forward pass; it moves results by rounding (and dropout)"""
    lr: float | None = None
    """learning rate that the ramp leads to"""
    lr_rampup: Annotated[float, tyro.conf.arg(metavar="MIMG")] = 10.0
    """million images over which that rises from 0"""
    ema: Annotated[float, tyro.conf.arg(metavar="MIMG")] = 0.5
    """half-life of averaged weights in million images; 0: none"""
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
    state_every: Annotated[float, tyro.conf.arg(metavar="SECONDS")] = 300.0
    """how often the state of the run is saved"""
    seed: int = 0
    """of initial weights, data order and noise"""
    max_size: int | None = None
    """train on a random subset of this many images"""
    key: Annotated[str | None, tyro.conf.arg(metavar="KEY")] = None
    """nesting of the state dict in checkpoints, such as ema; chosen if not given"""
    fresh: bool = False
    """start anew, replacing a run that is in the folder"""
    device: Literal["cpu", "cuda"] | None = None
    """by default a GPU where there is one"""

    def __call__(self) -> None:
        plan = self.plan()
        dataset = self.images()
        with processes(self.device) as group:
            # As published: training in full float32.
            torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
            torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
            torch.backends.cudnn.benchmark = True
            base = None if self.transfer is None else shared_file(self.transfer, group)
            model = self.from_scratch(dataset, group) if base is None else self.started_from(base, group)
            if plan.conditional is not None and plan.conditional != (model.num_classes > 0):
                kind = "conditional" if plan.conditional else "unconditional"
                raise RequestError(f"--preset {self.preset}: is of a {kind} network, {self.transfer} is not one")
            model.augment = augmentation_for(model.network.model, plan.augment)
            identity = {
                "neon": __version__,
                "base_sha256": None if base is None else group.on_main(lambda: sha256_file(base)),
                "config": model.config,
                "augment": plan.augment,
                "dropout": self.dropout,
                "data": str(self.data),
                "max_size": self.max_size,
            }
            self.train(model, dataset, plan, base, identity, group)

    def plan(self) -> Preset:
        """The preset, with what was given in its place; a RequestError for values that make no sense."""
        preset = PRESETS[self.preset] if self.preset else Preset()
        names = ("batch", "lr", "augment", "duration", "tick", "snap")
        given = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        plan = replace(preset, **given)
        for name in ("batch", "lr", "duration", "tick", "snap", "state_every"):
            value = getattr(plan, name, getattr(self, name, None))
            if value is None or not value > 0:
                raise RequestError(f"--{name} {value}: expected a positive number")
        if self.preset and self.transfer is None:
            raise RequestError(f"--preset {self.preset}: is of a self-training; name the base network with --transfer")
        return plan

    def images(self) -> TrainingImages:
        """The training images."""
        dataset: TrainingImages = ImageDataset(self.data)
        if self.max_size is None:
            return dataset
        if self.max_size < 1:
            raise RequestError(f"--max_size {self.max_size}: expected at least 1")
        return Subset(dataset, self.max_size, self.seed)

    def started_from(self, base: Path, group: Processes) -> EDM:
        """The network of checkpoint `base`, ready to be trained on."""
        model = load_model(base, self.key, device=group.device)
        if not isinstance(model, EDM):
            raise RequestError(f"{base}: a network of {model.architecture}; this program trains edm networks")
        if self.dropout is not None:
            for module in model.modules():
                if isinstance(module, UNetBlock):
                    module.dropout = self.dropout
        return model

    def from_scratch(self, dataset: TrainingImages, group: Processes) -> EDM:
        """A network with random weights for the images of `dataset`."""
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
            **architecture_keywords(self.arch),
            **{name: value if isinstance(value, int) else list(value) for name, value in given.items() if value},
            "dropout": 0.13 if self.dropout is None else self.dropout,
            "augment_dim": AUGMENT_DIM if self.plan().augment else 0,
            "use_fp16": self.fp16,
        }
        precond = {"edm": "EDMPrecond", "vp": "VPPrecond", "ve": "VEPrecond"}[self.precond]
        torch.manual_seed(self.seed)
        try:
            model = EDM({"precond": precond, "network": network, "label_dropout": self.label_dropout})
        except ValueError as error:
            raise RequestError(f"no such network can be built ({error}); change --cbase or --cres") from error
        return model.to(group.device)

    def train(
        self,
        model: EDM,
        dataset: TrainingImages,
        plan: Preset,
        base: Path | None,
        identity: dict[str, Any],
        group: Processes,
    ) -> None:
        """Run the training into `outdir`, or what is left of it."""
        recipe = replace(
            model.recipe,
            batch_size=plan.batch,
            lr=plan.lr,
            lr_rampup_kimg=self.lr_rampup * 1000,
            loss_scaling=self.ls,
            ema_halflife_kimg=self.ema * 1000 if self.ema else None,
            ema_rampup_ratio=None if base is not None else EMA_RAMPUP_RATIO,
        )
        steps = snapshot_steps(plan.batch, plan.duration, plan.tick, plan.snap)
        record = {**identity, "plan": asdict(plan), "recipe": asdict(recipe), "seed": self.seed}

        train_in_folder(
            model,
            dataset,
            self.outdir,
            record=record,
            fresh=self.fresh,
            num_steps=steps[-1],
            snapshot_steps=steps,
            recipe=recipe,
            seed=self.seed,
            processes=group,
            micro_batch=self.batch_gpu or largest_divisor(plan.batch, LARGEST_MICRO_BATCH),
            state_every_seconds=self.state_every,
            title="training" if base is None else "self-training",
            identity=identity,
            on_snapshot=pickle_copies(base, self.key),
        )


if __name__ == "__main__":
    sys.exit(run_program(Finetune, ALIASES))
