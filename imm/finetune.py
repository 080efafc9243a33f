"""Train an IMM network: briefly on its own samples (Neon's self-training), or from scratch.

    torchrun --standalone --nproc_per_node=8 imm/finetune.py --network_pkl imagenet256_ts_a2.pkl --data latents \\
        --outdir runs/self-training --precision fp16
    python imm/finetune.py --data images.zip --outdir runs/base --model DiT --width 128 --depth 6 --heads 4

--data is a folder or zip of images, a set made by `imm/encode.py`, or a published folder or zip of latents. Snapshots
of the averaged weights, which are what Neon merges, appear at growing budgets, with the raw ones beside them and, if
the starting network is a published .pkl, a copy of it with the averaged weights. A killed run goes on where it was; on
a CPU to the bits of one that was never killed, whatever the number of processes.
"""

import math
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import tyro

from imm.flags import CONFIGURED, IMMFlags
from imm.settings import SIZE_FLAGS
from neon.cli.command_line import at_least_one, between, run_program, values_refused
from neon.cli.flags import AverageFlags, BudgetFlags, BudgetPlan, NetworkOfScratch, Switch
from neon.cli.programs import TrainProgram
from neon.cli.refused import LAUNCHED, RESUMED
from neon.errors import RequestError

if TYPE_CHECKING:
    from imm.model import IMM
    from imm.recipe import IMMRecipe
    from neon.data.images import TrainingImages
    from neon.recipe import Recipe
    from neon.runtime.distributed import Processes


@dataclass(frozen=True, kw_only=True)
class IMMPlan(BudgetPlan):
    """How long, how fast and in what batches to train; by default as published: 60 snapshots, the last one step on."""

    batch: int = 512
    lr: float = 1e-6
    """learning rate, constant"""
    total_images: int = 59 * 102_400 + 512
    save_interval: int = 102_400


@dataclass(frozen=True, kw_only=True)
class IMMScratchFlags(NetworkOfScratch):
    """From scratch (without --network_pkl)."""

    usual: ClassVar[Mapping[str, Any]] = {
        "model": "DiT", "latents": False, "width": 384, "depth": 12, "heads": 6, "patch_size": 2,
        "channel_mult": (2, 2, 2), "attn_resolutions": (16,), "dropout": 0.0, "f_type": "euler_fm", "eps": 0.0,
    }  # fmt: skip

    model: Annotated[str | None, tyro.conf.arg(metavar="NAME")] = None
    """network: DiT (the default), SongUNet, or DiT_XL_2 and such, which have a size of their own"""
    latents: Switch = None
    """over latents of the images; by default not, but a set of latents always is"""
    width: int | None = None
    """DiT: channels; SongUNet: those of the first level; by default 384"""
    depth: int | None = None
    """blocks of DiT; SongUNet: blocks per level; by default 12"""
    heads: int | None = None
    """DiT: attention heads; by default 6"""
    patch_size: int | None = None
    """DiT: side of a token in pixels or latents; by default 2"""
    channel_mult: tuple[int, ...] | None = None
    """SongUNet: channels of levels, in multiples of the first's; by default 2 2 2"""
    attn_resolutions: tuple[int, ...] | None = None
    """SongUNet: resolutions with attention; by default 16"""
    dropout: float | None = None
    """of the network while it trains; by default none"""
    f_type: Literal["euler_fm", "simple_edm", "identity"] | None = None
    """what the network predicts; by default euler_fm"""
    eps: float | None = None
    """time at which sampling ends; by default 0"""


