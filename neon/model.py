"""What Neon needs of an image generator, and how one is found by name.

An architecture is a subclass of `GenerativeModel`, reached through the entry points of the group
`neon.architectures` (`edm`) or as `path/to/file.py:NAME`. Nothing in `neon` knows more about it. A checkpoint names its
architecture, but only an installed one is found by that name: code runs because the command line names it.
"""

import contextlib
import copy
import dataclasses
import importlib
import importlib.util
import inspect
import json
import math
import os
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, ParamSpec, TypeGuard, TypeVar

import torch
from torch import Tensor, nn

from neon.checkpoint import Checkpoint, open_checkpoint, save_safetensors
from neon.checkpoint.common import listing
from neon.checkpoint.naming import fitted, names_differ, unwrapped
from neon.data.prompts import prompts_for, read_prompts
from neon.data.sampler import SAMPLER, parse_sampler
from neon.errors import RequestError, WorkError, warn
from neon.noise import Noise, Purpose
from neon.precision import FP32, Precision, decide
from neon.recipe import Recipe
from neon.runtime.compiling import compile_parts
from neon.tunable import Tunables, far_apart

T = TypeVar("T")
P = ParamSpec("P")
Network = TypeVar("Network", bound=nn.Module)
SomeModel = TypeVar("SomeModel", bound="GenerativeModel")

GROUP = "neon.architectures"
BUFFERS = "buffers"
"""in a file's metadata, the names of the network's float buffers as a JSON list"""
_OF_FILES = "neon_model_"  # begins the names of modules of such files
_MAX_NUMBER = 1 << 24  # in the config of a network of an installed architecture
_TENSORS_BUILT = 10  # while a network is built, for each that it has in the end: some are replaced on the way
_CONFIG = "expected the config that neon wrote; write the file again, or take its `config` out"
ATTRIBUTES = ("network", "image_shape", "num_classes", "config", "default_settings", "recipe")
"""what `__init__` of a GenerativeModel sets"""


