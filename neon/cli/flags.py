"""The flags that commands share, as dataclasses that a command is put together from, and what each group of them does.

Nothing here, nor in a program's file, imports torch before the work begins: `--help` answers at once.
"""

import dataclasses
import math
import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, TypeVar

import tyro

from neon.cli.command_line import Scales, Weights, at_least_one, finite, number
from neon.errors import RequestError, note, warn
from neon.runtime.parallel import Parallel
from neon.runtime.trackers import TrackerName

if TYPE_CHECKING:
    import torch

    from neon.lora.settings import LoRA
    from neon.metrics.features import FeatureExtractor
    from neon.metrics.reference import NamedFeatures
    from neon.model import GenerativeModel
    from neon.noise import Purpose
    from neon.runtime.distributed import Processes
    from neon.sampling import Label

    SomeModel = TypeVar("SomeModel", bound=GenerativeModel)

Device = Annotated[str | None, tyro.conf.arg(metavar="cpu|cuda")]
PrecisionName = Literal["fp32", "tf32", "bf16", "fp16"] | None
Key = Annotated[str | None, tyro.conf.arg(metavar="KEY")]
File = Annotated[Path | None, tyro.conf.arg(metavar="FILE")]
FileOrURL = Annotated[str, tyro.conf.arg(metavar="FILE|URL")]
OptionalFileOrURL = Annotated[str | None, tyro.conf.arg(metavar="FILE|URL")]
Features = Annotated[tuple[str, ...], tyro.conf.arg(metavar="inception|dinov2|clip|NAME=FILE|FILE ..")]
Resizing = Literal["clean", "legacy_pytorch", "legacy_tensorflow"] | None
"""the keys of neon.metrics.resizing.RESIZERS"""
Switch = Annotated[bool | None, tyro.conf.arg(metavar="[0|1]")]
"""on or off where that must be told from not given"""
Log = Annotated[TrackerName | None, tyro.conf.arg(metavar="tensorboard|wandb|trackio")]
ModelName = Annotated[str | None, tyro.conf.arg(metavar="FILE.py:NAME")]
INCEPTION = "inception"
"""what `--features` calls the network of FID; any other name is a file"""


@dataclass(frozen=True, kw_only=True)
class NetworkFlags(ABC):
    """The network; the flag that names it is the architecture's."""

    precision: PrecisionName = None
    """what networks compute in: by default on a GPU as published, on a CPU float32 (fp32); tf32: float32, with products
    rounded by the GPU; bf16, fp16: under autocast"""
    tf32: Switch = None
    """whether a GPU may round the inputs of float32 products to TF32; by default as published"""
    key: Key = None
    """nesting of the state dict in checkpoints, such as ema; chosen if not given"""
    device: Device = None
    """by default a GPU where there is one"""

    @abstractmethod
    def load(self, group: "Processes") -> "tuple[Path, GenerativeModel]":
        """The checkpoint's path and its model, whole; a RequestError if flags and files disagree."""

    @abstractmethod
    def facts(self, model: "GenerativeModel", group: "Processes") -> dict[str, Any]:
        """What, besides network and settings, determines images and training, as JSON."""

    def open(
        self, name: str | None, kind: "type[SomeModel]", group: "Processes", **arguments: Any
    ) -> "tuple[Path, SomeModel]":
        """The path and the model of the checkpoint at a file or URL; a RequestError if it is not of class `kind`."""
        from neon.model import load_model
        from neon.runtime.download import shared_file

        assert name is not None, "training from scratch opens no checkpoint"
        path = shared_file(name, group)
        computed: dict[str, Any] = {"precision": self.precision, "tf32": self.tf32}
        model = load_model(path, self.key, device=group.device, only=kind, **computed, **arguments)
        assert isinstance(model, kind)
        return path, model

    def print_precision(self, model: "GenerativeModel", group: "Processes") -> None:
        """Say what is computed in and why, unless it is plain float32."""
        if group.is_main and model.precision.name != "fp32":
            print(f"computing in {model.precision.reason}", file=sys.stderr)

    def recorded_precision(self, model: "GenerativeModel") -> dict[str, Any]:
        """The precision of `model` among its `facts`."""
        return model.precision.recorded


