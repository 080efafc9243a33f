"""Train an IMM network: briefly on its own samples (Neon's self-training), or from scratch.

    torchrun --standalone --nproc_per_node=8 imm/finetune.py --network_pkl imagenet256_ts_a2.pkl --data latents \\
        --outdir runs/self-training --precision fp16
    python imm/finetune.py --data images.zip --outdir runs/base --model DiT --width 128 --depth 6 --heads 4

--data is a folder or zip of images, a set made by `imm/encode.py`, or a published folder or zip of latents. Snapshots
of the averaged weights, which are what Neon merges, appear at growing budgets, with the raw ones beside them and, if
the starting network is a published .pkl, a copy of it with the averaged weights. A killed run goes on where it was; on
a CPU to the bits of one that was never killed, whatever the number of processes.
"""

import sys
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro

from imm.flags import ALIASES, ModelFlags
from imm.latents import open_set
from imm.loss import IMMLoss
from imm.model import IMM
from imm.networks import MODELS
from imm.recipe import IMMRecipe
from imm.vae import DOWNSAMPLING, LATENT_CHANNELS, weights_file
from neon import __version__
from neon.cli.command_line import run_program
from neon.cli.flags import PRECISIONS
from neon.cli.training import Plan, TrainingFlags, pickle_copies
from neon.data.augment import AUGMENT_DIM, augmentation_for, labels_read_by
from neon.data.images import TrainingImages
from neon.errors import RequestError
from neon.runtime.distributed import Processes, processes
from neon.runtime.files import sha256_file

LARGEST_MICRO_BATCH = 64
AUGMENTATION = 0.12
"""of networks that read augmentation labels: the probability they were trained with"""


@dataclass(frozen=True, kw_only=True)
class IMMPlan(Plan):
    """How long, how fast and in what batches to train; by default as published: 60 snapshots, the last one step on."""

    batch: int = 512
    lr: float = 1e-6
    """learning rate, constant"""
    total_images: int = 59 * 102_400 + 512
    save_interval: int = 102_400


@dataclass(frozen=True, kw_only=True)
class ScratchFlags:
    """From scratch (without --network_pkl)."""

    # Their names are listed in one place.
    model: Annotated[Literal[tuple(MODELS)], tyro.conf.arg(metavar="NAME")] = "DiT"  # type: ignore[valid-type]
    """network: DiT, SongUNet, or DiT_XL_2 and such, which have a size of their own"""
    latents: bool = False
    """over latents of the images; a set of latents always is"""
    width: int = 384
    """DiT: channels; SongUNet: those of the first level"""
    depth: int = 12
    """blocks of DiT; SongUNet: blocks per level"""
    heads: int = 6
    """DiT: attention heads"""
    patch_size: int = 2
    """DiT: side of a token in pixels or latents"""
    channel_mult: tuple[int, ...] = (2, 2, 2)
    """SongUNet: channels of levels, in multiples of the first's"""
    attn_resolutions: tuple[int, ...] = (16,)
    """SongUNet: resolutions with attention"""
    dropout: float = 0.0
    """of the network while it trains"""
    f_type: Literal["euler_fm", "simple_edm", "identity"] = "euler_fm"
    """what the network predicts"""
    eps: float = 0.0
    """time at which sampling ends"""