class GenerativeModel(nn.Module, ABC):
    """A generator of images: a network whose weights Neon merges, its sampler and its training loss."""

    architecture: ClassVar[str]
    """the name under which checkpoints of this class are found again"""

    network: nn.Module
    """the module whose weights are trained and merged"""
    image_shape: tuple[int, int, int]
    """(C, H, W) of the images it samples"""
    num_classes: int
    """0: unconditional"""
    config: dict[str, Any]
    """JSON that rebuilds the model: `type(model)(model.config)`"""
    default_settings: Any
    """a frozen dataclass, how to sample unless told otherwise"""
    recipe: Recipe
    """how the published model was trained, in what self-training needs of it"""
    prompts: tuple[str, ...] | None = None
    """texts that labels are the numbers of; empty until `use_prompts`. None: labels are classes, if there are any"""
    batch_multiple: int = 1
    """training batches must divide by this"""
    protocol: Mapping[str, str] = MappingProxyType({})
    """rules of sampling that scores depend on, by name; recorded with every score"""
    second: tuple[nn.Module, float] | None = None
    """another network and g, to sample with both; set by `combine`, no part of what is trained and saved"""
    combines: ClassVar[bool] = False
    """whether `sample` heeds `second`"""
    tunable: Tunables = MappingProxyType({})
    """settings of the sampler that may be searched for the best ones of this model; none unless it says so"""
    file_metadata: Mapping[str, str] = MappingProxyType({})
    """what the file says of itself that `load_model` has read it from"""
    lora_targets: tuple[str, ...] = ()
    """layers that a self-training by LoRA adapts unless told otherwise, by the last words of their names; ():
    every linear layer and convolution"""
    example_kind: str = ""
    """what sets of examples are called that `encode` makes once and for all, drawing nothing; "": images are encoded at
    every visit"""
    component: str = ""
    """what pipelines of diffusers call the network (`unet`, `transformer`), in an adapter of it; "": it is in none"""
    precision: Precision = FP32
    """what it computes in; set by `__init__` if that takes it, never afterwards"""
    sampling_precision: ClassVar[Precision] = FP32
    """what published scores were sampled in on GPUs"""
    training_precision: ClassVar[Precision] = FP32
    """what the published network was trained in on GPUs"""

    @classmethod
    def config_of(cls, checkpoint: Checkpoint) -> dict[str, Any] | None:
        """The config of a published network, from what its file says or from its shapes; None: not one of ours."""
        return None

    def set_labels(self, num_images: int, seed: int) -> Tensor | None:
        """Classes of the images of a set, int64 [N]: every class equally often, shuffled by `seed`.

        None: unconditional, or the class belongs to the image and is drawn by `labels`.
        """
        return balanced_labels(num_images, self.num_classes, seed) if self.num_classes else None

    def labels(self, indices: Sequence[int], noise: Noise) -> Tensor | None:
        """Classes of images `indices` that no set gives one: int64 [B], or None if unconditional.

        Draws, if any, come from a restarted `noise`; the stream handed to `sample` is left as it was.
        """
        if not self.num_classes:
            return None
        return torch.tensor([index % self.num_classes for index in indices])

    def use_prompts(self, prompts: Sequence[str]) -> None:
        """Let labels be the numbers of these prompts, in the place of any before; for a model that takes prompts.

        Raises:
            RequestError: it takes none.
        """
        if self.prompts is None:
            raise RequestError(f"--prompts: a network of {self.architecture} is not asked by prompts; leave them out")
        self.prompts, self.num_classes = tuple(prompts), len(prompts)

    def labels_for(self, purpose: Purpose, num_images: int, seed: int) -> Tensor | None:
        """`set_labels` of a set that is drawn for a purpose: each has prompts of its own, if there are enough.

        Raises:
            RequestError: the model is asked by prompts, and has none.
        """
        if self.prompts is None:
            return self.set_labels(num_images, seed)
        own = prompts_for(purpose, len(self.asked_prompts()))
        return torch.tensor(own)[balanced_labels(num_images, len(own), seed)]

    def asked_prompts(self) -> tuple[str, ...]:
        """The prompts of a model that is asked by such; a RequestError if it has none yet."""
        if not self.prompts:
            raise RequestError(
                f"a network of {self.architecture} that is asked by prompts; name a text file with one in each line, "
                "with --prompts"
            )
        return self.prompts

    @abstractmethod
    def sample(self, noise: Noise, labels: Tensor | None, settings: Any) -> Tensor:
        """Images, uint8 [B, C, H, W]; image b depends on row b of `noise` and `labels` only."""

    def calls(self, settings: Any) -> int | None:
        """Network evaluations that an image takes, one with and one without a class counted as two; None: not told."""
        return None

    def converged(self, settings: Any) -> Any | None:
        """Settings of so many calls that more would change little, guidance as in `settings`; None: not told."""
        return None

    def prepare(self, images: Tensor, noise: Noise) -> Tensor:
        """What training does to images before `encode`, on the CPU: uint8 [B, C, H, W] -> the same, of any size.

        Resizing and cropping, say; by default nothing. Processes that are ahead of the training do it, so it takes
        neither the network nor a device. Draws, if any, come before those of `encode`.
        """
        return images

    @abstractmethod
    def encode(self, images: Tensor, noise: Noise) -> Tensor:
        """What `prepare` gives, on the model's device -> what training consumes (pixels, latents, tokens), row by row.

        One row per image; without a `prepare` of its own, images are uint8 [B, C, H, W].
        """

    def autoencoder_file(self, named: Path | None) -> Path | None:
        """Where the frozen network lies through which this model sees images: `named`, or its usual place.

        None: it works on pixels.

        Raises:
            RequestError: the file is missing, or `named` for a model of pixels.
        """
        if named is not None:
            raise RequestError(f"{named}: a model of {self.architecture} works on pixels; leave its autoencoder out")
        return None

    def use_autoencoder(self, path: Path) -> None:
        """Load the frozen network that `autoencoder_file` found, onto the device of the model.

        Raises:
            RequestError: the file does not hold it, or it does not fit the model.
        """
        raise NotImplementedError(f"{self.architecture} works on pixels")

    @property
    def _network_device(self) -> torch.device:
        """Where the network is."""
        return next(self.network.parameters()).device

    def combine(self: SomeModel, second: nn.Module, scale: float) -> SomeModel:
        """A model that samples with this network and `second` at once: (1 + g) out - g out_second at `scale` g.

        SIMS (arXiv 2408.16333), at twice the calls; 0 is this network alone, -1 the second one alone. The model shares
        this one's network and autoencoder: weights that are merged into them later are its own too. `second`, another
        network of the same kind on the same device and in eval mode, is neither trained nor saved with it.

        Raises:
            RequestError: the architecture has no such sampler, or `scale` is not finite.
        """
        if not self.combines:
            raise RequestError(
                f"{type(self).__name__}: it does not sample with two networks at once; let its `sample` heed `second` "
                "and set combines = True (docs/own_model.md)"
            )
        if not math.isfinite(scale):
            raise RequestError(f"the scale of the second network is {scale}; expected a finite number")
        combined = copy.copy(self)
        combined.second = (second, scale)
        return combined

    @property
    def _networks(self) -> tuple[Any, ...]:
        """The networks that images are sampled with."""
        return (self.network,) if self.second is None else (self.network, self.second[0])

    @property
    def _evaluated(self) -> int:
        """How many of them are evaluated in each call; one that has no weight is left out."""
        return 1 if self.second is None or self.second[1] in (0, -1) else 2

    def parts_of(self, network: Any) -> Sequence[nn.Module]:
        """What of `network`, one of this model's, is compiled, each by itself: it as a whole.

        Of transformers their blocks, which share what is compiled of the first.
        """
        return (network,)

    def compile_parts(self) -> None:
        """Compile, in place, what sampling spends its time in; weights may still change."""
        for network in self._networks:
            parts = self.parts_of(network)
            compile_parts(parts, repeated=len(parts) == 1)

    def compile_training(self) -> None:
        """Compile, in place, what training spends its time in."""
        compile_parts(self.parts_of(self.network))

    @abstractmethod
    def training_loss(self, examples: Tensor, labels: Tensor | None, noise: Noise) -> Tensor:
        """Loss terms [G] of a batch; the objective is their mean over the global batch."""