@dataclass(frozen=True, kw_only=True)
class SizeFlags:
    """The size of images."""

    img_size: int | None = None
    """side of the images; checked against the checkpoint"""

    def check_side(self, path: Path, model: "GenerativeModel") -> None:
        """A RequestError if the images of `model` are not of `--img_size`."""
        side = model.image_shape[-1]
        if self.img_size not in (None, side):
            raise RequestError(f"--img_size {self.img_size}: {path} makes images of {side} pixels; leave the flag out")


SomeImages = TypeVar("SomeImages", bound="ImageFlags")


@dataclass(frozen=True, kw_only=True)
class ImageFlags(NetworkFlags):
    """Images of a network: how many and of which seeds is the architecture's."""

    class_: Annotated[int | None, tyro.conf.arg(name="class")] = None
    """class of every image; by default by the rule of the model"""
    compile: bool = False
    """compile the network: slow at first, then faster; other roundings"""
    batch_size: int = 64
    """images per forward pass of one process"""

    @abstractmethod
    def settings_for(self, model: "GenerativeModel") -> Any:
        """The sampler's settings for this model; a RequestError for values that make no sense."""

    @abstractmethod
    def seeds_of(self, purpose: "Purpose") -> list[int]:
        """The seed of each image."""

    def counted(self: SomeImages, model: "GenerativeModel") -> SomeImages:
        """These flags with the number of images that `model` gives them."""
        return self

    @abstractmethod
    def recorded_seeds(self) -> dict[str, Any]:
        """Which images these are, as JSON, in what determines a set."""

    @abstractmethod
    def labels(self, model: "GenerativeModel", purpose: "Purpose") -> "Label":
        """The class of each image, of a set for `purpose`; None: drawn with the image by the model."""

    def combined(self, path: Path, model: "GenerativeModel", group: "Processes") -> "GenerativeModel":
        """What samples: the `model` of checkpoint `path`, or with it a second network; RequestErrors of their files."""
        return model

    def check(self) -> None:
        """A RequestError for numbers that make no sense."""
        at_least_one(batch_size=self.batch_size)

    def start(self, group: "Processes") -> "tuple[Path, GenerativeModel, Any]":
        """The checkpoint's path, its model and the sampler's settings; a RequestError if flags and files disagree."""
        from neon.merge import warn_of_merge
        from neon.sampling import check_label

        path, model = self.load(group)
        self.print_precision(model, group)
        check_label(model, self.class_)
        settings = self.settings_for(model)
        model = self.combined(path, model, group)
        warn_of_merge(path, model, settings)
        if self.compile:
            from neon.runtime.compiling import check_compiler

            check_compiler(group.device)
            model.compile_parts()
        return path, model, settings


SomeNumbered = TypeVar("SomeNumbered", bound="NumberedImages")