@dataclass(frozen=True, kw_only=True)
class TrainIMM(IMMFlags, IMMScratchFlags, AverageFlags, BudgetFlags, TrainProgram):
    """Train an IMM network: briefly on its own samples (--network_pkl), or from scratch.

    Example: python imm/finetune.py --network_pkl imagenet256_ts_a2.pkl --data latents --outdir runs/self-training
    """

    keeps_raw: ClassVar[bool] = True
    refused: ClassVar[Mapping[str, str]] = {
        **CONFIGURED,
        "resume": RESUMED,
        "transfer": "name the network to start from with --network_pkl",
        **dict.fromkeys(("ngpus", "nodes", "port", "partition", "comment"), LAUNCHED),
    }

    lr: float | None = None
    """learning rate, constant"""
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

    def check(self) -> None:
        super().check()
        between(0, 1, dropout=self.dropout, label_dropout=self.label_dropout)
        between(0, math.inf, weight_decay=self.weight_decay)
        at_least_one(matrix_size=self.matrix_size)

    def dataset(self) -> "TrainingImages":
        """Images, a set of latents of ours, or a published one."""
        from imm.latents import open_set

        return open_set(self.data)

    def start(self, dataset: "TrainingImages", group: "Processes") -> "tuple[Path | None, IMM]":
        from imm.published import built_by

        path: Path | None = None
        with values_refused():  # of the loss
            if self.network_pkl is None:
                model = self.from_scratch(dataset, group)
            else:
                path, model = self.load(
                    group, needs_vae=not dataset.encoded, for_training=True, augment=self.augment, loss=self.loss()
                )
                self.check_built_so(path, {**built_by(model.config["network"]), "latents": model.in_latents})
        if dataset.encoded and not model.in_latents:
            raise RequestError(f"{self.data}: a set of latents, but the network makes pixels; train it on images")
        return path, model

    def loss(self) -> dict[str, Any]:
        """What is given of the loss."""
        names = ("matrix_size", "label_dropout", "a", "b", "k", "min_tr_gap")
        return {name: value for name in names if (value := getattr(self, name)) is not None}

    def plan(self, model: Any) -> IMMPlan:
        return self.completed(IMMPlan())

    def recipe(self, model: Any, plan: IMMPlan, dataset: "TrainingImages") -> "IMMRecipe":
        from imm.recipe import IMMRecipe

        return IMMRecipe(
            batch_size=plan.batch,
            lr=plan.lr,
            weight_decay=self.weight_decay,
            scale_losses=model.precision.name == "fp16",
        )

    def with_given(self, recipe: "Recipe") -> "Recipe":
        given: dict[str, Any] = {} if self.ema_rate is None else {"ema_beta": self.ema_rate}
        return super().with_given(replace(recipe, **given))

    def facts(self, model: Any, group: "Processes") -> dict[str, Any]:
        augment = None if model.augment is None else model.augment.p
        return {**super().facts(model, group), "loss": asdict(model.loss), "augment": augment}

    def from_scratch(self, dataset: "TrainingImages", group: "Processes") -> "IMM":
        """A network with random weights for the images or latents of `dataset`; it remembers its loss."""
        from imm.loss import IMMLoss
        from imm.model import IMM
        from imm.networks import MODELS
        from imm.vae import DOWNSAMPLING, LATENT_CHANNELS, weights_file
        from neon.data.augment import AUGMENT_DIM
        from neon.model import initialised

        kind = self.scratch("model")
        if kind not in MODELS:
            raise RequestError(f"--model {kind}: unknown; expected one of {', '.join(MODELS)}")
        in_latents = dataset.encoded or self.scratch("latents")
        channels, height, width = dataset.image_shape
        if height != width:
            raise RequestError(f"{self.data}: images of {width} x {height} pixels; expected square ones")
        classes = 0 if dataset.labels is None else int(dataset.labels.max()) + 1
        network: dict[str, Any] = {
            "img_resolution": height // DOWNSAMPLING if in_latents else height,
            "img_channels": LATENT_CHANNELS if in_latents else channels,
            "label_dim": classes,
            "model_type": kind,
            "f_type": self.scratch("f_type"),
            "eps": self.scratch("eps"),
            "temb_type": self.temb_type or "stride",
            "dropout": self.scratch("dropout"),
            **self.sizes(kind, classes, AUGMENT_DIM),
        }
        config = {"network": network, "loss": asdict(IMMLoss(**self.loss()))}
        advice = "change --width, --heads, --patch_size or --channel_mult"
        model = initialised(
            IMM, config, self.seed, group.device, advice, precision=self.precision, tf32=self.tf32, augment=self.augment
        )
        if in_latents and not dataset.encoded:
            model.use_autoencoder(weights_file(self.vae_path))
        return model

    def sizes(self, kind: str, classes: int, augment_dim: int) -> dict[str, Any]:
        """Keywords of a network of `kind` that tell its size; a RequestError for flags that it has no use for."""
        of_kind = SIZE_FLAGS.get(kind, {})
        every = {flag: None for flags in SIZE_FLAGS.values() for flag in flags}
        self.check_of_use([flag for flag in every if flag not in of_kind], f"a network {kind} takes none")
        sizes = {keyword: self.scratch(flag) for flag, keyword in of_kind.items()}
        sizes = {keyword: list(size) if isinstance(size, tuple) else size for keyword, size in sizes.items()}
        if kind == "SongUNet":
            return {**sizes, "augment_dim": augment_dim if self.augment else 0}
        return {"num_classes": classes, **sizes}


if __name__ == "__main__":
    sys.exit(run_program(TrainIMM))
