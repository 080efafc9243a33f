"""A small feature network for images of one's own: what it is, how it is trained, its file."""

import hashlib
import json
import os

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from neon.checkpoint import open_checkpoint, save_safetensors
from neon.data.images import from_uint8
from neon.errors import RequestError
from neon.metrics.features import FeatureExtractor
from neon.model import building, check_outline, load_weights
from neon.runtime.distributed import Processes
from neon.runtime.progress import Progress


class SmallFeatures(nn.Module, FeatureExtractor):
    """A small convolutional classifier whose last hidden layer is the features: for small, low-resolution data.

    config: {"name", "image_shape": [C, H, W], "dim": F, "num_classes"}.
    """

    def __init__(self, name: str, image_shape: tuple[int, int, int], dim: int, num_classes: int) -> None:
        super().__init__()
        if not isinstance(name, str) or not isinstance(dim, int):
            raise TypeError(f"{name!r} with {dim!r} features")
        self.name, self.dim = name, dim
        self.image_shape = tuple(image_shape)
        self.config = {"name": name, "image_shape": list(image_shape), "dim": dim, "num_classes": num_classes}
        channels, height, width = image_shape
        self.body = nn.Sequential(
            nn.Conv2d(channels, 32, 3, padding=1), nn.ReLU(),
            nn.Conv2d(32, 64, 3, padding=1, stride=2), nn.ReLU(),
            nn.Conv2d(64, 64, 3, padding=1), nn.ReLU(),
            nn.Flatten(),
            nn.Linear(64 * ((height + 1) // 2) * ((width + 1) // 2), dim), nn.ReLU(),
        )  # fmt: skip
        self.head = nn.Linear(dim, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """uint8 [B, C, H, W] -> float32 [B, F], all at least 0.

        Raises:
            RequestError: the images have another shape than those the network was trained on.
        """
        if tuple(images.shape[1:]) != self.image_shape:
            raise RequestError(
                f"features {self.name!r} read images of shape {self.image_shape} (C, H, W), "
                f"not {tuple(images.shape[1:])}; name another extractor"
            )
        return self.body(from_uint8(images))

    @property
    def identity(self) -> str:
        """The name, and what tells networks of one name apart: a digest of config and weights."""
        digest = hashlib.sha256(json.dumps(self.config, sort_keys=True).encode())
        for name, tensor in sorted(self.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.cpu().numpy().tobytes())
        return f"{self.name}:{digest.hexdigest()[:12]}"

    def classify(self, images: Tensor) -> Tensor:
        """uint8 [B, C, H, W] -> class logits float32 [B, num_classes]: what the network is trained by."""
        return self.head(self(images))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write weights and config as one safetensors file."""
        save_safetensors(path, self.state_dict(), {"features": json.dumps(self.config)})


def load_features(path: str | os.PathLike[str], device: torch.device | str = "cpu") -> SmallFeatures:
    """The extractor that `SmallFeatures.save` wrote, in eval mode.

    Raises:
        RequestError: the file holds no feature network, or weights of another.
    """
    with open_checkpoint(path) as checkpoint:
        if "features" not in checkpoint.metadata:
            raise RequestError(
                f"{path}: not a feature network; expected safetensors with the metadata `features` "
                "as written by `python -m neon.demo.train features`"
            )
        shapes = {name: spec.shape for name, spec in checkpoint.specs.items()}
        with building(f"{path}: its metadata `features` describe no feature network", "write the file again"):
            config = json.loads(checkpoint.metadata["features"])
            check_outline(lambda: SmallFeatures(**config), shapes, path)
            extractor = SmallFeatures(**config)
        load_weights(extractor, {name: checkpoint.tensor(name) for name in checkpoint.names()}, path)
    return extractor.to(device).eval().requires_grad_(False)


def fit_classifier(extractor: SmallFeatures, images: torch.Tensor, labels: torch.Tensor, epochs: int) -> nn.Module:
    """Cross-entropy with Adam on batches of 128, the learning rate falling linearly to 0."""
    optimizer = torch.optim.Adam(extractor.parameters(), lr=2e-3)
    steps = epochs * (len(images) // 128)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
    with Progress("feature network", steps, "step", Processes()) as progress:
        for _ in range(epochs):
            for batch in torch.randperm(len(images)).split(128)[: len(images) // 128]:
                loss = F.cross_entropy(extractor.classify(images[batch]), labels[batch])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                progress.advance(1, loss=f"{loss.item():.3f}")
    return extractor.eval().requires_grad_(False)
