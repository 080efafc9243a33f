"""Neon from Python: a generator that is loaded, sampled, self-trained, extrapolated, scored and saved.

The functions do what the commands do, with the same images, weights and scores; `import neon` has them by name. A wrong
request is a `RequestError` (a ValueError), work that fails a `WorkError` (a RuntimeError), both with one line that says
what to do. Progress and warnings go to stderr; TQDM_DISABLE=1 in the environment leaves progress bars out.
"""

import contextlib
import copy
import functools
import inspect
import math
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from neon import __version__
from neon.checkpoint.safetensors_format import safetensors_sha256, save_safetensors
from neon.data.sampler import SAMPLER, sampler_text
from neon.data.shards import open_images
from neon.errors import RequestError, WorkError, warn
from neon.evaluate import Scores, evaluate, real_features, references_at, sampled_images, warn_of_few
from neon.lora.settings import check_lora, lora_of, record_of
from neon.merge import LiveMerge, load_self_trained, warn_of_merge, warn_of_snapshot
from neon.merge.extrapolate import check_weight
from neon.merge.pair import open_self_trained
from neon.merge.streaming import FORMULA
from neon.metrics.reference import NamedFeatures
from neon.model import (
    GenerativeModel,
    code_file,
    complete,
    load_model,
    model_metadata,
    sampler_of,
)
from neon.noise import Purpose, image_seeds
from neon.recipe import Recipe
from neon.runtime.blocks import blocks
from neon.runtime.distributed import Processes
from neon.runtime.download import local_file, shared_file
from neon.runtime.files import check_not_input, check_writable, hashes, sha256_file
from neon.runtime.hub import output_path, short_name, with_fetched
from neon.runtime.parallel import Parallel
from neon.runtime.progress import Progress
from neon.runtime.signals import answered
from neon.runtime.threads import threads_for
from neon.sampling import SetForm, check_enough, check_label, set_identity
from neon.sampling import sample_set as write_set
from neon.selftrain import (
    pickle_copies,
    recipe_of,
    snapshot_steps,
    train_in_folder,
    training_identity,
    usual_micro_batch,
)
from neon.settings import SETTINGS, loss_settings, settings_json, usual_settings, with_settings

P = ParamSpec("P")
T = TypeVar("T")
PathLike = str | os.PathLike[str]

LARGEST_MICRO_BATCH = 64
"""images per forward pass of a training unless told otherwise"""
_NESTINGS = ("base_key", "self_trained_key")  # of the files of a merge, in its metadata

_SAME = (
    *("features", "inception_weights", "key", "model", "precision", "prompts", "resize", "seed", "tf32"),
    *("lora_rank", "lora_alpha", "lora_targets", "gradient_checkpointing", "compile", "parallel", "workers"),
)
"""flags that are keywords of the same name"""
# Lower rooms name flags of commands in what they say; these are the keywords here. What is not here is said of programs
# of others, or is called here as there.
_KEYWORDS = {
    "class": "label",
    "fresh": "fresh=True",
    "overwrite": "overwrite=True",
    "model path/to/file.py:NAME": 'model="path/to/file.py:NAME"',
    "vae_ckpt (neon's commands: --vae)": "autoencoder",
    "vae_path (neon's commands: --vae)": "autoencoder",
    "vae": "autoencoder",
    "inception-weights": "inception_weights",
    "self_trained_key": "key",
    "batch_gpu": "micro_batch",
    **{name: name for name in _SAME},
}
_FLAG = re.compile("--(" + "|".join(map(re.escape, sorted(_KEYWORDS, key=len, reverse=True))) + r")(?![\w-])")


def in_python(message: str) -> str:
    """A message of a command as one for who calls a function: keywords in the place of flags."""
    return _FLAG.sub(lambda found: _KEYWORDS[found[1]], message)


def public(function: Callable[P, T]) -> Callable[P, T]:
    """`function`, whose errors name keywords."""

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return function(*args, **kwargs)
        except (RequestError, WorkError) as error:
            error.args = (in_python(str(error)),)
            raise

    return call


