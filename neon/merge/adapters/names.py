"""What an adapter file says: which layers its tensors belong to, and with which scale; nothing of any base.

PEFT (`adapter_config.json` beside the tensors), diffusers (a config in the file's metadata, or `.alpha` entries; older
names of attention processors) and kohya (`lora_unet_...`, underscores in place of dots) write the same thing: two
factors for a layer, whose product times alpha / r is added to its weight (LoRA, arXiv 2106.09685).
"""

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from neon.checkpoint import Checkpoint
from neon.errors import RequestError, reason

Style = Literal["peft", "diffusers", "kohya"]

CONFIG = "adapter_config.json"
DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"
CONFIG_ENTRY = "lora_adapter_metadata"
"""of the metadata of a diffusers file: its config as JSON"""
PEFT_FRONT = "base_model.model."
_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin", DIFFUSERS_FILE, "pytorch_lora_weights.bin")
_MAX_CONFIG = 10_000_000  # bytes
_SLOW = re.compile(r"\)\s*[*+{]")  # a group that repeats: what steps without end are made of
_MOST_REPEATS = 3  # in one pattern

_ADAPTER = r"(?:\.[^.]+)?"  # its name, which PEFT leaves out of files and others do not
_PARTS = {
    "down": rf"\.(?:lora_A{_ADAPTER}|lora_down|lora\.down|lora_linear_layer\.down)\.weight|_lora\.down\.weight",
    "up": rf"\.(?:lora_B{_ADAPTER}|lora_up|lora\.up|lora_linear_layer\.up)\.weight|_lora\.up\.weight",
    "mid": r"\.lora_mid\.weight",
    "embedding_down": rf"\.lora_embedding_A{_ADAPTER}",
    "embedding_up": rf"\.lora_embedding_B{_ADAPTER}",
    "up_bias": rf"\.lora_B{_ADAPTER}\.bias",
    "magnitude": rf"\.lora_magnitude_vector{_ADAPTER}(?:\.weight)?|\.dora_scale",
    "alpha": r"(?:\.lora|_lora|\.lora_linear_layer)?\.alpha",
    "diff": r"\.diff",
    "diff_b": r"\.diff_b",
}
_PART = re.compile("(?:" + "|".join(f"(?P<{part}>{pattern})" for part, pattern in _PARTS.items()) + ")$")
_TELLING = ("down", "up", "embedding_down", "embedding_up", "magnitude")
"""parts that nothing but an adapter has"""
_OTHER_KINDS = {
    "LoHa": r"\.hada_",
    "LoKr": r"\.lokr_",
    "(IA)3": r"\.ia3_l",
    "VeRA": r"vera_lambda_|vera_[AB]$",
    "OFT": r"\.oft_",
    "BOFT": r"\.boft_",
    "AdaLoRA": r"\.lora_E(?:\.|$)",
    "trained tokens": r"trainable_tokens_delta",
}
_COMPONENT = re.compile(
    r"(unet|transformer(?:_\d)?|text_encoder(?:_\d)?|prior|diffusion_model|controlnet|vae)\.|"
    r"(lora_unet|lora_te\d?|lora_transformer|lora_prior|lycoris)_"
)
# Settings of PEFT under which the tensors mean something else than two factors of what is added.
_OTHER_MEANING = (
    *("target_parameters", "layer_replication", "alora_invocation_tokens", "use_qalora", "use_bdlora", "arrow_config"),
    *("kasa_config", "monteclora_config", "trainable_token_indices"),
)
# Ways to begin that subtract the first product from the base, which the saved factors do not tell.
_CHANGES_BASE = ("pissa", "corda", "olora", "loftq", "lora_ga")
_PROCESSOR = re.compile(r"(.*?)(?:\.processor)?\.to_(q|k|v|out)")


@dataclass(frozen=True)
class Layer:
    """A layer of an adapter, under the name it has there."""

    component: str
    """the network it is said to belong to, such as `unet` or `lora_te1`; "": the only one"""
    module: str
    """the layer's name; with underscores in place of dots if `flat`"""
    flat: bool = False

    def __str__(self) -> str:
        return f"{self.component}{'_' if self.flat else '.'}{self.module}".lstrip("._")