@dataclass(frozen=True, kw_only=True)
class NumberedImages(ImageFlags):
    """Images, numbered from 0, each with a generator of its own."""

    usual_count: ClassVar[int | None] = None
    """how many images there are if no flag says; None: one must"""

    num_images: Annotated[int | None, tyro.conf.arg(aliases=["--N"])] = None
    """how many in all; every class equally often"""
    per_class_count: int | None = None
    """how many of each class, instead of --num_images"""
    seed: int = 0
    """of the images; each has its own generator"""

    def check(self) -> None:
        super().check()
        check_alternatives(self, "num_images", "per_class_count")
        if self.num_images is None and self.per_class_count is None and self.usual_count is None:
            raise RequestError("--num_images: not given; say how many in all, or of each class with --per_class_count")
        at_least_one(num_images=self.num_images, per_class_count=self.per_class_count)

    def counted(self: SomeNumbered, model: "GenerativeModel") -> SomeNumbered:
        """These flags with the `num_images` that they come to for `model`."""
        if self.per_class_count is None:
            count = self.usual_count if self.num_images is None else self.num_images
            if count is not None and count < model.num_classes and self.class_ is None and model.prompts is None:
                warn(
                    f"{count} images in all, fewer than the {model.num_classes} classes: some have none; for {count} "
                    f"of each class say --per_class_count {count}"
                )
            return replace(self, num_images=count)
        if model.num_classes == 0:
            raise RequestError("--per_class_count: the network is unconditional; use --num_images")
        return replace(self, num_images=self.per_class_count * model.num_classes, per_class_count=None)

    @property
    def count(self) -> int:
        """`num_images`, of flags that are `counted`."""
        assert self.num_images is not None
        return self.num_images

    def seeds_of(self, purpose: "Purpose") -> list[int]:
        from neon.noise import image_seeds

        return image_seeds(purpose, self.seed, self.count)

    def recorded_seeds(self) -> dict[str, Any]:
        return {"num_images": self.count, "seed": self.seed}

    def labels(self, model: "GenerativeModel", purpose: "Purpose") -> "Label":
        return model.labels_for(purpose, self.count, self.seed) if self.class_ is None else self.class_


def check_alternatives(flags: object, *names: str) -> None:
    """A RequestError if more than one of these flags, which say the same thing, is given."""
    given = [f"--{name}" for name in names if getattr(flags, name) not in (None, False)]
    if len(given) > 1:
        raise RequestError(f"{' and '.join(given)}: both say the same thing; leave one of them out")


@dataclass(frozen=True, kw_only=True)
class SelfTrainedFlags(ImageFlags):
    """Images of a network, and self-trained weights beside its own."""

    self_trained: File = None
    """self-trained weights"""
    self_trained_key: Key = None
    """nesting of the state dict in their file; by default that of --key if it is there, else chosen"""

    @abstractmethod
    def scales(self) -> list[float]:
        """Each g at which base and self-trained network sample together; none: the base alone, or merges."""

    def check(self) -> None:
        super().check()
        if self.self_trained is None and self.self_trained_key is not None:
            raise RequestError("--self_trained_key: goes with --self_trained, the file it is a part of")
        finite("--sims", self.scales())

    def combined(self, path: Path, model: "GenerativeModel", group: "Processes") -> "GenerativeModel":
        """At the first of `scales`, if there are any."""
        scales = self.scales()
        if not scales:
            return model
        from neon.merge import load_self_trained_network

        assert self.self_trained is not None
        second = load_self_trained_network(model.network, path, self.self_trained, self.key, self.self_trained_key)
        return model.combine(second, scales[0])


@dataclass(frozen=True, kw_only=True)
class OutputFlags:
    """Output."""

    outdir: Annotated[Path, tyro.conf.arg(aliases=["--out_dir"])]
    """folder of the images, or a name that ends in .zip"""
    format: Literal["png", "shards"] = "png"
    """png: a file for each image; shards: a folder of safetensors, which all commands read faster"""
    fresh: bool = False
    """replace what the output holds"""


@dataclass(frozen=True, kw_only=True)
class FeatureFlags:
    """What images are compared by."""

    features: Features = (INCEPTION,)
    """feature network: inception, dinov2 or clip (with =FILE, its weights), or a FILE made by `neon features`;
    several score the same images in each, and the first is what choices are made by"""
    inception_weights: File = None
    """weights of the Inception network; by default those in torch-fidelity's cache"""
    resize: Resizing = None
    """how images, which may then differ in size, are resized for Inception; by default as in legacy_tensorflow"""

    def named_features(self) -> "NamedFeatures":
        """What these flags name."""
        from neon.metrics.reference import NamedFeatures

        return NamedFeatures(names=self.features, inception_weights=self.inception_weights, resize=self.resize)

    def extractors(self, device: "torch.device") -> "list[FeatureExtractor]":
        """The feature networks; a RequestError if flags contradict each other."""
        return self.named_features().load(device)