@dataclass(frozen=True, kw_only=True)
class Origin:
    """The file that a model is opened from, and how."""

    path: Path
    key: str | None = None
    """nesting of the state dict"""
    kind: type[GenerativeModel] | str | None = None
    """the class of a model of one's own, or `file.py:NAME`; None: as the file says"""
    autoencoder: Path | None = None
    """of a model that has one; None: where it usually lies"""
    precision: str | None = None
    """None: as published for a GPU, float32 on a CPU"""
    tf32: bool | None = None
    """whether a GPU may round the inputs of float32 products; None: as usual for the precision"""
    loss: tuple[str, ...] = ()
    """settings of the training loss, NAME=NUMBER each, in place of the model's own"""
    prompts: Path | None = None
    """text file of those that the model is asked by; None: none yet"""

    def open(self, device: torch.device, **arguments: Any) -> GenerativeModel:
        """The model, whole; `arguments` and errors as `neon.model.load_model`, those of its autoencoder and prompts."""
        if self.loss:
            arguments["loss"] = loss_settings(self.loss)
        computed: dict[str, Any] = {"precision": self.precision, "tf32": self.tf32}
        model = load_model(self.path, self.key, device=device, kind=self.kind, **computed, **arguments)
        complete(model, self.autoencoder, self.prompts)
        return model

    def facts(self, model: GenerativeModel) -> dict[str, Any]:
        """What, besides the network, determines images and training of `model`, which was opened so, as JSON."""
        files = {"model_sha256": self._code(), "autoencoder_sha256": model.autoencoder_file(self.autoencoder)}
        # Nothing without prompts or for float32, as runs before there was a choice.
        files |= {} if self.prompts is None else {"prompts_sha256": self.prompts}
        precision = {} if model.precision.name == "fp32" else model.precision.recorded
        return {**hashes(files), **precision, **({"loss": list(self.loss)} if self.loss else {})}

    def _code(self) -> Path | None:
        """The file with the class of a model of one's own; None: there is none, or it was typed in."""
        if not inspect.isclass(self.kind):
            return code_file(self.kind)
        with contextlib.suppress(TypeError, OSError):
            return Path(inspect.getfile(self.kind))
        return None


@dataclass(frozen=True, kw_only=True, eq=False)
class Generator:
    """A trained image generator with the settings that it is sampled with; `load` and `extrapolate` make it.

    No function here changes its weights or its settings.
    """

    model: GenerativeModel = field(repr=False)
    """network, sampler and loss, in eval mode on `device`. Records tell weights by the file they were loaded from: save
    those that you change in place, and load them, before they are used here"""
    settings: Any
    """of the sampler: a frozen dataclass of the architecture"""
    device: torch.device
    """where it computes"""
    path: Path | None
    """the file of these weights; None: they are in memory only"""
    origin: Origin = field(repr=False)
    """how its model was opened; of an extrapolated one, its base's"""

    @public
    def with_settings(self, **settings: Any) -> "Generator":
        """The same generator, sampled with other settings where they are given, by name; it shares the network.

        Raises:
            RequestError: the sampler has no such setting, or a value makes no sense.
        """
        return replace(self, settings=with_settings(self.settings, settings, "settings of the sampler"))

    @public
    def sample(
        self,
        num_images: int,
        *,
        seed: int = 0,
        label: int | Sequence[int] | Tensor | None = None,
        batch_size: int = 64,
        **settings: Any,
    ) -> Tensor:
        """Images, uint8 [N, C, H, W] on the CPU: those that `neon sample` writes for the same numbers.

        Image i is determined by the seed, its class and the settings; batches move it by roundings only.

        Args:
            num_images: N, at least 1.
            seed: 0 to 1023; images of different seeds are drawn from different noise.
            label: class of every image, or of each (N of them); None: every class equally often, shuffled by the seed,
                or as the model draws them.
            batch_size: images per forward pass.
            settings: by name, in place of those of the generator.

        Raises:
            RequestError: a number is out of range, the model has no such class, or the sampler no such setting.
        """
        which = _images(self, Purpose.SYNTHETIC, num_images, seed, label, batch_size, settings)
        alone = Processes(device=self.device)
        compute = sampled_images(self.model, which.seeds, which.settings, alone, which.label)
        done = []
        with threads_for(self.device, self.model), Progress("sampling", num_images, "img", alone) as progress:
            for block in blocks(num_images, batch_size):
                done.append(compute(block).cpu())
                progress.advance(len(block))
        return torch.cat(done)

    @public
    def save(self, path: PathLike, *, overwrite: bool = False) -> Path:
        """Write weights and settings as one safetensors file; `neon.load` gives a generator of the same images.

        Returns:
            `path`.

        Raises:
            RequestError: `path` exists (unless `overwrite`), is the file that this generator came from, does not end
                in .safetensors, or cannot be written.
            WorkError: the disk is full.
        """
        path = output_path(path)
        if path.suffix != ".safetensors":
            raise RequestError(f"{path}: generators are saved as safetensors; end the name in .safetensors")
        check_not_input(path, self.origin.path)
        check_writable(path, overwrite=overwrite)
        save_safetensors(path, self.model.network.state_dict(), self._metadata(), overwrite=overwrite)
        return path

    def _metadata(self) -> dict[str, str]:
        """What a file tells of the generator beside its weights."""
        return {
            **self.model.file_metadata,
            **model_metadata(self.model),
            SETTINGS: settings_json(self.settings),
            "neon_version": __version__,
        }

    def _sha256(self) -> str:
        """Of the file of its weights, or of that which `save` would write."""
        if self.path is not None:
            return sha256_file(self.path)
        return safetensors_sha256(self.model.network.state_dict(), self._metadata())

    def _processes(self, given: Processes | None) -> Processes:
        """The processes `given` to work with, or this one alone; a RequestError if they compute elsewhere."""
        processes = given or Processes(device=self.device)
        if processes.device != self.device:
            raise RequestError(
                f"processes: they compute on {processes.device} and the generator on {self.device}; load it with "
                "device=processes.device"
            )
        return processes


