"""Images in shards: pixels as a set of examples has them (`neon.data.encoded`), which nobody has to decode.

A shard holds uint8 [n, H, W, C], so that images lie in memory as those of files do; the layout decides in which order a
network adds up, so how its results are rounded. Prompts are in `metadata.jsonl`, by number as the names of PNG files.
"""

import os
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from neon.data.encoded import INDEX_FILE, ExampleSet, is_example_set, kind_of, write_examples
from neon.data.images import ImageDataset, TrainingImages, image_name, write_texts
from neon.data.prompts import TEXT_FORM, TEXTS_FILE, parse_texts
from neon.data.storage import Storage
from neon.errors import RequestError
from neon.runtime.distributed import Processes

IMAGES = "images"
"""what sets of examples hold that are no more than images"""


class ImageShards(ExampleSet):
    """The images of a folder of shards.

    Raises:
        RequestError: the index or a shard is missing, damaged, does not fit, or holds no images.
    """

    encoded = False
    expected_instead: ClassVar[str] = "expected images"

    def __init__(self, path: str | os.PathLike[str]) -> None:
        super().__init__(path, IMAGES)
        channels, height, width = self.image_shape
        if channels not in (1, 3) or (self._shape, self._dtype) != ((height, width, channels), torch.uint8):
            raise RequestError(
                f"{self.path}: its shards hold {self._dtype} {list(self._shape)}; expected images, uint8 [H, W, C] of "
                f"the {list(self.image_shape)} (C, H, W) in {INDEX_FILE}, C 1 or 3; make the set again"
            )

    @cached_property
    def texts(self) -> list[str] | None:  # type: ignore[override]
        """The prompt of each image; None: there is no `metadata.jsonl`.

        Raises:
            RequestError: it is damaged, or lacks an image.
        """
        if not (self.path / TEXTS_FILE).is_file():
            return None
        try:
            by_name = parse_texts(Storage(self.path, "images").read(TEXTS_FILE))
            return [by_name[image_name(index)] for index in range(len(self))]
        except RequestError:
            raise
        except (ValueError, KeyError) as error:
            found = f"it has no text for {error}" if isinstance(error, KeyError) else str(error)
            raise RequestError(f"{self.path / TEXTS_FILE}: {found}; expected a line {TEXT_FORM} each") from error

    def examples(self, indices: Sequence[int]) -> Tensor:
        """uint8 [B, C, H, W]."""
        stored = super().examples(indices)
        return stored.permute(0, 3, 1, 2) if self.image_shape[0] == 3 else stored.view(-1, *self.image_shape)

    def images(self, indices: Sequence[int]) -> list[Tensor]:
        """The images at `indices`, uint8 [C, H, W] each."""
        return list(self.examples(indices))


def write_image_shards(
    compute: Callable[[range], tuple[Tensor, Tensor | None]],
    num_images: int,
    folder: str | os.PathLike[str],
    *,
    texts: Sequence[str] | None = None,
    image_shape: tuple[int, int, int],
    batch_size: int,
    processes: Processes,
    title: str,
    sampler: dict[str, object] | None = None,
) -> None:
    """`write_examples` for images: `compute` gives (uint8 [B, C, H, W], int64 [B] or None) of a block."""

    def pixels(block: range) -> tuple[Tensor, Tensor | None]:
        images, labels = compute(block)
        return images.permute(0, 2, 3, 1), labels

    if texts is not None:
        processes.on_main(lambda: write_texts(folder, texts))  # first: with its index the set is whole
    write_examples(
        pixels,
        num_images,
        folder,
        kind=IMAGES,
        image_shape=image_shape,
        batch_size=batch_size,
        processes=processes,
        title=title,
        sampler=sampler,
    )


def open_images(path: str | os.PathLike[str]) -> ImageDataset | ImageShards:
    """The images at `path`: files of a folder or zip, or shards.

    Raises:
        RequestError: they are neither, or cannot be read.
    """
    return ImageShards(path) if is_example_set(path) else ImageDataset(path)


def images_or_examples(path: str | os.PathLike[str], kind: str) -> TrainingImages:
    """The set at `path`: encoded examples of a `kind`, or images."""
    if is_example_set(path) and kind_of(path) != IMAGES:
        return ExampleSet(path, kind)
    return open_images(path)