@dataclass(frozen=True)
class Config:
    """Scales of a config in the form of PEFT; errors name `source`."""

    source: str
    entries: Mapping[str, Any]

    def rank(self, module: str) -> float:
        """What it says of the rank of a layer."""
        return self._of(module, "r", "rank_pattern", 8)

    def scale(self, module: str, rank: int) -> float:
        """What the product of the factors is multiplied with: alpha / r, or alpha / sqrt(r) if stabilised."""
        return self.alpha(module) / (math.sqrt(rank) if self.entries.get("use_rslora") else rank)

    def alpha(self, module: str) -> float:
        """What it says of the alpha of a layer."""
        return self._of(module, "lora_alpha", "alpha_pattern", 8)

    def _of(self, module: str, name: str, pattern_name: str, usual: int) -> float:
        value, patterns = self.entries.get(name, usual), self.entries.get(pattern_name) or {}
        if not isinstance(patterns, dict):
            raise RequestError(f"{self.source}: {pattern_name} is no table of names and numbers")
        found = [one for pattern, one in patterns.items() if _stands_for(pattern, module, self.source)]
        value = found[0] if found else value
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise RequestError(f"{self.source}: {name} of {module} is {value!r}; expected a number")
        return value


@dataclass
class Contents:
    """What an adapter file holds, by name of tensor in it."""

    style: Style
    layers: dict[Layer, dict[str, str]] = field(default_factory=dict)
    """the tensors of each layer by part (`down`, `up`, `alpha`, ...)"""
    whole: dict[Layer, str] = field(default_factory=dict)
    """tensors that replace one of the base, by their name there"""
    configs: dict[str, Config] = field(default_factory=dict)
    """by component"""
    config_file: Path | None = None


def _stands_for(pattern: str, module: str, source: str) -> bool:
    """Whether a key of `rank_pattern` or `alpha_pattern` stands for a layer: it matches the end of its name."""
    if _SLOW.search(pattern) or sum(map(pattern.count, "*+{")) > _MOST_REPEATS:
        raise RequestError(f"{source}: the pattern {pattern[:80]!r} may take forever to match; name the layers instead")
    try:
        return re.match(rf"(.*\.)?({pattern})$", module) is not None
    except re.error:
        raise RequestError(f"{source}: the pattern {pattern[:80]!r} is no regular expression") from None


def weights_of(path: Path) -> Path:
    """The file of weights of a folder that holds an adapter; any other path as it is.

    Raises:
        RequestError: there is a config of an adapter and no weights.
    """
    if not path.is_dir():
        return path
    for name in _WEIGHTS:
        if (path / name).is_file():
            return path / name
    if (path / CONFIG).is_file():
        raise RequestError(f"{path}: holds {CONFIG} and no weights; expected {_WEIGHTS[0]} beside it, download it too")
    return path


def is_adapter(names: Iterable[str]) -> bool:
    """Whether these are the names of an adapter's tensors, of whatever kind."""
    return any(
        name.startswith(PEFT_FRONT) or _kind_of(name) or ((part := _PART.search(name)) and part.lastgroup in _TELLING)
        for name in names
    )


def read_contents(file: Checkpoint, path: Path) -> Contents:
    """What the adapter `file`, named as `path`, holds.

    Raises:
        RequestError: it is another kind of adapter than LoRA, or its config cannot be read.
    """
    for name in file.specs:
        if kind := _kind_of(name):
            raise RequestError(
                f"{path}: an adapter of the kind {kind} ({name}), and only LoRA is read; merge it into the base by the "
                "program that trained it, and name the merged weights"
            )
    config_file = _config_file(path)
    contents = Contents(_style(file.specs), config_file=config_file)
    for name in file.specs:
        _place(contents, name, path)
    if config_file is not None:
        contents.configs[""] = _checked(Config(str(config_file), _json_of(config_file)))
    elif CONFIG_ENTRY in file.metadata:
        contents.configs |= _packed_configs(file, path)
    elif any(name.startswith(PEFT_FRONT) for name in file.specs):
        raise RequestError(f"{path}: {CONFIG} is not beside it, which says the scale of a PEFT adapter; add it")
    return contents


def _kind_of(name: str) -> str | None:
    """The kind of adapter other than LoRA that has tensors of this name."""
    return next((kind for kind, like in _OTHER_KINDS.items() if re.search(like, name)), None)


def _style(names: Iterable[str]) -> Style:
    names = list(names)
    if any(_COMPONENT.match(name) and name.startswith(("lora_", "lycoris_")) for name in names):
        return "kohya"
    return "peft" if any(name.startswith(PEFT_FRONT) for name in names) else "diffusers"