@public
def load(
    path: PathLike,
    *,
    key: str | None = None,
    device: torch.device | str | None = None,
    precision: str | None = None,
    tf32: bool | None = None,
    model: type[GenerativeModel] | str | None = None,
    autoencoder: PathLike | None = None,
    prompts: PathLike | None = None,
) -> Generator:
    """The generator of a checkpoint: published, written by neon, or of a model of your own.

    Nothing stored in the file is executed. It is sampled with the settings that the file carries (`Generator.save`
    writes them), else with the published ones.

    Args:
        path: file, folder or index of shards; or what is downloaded once: a URL, or a name on the Hugging Face Hub,
            `hf:ORG/REPO[/FILE][@REVISION]`.
        key: nesting of the state dict, such as "ema"; chosen if not given.
        device: "cpu", "cuda" or "cuda:1", say; by default a GPU where there is one.
        precision: "fp32", "tf32", "bf16" or "fp16"; by default on a GPU as published, on a CPU float32.
        tf32: whether a GPU may round the inputs of float32 products; by default as usual for the precision.
        model: class of a model of your own, or "path/to/file.py:NAME", which runs that file; by default as the
            checkpoint says.
        autoencoder: file of the autoencoder or tokenizer of a model that has one; by default where it usually lies.
        prompts: text file, one in each line, of a model that is asked by prompts: its labels are their numbers, from 0.

    Raises:
        RequestError: the file is missing or damaged, its architecture is not known or not that of `model`, or there is
            no such device or precision.
        WorkError: a download fails.
    """
    place = _device(device)
    origin = Origin(
        path=local_file(path),
        key=key,
        kind=model,
        autoencoder=None if autoencoder is None else local_file(autoencoder),
        precision=precision,
        tf32=tf32,
        prompts=None if prompts is None else Path(prompts),
    )
    loaded = origin.open(place)
    try:
        settings = usual_settings(loaded)
    except RequestError as error:
        raise RequestError(f"{path}: {error}") from error
    return Generator(model=loaded, settings=settings, device=place, path=origin.path, origin=origin)


