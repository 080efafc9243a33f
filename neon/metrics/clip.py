"""CLIP's features of images (Radford et al. 2021), and how well images fit their prompts: the CLIP score.

The score of an image is 100 max(cos(image, prompt), 0) of what CLIP's two towers make of both, as torchmetrics has it
(Hessel et al. 2021 multiply by 2.5 instead of 100). Images become what CLIP's own preprocessing makes of them.
"""

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from neon.checkpoint import open_checkpoint
from neon.errors import RequestError
from neon.metrics.networks import PublishedNetwork, full_float32
from neon.model import building, check_outline, load_weights
from neon.runtime.files import sha256_file
from neon.runtime.small_json import read_table

USUAL = "openai/clip-vit-large-patch14"
MEAN, DEVIATION = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
"""CLIP's, of values in 0..1"""
PROTOCOL = {
    "resize": "shorter side to CLIP's by PIL's bicubic, rounded, then the square in the middle",
    "normalisation": "mean and deviation of CLIP",
    "output": "image embedding after the projection, not normalised",
}
_PERCENT = 100
_VOCABULARIES = ("tokenizer.json", "vocab.json")


class CLIPFeatures(PublishedNetwork, nn.Module):
    """Both towers of a CLIPModel of transformers; `load` makes one.

    A module, so that its size decides how many threads a CPU computes with.
    """

    name = "clip"
    any_size = True  # there is one way to resize, for images of one size as of several
    protocol = PROTOCOL
    reads_prompts = True

    def __init__(self, network: Any, tokenizer: Any, digest: str) -> None:
        """Wrap a CLIPModel and its tokenizer; `digest` tells its weights from others."""
        super().__init__()
        self._network = network
        self._tokenizer, self._digest = tokenizer, digest
        self.dim = int(self._network.config.projection_dim)
        self._of_prompts: dict[str, Tensor] = {}

    @property
    def identity(self) -> str:
        return f"{self.name}:{self._digest}"

    def resized(self, images: Tensor) -> Tensor:
        side = int(self._network.config.vision_config.image_size)
        pictures = [Image.fromarray(image) for image in images.permute(0, 2, 3, 1).cpu().numpy()]
        squares = np.stack([np.asarray(_square(picture, side)) for picture in pictures])
        return torch.from_numpy(squares).permute(0, 3, 1, 2).to(images.device, torch.float32)

    def features(self, images: Tensor) -> Tensor:
        mean, deviation = (images.new_tensor(values)[:, None, None] for values in (MEAN, DEVIATION))
        seen = self._network.vision_model(pixel_values=(images / 255 - mean) / deviation)
        return self._network.visual_projection(seen.pooler_output)

    @torch.no_grad()
    def fit(self, features: Tensor, prompts: Sequence[str]) -> Tensor:
        """The CLIP score of each image, float32 [B] in 0..100, from its features [B, F] and its prompt.

        Prompts of more tokens than CLIP reads (77) are cut.
        """
        wanted = torch.stack([self._of_prompt(prompt) for prompt in prompts]).to(features.device)
        return _PERCENT * F.cosine_similarity(features, wanted).clamp(min=0)

    def _of_prompt(self, prompt: str) -> Tensor:
        """The embedding [F] of a prompt, computed alone and kept."""
        if prompt not in self._of_prompts:
            device = self._network.visual_projection.weight.device
            longest = int(self._network.config.text_config.max_position_embeddings)
            tokens = self._tokenizer(prompt, truncation=True, max_length=longest, return_tensors="pt").to(device)
            with full_float32():
                read = self._network.text_model(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask)
                self._of_prompts[prompt] = self._network.text_projection(read.pooler_output)[0]
        return self._of_prompts[prompt]

    @classmethod
    def weights_file(cls, named: Path | None = None) -> Path:
        """The folder `named`, or that of `USUAL` in the cache of the Hugging Face hub."""
        from huggingface_hub import try_to_load_from_cache

        if named is not None:
            return named
        found = try_to_load_from_cache(USUAL, "model.safetensors")
        if not isinstance(found, str):
            raise RequestError(
                f"{USUAL}: not in the cache of Hugging Face; {cls.name} features need its folder (1.7 GB): fetch it "
                f'once with `hf download {USUAL} --include "*.json" "*.txt" model.safetensors`, or name a folder or a '
                f"repository of a CLIPModel: {cls.name}=FOLDER, {cls.name}=hf:ORG/REPO"
            )
        return Path(found).parent

    @classmethod
    def load(
        cls, weights: Path | None = None, device: torch.device = torch.device("cpu"), resize: str | None = None
    ) -> "CLIPFeatures":
        assert resize is None, "there are no modes"
        try:
            transformers = importlib.import_module("transformers")
        except ImportError as error:
            raise RequestError(
                f"{cls.name} features need the package transformers ({error}); install it with "
                "`pip install 'neon-extrapolation[diffusers]'` (Python 3.11 or newer)"
            ) from error
        folder = cls.weights_file(weights)
        advice = f"expected the folder of a CLIPModel, such as {USUAL}"
        config = read_table(folder / "config.json") if folder.is_dir() else {}
        if config.get("model_type") != "clip" or not any((folder / name).is_file() for name in _VOCABULARIES):
            raise RequestError(f"{folder}: no config.json of a CLIPModel with its tokenizer in it; {advice}")

        def build() -> nn.Module:
            return transformers.CLIPModel(transformers.CLIPConfig.from_dict(config)).float()

        with open_checkpoint(folder) as file, building(f"{folder}: not the config of a CLIPModel", advice):
            names = [name for name in file.names() if not name.endswith("position_ids")]  # which count the positions
            check_outline(build, {name: file.shape(name) for name in names}, file.path)
            network = build()
            load_weights(network, {name: file.tensor(name).float() for name in names}, file.path)
            digest = sha256_file(file.path)[:12]
        with building(f"{folder}: no tokenizer can be made of it", advice):
            tokenizer = transformers.CLIPTokenizer.from_pretrained(folder, local_files_only=True)
        return cls(network.to(device).eval().requires_grad_(False), tokenizer, digest)


def _square(picture: Image.Image, side: int) -> Image.Image:
    """The middle of a picture whose shorter side has become `side` pixels."""
    shorter = min(picture.size)
    width, height = (side * length // shorter for length in picture.size)
    left, top = (width - side) // 2, (height - side) // 2
    return picture.resize((width, height), Image.Resampling.BICUBIC).crop((left, top, left + side, top + side))