def extrapolated(first: Callable[P, Tensor], second: Callable[P, Tensor], scale: float) -> Callable[P, Tensor]:
    """first + scale (first - second), as functions: away from the second; 0 is the first alone, -1 the second alone."""
    if scale == 0:
        return first
    if scale == -1:
        return second

    def both(*args: P.args, **kwargs: P.kwargs) -> Tensor:
        output = first(*args, **kwargs)
        return output + scale * (output - second(*args, **kwargs))

    return both


def of_both(
    output: Callable[[Network], Callable[P, Tensor]], network: Network, second: tuple[Network, float] | None
) -> Callable[P, Tensor]:
    """What `output` makes of `network`; with a second network and its scale, what is `extrapolated` from both."""
    return output(network) if second is None else extrapolated(output(network), output(second[0]), second[1])


def balanced_labels(num_images: int, num_classes: int, seed: int) -> Tensor:
    """Every class equally often, int64 [N], shuffled by `seed`; classes of a remainder are drawn from it too.

    The published rule of class-conditional evaluations; for a multiple of `num_classes` the same labels.
    """
    each, rest = divmod(num_images, num_classes)
    drawn = torch.randint(num_classes, (rest,), generator=torch.Generator().manual_seed(seed + 1))
    labels = torch.cat([torch.arange(num_classes).repeat_interleave(each), drawn])
    return labels[torch.randperm(num_images, generator=torch.Generator().manual_seed(seed))]


def architecture(name: str) -> type[GenerativeModel]:
    """The class that a user calls `name`: an entry point, or `path/to/file.py:NAME`, which runs that file.

    Never to be called with a name from a checkpoint.

    Raises:
        RequestError: no such entry point, file or class, or the file does not run.
    """
    return _class_in_file(name) if ":" in name else _installed(name)


def code_file(name: str | None) -> Path | None:
    """The file in `path/to/file.py:NAME`; None: an entry point, or no name."""
    return Path(name.rpartition(":")[0]) if name is not None and ":" in name else None


def own_class(kind: type[GenerativeModel]) -> str:
    """The flag that names a class in a file to commands: ` --model path/to/file.py:NAME`; "" for an installed one."""
    return f" --model {inspect.getfile(kind)}:{kind.__name__}" if kind.__module__.startswith(_OF_FILES) else ""


def _installed(name: str) -> type[GenerativeModel]:
    found = {entry.name: entry for entry in entry_points(group=GROUP)}
    if name not in found:
        known = ", ".join(sorted(found, key=str.lower)) or "(none installed)"
        raise RequestError(
            f"architecture {name!r} is unknown; expected one of {known}, or path/to/file.py:NAME of your own"
        )
    return _loaded(found[name])