@public
def sample_set(
    generator: Generator,
    num_images: int,
    path: PathLike,
    *,
    seed: int = 0,
    label: int | None = None,
    batch_size: int = 64,
    fresh: bool = False,
    format: SetForm = "png",
    processes: Processes | None = None,
    **settings: Any,
) -> Path:
    """Sample images into a folder or a zip, with their classes: the synthetic set S, as `neon sample` writes it.

    PNG files by number, and `dataset.json` with their classes and what drew them. The same call goes on where one that
    was killed has ended.

    Args:
        generator: what is sampled.
        num_images: how many, at least 1.
        path: a folder, or a name that ends in .zip.
        seed: 0 to 1023; as in `Generator.sample`, whose images these are.
        label: class of every image; None: every class equally often, or as the model draws them.
        batch_size: images per forward pass of one process.
        fresh: replace what lies at `path`.
        format: "png", a file for each image, or "shards" of safetensors in a folder, which are read faster.
        processes: those of a run under torchrun (`neon.runtime.distributed.processes`), which share the work and all
            make this call; by default this one alone.
        settings: of the sampler by name, in place of those of the generator.

    Returns:
        `path`.

    Raises:
        RequestError: a number, class or setting makes no sense, or `path` holds something else or cannot be written.
        WorkError: the disk is full; what is written stays, and the next call goes on from there.
    """
    path, group = output_path(path), generator._processes(processes)
    which = _images(generator, Purpose.SYNTHETIC, num_images, seed, label, batch_size, settings)
    check_enough(num_images, group)
    numbered = {"num_images": num_images, "seed": seed}
    with threads_for(group.device, generator.model):

        def identity() -> dict[str, Any]:
            facts = generator.origin.facts(generator.model) | ({} if format == "png" else {"format": format})
            return set_identity(generator._sha256(), numbered, label, batch_size, which.settings, facts)

        write_set(
            generator.model,
            which.seeds,
            which.settings,
            path,
            batch_size=batch_size,
            processes=group,
            identity=group.on_main(identity),
            label=which.label,
            fresh=fresh,
            form=format,
        )
    return path


