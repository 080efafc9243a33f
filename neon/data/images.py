"""Sets of images on disk: PNG folders and zips that every architecture writes and reads.

A set is `00000000.png`, `00000001.png`, ... by index, with `dataset.json` holding
`{"labels": [[name, label], ...]}`; folders with one subfolder per class are read too.
"""

import io
import json
import os
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import ClassVar, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from neon.errors import RequestError
from neon.runtime.files import atomic_write, write_json

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".webp"})
LABELS_FILE = "dataset.json"


def from_uint8(images: Tensor) -> Tensor:
    """uint8 images -> float32 in [-1, 1]."""
    return images.to(torch.float32) / 127.5 - 1


def to_uint8(images: Tensor, *, offset: float = 128.0) -> Tensor:
    """Images in [-1, 1] -> uint8: truncate(clip(127.5 x + offset, 0, 255)).

    `offset` is the published rounding rule: 128 for EDM; 127.5 truncates [0, 1] images times 255.
    """
    return (images * 127.5 + offset).clip(0, 255).to(torch.uint8)


def image_name(index: int) -> str:
    """The file name of image `index` of a set."""
    return f"{index:08d}.png"


def write_images(folder: str | os.PathLike[str], indices: Sequence[int], images: Tensor) -> None:
    """Write uint8 `images` [B, C, H, W] (C 1 or 3) as PNG files named by their index, each atomically."""
    for index, image in zip(indices, images.cpu().numpy(), strict=True):
        pixels = image[0] if image.shape[0] == 1 else image.transpose(1, 2, 0)
        with atomic_write(Path(folder) / image_name(index), flush=False) as file:
            Image.fromarray(pixels).save(file, format="png")


def write_labels(folder: str | os.PathLike[str], labels: Sequence[int] | None, num_images: int) -> None:
    """Write `dataset.json`; its presence says that the set is complete."""
    named = None if labels is None else [[image_name(i), int(labels[i])] for i in range(num_images)]
    write_json(Path(folder) / LABELS_FILE, {"labels": named})


def pack_set(folder: str | os.PathLike[str], archive: str | os.PathLike[str]) -> None:
    """Write the images and labels of `folder` as a stored zip, atomically; equal sets give equal bytes."""
    files = [*sorted(Path(folder).glob("*.png")), Path(folder) / LABELS_FILE]
    with atomic_write(archive) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as packed:
        for path in files:
            packed.writestr(zipfile.ZipInfo(path.name), path.read_bytes())  # its date is 1980, always


class TrainingImages(Protocol):
    """What training reads: a finite set of images of one shape, with or without classes, as pixels or encoded."""

    path: Path
    """where it came from, for messages"""
    image_shape: tuple[int, int, int]
    labels: Tensor | None
    """int64 [N], or None"""
    encoded: bool
    """whether `load` gives what a model's `encode` makes of the images (tokens, latents) and not their pixels"""

    def __len__(self) -> int: ...

    def load(self, indices: Sequence[int]) -> tuple[Tensor, Tensor | None]:
        """(uint8 [B, C, H, W] or encoded [B, ...], int64 [B] or None) of the images at `indices`."""
        ...


class ArrayDataset:
    """Images that are in memory: uint8 [N, C, H, W], with int64 [N] classes or None."""

    encoded = False

    def __init__(self, images: Tensor, labels: Tensor | None, path: str | os.PathLike[str]) -> None:
        self.images, self.labels, self.path = images, labels, Path(path)
        _, channels, height, width = images.shape
        self.image_shape = (channels, height, width)

    def __len__(self) -> int:
        return len(self.images)

    def load(self, indices: Sequence[int]) -> tuple[Tensor, Tensor | None]:
        chosen = torch.as_tensor(indices)
        return self.images[chosen], None if self.labels is None else self.labels[chosen]


class Storage:
    """The files of a folder, or of a zip that is read without unpacking it, by their names relative to it.

    Raises:
        RequestError: the path is neither; `contents` is what the message says was expected in it.
    """

    def __init__(self, path: Path, contents: str) -> None:
        self.path, self._archive = path, None
        if path.is_file() and zipfile.is_zipfile(path):
            self._archive = zipfile.ZipFile(path)
        elif not path.is_dir():
            kind = "a file that is not a zip" if path.exists() else "nothing"
            raise RequestError(f"{path}: expected a folder or zip of {contents}, found {kind}")

    def names(self) -> Iterator[str]:
        """The names of all files, in no order."""
        if self._archive:
            return (name for name in self._archive.namelist() if not name.endswith("/"))
        return (file.relative_to(self.path).as_posix() for file in self.path.rglob("*") if file.is_file())

    def read(self, name: str) -> bytes:
        return self._archive.read(name) if self._archive else (self.path / name).read_bytes()