def _loaded(entry: EntryPoint) -> type[GenerativeModel]:
    """The class that an entry point names.

    Raises:
        RequestError: what Python finds under the name of its package is another package or folder.
    """
    package = entry.module.partition(".")[0]
    try:
        found = getattr(importlib.import_module(entry.module), entry.attr, None)
        problem = f"{entry.module} has no GenerativeModel called {entry.attr}"
    except ImportError as error:
        if package not in sys.modules or (error.name or "").partition(".")[0] != package:
            raise  # not installed, or lacks a package of somebody else's
        found, problem = None, str(error)
    if _is_model(found):
        return found
    module = sys.modules.get(entry.module, sys.modules[package])
    place = module.__file__ or next(iter(module.__path__))  # a folder without __init__.py has no file
    raise RequestError(
        f"architecture {entry.name!r}: {place} comes first and is not the {package} that was installed ({problem}); "
        "take its folder out of PYTHONPATH, rename it, or start elsewhere"
    )


def _class_in_file(name: str) -> type[GenerativeModel]:
    path, class_name = code_file(name), name.rpartition(":")[2]
    assert path is not None
    if not path.is_file():
        raise RequestError(f"architecture {name!r}: no file {path}; expected path/to/file.py:NAME")
    spec = importlib.util.spec_from_file_location(f"{_OF_FILES}{path.stem}", path)
    if spec is None or spec.loader is None:
        raise RequestError(f"architecture {name!r}: {path} is no Python file; expected path/to/file.py:NAME")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look up their annotations
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever the file does wrong
        raise RequestError(f"architecture {name!r}: {path} does not run ({type(error).__name__}: {error})") from error
    found = getattr(module, class_name, None)
    if not _is_model(found):
        own = [key for key, value in vars(module).items() if _is_model(value) and value.__module__ == spec.name]
        raise RequestError(
            f"architecture {name!r}: {path} holds no subclass of GenerativeModel called {class_name}"
            + (f"; it holds {', '.join(own)}" if own else "")
        )
    lacking = [*sorted(found.__abstractmethods__), *(["architecture"] if not hasattr(found, "architecture") else [])]
    if lacking:
        raise RequestError(f"architecture {name!r}: {class_name} lacks {', '.join(lacking)}; see docs/own_model.md")
    return found


def _is_model(value: object) -> TypeGuard[type[GenerativeModel]]:
    return inspect.isclass(value) and issubclass(value, GenerativeModel)


def described(checkpoint: Checkpoint) -> dict[str, str]:
    """The metadata of a checkpoint, with `architecture` and `config` filled in if an architecture recognises it.

    Raises:
        RequestError: another package hides an architecture that would be asked.
    """
    metadata = checkpoint.metadata
    if "architecture" in metadata:
        return metadata
    try:
        _ = checkpoint.constructor
    except RequestError:  # a network that no keywords build is none of ours
        return metadata
    checkpoint = unwrapped(checkpoint)
    for entry in entry_points(group=GROUP):
        config = _config_of(_loaded(entry), checkpoint)
        if config is not None:
            return {**metadata, "architecture": entry.name, "config": json.dumps(config)}
    return metadata


def _config_of(kind: type[GenerativeModel], checkpoint: Checkpoint) -> dict[str, Any] | None:
    """The config of a published network; None also where names are those of one, and shapes of another."""
    try:
        return kind.config_of(checkpoint)
    except (LookupError, TypeError, ValueError, ArithmeticError, RuntimeError) as error:
        if isinstance(error, RequestError | WorkError):
            raise
        return None


def buffers_of(checkpoint: Checkpoint) -> frozenset[str] | None:
    """The tensors of a checkpoint that are buffers of its network, not weights; None: the file does not say."""
    try:
        names = json.loads(checkpoint.metadata[BUFFERS])
        return frozenset(names) if type(names) is list and all(name in checkpoint.specs for name in names) else None
    except (KeyError, ValueError, TypeError, RecursionError):  # no such entry, or not ours
        return None


def sampler_of(metadata: Mapping[str, str]) -> dict[str, Any] | None:
    """The sampler that a file belongs to by its metadata: of self-trained weights, that which drew the synthetic set.

    A record as in `neon.data.sampler`: `architecture`, `settings` as JSON, `network_sha256` where it is known. None:
    the file does not say.
    """
    return parse_sampler(metadata.get(SAMPLER))


