"""DINOv2's 1,024 features (Oquab et al. 2023) by timm, of which FD-DINOv2 is made (Stein et al. 2023).

Not comparable with published figures until that is checked: the weights are Meta's, but how an image is resized and how
position embeddings are is this module's choice, named in `PROTOCOL`.
"""

from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from neon.checkpoint import load_state
from neon.errors import RequestError, note
from neon.metrics.networks import PublishedNetwork
from neon.metrics.resizing import clean
from neon.model import load_weights

SIDE = 224
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""ImageNet's, of values in 0..1"""
FILE = "model.safetensors"
PROTOCOL = {
    "resize": "224 x 224, PIL bicubic with antialias, in floats that are not rounded (clean-fid's clean)",
    "normalisation": "mean and deviation of ImageNet",
    "output": "class token after the final norm",
    "position_embeddings": "37 x 37 to 16 x 16 by timm's resample_abs_pos_embed (bicubic with antialias)",
    "comparable": "not with published figures: unchecked",
}


class DINOv2Features(PublishedNetwork, nn.Module):
    """The ViT-L/14 without registers; `load` makes one.

    A module, so that its size decides how many threads a CPU computes with.
    """

    name = "dinov2"
    dim = 1024
    variant: ClassVar[str] = "vit_large_patch14_dinov2"
    """what timm calls it"""
    any_size = True  # there is one way to resize, for images of one size as of several
    protocol = PROTOCOL

    def __init__(self, network: nn.Module) -> None:
        """Wrap timm's network, built for images of 224 pixels and without a head."""
        super().__init__()
        self._network = network

    def resized(self, images: Tensor) -> Tensor:
        return clean(images, SIDE)

    def features(self, images: Tensor) -> Tensor:
        mean, deviation = (images.new_tensor(values)[:, None, None] for values in (MEAN, DEVIATION))
        return self._network((images / 255 - mean) / deviation)

    @classmethod
    def weights_file(cls, named: Path | None = None) -> Path:
        """`named`, or where the Hugging Face hub caches timm's."""
        from huggingface_hub import try_to_load_from_cache

        if named is not None:
            return named
        repository = f"timm/{cls.variant}.lvd142m"
        found = try_to_load_from_cache(repository, FILE)
        if not isinstance(found, str):
            raise RequestError(
                f"{repository}: not in the cache of Hugging Face; {cls.name} features need its weights (1.2 GB): fetch "
                f"them once with `hf download {repository} {FILE}`, or name your copy: {cls.name}=FILE"
            )
        return Path(found)

    @classmethod
    def load(
        cls, weights: Path | None = None, device: torch.device = torch.device("cpu"), resize: str | None = None
    ) -> "DINOv2Features":
        assert resize is None, "there are no modes"
        path = cls.weights_file(weights)
        state = load_state(path)
        network = cls._fitted(path, state)
        note(f"{cls.name} features: not comparable with published figures (how images are resized is recorded)")
        return cls(network.to(device).eval().requires_grad_(False))

    @classmethod
    def _fitted(cls, path: Path, state: dict[str, Tensor]) -> nn.Module:
        """timm's network with the weights `state`, by timm's names or Meta's, which differ in one that is of training.

        Raises:
            RequestError: they are those of another network.
        """
        # Imports torchvision: 1.7 s that only those who use this network pay.
        import timm
        from timm.layers import resample_abs_pos_embed

        with torch.device("meta"):
            network: Any = timm.create_model(cls.variant, img_size=SIDE, num_classes=0)
        state.pop("mask_token", None)
        embeddings = state.get("pos_embed")
        if embeddings is not None and embeddings.ndim == 3 and _is_square(embeddings.shape[1] - 1):
            grid = list(network.patch_embed.grid_size)
            state["pos_embed"] = resample_abs_pos_embed(embeddings.float(), grid, num_prefix_tokens=1)
        network = network.to_empty(device="cpu")
        assert not list(network.buffers()), "what no file holds would have no value"
        try:
            load_weights(network, state, path)
        except RequestError as error:
            raise RequestError(
                f"{error}: expected those of timm's {cls.variant}, as `hf download timm/{cls.variant}.lvd142m {FILE}` "
                "fetches them"
            ) from error
        return network


def _is_square(number: int) -> bool:
    return number > 0 and round(number**0.5) ** 2 == number