@dataclass(frozen=True, kw_only=True)
class Finetune(ModelFlags, TrainingFlags, ScratchFlags):
    """Train an IMM network: briefly on its own samples (--network_pkl), or from scratch."""

    network_pkl: Annotated[str | None, tyro.conf.arg(metavar="FILE|URL")] = None  # type: ignore[assignment]  # needed by the other programs
    """network to start from; without: random weights"""
    lr: float | None = None
    """learning rate, constant"""
    ema_rate: float = 0.9999
    """decay per step of the averaged weights; 0: no averaging"""
    weight_decay: float = 0.0
    """of all weights"""
    augment: float | None = None
    """probability of augmentations; by default 0.12 for U-Nets told of them"""
    matrix_size: int | None = None
    """images per group that are compared with one another; published: 4"""
    label_dropout: float | None = None
    """share of images shown without their class, for guidance; published: 0.1"""
    a: float | None = None
    """exponent of the weight of a time: 2 for ts_a2, 1 for CIFAR-10"""
    b: float | None = None
    """offset of the weight of a time; published: 4"""
    k: int | None = None
    """a step is 2^-k of the range of noise ratios; ImageNet: 12, CIFAR-10: 15"""
    min_tr_gap: float | None = None
    """shortest step in time; published: 1e-4 for ImageNet, none for CIFAR-10"""

    def __call__(self) -> None:
        plan = self.plan()
        dataset = open_set(self.data)
        with processes(self.device) as group:
            # As published: no TF32, and no reductions in half precision.
            torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
            torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
            torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
            torch.backends.cudnn.benchmark = True
            base, model = self.start(dataset, group)
            self.fit(model, dataset)
            identity = {
                "neon": __version__,
                "base_sha256": None if base is None else group.on_main(lambda: sha256_file(base)),
                "config": model.config,
                "loss": asdict(model.loss),
                "augment": None if model.augment is None else model.augment.p,
                "data": str(self.data),
                **self.facts(group, model),
            }
            recipe = IMMRecipe(
                batch_size=plan.batch,
                lr=plan.lr,
                weight_decay=self.weight_decay,
                ema_beta=self.ema_rate,
                scale_losses=self.precision == "fp16",
            )
            self.run(
                model,
                dataset,
                plan,
                recipe,
                identity,
                group,
                largest_micro_batch=LARGEST_MICRO_BATCH,
                title="training" if base is None else "self-training",
                on_snapshot=pickle_copies(base, self.key),
                keep_raw=True,
            )

    def plan(self) -> IMMPlan:
        """The published plan, with what was given in its place; a RequestError for values that make no sense."""
        if not 0 <= self.ema_rate < 1:
            raise RequestError(f"--ema_rate {self.ema_rate}: expected 0 (no averaging) or more, below 1")
        return self.completed(IMMPlan())

    def fit(self, model: IMM, dataset: TrainingImages) -> None:
        """Give the model the loss and the augmentation that the flags ask for.

        A network from scratch remembers its loss, with which it is then self-trained.
        """
        given = {
            field.name: value for field in fields(IMMLoss) if (value := getattr(self, field.name, None)) is not None
        }
        try:
            model.use_loss(replace(model.loss, **given))
        except ValueError as error:
            raise RequestError(f"{error}; see --help") from error
        if self.network_pkl is None:
            model.config["loss"] = asdict(model.loss)
        unet = model.network.model
        known = labels_read_by(unet) and not model.in_latents
        probability = self.augment if self.augment is not None else AUGMENTATION if known else 0.0
        model.augment = augmentation_for(unet, probability)
        if dataset.encoded and not model.in_latents:
            raise RequestError(f"{self.data}: a set of latents, but the network makes pixels; train it on images")

    def start(self, dataset: TrainingImages, group: Processes) -> tuple[Path | None, IMM]:
        """The checkpoint that training starts from, if there is one, and its model."""
        if self.network_pkl is None:
            return None, self.from_scratch(dataset, group)
        return self.load(group, needs_vae=not dataset.encoded)

    def from_scratch(self, dataset: TrainingImages, group: Processes) -> IMM:
        """A network with random weights for the images or latents of `dataset`."""
        in_latents = dataset.encoded or self.latents
        channels, height, width = dataset.image_shape
        if height != width:
            raise RequestError(f"{self.data}: images of {width} x {height} pixels; expected square ones")
        classes = 0 if dataset.labels is None else int(dataset.labels.max()) + 1
        network: dict[str, Any] = {
            "img_resolution": height // DOWNSAMPLING if in_latents else height,
            "img_channels": LATENT_CHANNELS if in_latents else channels,
            "label_dim": classes,
            "model_type": self.model,
            "f_type": self.f_type,
            "eps": self.eps,
            "temb_type": self.temb_type or "stride",
            "dropout": self.dropout,
            **self.sizes(classes),
        }
        torch.manual_seed(self.seed)
        try:
            model = IMM({"network": network}).to(group.device)
        except ValueError as error:
            raise RequestError(
                f"no such network can be built ({error}); change --width, --heads, --patch_size or --channel_mult"
            ) from error
        if in_latents and not dataset.encoded:
            model.use_autoencoder(weights_file(self.vae_path))
        model.network.mixed_precision = PRECISIONS[self.precision]
        return model

    def sizes(self, classes: int) -> dict[str, Any]:
        """Keywords of the network that tell its size."""
        if self.model == "SongUNet":
            return {
                "model_channels": self.width,
                "channel_mult": list(self.channel_mult),
                "num_blocks": self.depth,
                "attn_resolutions": list(self.attn_resolutions),
                "augment_dim": AUGMENT_DIM if self.augment else 0,
            }
        sizes = {"num_classes": classes}
        if self.model == "DiT":
            sizes |= {
                "hidden_size": self.width,
                "depth": self.depth,
                "num_heads": self.heads,
                "patch_size": self.patch_size,
            }
        return sizes


if __name__ == "__main__":
    sys.exit(run_program(Finetune, ALIASES))
