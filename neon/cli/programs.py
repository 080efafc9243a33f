"""The programs that run a network: written once, over what an architecture's flags say of themselves.

`edm/sample.py` and its like put an architecture's flags in front of these; `neon sample`, `selftrain` and `evaluate`
the flags of any architecture, of a user's own too. Images, labels and precision are the same through both doors.
"""

import math
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import tyro

from neon import __version__
from neon.cli.command_line import at_least_one, between
from neon.cli.flags import (
    BudgetFlags,
    BudgetPlan,
    Device,
    FeatureFlags,
    File,
    FileOrURL,
    ImagePairFlags,
    LoRAFlags,
    ModelName,
    NetworkFlags,
    NumberedImages,
    OutputFlags,
    Plan,
    SamplerFlags,
    ScoredImages,
    SelfTrainedFlags,
    Switch,
    TrainingFlags,
    tell_prompts,
)
from neon.errors import RequestError, warn
from neon.runtime.parallel import MOST_WORKERS
from neon.runtime.trackers import check_installed

if TYPE_CHECKING:
    import torch

    from neon.data.images import TrainingImages
    from neon.library.generator import Origin
    from neon.model import GenerativeModel
    from neon.noise import Purpose
    from neon.recipe import Recipe
    from neon.runtime.distributed import Processes
    from neon.selftrain import Snapshot