@dataclass(frozen=True, kw_only=True)
class ScoredImages(FeatureFlags, SelfTrainedFlags):
    """Which images of a network are scored, and how."""

    ref: Annotated[str, tyro.conf.arg(metavar="FILE|URL", aliases=["--fid_stats"])]
    """statistics of real images: .npz with mu and sigma, by the same features"""
    self_trained: File = None
    """self-trained weights: scores (1 + w) base - w self_trained for each --w, or both networks for each --sims"""
    w: Weights = field(default_factory=list)
    """merge weights: 0 the base, -1 the self-trained model, above 0 Neon"""
    sims: Scales = field(default_factory=list)
    """instead of --w: both networks at inference, (1 + g) out_base - g out_self_trained, at twice the calls"""
    precision_recall: Annotated[Path | None, tyro.conf.arg(metavar="IMAGES")] = None
    """real images: also scores precision, recall, density, coverage and the kernel distance (KID)"""
    nearest_k: int = 5
    """which neighbour gives the radius in precision and recall"""
    json: File = None
    """also write scores and protocol to this file"""
    run_dir: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """where a killed evaluation goes on from; by default a folder below runs/"""
    fresh: bool = False
    """forget what a killed evaluation of the same kind has done"""

    def check(self) -> None:
        self.sweep()
        super().check()

    def sweep(self) -> tuple[Literal["w", "sims"], list[float]]:
        """What the self-trained weights are for, and at which values; without them ("w", []).

        Raises:
            RequestError: the flags do not go together, or a value is no number or given twice.
        """
        if self.w and self.sims:
            raise RequestError(
                "--w and --sims: one merges the weights, the other samples with both networks; score one at a time"
            )
        kind: Literal["w", "sims"] = "sims" if self.sims else "w"
        texts = self.sims or self.w
        if self.self_trained is None and texts:
            raise RequestError(f"--{kind}: needs the second network; name it with --self_trained")
        if self.self_trained is not None and not texts:
            raise RequestError(
                "--self_trained: no merge weight given; add --w, such as --w 0.5 1 1.5 (or --sims, for both networks "
                "at inference)"
            )
        values = [number(f"--{kind}", text) + 0.0 for text in texts]
        if len(set(values)) < len(values):
            raise RequestError(f"--{kind} {' '.join(texts)}: a value is given twice")
        return kind, values

    def scales(self) -> list[float]:
        kind, values = self.sweep()
        return values if kind == "sims" else []

    @abstractmethod
    def seeds_text(self) -> str:
        """Which images are scored, for the record."""


@dataclass(frozen=True, kw_only=True)
class ImagePairFlags(FeatureFlags):
    """Two sets of images, or their statistics, to be compared."""

    a: tyro.conf.Positional[Path]
    """generated images (folder or zip), or statistics (.npz)"""
    b: tyro.conf.Positional[Path]
    """real images (folder or zip), or statistics (.npz)"""
    precision_recall: bool = False
    """also precision, recall, density, coverage and the kernel distance (KID); both sides must be images"""
    nearest_k: int = 5
    """which nearest neighbour gives the radius in precision and recall"""
    batch_size: int = 64
    """images per forward pass"""
    device: Device = None
    """by default a GPU where there is one"""
    json: File = None
    """also write the scores to this file"""


