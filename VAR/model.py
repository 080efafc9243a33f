"""VAR as a GenerativeModel: tokens of a frozen multi-scale tokenizer, drawn scale by scale."""

import os
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from neon.checkpoint import Checkpoint, load_state
from neon.data.images import from_uint8
from neon.errors import RequestError
from neon.model import GenerativeModel, building, check_outline, load_weights
from neon.noise import Noise
from neon.precision import FP16, FP32, Precision
from neon.runtime.compiling import compile_parts
from neon.runtime.published_files import usual_file
from neon.tunable import Range
from VAR.preprocess import enlarge
from VAR.published import TOKENIZER_FILE, published_settings, recognise, recognise_tokenizer
from VAR.recipe import VARRecipe
from VAR.sampler import generate, generate_tokens
from VAR.settings import ENLARGEMENT, VARSettings
from VAR.transformer import VAR
from VAR.vqvae import VQVAE, fit_usage_buffer

VAE_FLAG = "--vae_ckpt (neon's commands: --vae)"
TOKENS = "VAR tokens"
"""what sets of encoded images hold"""


class VARModel(GenerativeModel):
    """A transformer over the tokens of all scales; `use_autoencoder` gives it the tokenizer, which is never trained.

    config: {"transformer": keywords of VAR}.
    """

    architecture = "VAR"
    network: VAR
    second: tuple[VAR, float] | None
    combines = True
    protocol = {  # noqa: RUF012 - a constant
        "uint8_rule": "truncate(255 clip(x, 0, 1))",
        "label_rule": "every class equally often, shuffled by the seed",
    }

    sampling_precision = replace(FP16, reason="float16 autocast, as published")
    training_precision = replace(FP16, reason="float16 autocast, as published")

    def __init__(
        self, config: dict[str, Any], *, precision: Precision = FP32, enlargement: float = ENLARGEMENT
    ) -> None:
        """`enlargement`: of training images before they are cropped; 1: those of the right size stay as they are."""
        super().__init__()
        self.config = config
        self.precision = precision
        self.network = VAR(**config["transformer"])
        self.tokenizer: VQVAE | None = None
        self.num_classes = self.network.classes
        self.patch_nums: tuple[int, ...] = tuple(self.network.patch_nums)
        side = 16 * self.patch_nums[-1]  # of the published tokenizer, until there is one
        self.image_shape = (3, side, side)
        self.default_settings = published_settings(config["transformer"]) or VARSettings()
        self.tunable = {
            "guidance": Range(0.0, 6.0),
            "temperature": Range(0.5, 2.0, "log"),
            "top_k": Range(min(10, self.network.vocab), self.network.vocab, "log", integer=True, unlimited=0),
            "top_p": Range(0.5, 1.0, unlimited=0.0),
        }
        self.lora_targets = ("attn.mat_qkv", "attn.proj")
        self.recipe = VARRecipe()
        self.enlargement = enlargement

    @classmethod
    def config_of(cls, checkpoint: Checkpoint) -> dict[str, Any] | None:
        if "lvl_1L" not in checkpoint.specs or "word_embed.weight" not in checkpoint.specs:
            return None
        shapes = {name: spec.shape for name, spec in checkpoint.specs.items()}
        return {"transformer": recognise(shapes, checkpoint.tensor("lvl_1L"))}

    def autoencoder_file(self, named: Path | None) -> Path:
        return tokenizer_file(named)

    def use_autoencoder(self, path: Path) -> None:
        """Load the tokenizer of checkpoint `path`, frozen; a RequestError if it speaks another language."""
        tokenizer = load_tokenizer(path, self.patch_nums)
        found = tuple(tokenizer.quantize.embedding.weight.shape)
        if found != (self.network.vocab, self.network.code_channels):
            raise RequestError(
                f"{path}: a tokenizer of {found[0]} codes with {found[1]} channels, but the transformer draws from "
                f"{self.network.vocab} with {self.network.code_channels}; expected the tokenizer it was trained with"
            )
        self.set_tokenizer(tokenizer)

    def set_tokenizer(self, tokenizer: VQVAE) -> None:
        """Use `tokenizer`, frozen."""
        self.image_shape = (3, tokenizer.image_side, tokenizer.image_side)
        self.tokenizer = tokenizer.to(self._network_device).eval().requires_grad_(False)

    def _tokenizer(self) -> VQVAE:
        if self.tokenizer is None:
            raise RequestError(f"VAR needs its tokenizer; name it with {VAE_FLAG}")
        return self.tokenizer

    def parts_of(self, network: VAR) -> Sequence[nn.Module]:
        """The blocks, compiled for the size of each scale."""
        return tuple(network.blocks)

    def compile_parts(self) -> None:
        super().compile_parts()
        compile_parts([self._tokenizer().decoder])

    def calls(self, settings: VARSettings) -> int:
        """One for each scale."""
        return self._evaluated * len(self.patch_nums) * (2 if settings.guidance > 0 else 1)

    @torch.no_grad()
    def sample(self, noise: Noise, labels: Tensor | None, settings: VARSettings) -> Tensor:
        """Draws per image and scale: one exponential per token and code, twice as many in the smooth mode."""
        with self._autocast():
            images = generate(self.network, self._tokenizer(), self._on_device(labels), noise, settings, self.second)
        return (images.to(torch.float32).clamp(0, 1) * 255).to(torch.uint8)

    @torch.no_grad()
    def sample_tokens(self, noise: Noise, labels: Tensor | None, settings: VARSettings) -> Tensor:
        """The tokens behind `sample`, int64 [B, L]."""
        with self._autocast():
            classes = self._on_device(labels)
            return generate_tokens(self.network, self._tokenizer(), classes, noise, settings, self.second)

    def prepare(self, images: Tensor, noise: Noise) -> Tensor:
        """A random crop of the enlarged image.

        Draws per image: two integers, top and left of the crop.
        """
        side = self.image_shape[-1]
        enlarged = [enlarge(image, round(self.enlargement * side)) for image in images]
        height, width = enlarged[0].shape[1:]
        corners = torch.stack([noise.integers(height - side + 1), noise.integers(width - side + 1)], dim=1)
        crops = [
            image[:, top : top + side, left : left + side]
            for image, (top, left) in zip(enlarged, corners.tolist(), strict=True)
        ]
        return torch.stack(crops)

    @torch.no_grad()
    def encode(self, images: Tensor, noise: Noise) -> Tensor:
        """uint8 [B, 3, side, side] -> tokens int64 [B, L]; draws nothing."""
        return self._tokenizer().tokens(from_uint8(images))

    def training_loss(self, examples: Tensor, labels: Tensor | None, noise: Noise) -> Tensor:
        """Per image, the mean cross entropy of its tokens [B, L] given the coarser scales: float32 [B].

        Draws per image: a uniform for label drop, then one for each branch that a drop path may skip.
        """
        tokens = examples.to(torch.int64)
        known = self._tokenizer().quantize.teacher_forcing_input(tokens)
        with self._autocast():
            logits = self.network(self._on_device(labels), known, noise)
        return F.cross_entropy(logits.float().flatten(0, 1), tokens.flatten(), reduction="none").view_as(tokens).mean(1)

    def _on_device(self, labels: Tensor | None) -> Tensor:
        assert labels is not None, "VAR is class-conditional"
        return labels.to(self._network_device, non_blocking=True)

    def _autocast(self) -> AbstractContextManager[object]:
        return self.precision.autocast_on(self._network_device)