def unlike_sampler_of(metadata: Mapping[str, str], model: GenerativeModel, settings: Any) -> tuple[str, ...]:
    """In what `settings` of `model` are very different from the sampler that a file belongs to (`far_apart`).

    (): they are not, or the file belongs to none of this architecture.
    """
    then = sampler_of(metadata)
    if then is None or then["architecture"] != model.architecture:
        return ()
    return far_apart(model.tunable, model.calls, then["settings"], settings)


def load_model(
    path: str | os.PathLike[str],
    key: str | None = None,
    *,
    device: torch.device | str = "cpu",
    kind: type[GenerativeModel] | str | None = None,
    only: type[GenerativeModel] | None = None,
    precision: str | None = None,
    tf32: bool | None = None,
    for_training: bool = False,
    **arguments: Any,
) -> GenerativeModel:
    """The model of a checkpoint, in eval mode on `device`.

    Files written by neon say of what `architecture` and `config` they are; published ones are recognised.
    `key` as in `open_checkpoint`.

    Args:
        kind: The class of the model, or what the user calls it (`architecture`); by default the installed one that the
            file names.
        only: The class that it must be.
        precision: A name as in `neon.precision`; by default the published one of sampling, or `for_training`, on a
            GPU, and float32 on a CPU.
        tf32: Whether a GPU may round the inputs of float32 products; by default as usual for the precision.
        arguments: To the constructor.

    Raises:
        RequestError: the file is no checkpoint, is of another architecture than `kind` or of none that is installed,
            holds other tensors than its architecture has, or the model takes no precision and one is asked for.
    """
    if isinstance(kind, str):
        kind = architecture(kind)
    with open_checkpoint(path, key) as file:
        checkpoint = unwrapped(file)
        _check_whole(path, file)
        kind, config = _recognised(path, checkpoint) if kind is None else (kind, _config_for(path, checkpoint, kind))
        if only is not None and not issubclass(kind, only):
            raise RequestError(f"{path}: a network of {kind.architecture}; this program is for {only.architecture}")
        if "precision" in inspect.signature(kind).parameters:
            published = kind.training_precision if for_training else kind.sampling_precision
            arguments["precision"] = decide(precision, published, torch.device(device), tf32)
        elif precision not in (None, FP32.name) or tf32:
            flag = "--tf32 1" if tf32 else f"--precision {precision}"
            raise RequestError(f"{flag}: {kind.__name__} computes in float32 only; let its __init__ take a precision")
        if "loss" in arguments and "loss" not in inspect.signature(kind).parameters:
            raise RequestError(f"--loss: the training loss of {kind.architecture} has no settings; leave it out")
        model = _built(path, kind, config, arguments, {name: spec.shape for name, spec in file.specs.items()})
        names = _our_names(model.network.state_dict(), {name: name for name in file.names()})
        if any(name != held for name, held in names.items()):
            warn(f"{path}: {names_differ(names)}")
        load_weights(model.network, {name: file.tensor(held) for name, held in names.items()}, path)
        model.file_metadata = dict(file.metadata)
    return model.to(device).eval().requires_grad_(False)


def _check_whole(path: str | os.PathLike[str], file: Checkpoint) -> None:
    """Refuse a file with the factors of a LoRA, which is no network without its base."""
    if any(".lora_A." in name or ".lora_down." in name for name in file.specs):
        raise RequestError(
            f"{path}: holds a LoRA, factors beside the layers of a base, and no network of its own; name its base, and "
            "this as the self-trained side, or merge both (neon merge)"
        )


def initialised(
    kind: type[SomeModel],
    config: dict[str, Any],
    seed: int,
    device: torch.device,
    advice: str,
    *,
    precision: str | None = None,
    tf32: bool | None = None,
    **arguments: Any,
) -> SomeModel:
    """A model to train from scratch, its initial weights drawn by `seed`; the others as `load_model` takes them.

    Raises:
        RequestError: there is no such network; ends with `advice`.
    """
    torch.manual_seed(seed)
    try:
        model = kind(config, precision=decide(precision, kind.training_precision, device, tf32), **arguments)
    except RequestError:
        raise
    except (ValueError, ArithmeticError) as error:
        raise RequestError(f"no such network can be built ({error}); {advice}") from error
    return model.to(device)