@dataclass(frozen=True, kw_only=True)
class TrainingFlags:
    """Training: on what, for how long and where."""

    data: Annotated[Path, tyro.conf.arg(aliases=["--data_path"])]
    """folder or zip of images with dataset.json, or a set encoded before"""
    outdir: Annotated[Path, tyro.conf.arg(aliases=["--output_dir"])]
    """folder of snapshots, log and state"""
    batch: Annotated[int | None, tyro.conf.arg(aliases=["--bs"])] = None
    """images per step, over all processes"""
    batch_gpu: int | None = None
    """images per forward pass; it moves results by rounding (and dropout)"""
    lr_rampup: Annotated[float | None, tyro.conf.arg(metavar="KIMG")] = None
    """thousand images over which the learning rate rises from 0; 0: none. By default as published; a self-training of
    fewer images than published shortens it in proportion"""
    ema: Annotated[float | None, tyro.conf.arg(metavar="KIMG")] = None
    """half-life of averaged weights in thousand images; 0: none. By default as published, or shortened likewise"""
    state_every: Annotated[float, tyro.conf.arg(metavar="SECONDS")] = 300.0
    """how often the state of the run is saved"""
    workers: Annotated[int | None, tyro.conf.arg(aliases=["--num_workers"])] = None
    """processes that read and prepare images ahead, for each that trains; by default none on a CPU, up to 8 on a GPU"""
    seed: int = 0
    """of initial weights, data order and noise"""
    compile: bool = False
    """compile the network: the first step takes a minute, the others less; other roundings. A run may go on without"""
    parallel: Parallel | None = None
    """how several processes train: ordered adds gradients as one process would, ddp as they come, fsdp also spreads
    weights and optimiser over the GPUs. By default ordered on CPUs, ddp on GPUs, fsdp where nothing else fits"""
    log: Log = None
    """also send the curves to a tracker"""
    fresh: bool = False
    """start anew, replacing a run that is in the folder"""

    def completed(self, preset: "SomePlan", zero: Sequence[str] = ()) -> "SomePlan":
        """`preset` with what was given in its place; a RequestError for what is not above 0 (`zero`: may be 0)."""
        given = {
            f.name: value for f in dataclasses.fields(preset) if (value := getattr(self, f.name, None)) is not None
        }
        plan = replace(preset, **given)
        for name, value in {**asdict(plan), "state_every": self.state_every}.items():
            # What a plan leaves open, or a yes or no, is no number.
            if value is None or isinstance(value, bool):
                continue
            if not (0 < value < math.inf or (name in zero and value == 0)):
                raise RequestError(f"--{name} {value}: expected a positive number")
        return plan


@dataclass(frozen=True, kw_only=True)
class LoRAFlags:
    """What is trained."""

    lora_rank: Annotated[int | None, tyro.conf.arg(metavar="R")] = None
    """train factors of this rank beside layers, in the place of the weights (LoRA); snapshots hold these alone"""
    lora_alpha: Annotated[float | None, tyro.conf.arg(metavar="A")] = None
    """the product of the factors is multiplied with A/R; by default A is R"""
    lora_targets: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME ..")] = ()
    """the layers, by the last words of their names, or all; by default those that are usual for the architecture"""
    gradient_checkpointing: bool = False
    """compute activations once more for the backward pass, where a network can: less memory, more time"""

    def lora(self, model: "GenerativeModel") -> "LoRA | None":
        """The LoRA that is asked for; None: whole weights are trained."""
        from neon.lora.settings import lora_of

        return lora_of(self.lora_rank, self.lora_alpha, self.lora_targets, model.lora_targets)


@dataclass(frozen=True, kw_only=True)
class NetworkOfScratch:
    """From scratch: how the network is built. A flag that is None is not given."""

    usual: ClassVar[Mapping[str, Any]] = {}
    """what flags of a network say that are not given, by name; None: it follows from others"""

    def scratch(self, name: str) -> Any:
        """What the flag `name` says, or is usual."""
        value = getattr(self, name)
        return self.usual[name] if value is None else value

    def given_of_scratch(self) -> dict[str, Any]:
        """The flags of a network that are given."""
        return {name: value for name in self.usual if (value := getattr(self, name)) is not None}

    def check_built_so(self, path: Path, base: Mapping[str, Any]) -> None:
        """A RequestError if a flag says otherwise than `base`, which tells by flag how the network at `path` is built.

        The published commands say again what the network that they start from is: that is let pass.
        """
        for name, value in self.given_of_scratch().items():
            found = base.get(name)
            if value != (tuple(found) if isinstance(found, list) else found):
                spelled = " ".join(map(str, value)) if isinstance(value, tuple) else value
                raise RequestError(
                    f"--{name} {spelled}: is of a network from scratch, and {path} is built with {found}; leave it out"
                )

    def check_of_use(self, names: Sequence[str], why: str) -> None:
        """A RequestError, with `why`, if one of the flags `names` is given."""
        for name in names:
            if name in self.given_of_scratch():
                raise RequestError(f"--{name}: {why}; leave it out")