def tokenizer_file(named: Path | None) -> Path:
    """Where the tokenizer lies: `named`, or its usual place; a RequestError if it is not there."""
    fetch = f"hf download FoundationVision/var {TOKENIZER_FILE} --local-dir ."
    return named or usual_file(TOKENIZER_FILE, "the tokenizer", fetch, VAE_FLAG)


def load_tokenizer(path: str | os.PathLike[str], patch_nums: Sequence[int]) -> VQVAE:
    """The tokenizer of checkpoint `path` for scales of sides `patch_nums`, frozen.

    Raises:
        RequestError: the file holds no tokenizer, or no such tokenizer can be built.
    """
    state = load_state(path)
    if "word_embed.weight" in state:
        raise RequestError(f"{path}: a transformer, not a tokenizer; name the tokenizer with {VAE_FLAG}")
    state = fit_usage_buffer(state, len(patch_nums))
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    with building(f"{path}: its shapes are of no tokenizer of VAR", f"expected {TOKENIZER_FILE}"):
        try:
            keywords = recognise_tokenizer(shapes)
        except RequestError as error:
            raise RequestError(f"{path}: {error}") from error
        check_outline(lambda: VQVAE(**keywords, patch_nums=patch_nums), shapes, path)
        tokenizer = VQVAE(**keywords, patch_nums=patch_nums)
    load_weights(tokenizer, state, path)
    return tokenizer.eval().requires_grad_(False)


def token_dtype(tokenizer: VQVAE) -> torch.dtype:
    """What tokens are kept as: 16 bits where the codes fit."""
    return torch.uint16 if tokenizer.quantize.embedding.num_embeddings <= 2**16 else torch.int32