@dataclass(frozen=True, kw_only=True)
class SampleProgram(OutputFlags, SelfTrainedFlags):
    """Sample images of a network into a PNG folder or a zip, with their classes: the synthetic set S."""

    self_trained: File = None
    """self-trained weights, to sample with both networks: goes with --sims"""
    sims: Annotated[float | None, tyro.conf.arg(metavar="G")] = None
    """both networks at inference, (1 + g) out_base - g out_self_trained, at twice the calls"""

    def check(self) -> None:
        super().check()
        if self.self_trained is None and self.sims is not None:
            raise RequestError("--sims: needs the second network; name it with --self_trained")
        if self.self_trained is not None and self.sims is None:
            raise RequestError(
                "--self_trained: add --sims G, to sample with both networks; for images of their merge name as the "
                "network what neon merge writes"
            )

    def scales(self) -> list[float]:
        return [] if self.sims is None else [self.sims]

    def __call__(self) -> None:
        from neon.noise import Purpose
        from neon.runtime.distributed import processes
        from neon.runtime.threads import use_threads
        from neon.sampling import check_enough

        self.check()
        with processes(self.device) as group:
            path, model, settings = self.start(group)
            use_threads(group.device, model)
            images, facts = self.counted(model), self.facts(model, group)
            seeds, label = images.seeds_of(Purpose.SYNTHETIC), images.labels(model, Purpose.SYNTHETIC)
            check_enough(len(seeds), group)
            identity = group.on_main(lambda: images.identity(path, settings, facts))
            self.write(model, seeds, settings, processes=group, identity=identity, label=label)
            if group.is_main:
                print(f"{self.outdir}: {len(seeds)} images in all")

    def identity(self, path: Path, settings: Any, facts: dict[str, Any]) -> dict[str, Any]:
        """What determines the set, as JSON: the network of checkpoint `path`, seeds, sampler and `facts`."""
        from neon.runtime.files import hashes, sha256_file
        from neon.sampling import set_identity

        others = {
            "sims": self.sims,
            "self_trained_key": self.self_trained_key,
            **hashes({"self_trained_sha256": self.self_trained}),
            "compile": self.compile or None,
            "format": None if self.format == "png" else self.format,
        }  # left out where they are not used, as by runs before there was a choice
        facts = {**{name: value for name, value in others.items() if value is not None}, **facts}
        return set_identity(
            sha256_file(path), self.recorded_seeds(), self.class_, self.batch_size, settings, facts
        )  # fmt: skip

    def write(self, model: Any, seeds: list[int], settings: Any, **arguments: Any) -> None:
        """Write what is not in the output yet; `arguments` as of `sample_set`."""
        from neon.sampling import sample_set

        sample_set(
            model, seeds, settings, self.outdir,
            batch_size=self.batch_size, fresh=self.fresh, form=self.format, **arguments,
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ScoreProgram(ScoredImages):
    """FID, Inception Score, precision and recall of a network, or of merges of two."""

    def __call__(self) -> None:
        from neon.cli.score import Sampling, score_network
        from neon.runtime.distributed import processes

        self.check()
        with processes(self.device) as group:
            path, model, settings = self.start(group)
            images = self.counted(model)
            sampling = Sampling(
                seeds=images.seeds_of(self.purpose()),
                settings=settings,
                label=images.labels(model, self.purpose()),
                facts=self.facts(model, group),
            )
            score_network(path, model, sampling, self, group)

    def purpose(self) -> "Purpose":
        """What the images are for."""
        from neon.noise import Purpose

        return Purpose.REPORT


@dataclass(frozen=True, kw_only=True)
class NumberedScoreProgram(NumberedImages, ScoreProgram):
    """The same of numbered images, which are others for a choice than for a report."""

    images_for: Literal["report", "selection"] = "report"
    """selection: others, to choose w or guidance with"""

    def purpose(self) -> "Purpose":
        from neon.noise import Purpose

        return Purpose.REPORT if self.images_for == "report" else Purpose.SELECTION

    def seeds_text(self) -> str:
        return f"{self.images_for} images of seed {self.seed}"


@dataclass(frozen=True, kw_only=True)
class TrainProgram(LoRAFlags, TrainingFlags, NetworkFlags):
    """Train a network: briefly on its own samples, which gives what Neon merges, or from scratch."""

    largest_micro_batch: ClassVar[int] = 64
    """images per forward pass unless told otherwise"""
    keeps_raw: ClassVar[bool] = False
    """whether raw weights are written beside averaged ones, as published"""
    schedule_unit: ClassVar[float] = 1.0
    """of --lr_rampup and --ema, in thousand images"""
    budget_flag: ClassVar[str] = "--total_images"

    def __call__(self) -> None:
        from neon.lora.settings import check_lora, record_of
        from neon.runtime.distributed import processes
        from neon.runtime.files import sha256_file
        from neon.runtime.threads import use_threads
        from neon.selftrain import pickle_copies, train_in_folder, training_identity, usual_micro_batch

        check_installed(self.log)
        between(0, MOST_WORKERS, workers=self.workers)
        check_lora(self.lora_rank, self.lora_alpha, self.lora_targets)
        self.check()
        dataset = self.dataset()
        with processes(self.device) as group:
            base, model = self.start(dataset, group)
            use_threads(group.device, model)
            self.print_precision(model, group)
            lora = self.lora(model)
            if lora is not None and base is None:
                raise RequestError("--lora_rank: factors go beside weights that are trained; name the base network")
            plan = self.plan(model)
            published = self.recipe(model, plan, dataset)
            shortened = published if base is None else published.scaled_to(self.budget(plan))
            recipe = self.with_given(shortened)
            if group.is_main:
                self.tell_shortened(published, shortened, recipe, self.budget(plan))
            steps = self.snapshot_steps(plan)
            usual = usual_micro_batch(plan.batch, model.batch_multiple, self.largest_micro_batch)
            facts = {**self.facts(model, group), **record_of(lora)}
            identity = group.on_main(
                lambda: training_identity(model, self.data, None if base is None else sha256_file(base), facts)
            )
            snapshots = train_in_folder(
                model,
                dataset,
                self.outdir,
                record={**identity, "plan": asdict(plan), "recipe": recipe.facts(), "seed": self.seed},
                fresh=self.fresh,
                num_steps=steps[-1],
                snapshot_steps=steps,
                recipe=recipe,
                seed=self.seed,
                processes=group,
                micro_batch=usual if self.batch_gpu is None else self.batch_gpu,
                state_every_seconds=self.state_every,
                title="training" if base is None else "self-training",
                identity=identity,
                on_snapshot=None if lora else pickle_copies(base, self.key, model),
                keep_raw=self.keeps_raw,
                lora=lora,
                gradient_checkpointing=self.gradient_checkpointing,
                compile_network=self.compile,
                parallel=self.parallel,
                log=self.log,
                workers=self.workers,
            )
            if group.is_main:
                last = snapshots[-1]
                print(f"{last.path}: the last of {len(snapshots)} snapshots, {last.images_seen:,} images seen")
                if base is not None:
                    self.tell_moved(last)

    def check(self) -> None:
        """A RequestError for numbers that make no sense, before anything is opened."""

    def with_given(self, recipe: "Recipe") -> "Recipe":
        """`recipe` with what flags say of the ramp of its learning rate and of the average of its weights."""
        for name in ("lr_rampup", "ema"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < math.inf:
                raise RequestError(f"--{name} {value}: expected 0 (none) or more")
        if self.lr_rampup is not None:
            recipe = recipe.with_rampup(self.lr_rampup * self.schedule_unit)
        if self.ema is not None:
            recipe = recipe.with_halflife(self.ema * self.schedule_unit or None)
        return recipe

    def tell_shortened(self, published: "Recipe", shortened: "Recipe", used: "Recipe", budget: int) -> None:
        """Say in one line what is shorter in the recipe that is `used` than in the `published`, if no flag says so."""
        parts = []
        for name, text, flag in (
            ("rampup_kimg", "the learning rate rises over", "--lr_rampup"),
            ("halflife_kimg", "averaged weights have a half-life of", "--ema"),
        ):
            before, now, finally_used = (getattr(recipe, name) for recipe in (published, shortened, used))
            if before != now == finally_used:
                parts.append(f"{text} {_images(now)} images instead of {_images(before)} ({flag})")
        if parts:
            of = f"{budget:,} of the published {published.budget_images:,} images"
            print(f"{of}: {', '.join(parts)}; the flags set others")

    def tell_moved(self, last: "Snapshot") -> None:
        """Say how far a self-training moved the weights, and what to do if that is nowhere."""
        moved = last.moved()
        if moved is not None:
            print(f"moved {moved:.2e}: |self-trained - base| / |base|")
        if unmoved := last.unmoved():
            warn(f"{unmoved}; raise {self.budget_flag} or --lr, or lower --lr_rampup and --ema")

    def dataset(self) -> "TrainingImages":
        """What is trained on."""
        from neon.data.shards import open_images

        return open_images(self.data)

    @abstractmethod
    def start(self, dataset: "TrainingImages", group: "Processes") -> "tuple[Path | None, GenerativeModel]":
        """The checkpoint that training starts from (None: random weights), and the model to train."""

    @abstractmethod
    def plan(self, model: "GenerativeModel") -> Plan:
        """A preset, with what was given in its place; a RequestError for values that make no sense."""

    @abstractmethod
    def recipe(self, model: "GenerativeModel", plan: Any, dataset: "TrainingImages") -> "Recipe":
        """How to train by `plan`."""

    def budget(self, plan: Any) -> int:
        """How many images to train on, repeated ones included."""
        return int(plan.total_images)

    def snapshot_steps(self, plan: Any) -> list[int]:
        """The steps after which snapshots are written; the last ends the training."""
        from neon.selftrain import snapshot_steps

        return snapshot_steps(plan.batch, plan.total_images, plan.save_interval)


def _images(kimg: float | None) -> str:
    """A number of images, as text, from thousands of them; None is none."""
    images = 1000 * (kimg or 0)
    return f"{images:,.0f}" if images >= 10 else f"{images:.2g}"


@dataclass(frozen=True, kw_only=True)
class EncodeProgram:
    """Encode images once, for training many epochs without the work of tokenizer or autoencoder."""

    data: Path
    """folder or zip of images"""
    outdir: Path
    """folder of what they are encoded as"""
    batch_size: int = 64
    """images per forward pass of one process"""
    fresh: bool = False
    """replace what the output holds"""
    tf32: Switch = None
    """whether a GPU may round the inputs of products to TF32; by default it does"""
    device: Device = None
    """by default a GPU where there is one"""

    def __call__(self) -> None:
        from neon.data.encoded import encode_set
        from neon.data.shards import open_images
        from neon.precision import ENCODING, decide
        from neon.runtime.distributed import processes

        at_least_one(batch_size=self.batch_size)
        with processes(self.device) as group:
            encoder, dataset = self.encoder(group), open_images(self.data)
            precision = decide(None, ENCODING, group.device, self.tf32)
            usual = decide(None, ENCODING, group.device)  # not recorded, as by runs before there was a choice
            said = {} if precision == usual else {"tf32": precision.tf32}

            def encode(images: "torch.Tensor") -> "torch.Tensor":
                with precision.allowed_on(group.device):
                    return encoder.encode(images)

            encode_set(
                encode,
                dataset,
                self.outdir,
                kind=encoder.kind,
                image_shape=(3, encoder.side, encoder.side),
                batch_size=self.batch_size,
                processes=group,
                identity={"neon": __version__, **encoder.identity, **said},
                fresh=self.fresh,
            )
            if group.is_main:
                print(f"{self.outdir}: {len(dataset)} images")

    @abstractmethod
    def encoder(self, group: "Processes") -> "ImageEncoder":
        """What encodes, on the device of this process."""


@dataclass(frozen=True, kw_only=True)
class ImageEncoder:
    """How images are encoded, and what of."""

    encode: "Callable[[torch.Tensor], torch.Tensor]"
    """uint8 [B, 3, side, side] -> one example per image"""
    kind: str
    """what sets of them hold"""
    side: int
    """of the images"""
    identity: dict[str, Any]
    """what determines the examples, as JSON"""


@dataclass(frozen=True, kw_only=True)
class AnyModelFlags(NetworkFlags):
    """The network."""

    network: FileOrURL
    """the network: a checkpoint"""
    model: ModelName = None
    """the class of a model of your own; by default as the checkpoint says"""
    vae: File = None
    """autoencoder or tokenizer; by default where it usually lies"""
    prompts: File = None
    """of a network that is asked by prompts: a text file with one in each line"""

    def load(self, group: "Processes", **arguments: Any) -> "tuple[Path, GenerativeModel]":
        from neon.runtime.download import shared_file

        path = shared_file(self.network, group)
        model = self._origin(path).open(group.device, **arguments)
        tell_prompts(self.prompts, model)
        return path, model

    def facts(self, model: "GenerativeModel", group: "Processes") -> dict[str, Any]:
        return group.on_main(lambda: self._origin(Path(self.network)).facts(model))

    def _origin(self, path: Path) -> "Origin":
        from neon.library.generator import Origin

        return Origin(
            path=path,
            key=self.key,
            kind=self.model,
            autoencoder=self.vae,
            precision=self.precision,
            tf32=self.tf32,
            prompts=self.prompts,
        )


@dataclass(frozen=True, kw_only=True)
class LossFlags(AnyModelFlags):
    """The network, and how it is trained."""

    loss: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME=NUMBER ..")] = ()
    """settings of the training loss, such as min_snr=5 for pipelines of diffusers; by default the model's own"""

    def _origin(self, path: Path) -> "Origin":
        return replace(super()._origin(path), loss=self.loss)


@dataclass(frozen=True, kw_only=True)
class AnyImageFlags(SamplerFlags, AnyModelFlags, NumberedImages):
    """The network, its sampler and its images."""


@dataclass(frozen=True, kw_only=True)
class Sample(AnyImageFlags, SampleProgram):
    """Sample images of a network into a PNG folder or a zip, with their classes: the synthetic set S.

    A killed run goes on where it was. Under `torchrun -m neon.cli sample ...` the images are the same.

    Example: neon sample --network neon/demo/base.safetensors --num_images 1000 --outdir synthetic.zip --num_steps 5
    """


@dataclass(frozen=True, kw_only=True)
class Selftrain(LossFlags, BudgetFlags, TrainProgram):
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

    def start(self, dataset: "TrainingImages", group: "Processes") -> "tuple[Path | None, GenerativeModel]":
        return self.load(group, for_training=True)

    def plan(self, model: "GenerativeModel") -> BudgetPlan:
        usual = BudgetPlan(
            batch=model.recipe.batch_size, total_images=self.total_images, save_interval=self.total_images
        )
        return self.completed(usual)

    def recipe(self, model: "GenerativeModel", plan: Plan, dataset: "TrainingImages") -> "Recipe":
        from neon.selftrain import recipe_of

        try:
            return recipe_of(model, plan.batch, self.lr)
        except ValueError as error:
            raise RequestError(f"--lr: {error}") from error


@dataclass(frozen=True, kw_only=True)
class Evaluate(AnyImageFlags, NumberedScoreProgram):
    """FID, Inception Score, precision and recall of a network, or of merges of two.

    Example: neon evaluate --network neon/demo/base.safetensors --ref neon/demo/test-statistics.npz
    --features neon/demo/features.safetensors --num_images 2000 --num_steps 5 --set solver=euler
    """


@dataclass(frozen=True, kw_only=True)
class Stats(FeatureFlags):
    """Write the mean and covariance of the features of images: the reference that scores are computed against.

    Runs on several processes under `torchrun -m neon.cli stats ...`; the result is the same.

    Example: neon stats real_images/ real.npz
    """

    images: tyro.conf.Positional[Path]
    """folder or zip of images of one size"""
    output: tyro.conf.Positional[Path]
    """file to write; ends in .npz"""
    batch_size: int = 64
    """images per forward pass"""
    device: Device = None
    """by default a GPU where there is one"""
    beside: File = None
    """statistics of the same images by other features, published ones for example: the output holds them, too"""
    overwrite: bool = False
    """replace an existing output"""

    def __call__(self) -> None:
        from neon.data.shards import open_images
        from neon.evaluate import tally_images
        from neon.metrics import Statistics, save_statistics
        from neon.metrics.reference import statistics_beside
        from neon.runtime.distributed import processes
        from neon.runtime.files import check_writable
        from neon.runtime.threads import use_threads

        output, overwrite = self.output, self.overwrite
        at_least_one(batch_size=self.batch_size)
        if output.suffix != ".npz":
            raise RequestError(f"{output}: statistics are written as .npz; end the name in .npz")
        with processes(self.device) as group:
            dataset = open_images(self.images)
            extractors = self.extractors(group.device)
            use_threads(group.device, *extractors)
            others = [] if self.beside is None else statistics_beside(self.beside, extractors)
            group.on_main(lambda: check_writable(output, overwrite=overwrite))
            tallies = tally_images(dataset, extractors, batch_size=self.batch_size, processes=group)

            def write() -> None:
                made = [
                    Statistics.from_moments(tally.moments, name=str(self.images), features=tally.extractor.identity)
                    for tally in tallies
                ]
                save_statistics(output, [*made, *others], overwrite=overwrite)
                features = " and ".join(f"{extractor.dim} features of {extractor.name}" for extractor in extractors)
                kept = f"; beside them {' and '.join(str(one.features) for one in others)}" if others else ""
                print(f"{self.images} -> {output} ({len(dataset)} images, {features}{kept})")

            group.on_main(write)


@dataclass(frozen=True, kw_only=True)
class Fid(ImagePairFlags):
    """Score images A against images or statistics B: FID, the Inception Score of A, precision and recall.

    Runs on several processes under `torchrun -m neon.cli fid ...`; the result is the same.

    Example: neon fid samples.zip real.npz
    """

    def __call__(self) -> None:
        from neon.cli.score import score_images
        from neon.runtime.distributed import processes

        at_least_one(batch_size=self.batch_size)
        with processes(self.device) as group:
            score_images(self, group)