def _place(contents: Contents, name: str, path: Path) -> None:
    """Put a tensor where it belongs."""
    found = _PART.search(name)
    if found is None or found.lastgroup is None:
        contents.whole[_layer_of(name.replace(".base_layer.", ".").replace(".modules_to_save.", "."))] = name
        return
    part, module = found.lastgroup, name[: found.start()].replace(".base_layer", "")
    if found[0].startswith("_lora."):
        module = _without_processor(module)
    parts = contents.layers.setdefault(_layer_of(module), {})
    if part in parts:
        raise RequestError(
            f"{path}: {parts[part]} and {name} are the same part of one layer; expected one adapter in the file, keep "
            "the one that is meant"
        )
    parts[part] = name


def _layer_of(module: str) -> Layer:
    if module.startswith(PEFT_FRONT):
        return Layer("", module.removeprefix(PEFT_FRONT))
    found = _COMPONENT.match(module)
    if found is None:
        return Layer("", module)
    return Layer(found[1] or found[2], module[found.end() :], flat=found[2] is not None)


def _without_processor(module: str) -> str:
    """The layer that an attention processor's `to_q_lora` stands for, as diffusers named it up to 0.20."""
    found = _PROCESSOR.fullmatch(module)
    if found is None:
        return module
    front, word = found[1], found[2]
    if front.endswith("self_attn"):  # of a text encoder
        return f"{front}.{word}_proj"
    return f"{front}.to_{word}" + (".0" if word == "out" else "")


def _config_file(path: Path) -> Path | None:
    folder = path if path.is_dir() else path.parent
    is_peft = path.is_dir() or path.name.startswith("adapter_model.")
    return folder / CONFIG if is_peft and (folder / CONFIG).is_file() else None


def _json_of(file: Path) -> Mapping[str, Any]:
    """The table that a config file holds."""
    try:
        if (size := file.stat().st_size) > _MAX_CONFIG:
            raise RequestError(f"{file}: a text of {size} bytes; expected the config of an adapter")
        return _table(file.read_bytes(), str(file))
    except OSError as error:
        raise RequestError(f"{file}: cannot be read ({reason(error)}); check its permissions") from error


def _table(text: str | bytes, source: str) -> Mapping[str, Any]:
    try:
        entries = json.loads(text)
    except (ValueError, RecursionError):
        entries = None
    if not isinstance(entries, dict):
        raise RequestError(f"{source}: no table in JSON; expected the config of an adapter, download it again")
    return entries


def _packed_configs(file: Checkpoint, path: Path) -> dict[str, Config]:
    """The configs in the metadata of a diffusers file, whose entries begin with the component they are of."""
    source = f"{path} ({CONFIG_ENTRY})"
    packed: dict[str, dict[str, Any]] = {}
    for name, value in _table(file.metadata[CONFIG_ENTRY], source).items():
        found = _COMPONENT.match(name)
        component, entry = (found[1], name[found.end() :]) if found and found[1] else ("", name)
        packed.setdefault(component, {})[entry] = value
    return {component: _checked(Config(source, entries)) for component, entries in packed.items()}


def _checked(config: Config) -> Config:
    """The config; a RequestError if the tensors beside it are more than two factors of what is added."""
    entries, source = config.entries, config.source
    kind = entries.get("peft_type", "LORA")
    if kind != "LORA":
        raise RequestError(
            f"{source}: an adapter of the kind {kind!r}, and only LORA is read; merge it into the base by the program "
            "that trained it, and name the merged weights"
        )
    if other := [name for name in _OTHER_MEANING if entries.get(name)]:
        raise RequestError(
            f"{source}: a LoRA with {', '.join(other)}, which is more than two factors for a layer and is not read; "
            "merge it into the base by PEFT, and name the merged weights"
        )
    began = entries.get("init_lora_weights")
    if isinstance(began, str) and began.lower().startswith(_CHANGES_BASE):
        raise RequestError(
            f"{source}: init_lora_weights is {began!r}, which changes the base too; save it by PEFT with "
            "path_initial_model_for_weight_conversion, which makes a plain LoRA of it"
        )
    rank = entries.get("r", 8)
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise RequestError(f"{source}: rank {rank!r}; expected an r of 1 or more")
    return config