@public
def self_train(
    generator: Generator,
    images: PathLike,
    outdir: PathLike,
    *,
    total_images: int,
    batch: int | None = None,
    lr: float | None = None,
    lr_rampup: float | None = None,
    ema: float | None = None,
    micro_batch: int | None = None,
    save_interval: int | None = None,
    lora_rank: int | None = None,
    lora_alpha: float | None = None,
    lora_targets: Sequence[str] = (),
    gradient_checkpointing: bool = False,
    compile: bool = False,
    parallel: Parallel | None = None,
    workers: int | None = None,
    seed: int = 0,
    fresh: bool = False,
    processes: Processes | None = None,
) -> Path:
    """Train a copy of a generator briefly on its own samples, as `neon selftrain` does; the generator stays as it is.

    By the recipe of its architecture, whose ramp of the learning rate and average of the weights are shortened for
    fewer images than published. The same call goes on where one that was killed or stopped has ended. Warns if the
    weights did not move.

    Args:
        generator: where training starts from.
        images: folder or zip of images with their classes, such as `sample_set` writes.
        outdir: folder of snapshots, log and state.
        total_images: how many images are trained on, repeated ones included.
        batch: images per step, over all processes; by default as the recipe says.
        lr: learning rate; by default as the recipe says.
        lr_rampup: thousand images over which the learning rate rises from 0; 0: none.
        ema: half-life of the averaged weights in thousand images; 0: none, the raw weights are the result.
        micro_batch: images per forward pass, a divisor of `batch`; moves results by rounding (and dropout). By default
            the largest up to 64.
        save_interval: images between snapshots; by default there is one, at the end.
        lora_rank: train factors of this rank beside layers, in the place of the weights (LoRA, by PEFT); snapshots hold
            these alone.
        lora_alpha: the product of the factors is multiplied with this over the rank; by default the rank.
        lora_targets: the layers, by the last words of their names, or "all"; by default those that are usual for the
            architecture.
        gradient_checkpointing: compute activations once more for the backward pass, where the network can.
        compile: compile the network (torch.compile), which moves results by rounding.
        parallel: how several processes train: "ordered" adds gradients as one process would, "ddp" as they come,
            "fsdp" also spreads weights and optimiser over the GPUs. By default "ordered" on CPUs, "ddp" on GPUs, "fsdp"
            where nothing else fits.
        workers: processes that read images ahead; by default none on a CPU, up to 8 on a GPU.
        seed: 0 to 1023; of the order of the images and of the noise, and of first factors.
        fresh: start anew, replacing a run that is in the folder.
        processes: as in `sample_set`.

    Returns:
        The last snapshot, a safetensors file that `extrapolate` and `load` take.

    Raises:
        RequestError: a number makes no sense, the images do not fit the model, or the folder is another run's.
        WorkError: the loss is not finite, or the disk is full.
    """
    total_images = whole("total_images", total_images)
    batch, micro_batch, save_interval = (
        None if value is None else whole(name, value)
        for name, value in (("batch", batch), ("micro_batch", micro_batch), ("save_interval", save_interval))
    )
    check_lora(lora_rank, lora_alpha, lora_targets)
    group, outdir = generator._processes(processes), output_path(outdir)
    images = shared_file(os.fspath(images), group)
    dataset = open_images(images)
    model = generator.origin.open(group.device, for_training=True)
    lora = lora_of(lora_rank, lora_alpha, lora_targets, model.lora_targets)
    model.network.load_state_dict(generator.model.network.state_dict())
    recipe = _recipe(model, total_images, batch, lr, lr_rampup, ema)
    plan = {"batch": recipe.batch_size, "total_images": total_images, "save_interval": save_interval or total_images}
    steps = snapshot_steps(plan["batch"], plan["total_images"], plan["save_interval"])
    usual = usual_micro_batch(recipe.batch_size, model.batch_multiple, LARGEST_MICRO_BATCH)

    def identify() -> dict[str, Any]:
        facts = {**generator.origin.facts(model), **record_of(lora)}
        return training_identity(model, images, generator._sha256(), facts)

    identity = group.on_main(identify)
    with threads_for(group.device, model), answered():
        snapshots = train_in_folder(
            model,
            dataset,
            outdir,
            record={**identity, "plan": plan, "recipe": recipe.facts(), "seed": seed},
            fresh=fresh,
            num_steps=steps[-1],
            snapshot_steps=steps,
            recipe=recipe,
            seed=seed,
            processes=group,
            micro_batch=micro_batch or usual,
            title="self-training",
            identity=identity,
            on_snapshot=None if lora else pickle_copies(generator.path, generator.origin.key, model),
            lora=lora,
            gradient_checkpointing=gradient_checkpointing,
            compile_network=compile,
            parallel=parallel,
            workers=workers,
        )
    last = snapshots[-1]
    if unmoved := group.on_main(last.unmoved):
        warn(f"{unmoved}; raise total_images or lr, or lower lr_rampup and ema")
    return last.path


@public
def extrapolate(base: Generator, self_trained: PathLike | Generator, w: float, *, key: str | None = None) -> Generator:
    """Neon: theta = (1 + w) theta_base - w theta_self_trained, as a new generator; both others stay as they are.

    w = 0 is the base, w = -1 the self-trained model, w > 0 Neon. Weights are extrapolated; buffers (running statistics,
    tables) are the base's. Of files in float32 the weights are, bit for bit, those that `neon merge` writes. The result
    is sampled with the settings of the base, for which w is to be chosen.

    Args:
        base: the generator before its self-training.
        self_trained: what `self_train` returns, any other file of self-trained weights (or its name on the Hub, as for
            `load`), or a generator loaded from one.
        w: any finite number.
        key: nesting of the state dict in the file of `self_trained`; by default that of the base if it is there.

    Raises:
        RequestError: the two are not of one network, a file cannot be read, or `w` is not finite.
        WorkError: the result is not finite.
    """
    check_weight(w)
    if isinstance(self_trained, Generator):
        if self_trained.path is None:
            raise RequestError(
                "self_trained: this generator is in memory only; save it, and give the file in its place"
            )
        key = key or self_trained.origin.key
        self_trained = self_trained.path
    path, opened = local_file(self_trained), base.origin
    trained = load_self_trained(base.model.network, opened.path, path, opened.key, key)
    warn_of_snapshot(path, base.model, base.settings, opened.key, key)
    model = _with_own_network(base.model)
    network = model.network.cpu()  # where files are merged, too
    own = {name: tensor.cpu() for name, tensor in base.model.network.state_dict().items()}
    LiveMerge(network, own, trained).set(w)
    network.to(base.device)
    model.file_metadata = _provenance(base, path, w, key)
    return replace(base, model=model, path=None)