@dataclass(frozen=True, kw_only=True)
class BudgetFlags(TrainingFlags):
    """Training: on what, for how long and where."""

    total_images: int | None = None
    """budget"""
    save_interval: Annotated[int | None, tyro.conf.arg(aliases=["--save_img_interval"])] = None
    """images between snapshots"""


@dataclass(frozen=True, kw_only=True)
class AverageFlags:
    """Averaging of weights, beside `--ema`."""

    ema_rate: Annotated[float | None, tyro.conf.arg(aliases=["--ema_beta"])] = None
    """the same as --ema, as decay per step; 0: no averaging; published: 0.9999"""

    def check(self) -> None:
        """A RequestError for a rate that makes no sense."""
        if self.ema_rate is not None and not 0 <= self.ema_rate < 1:
            raise RequestError(f"--ema_rate {self.ema_rate}: expected 0 (no averaging) or more, below 1")
        check_alternatives(self, "ema_rate", "ema")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How long and in what batches to train; an architecture adds how fast."""

    batch: int
    """images per step, over all processes"""


@dataclass(frozen=True, kw_only=True)
class BudgetPlan(Plan):
    """A plan in images."""

    total_images: int
    """budget"""
    save_interval: int
    """images between snapshots"""


SomePlan = TypeVar("SomePlan", bound=Plan)


@dataclass(frozen=True, kw_only=True)
class SamplerFlags:
    """Sampler."""

    set: Annotated[list[str], tyro.conf.arg(metavar="NAME=VALUE ..")] = field(default_factory=list)
    """settings of the sampler, in place of those that the file carries, or of the published ones"""
    num_steps: Annotated[int | None, tyro.conf.arg(aliases=["--steps"])] = None
    """steps of a sampler that has them; the same as --set num_steps=N"""
    guidance: Annotated[float | None, tyro.conf.arg(aliases=["--cfg", "--cfg_scale"])] = None
    """guidance of a sampler that has it; the same as --set guidance=X"""

    def settings_for(self, model: "GenerativeModel") -> Any:
        """The sampler's settings for this model; a RequestError for values that make no sense."""
        pairs = list(self.set)
        for name in ("num_steps", "guidance"):
            value = getattr(self, name)
            if value is None:
                continue
            if not hasattr(model.default_settings, name):
                raise RequestError(f"--{name}: the sampler of {model.architecture} has none")
            pairs.append(f"{name}={value}")
        return settings_with(said_settings(model), pairs)


def said_settings(model: "GenerativeModel") -> Any:
    """How to sample `model` unless flags say otherwise; what its file carries is said, for nobody typed it."""
    from neon.settings import carried_settings, usual_settings

    settings = usual_settings(model)
    if carried_settings(model):
        usual = asdict(model.default_settings)
        changed = [f"{name} {value}" for name, value in asdict(settings).items() if value != usual[name]]
        note(f"sampling as the file says: {', '.join(changed) or 'as published'}")
    return settings


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


def tell_prompts(file: Path | None, model: "GenerativeModel") -> None:
    """Say how purposes share the prompts of `file`, of a model that is asked by them."""
    from neon.data.prompts import sharing

    if model.prompts:
        note(f"{file}: {sharing(len(model.prompts))}")