def open_autoencoder(model: GenerativeModel, named: Path | None) -> Path | None:
    """Find and load the frozen network that a model sees images through; raises what its two methods raise."""
    path = model.autoencoder_file(named)
    if path is not None:
        model.use_autoencoder(path)
    return path


def complete(model: GenerativeModel, autoencoder: Path | None, prompts: Path | None) -> Path | None:
    """Give a model its autoencoder, whose file is returned, and prompts if a text file of them is named.

    Raises what `open_autoencoder`, `read_prompts` and `GenerativeModel.use_prompts` raise.
    """
    path = open_autoencoder(model, autoencoder)
    if prompts is not None:
        model.use_prompts(read_prompts(prompts))
    return path


def _recognised(path: str | os.PathLike[str], checkpoint: Checkpoint) -> tuple[type[GenerativeModel], dict[str, Any]]:
    """The installed architecture of a checkpoint, and its config."""
    metadata = described(checkpoint)
    if "architecture" not in metadata or "config" not in metadata:
        _ = checkpoint.constructor  # says so, if that is what cannot be read
        raise RequestError(
            f"{path}: the checkpoint does not say which architecture it is of, and none recognises it; expected a "
            "published network, or the metadata `architecture` and `config` that files written by neon carry; "
            "a model of your own is named to neon's commands: --model path/to/file.py:NAME"
        )
    config = _parsed_config(path, metadata["config"])
    if _greatest_number(config) > _MAX_NUMBER:
        raise RequestError(f"{path}: its config holds a number above {_MAX_NUMBER:,}, which no network has; {_CONFIG}")
    try:
        return _installed(metadata["architecture"]), config
    except RequestError as error:
        raise RequestError(f"{path}: {error}") from error


def _parsed_config(path: str | os.PathLike[str], text: str) -> dict[str, Any]:
    """The config in the metadata of a file; a RequestError if it is none."""
    try:
        config = json.loads(text)
        problem = f"is a {type(config).__name__}"
    except (ValueError, RecursionError) as error:
        config, problem = None, f"is no JSON that can be read ({error})"
    if not isinstance(config, dict):
        raise RequestError(f"{path}: the config in its metadata {problem}; {_CONFIG}")
    return config


def _greatest_number(config: Any) -> int:
    """The greatest whole number in a config, by its size."""
    greatest, waiting = 0, [config]
    while waiting:
        part = waiting.pop()
        if isinstance(part, dict | list):
            waiting += part.values() if isinstance(part, dict) else part
        elif isinstance(part, int):
            greatest = max(greatest, abs(part))
    return greatest


def _config_for(path: str | os.PathLike[str], checkpoint: Checkpoint, kind: type[GenerativeModel]) -> dict[str, Any]:
    """The config of a checkpoint that is of architecture `kind`."""
    found = checkpoint.metadata.get("architecture", kind.architecture)
    if found != kind.architecture:
        raise RequestError(
            f"{path}: a checkpoint of {found!r}, but --model names {kind.__name__} of {kind.architecture!r}"
        )
    config = _config_of(kind, checkpoint)
    if "config" in checkpoint.metadata:
        config = _parsed_config(path, checkpoint.metadata["config"])
    if config is None:
        raise RequestError(
            f"{path}: carries no config, and config_of of {kind.__name__} finds none in it; write the file with "
            "neon.model.save_model, or tell the config there from names and shapes"
        )
    return config