@public
def score(
    generator: Generator,
    real: PathLike,
    *,
    features: PathLike | Sequence[PathLike] = "inception",
    num_images: int = 10_000,
    seed: int = 0,
    label: int | None = None,
    batch_size: int = 64,
    inception_weights: PathLike | None = None,
    resize: str | None = None,
    real_images: PathLike | None = None,
    nearest_k: int = 5,
    processes: Processes | None = None,
    **settings: Any,
) -> Scores:
    """Scores of sampled images against real ones, as `neon evaluate` prints them for the same numbers.

    The images are others than those of `Generator.sample` and `sample_set`, and others than `neon tune` chooses w by.

    Args:
        generator: what is sampled.
        real: statistics of real images (.npz with mu and sigma, as `neon stats` writes them; a file, a URL or a name on
            the Hub), or a folder or zip of images of the model's size, whose statistics are computed in every call.
        features: "inception", or the file of a feature network; or several, which score the same images: the scores in
            the others are `beside` those in the first.
        num_images: how many are sampled. The distance falls with their number; more than there are features, at least.
        seed: 0 to 1023; of the images.
        label: as in `sample_set`.
        batch_size: images per forward pass of one process.
        inception_weights: file of the Inception network; by default in torch-fidelity's cache.
        resize: how images are resized for it: "clean", "legacy_pytorch" or, by default, "legacy_tensorflow".
        real_images: folder or zip of real images: also scores precision, recall, density, coverage and the kernel
            distance (KID).
        nearest_k: which nearest neighbour gives the radius in these.
        processes: as in `sample_set`.
        settings: of the sampler by name, in place of those of the generator.

    Returns:
        Fréchet distance (FID, if the features are Inception's) and, where they are asked for or defined, the others.

    Raises:
        RequestError: a number, class or setting makes no sense, files are missing or do not fit each other, or there
            are no more real images than features.
        WorkError: features are not finite, or those of all images alike.
    """
    group = generator._processes(processes)
    which = _images(generator, Purpose.REPORT, num_images, seed, label, batch_size, settings)
    nearest_k = whole("nearest_k", nearest_k)
    check_enough(num_images, group)
    extractors = named_features(features, inception_weights, resize).load(group.device)
    model = generator.model
    with threads_for(group.device, model, *extractors), answered():
        path = shared_file(os.fspath(real), group)
        compared = real_features(
            None if real_images is None else shared_file(os.fspath(real_images), group),
            extractors,
            nearest_k=nearest_k,
            kernel=True,
            batch_size=batch_size,
            processes=group,
        )
        references = references_at(path, compared, model, extractors, batch_size=batch_size, processes=group)
        for extractor in extractors:
            warn_of_few(num_images, extractor.dim)
        return evaluate(
            model,
            which.seeds,
            which.settings,
            references,
            batch_size=batch_size,
            processes=group,
            label=which.label,
        )


@dataclass(frozen=True, kw_only=True)
class _Images:
    """Which images are sampled, and how."""

    seeds: list[int]
    label: int | Tensor | None
    settings: Any


def _images(
    generator: Generator,
    purpose: Purpose,
    num_images: int,
    seed: int,
    label: int | Sequence[int] | Tensor | None,
    batch_size: int,
    settings: dict[str, Any],
) -> _Images:
    """What the numbers that a caller gives come to for a generator; a RequestError if one makes no sense."""
    whole("num_images", num_images)
    whole("batch_size", batch_size)
    whole("seed", seed, least=0)
    model = generator.model
    chosen = with_settings(generator.settings, settings, "settings of the sampler")
    classes = model.labels_for(purpose, num_images, seed) if label is None else _label(model, label, num_images)
    warn_of_merge(generator.path or "the extrapolated generator", model, chosen)
    return _Images(seeds=image_seeds(purpose, seed, num_images), label=classes, settings=chosen)


