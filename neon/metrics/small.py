"""A small feature network for images of one's own: what it is, how it is trained, its file."""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from itertools import islice

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from neon.checkpoint import open_checkpoint, save_safetensors
from neon.data.images import TrainingImages, from_uint8
from neon.errors import RequestError
from neon.metrics.features import FeatureExtractor
from neon.model import building, check_outline, load_weights
from neon.runtime.distributed import Processes
from neon.runtime.progress import Progress

BATCH = 128
LARGEST = 1 << 24
"""stride and width: beyond, sizes overflow before they can be held against those of a file"""
LARGEST_SIDE = 16
"""of what the first layer hands on, by `usual_stride`"""

Lesson = Callable[[Tensor], tuple[Tensor, Tensor]]
"""int64 [B], places in a set -> their images, uint8 [B, C, H, W], and what is to be answered of them, int64 [B]"""


class SmallFeatures(nn.Module, FeatureExtractor):
    """A small convolutional classifier whose last hidden layer is the features, for data of one's own.

    config: {"name", "image_shape": [C, H, W], "dim": F, "num_classes"}, and where they are not the usual ones "stride",
    by how many pixels the first layer steps, and "width", the channels of the last.
    """

    def __init__(
        self,
        name: str,
        image_shape: tuple[int, int, int],
        dim: int,
        num_classes: int,
        stride: int = 1,
        width: int = 64,
    ) -> None:
        super().__init__()
        if not isinstance(name, str) or not all(isinstance(number, int) for number in (dim, stride, width)):
            raise TypeError(f"{name!r} with {dim!r} features, stride {stride!r}, width {width!r}")
        if not (1 <= stride <= LARGEST and 2 <= width <= LARGEST):
            raise ValueError(f"stride {stride}, width {width}")
        self.name, self.dim = name, dim
        self.image_shape = tuple(image_shape)
        unusual = {key: value for key, value, usual in (("stride", stride, 1), ("width", width, 64)) if value != usual}
        self.config = {
            "name": name, "image_shape": list(image_shape), "dim": dim, "num_classes": num_classes, **unusual
        }  # fmt: skip
        channels, high, wide = image_shape
        rows, columns = -(-high // stride), -(-wide // stride)
        # So that the windows, which overlap by two pixels, cover an image to its edges.
        padding = (rows * stride - high + 1) // 2 + 1, (columns * stride - wide + 1) // 2 + 1
        self.body = nn.Sequential(
            nn.Conv2d(channels, width // 2, stride + 2, padding=padding, stride=stride), nn.ReLU(),
            nn.Conv2d(width // 2, width, 3, padding=1, stride=2), nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1), nn.ReLU(),
            nn.Flatten(),
            nn.Linear(width * ((rows + 1) // 2) * ((columns + 1) // 2), dim), nn.ReLU(),
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

    @torch.no_grad()
    def standardise(self, images: Tensor) -> None:
        """Scale the last layer so that each feature has, before its ReLU, mean 0 and deviation 1 over uint8 `images`.

        For weights that nothing has trained: as they are drawn, features are nearly constant, some of them 0.
        """
        *layers, last, _ = self.body
        assert isinstance(last, nn.Linear)
        deviation, mean = torch.std_mean(nn.Sequential(*layers, last)(from_uint8(images)), dim=0)
        deviation.clamp_(min=torch.finfo(deviation.dtype).tiny)
        last.weight /= deviation[:, None]
        last.bias.sub_(mean).div_(deviation)

    def save(
        self, path: str | os.PathLike[str], facts: Mapping[str, str] | None = None, *, overwrite: bool = True
    ) -> None:
        """Write weights and config as one safetensors file, with `facts` in its metadata."""
        metadata = {"features": json.dumps(self.config), **(facts or {})}
        save_safetensors(path, self.state_dict(), metadata, overwrite=overwrite)


def usual_stride(image_shape: tuple[int, int, int]) -> int:
    """The least stride with which the network of images [C, H, W] sees at most 16 x 16 windows of them.

    So it is as quick and small for large images as for small ones.
    """
    return -(-max(image_shape[1:]) // LARGEST_SIDE)


def load_features(path: str | os.PathLike[str], device: torch.device | str = "cpu") -> SmallFeatures:
    """The extractor that `SmallFeatures.save` wrote, in eval mode.

    Raises:
        RequestError: the file holds no feature network, or weights of another.
    """
    with open_checkpoint(path) as checkpoint:
        if "features" not in checkpoint.metadata:
            raise RequestError(
                f"{path}: not a feature network; expected safetensors with the metadata `features` "
                "as written by `neon features`"
            )
        shapes = {name: spec.shape for name, spec in checkpoint.specs.items()}
        with building(f"{path}: its metadata `features` describe no feature network", "write the file again"):
            config = json.loads(checkpoint.metadata["features"])
            check_outline(lambda: SmallFeatures(**config), shapes, path)
            extractor = SmallFeatures(**config)
        load_weights(extractor, {name: checkpoint.tensor(name) for name in checkpoint.names()}, path)
    return extractor.to(device).eval().requires_grad_(False)


def classes_of(dataset: TrainingImages) -> Lesson:
    """To tell the classes of images that have some, by their numbers in the order of those that occur."""
    assert dataset.labels is not None
    ranks = dataset.labels.unique(return_inverse=True)[1]
    return lambda places: (dataset.examples(places.tolist()), ranks[places])


def quarter_turns(dataset: TrainingImages) -> Lesson:
    """To tell by how many quarter turns a square image was turned: for images without classes.

    Gidaris, Singh, Komodakis: Unsupervised Representation Learning by Predicting Image Rotations, 2018.
    """

    def lesson(places: Tensor) -> tuple[Tensor, Tensor]:
        turns = torch.randint(4, (len(places),))
        images = dataset.examples(places.tolist())
        return torch.stack([image.rot90(int(k), (1, 2)) for image, k in zip(images, turns, strict=True)]), turns

    return lesson


def fit_classifier(extractor: SmallFeatures, lesson: Lesson, places: Tensor, passes: float) -> None:
    """Cross-entropy with Adam on batches of 128, the learning rate falling linearly to 0; then in eval mode.

    The images at `places`, int64 [N], are visited in `passes` that torch's global generator shuffles.
    """
    size = min(BATCH, len(places))
    steps = max(1, round(passes * (len(places) // size)))
    device = extractor.head.weight.device
    optimizer = torch.optim.Adam(extractor.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
    with Progress("feature network", steps, "step", Processes()) as progress:
        for batch in islice(_batches(places, size), steps):
            images, answers = (tensor.to(device) for tensor in lesson(batch))
            loss = F.cross_entropy(extractor.classify(images), answers)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            progress.advance(1, loss=f"{loss.item():.3f}")
    extractor.eval().requires_grad_(False)


def _batches(places: Tensor, size: int) -> Iterator[Tensor]:
    """Batches without end, whole ones only."""
    while True:
        for chosen in torch.randperm(len(places)).split(size)[: len(places) // size]:
            yield places[chosen]


@torch.no_grad()
def accuracy(extractor: SmallFeatures, lesson: Lesson, places: Tensor) -> tuple[float, float]:
    """The share of right answers for the images at `places`, and that of who always gives the most frequent answer."""
    device = extractor.head.weight.device
    right, asked = [], []
    for batch in places.split(500):
        images, answers = lesson(batch)
        right.append(extractor.classify(images.to(device)).argmax(1).cpu() == answers)
        asked.append(answers)
    return torch.cat(right).double().mean().item(), torch.cat(asked).bincount().max().item() / len(places)