def _built(
    path: str | os.PathLike[str],
    kind: type[GenerativeModel],
    config: dict[str, Any],
    arguments: dict[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
) -> GenerativeModel:
    """The model that a file describes, which holds tensors of these shapes."""
    check_outline(lambda: kind(config, **arguments).network, shapes, path)
    with building(f"{path}: no {kind.architecture} network can be built as the file describes it", _CONFIG):
        model = kind(config, **arguments)
    lacking = [name for name in ATTRIBUTES if not hasattr(model, name)]
    if lacking:
        raise RequestError(f"{kind.__name__}: its __init__ sets no {', '.join(lacking)}; see docs/own_model.md")
    if not dataclasses.is_dataclass(model.default_settings):
        raise RequestError(f"{kind.__name__}: default_settings is no dataclass; see docs/own_model.md")
    return model


@contextlib.contextmanager
def building(problem: str, advice: str) -> Iterator[None]:
    """Whatever a constructor raises inside the block is the fault of the file that it is called by.

    Constructors do not look at what they are given. `problem` and `advice` are the beginning and end of the
    RequestError; one that names its file, and a package that is not installed, pass.
    """
    try:
        yield
    except (RequestError, ModuleNotFoundError):
        raise
    except Exception as error:
        raise RequestError(f"{problem} ({type(error).__name__}: {error}); {advice}") from error


def check_outline(
    build: Callable[[], nn.Module], shapes: Mapping[str, tuple[int, ...]], source: str | os.PathLike[str]
) -> None:
    """Refuse a network that is not that of a file's tensors before memory or time is spent on it.

    It is built without memory for its values. Networks that cannot be built so are let pass.

    Raises:
        RequestError: it has far more tensors than the file, or others.
    """
    left = _TENSORS_BUILT * len(shapes) + _TENSORS_BUILT

    def count(module: nn.Module, name: str, tensor: Tensor | None) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise RequestError(
                f"{source}: the config describes a network of far more tensors than the {len(shapes)} in it; {_CONFIG}"
            )

    registered = torch.nn.modules.module
    hooks = [
        registered.register_module_parameter_registration_hook(count),
        registered.register_module_buffer_registration_hook(count),
    ]
    try:
        with torch.device("meta"):
            own = build().state_dict()
    except RequestError:
        raise
    except Exception:  # whatever is wrong shows when it is built for use
        return
    finally:
        for hook in hooks:
            hook.remove()
    _check_fit({name: tuple(tensor.shape) for name, tensor in own.items()}, _our_names(own, shapes), source)


def _our_names(own: Iterable[str], held: Mapping[str, T]) -> dict[str, T]:
    """What a file holds by the names of our network, if those differ by a wrapper's words at most; else by its own."""
    names = fitted(own, held)
    return dict(held) if names is None else {name: held[theirs] for name, theirs in names.items()}


def load_weights(network: nn.Module, state: dict[str, Tensor], source: str | os.PathLike[str]) -> None:
    """Copy `state` into `network`, every name and shape checked.

    Raises:
        RequestError: names or shapes differ; both sides are listed.
    """
    own, found = ({name: tuple(tensor.shape) for name, tensor in s.items()} for s in (network.state_dict(), state))
    _check_fit(own, found, source)
    network.load_state_dict(state)


@torch.no_grad()
def read_weights(network: nn.Module, path: str | os.PathLike[str]) -> None:
    """Copy the weights of a file into `network`, a tensor at a time, every name and shape checked.

    Raises:
        RequestError: the file cannot be read, or names or shapes differ; both sides are listed.
    """
    own = network.state_dict()
    with open_checkpoint(path) as file:
        names = _our_names(own, {name: name for name in file.names()})
        found = {name: file.specs[held].shape for name, held in names.items()}
        _check_fit({name: tuple(tensor.shape) for name, tensor in own.items()}, found, path)
        for name, held in names.items():
            own[name].copy_(file.tensor(held))


def _check_fit(
    own: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]], source: str | os.PathLike[str]
) -> None:
    missing = [name for name in own if name not in found]
    unknown = [name for name in found if name not in own]
    reshaped = [
        f"{name} {found[name]} instead of {own[name]}" for name in own if name in found and found[name] != own[name]
    ]
    problems = [
        f"{len(names)} {kind}: {listing(names, first=3)}"
        for kind, names in (("missing", missing), ("not in the model", unknown), ("of another shape", reshaped))
        if names
    ]
    if problems:
        raise RequestError(f"{source}: the weights do not fit the model ({'; '.join(problems)})")


def model_metadata(model: GenerativeModel) -> dict[str, str]:
    """The metadata from which `load_model` rebuilds the model, and merges tell its weights from its buffers."""
    state, buffers = model.network.state_dict(), model.network.named_buffers(remove_duplicate=False)
    floats = [name for name, buffer in buffers if name in state and buffer.is_floating_point()]
    return {
        "architecture": model.architecture,
        "config": json.dumps(model.config),
        BUFFERS: json.dumps(floats),
    }


def save_model(
    path: str | os.PathLike[str],
    model: GenerativeModel,
    state: dict[str, Tensor] | None = None,
    metadata: dict[str, str] | None = None,
) -> None:
    """Write the network's weights (or `state` in their place) as safetensors that `load_model` opens."""
    state = model.network.state_dict() if state is None else state
    save_safetensors(path, state, {**model_metadata(model), **(metadata or {})})