def _label(model: GenerativeModel, label: int | Sequence[int] | Tensor, num_images: int) -> int | Tensor:
    """The class of all images, or of each, int64 [N]; a RequestError if the model does not know it."""
    if isinstance(label, int):
        check_label(model, label)
        return label
    try:
        classes = torch.as_tensor(label).cpu()
    except (TypeError, ValueError, RuntimeError):
        classes = torch.empty(0)
    if classes.shape != (num_images,) or classes.dtype.is_floating_point or classes.dtype == torch.bool:
        raise RequestError(f"label: expected one class, or one for each of the {num_images} images; found {label!r}")
    check_label(model, int(classes[0]))  # an unconditional one knows none
    check_label(model, classes.long())
    return classes.long()


def whole(name: str, value: int, least: int = 1) -> int:
    """`value`; a RequestError, in which it is called `name`, unless it is a whole number of at least `least`."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise RequestError(f"{name} is {value!r}; expected a whole number, at least {least}")
    return value


def _device(named: torch.device | str | None) -> torch.device:
    """The device that a caller names, by default a GPU where there is one; a RequestError if there is no such one."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    expected = 'expected "cpu", or "cuda" where there is a GPU'
    try:
        device = torch.device(named or ("cuda" if gpus else "cpu"))
    except RuntimeError as error:
        raise RequestError(f"device is {named!r}; {expected}") from error
    if device.type == "cpu":
        return torch.device("cpu")
    if device.type != "cuda" or (device.index or 0) >= gpus:
        raise RequestError(f"device is {str(named)!r}, and there are {gpus} GPUs; {expected}")
    return torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)


def _recipe(
    model: GenerativeModel,
    total_images: int,
    batch: int | None,
    lr: float | None,
    lr_rampup: float | None,
    ema: float | None,
) -> Recipe:
    """How to train `model`, with what a caller gives in its place; a RequestError if it makes no sense."""
    for name, value in (("lr_rampup", lr_rampup), ("ema", ema)):
        if value is not None and not 0 <= value < math.inf:
            raise RequestError(f"{name} is {value}; expected 0 (none) or more, in thousand images")
    try:
        recipe = recipe_of(model, batch, None if lr is None else float(lr)).scaled_to(total_images)
    except ValueError as error:
        raise RequestError(str(error)) from error
    if lr_rampup is not None:
        recipe = recipe.with_rampup(float(lr_rampup))
    return recipe if ema is None else recipe.with_halflife(float(ema) or None)


def _with_own_network(model: GenerativeModel) -> GenerativeModel:
    """A copy of `model` with a network of its own; what else it is made of, such as an autoencoder, they share."""
    shared = {id(part): part for part in model.children() if part is not model.network}
    return copy.deepcopy(model, shared)


def _provenance(base: Generator, self_trained: Path, w: float, key: str | None) -> dict[str, str]:
    """What the metadata tell of an extrapolated generator, with what those of its base do."""
    name = short_name(base.origin.path)
    known = {name: text for name, text in base.model.file_metadata.items() if name not in _NESTINGS}
    with open_self_trained(self_trained, base.origin.key, key) as snapshot:
        sampler = sampler_of(snapshot.metadata)
    return {
        **known,
        "formula": FORMULA,
        "w": repr(w + 0.0),  # -0.0 becomes 0.0
        "base": name if base.path is not None else f"an extrapolation of {name}",
        "base_sha256": base._sha256(),
        "self_trained": short_name(self_trained),
        "self_trained_sha256": sha256_file(self_trained),
        **({} if sampler is None else {SAMPLER: sampler_text(sampler)}),
    }


def named_features(
    features: PathLike | Sequence[PathLike], inception_weights: PathLike | None, resize: str | None = None
) -> NamedFeatures:
    """The feature networks that a caller names, one or several."""
    several = (features,) if isinstance(features, (str, os.PathLike)) else features
    weights = None if inception_weights is None else local_file(inception_weights)
    return NamedFeatures(names=tuple(map(with_fetched, several)), inception_weights=weights, resize=resize)