class FileDataset(ABC):
    """The files of a folder or zip with one of some suffixes, in sorted order, with their classes if they have any.

    Raises:
        RequestError: the path holds no such files, `dataset.json` does not fit them, or a file cannot be read or
            has another shape than the first.
    """

    contents: ClassVar[str]
    """what the files are, for messages"""
    one_of_them: ClassVar[str]
    """the singular, with its article"""
    suffixes: ClassVar[frozenset[str]]
    folders_are_classes: ClassVar[bool] = True
    """whether files without `dataset.json` belong to the class of their folder"""
    shape: tuple[int, int, int]
    """(C, H, W) of what a file holds"""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._storage = Storage(self.path, self.contents)
        files = sorted(self._storage.names())
        self.names = [name for name in files if has_suffix(name, self.suffixes)]
        if not self.names:
            suffixes = ", ".join(sorted(self.suffixes))
            raise RequestError(f"{self.path}: expected {self.contents} ({suffixes}), found none")
        self.labels = self._read_labels(LABELS_FILE in files)
        channels, height, width = self._read(self.names[0]).shape
        self.shape = (channels, height, width)

    def __len__(self) -> int:
        return len(self.names)

    def load(self, indices: Sequence[int]) -> tuple[Tensor, Tensor | None]:
        """(what the files hold [B, C, H, W], int64 [B] or None) at `indices`."""
        arrays = []
        for index in indices:
            array = self._read(self.names[index])
            if array.shape != self.shape:
                raise RequestError(
                    f"{self.path}: {self.names[index]} is {array.shape} (C, H, W) but {self.names[0]} is "
                    f"{self.shape}; expected {self.contents} of one size"
                )
            arrays.append(array)
        labels = None if self.labels is None else self.labels[torch.as_tensor(indices)]
        return torch.from_numpy(np.stack(arrays)), labels

    def _read(self, name: str) -> np.ndarray:
        try:
            return self.decode(self._storage.read(name))
        except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
            raise RequestError(
                f"{self.path}: {name} cannot be read as {self.one_of_them} ({error}); make it again"
            ) from error

    @staticmethod
    @abstractmethod
    def decode(data: bytes) -> np.ndarray:
        """The array [C, H, W] of a file's content; a ValueError, OSError or EOFError if it holds none."""

    def _read_labels(self, has_file: bool) -> Tensor | None:
        if has_file:
            try:
                entries = json.loads(self._storage.read(LABELS_FILE))["labels"]
                by_name = None if entries is None else {name: int(label) for name, label in entries}
            except (ValueError, KeyError, TypeError) as error:
                raise RequestError(
                    f'{self.path}: {LABELS_FILE} is not of the form {{"labels": [[name, label], ...]}} ({error!r})'
                ) from error
            if by_name is None:
                return None
            unlabelled = [name for name in self.names if name not in by_name]
            if unlabelled:
                raise RequestError(
                    f"{self.path}: {LABELS_FILE} has no label for {len(unlabelled)} of {len(self.names)} "
                    f"{self.contents}, the first is {unlabelled[0]}"
                )
            return torch.tensor([by_name[name] for name in self.names])
        folders = [PurePosixPath(name).parent.as_posix() for name in self.names]
        if "." in folders or not self.folders_are_classes:
            return None
        classes = {folder: i for i, folder in enumerate(sorted(set(folders)))}
        return torch.tensor([classes[folder] for folder in folders])


class ImageDataset(FileDataset):
    """The images of a folder or zip: uint8 [C, H, W], C 1 or 3."""

    encoded = False
    contents, one_of_them = "images", "an image"
    suffixes = IMAGE_SUFFIXES

    def __init__(self, path: str | os.PathLike[str]) -> None:
        super().__init__(path)
        self.image_shape = self.shape

    @staticmethod
    def decode(data: bytes) -> np.ndarray:
        image = Image.open(io.BytesIO(data))
        pixels = np.asarray(image if image.mode in ("L", "RGB") else image.convert("RGB"))
        return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


def has_suffix(name: str, suffixes: Collection[str]) -> bool:
    """Whether the file `name` is one of those with these suffixes; hidden files never are."""
    path = PurePosixPath(name)
    return path.suffix.lower() in suffixes and not path.name.startswith(".")


def subset_indices(num_images: int, max_size: int, seed: int) -> list[int]:
    """The images, in ascending order, that are kept of a set cut down to `max_size` (EDM's rule); all if fewer."""
    order = np.arange(num_images)
    np.random.RandomState(seed).shuffle(order)
    return sorted(order[:max_size].tolist())


class Subset:
    """A random part of a set, in the order of the set."""

    def __init__(self, whole: TrainingImages, max_size: int, seed: int) -> None:
        self._whole, self._indices = whole, subset_indices(len(whole), max_size, seed)
        self.path, self.image_shape, self.encoded = whole.path, whole.image_shape, whole.encoded
        self.labels = None if whole.labels is None else whole.labels[torch.as_tensor(self._indices)]

    def __len__(self) -> int:
        return len(self._indices)

    def load(self, indices: Sequence[int]) -> tuple[Tensor, Tensor | None]:
        """(uint8 [B, C, H, W] or encoded, int64 [B] or None) of the images at `indices` of this part."""
        return self._whole.load([self._indices[i] for i in indices])


def visit_order(num_images: int, seed: int) -> Iterator[int]:
    """The endless order in which training visits images (EDM's rule).

    One shuffle, then cyclic walks; after each visit the image changes places with one of the last half
    of the set visited, so that every walk differs. Process r of R takes every R-th visit from r on.
    """
    random = np.random.RandomState(seed)
    order = np.arange(num_images)
    random.shuffle(order)
    window = round(num_images / 2)
    visit = 0
    while True:
        here = visit % num_images
        yield int(order[here])
        if window >= 2:
            there = (here - random.randint(window)) % num_images
            order[here], order[there] = order[there], order[here]
        visit += 1
