"""Text encoders of pipelines, frozen and in float32: a prompt as tokens, and what the encoder makes of them.

The tokenizer is built of the vocabulary in its folder, the encoder of its configuration and weights; nothing else there
is looked at.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from neon.checkpoint import open_checkpoint
from neon.errors import RequestError, warn
from neon.model import building, check_outline, load_weights
from neon_diffusers.library import library

_VOCABULARIES = ("tokenizer.json", "vocab.json", "spiece.model")
_SHOWN = 60
"""letters of a prompt that a message tells"""


def _clip(front: str) -> Callable[[str], str | None]:
    """The name in the network of a name in a file, where those of its text model begin with `front` or not."""

    def renamed(name: str) -> str | None:
        bare = name.removeprefix("text_model.")
        if bare == "embeddings.position_ids":  # counts the positions, in files of older versions
            return None
        return name if bare.startswith("text_projection.") else front + bare

    return renamed


def _t5(name: str) -> str | None:
    """One table of tokens, which some files hold twice."""
    return None if name == "encoder.embed_tokens.weight" else name


@dataclass(frozen=True)
class _Served:
    """An encoder that is served."""

    config: str
    """the class of its configuration"""
    tokenizer: str
    renamed: Callable[[str], str | None]
    """the name in the network of one in a file; None: it is left out"""
    tied: Mapping[str, str]
    """names in the network that stand for other ones, which files hold"""


CLIP, CLIP_PROJECTED, T5 = "CLIPTextModel", "CLIPTextModelWithProjection", "T5EncoderModel"
_SERVED = {
    CLIP: _Served("CLIPTextConfig", "CLIPTokenizer", _clip(""), {}),
    CLIP_PROJECTED: _Served("CLIPTextConfig", "CLIPTokenizer", _clip("text_model."), {}),
    T5: _Served("T5Config", "T5TokenizerFast", _t5, {"encoder.embed_tokens.weight": "shared.weight"}),
}


class TextEncoder:
    """An encoder with its tokenizer."""

    def __init__(
        self,
        class_name: str,
        config: Mapping[str, Any],
        weights: Path,
        vocabulary: Path,
        length: int | None,
        device: torch.device,
    ) -> None:
        """Load both, onto `device`.

        Args:
            class_name: one of `CLIP`, `CLIP_PROJECTED`, `T5`.
            weights: folder of the encoder.
            vocabulary: folder of the tokenizer.
            length: tokens that every prompt is filled up or cut to; None: as many as the tokenizer says.

        Raises:
            RequestError: one of them is missing, or does not fit.
        """
        served = _SERVED[class_name]
        self.network = _encoder(class_name, served, config, weights).to(device).eval().requires_grad_(False)
        self._tokenizer = _tokenizer(served.tokenizer, vocabulary)
        positions = config.get("max_position_embeddings") or int(1e9)
        self.length = length or min(int(self._tokenizer.model_max_length), int(positions))
        if self.length > 10_000:  # what tokenizers say that know no limit
            raise RequestError(f"{vocabulary}: does not say how many tokens a prompt may have; download it again")
        self._masked = bool(config.get("use_attention_mask"))
        self._vocabulary, self._size = vocabulary, int(self.network.get_input_embeddings().weight.shape[0])
        self._has_warned = False

    def __call__(self, prompt: str, **arguments: Any) -> Any:
        """What the encoder says of a batch of one, tokens filled up and cut as its pipeline does."""
        if not self._has_warned and len(self._tokenizer(prompt, verbose=False).input_ids) > self.length:
            self._has_warned = True
            shown = prompt[:_SHOWN]
            warn(f"prompts of more than {self.length} tokens are cut, as by the pipeline; the first is {shown!r}...")
        found = self._tokenizer(
            prompt, padding="max_length", max_length=self.length, truncation=True, return_tensors="pt"
        )
        if int(found.input_ids.max()) >= self._size:
            raise RequestError(
                f"{self._vocabulary}: token {int(found.input_ids.max())}, but the encoder knows {self._size:,}; "
                "expected the tokenizer that it was trained with"
            )
        device = self.network.get_input_embeddings().weight.device
        mask = {"attention_mask": found.attention_mask.to(device)} if self._masked else {}
        return self.network(found.input_ids.to(device), **mask, **arguments)


def _encoder(class_name: str, served: _Served, config: Mapping[str, Any], folder: Path) -> Any:
    """The encoder of a folder, in float32."""
    source = library("transformers")
    maker: Any = getattr(source, class_name)

    def build() -> nn.Module:
        return maker(getattr(source, served.config).from_dict(dict(config))).float()

    with open_checkpoint(folder) as file, building(f"{folder}: not the config of a {class_name}", "download it again"):
        held = {name: own for name in file.names() if (own := served.renamed(name)) is not None}
        held = {own: name for name, own in held.items()}
        held |= {own: held[same] for own, same in served.tied.items() if same in held}
        check_outline(build, {own: file.shape(name) for own, name in held.items()}, file.path)
        network = build()
        load_weights(network, {own: file.tensor(name) for own, name in held.items()}, file.path)
        return network


def _tokenizer(class_name: str, folder: Path) -> Any:
    """The tokenizer of a folder; a RequestError if there is none."""
    advice = "expected the tokenizer of the pipeline; download it again"
    if not any((folder / name).is_file() for name in _VOCABULARIES):
        raise RequestError(f"{folder}: no {' or '.join(_VOCABULARIES)} in it; {advice}")
    maker = getattr(library("transformers"), class_name)
    with building(f"{folder}: no tokenizer can be made of it", advice):
        return maker.from_pretrained(folder, local_files_only=True)
