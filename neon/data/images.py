"""Sets of images on disk: PNG folders and zips that every architecture writes and reads.

A set is `00000000.png`, `00000001.png`, ... by index, with `dataset.json` holding
`{"labels": [[name, label], ...]}` and, of a synthetic set, what drew it (`neon.data.sampler`); folders with one
subfolder per class are read too (`neon.data.labels`). Where labels are prompts `metadata.jsonl` has them in words
(`neon.data.prompts`).
"""

import contextlib
import os
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from neon.data.labels import (
    FORM,
    LABELS_FILE,
    folder_classes,
    labels_file,
    largest_labels_file,
    most_labels,
    parse_labels,
    parse_sampler_of_set,
)
from neon.data.listing import plain
from neon.data.pictures import as_coloured, decode_image, is_grey
from neon.data.prompts import TEXT_FORM, TEXTS_FILE, parse_texts, text_lines
from neon.data.sampler import SAMPLER
from neon.data.storage import Storage
from neon.errors import RequestError, note, warn
from neon.runtime.files import atomic_write, write_json

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".webp"})
OTHER_SUFFIXES = frozenset({".tif", ".tiff", ".gif", ".jfif", ".jpe", ".jp2", ".avif", ".heic", ".ppm", ".pgm", ".tga"})
"""of pictures that are not read: a set with some of them is smaller than it looks"""


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


def has_image(folder: Path, index: int) -> bool:
    """Whether image `index` is there, and not the empty file that a crash of the machine can leave."""
    try:
        return (folder / image_name(index)).stat().st_size > 0
    except OSError:
        return False


def write_labels(
    folder: str | os.PathLike[str],
    labels: Sequence[int] | None,
    num_images: int,
    sampler: Mapping[str, Any] | None = None,
) -> None:
    """Write `dataset.json`, with the record of the `sampler` that drew a synthetic set.

    Its presence says that the set is complete.
    """
    named = None if labels is None else [[image_name(i), int(labels[i])] for i in range(num_images)]
    drawn_by = {} if sampler is None else {SAMPLER: dict(sampler)}
    write_json(Path(folder) / LABELS_FILE, {"labels": named, **drawn_by})


def write_texts(folder: str | os.PathLike[str], texts: Sequence[str]) -> None:
    """Write `metadata.jsonl` with the prompt of each image; to be there before `dataset.json`."""
    lines = text_lines([(image_name(index), text) for index, text in enumerate(texts)])
    with atomic_write(Path(folder) / TEXTS_FILE) as file:
        file.write(lines)


def pack_set(folder: str | os.PathLike[str], archive: str | os.PathLike[str]) -> None:
    """Write the images and labels of `folder` as a stored zip, atomically; equal sets give equal bytes."""
    described = (Path(folder) / name for name in (TEXTS_FILE, LABELS_FILE))
    files = [*sorted(Path(folder).glob("*.png")), *(file for file in described if file.exists())]
    with atomic_write(archive) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as packed:
        for path in files:
            packed.writestr(zipfile.ZipInfo(path.name), path.read_bytes())  # its date is 1980, always


class TrainingImages(Protocol):
    """What training reads: a finite set of images of one shape, with or without classes, as pixels or encoded."""

    path: Path
    """where it came from, for messages"""
    image_shape: tuple[int, int, int]
    encoded: bool
    """whether `examples` are what a model's `encode` makes of the images (tokens, latents) and not their pixels"""

    @property
    def labels(self) -> Tensor | None:
        """int64 [N], or None; a set that has no use for them need not be able to tell them."""
        ...

    @property
    def texts(self) -> Sequence[str] | None:
        """The prompt of each image, or None; a set that has no use for them need not be able to tell them."""
        ...

    @property
    def sampler(self) -> dict[str, Any] | None:
        """The record of what drew a synthetic set (`neon.data.sampler`); None: the set does not tell."""
        ...

    def __len__(self) -> int: ...

    def examples(self, indices: Sequence[int]) -> Tensor:
        """uint8 [B, C, H, W] or encoded [B, ...]: the images at `indices`."""
        ...

    def load(self, indices: Sequence[int]) -> tuple[Tensor, Tensor | None]:
        """(examples, int64 [B] or None) of the images at `indices`."""
        ...


class Labelled(ABC):
    """A set that gives the labels of its examples with them."""

    labels: Tensor | None
    texts: Sequence[str] | None = None
    sampler: dict[str, Any] | None = None
    """as of `TrainingImages`"""

    @abstractmethod
    def examples(self, indices: Sequence[int]) -> Tensor:
        """uint8 [B, C, H, W] or encoded [B, ...]: the images at `indices`."""

    def load(self, indices: Sequence[int]) -> tuple[Tensor, Tensor | None]:
        """(examples, int64 [B] or None) of the images at `indices`."""
        return self.examples(indices), None if self.labels is None else self.labels[torch.as_tensor(indices)]


class ArrayDataset(Labelled):
    """Images that are in memory: uint8 [N, C, H, W], with int64 [N] classes or None."""

    encoded = False

    def __init__(self, images: Tensor, labels: Tensor | None, path: str | os.PathLike[str]) -> None:
        self.images, self.labels, self.path = images, labels, Path(path)
        _, channels, height, width = images.shape
        self.image_shape = (channels, height, width)

    def __len__(self) -> int:
        return len(self.images)

    def examples(self, indices: Sequence[int]) -> Tensor:
        return self.images[torch.as_tensor(indices)]


class FileDataset(Labelled):
    """The files of a folder or zip with one of some suffixes, in sorted order, with their classes if they have any.

    Raises:
        RequestError: the path holds no such files, one cannot be read, or has another shape than the set.
    """

    contents: ClassVar[str]
    """what the files are, for messages"""
    one_of_them: ClassVar[str]
    """the singular, with its article"""
    suffixes: ClassVar[frozenset[str]]
    left_out: ClassVar[frozenset[str]] = frozenset()
    """suffixes of files that a user may think are read: said when there are any"""
    folders_are_classes: ClassVar[bool] = True
    """whether files without `dataset.json` belong to the class of their folder"""
    otherwise: ClassVar[str] = ""
    """what can be done with files that differ in shape"""
    shape: tuple[int, int, int]
    """(C, H, W) of what a file holds"""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._storage = Storage(self.path, self.contents)
        self._all_names = sorted(self._storage.names())
        self.names = [name for name in self._all_names if has_suffix(name, self.suffixes)]
        others = [name for name in self._all_names if has_suffix(name, self.left_out)]
        if not self.names:
            suffixes, found = ", ".join(sorted(self.suffixes)), f"only {others[0]}" if others else "none"
            raise RequestError(f"{self.path}: expected {self.contents} ({suffixes}), found {found}")
        if others:
            warn(f"{self.path}: left out {len(others)} that are not read, the first is {others[0]}; convert to .png")
        self.shape = self._shape_of_set()

    def __len__(self) -> int:
        return len(self.names)

    @cached_property
    def labels(self) -> Tensor | None:  # type: ignore[override]
        """int64 [N], or None where neither `dataset.json` nor folders tell classes; all are looked at.

        Raises:
            RequestError: `dataset.json` does not fit the files, or folders do not tell classes.
        """
        try:
            file = labels_file(self._all_names)
            labels = self._labels_by_folder() if file is None else self._labels_in(file)
        except ValueError as error:
            if isinstance(error, RequestError):
                raise
            raise RequestError(
                f"{self.path}: no classes, since {error}; expected one folder for each class, or a {LABELS_FILE}"
            ) from error
        return None if labels is None else torch.tensor(labels)

    @cached_property
    def texts(self) -> list[str] | None:  # type: ignore[override]
        """The prompts of the files by `metadata.jsonl`, which names them as seen from its folder; None: there is none.

        Raises:
            RequestError: it does not fit the files.
        """
        try:
            file = labels_file(self._all_names, TEXTS_FILE)
            if file is None:
                return None
            by_name = parse_texts(self._storage.read(file))
        except ValueError as error:
            if isinstance(error, RequestError):
                raise
            raise RequestError(f"{self.path}: no prompts, since {error}; expected a line {TEXT_FORM} each") from error
        around = file.removesuffix(TEXTS_FILE)
        texts = [by_name.get(plain(name).removeprefix(around)) for name in self.names]
        if None in texts:
            raise RequestError(
                f"{self.path}: {file} has no text for {texts.count(None)} of {len(texts)} {self.contents}, the first "
                f"is {self.names[texts.index(None)]}"
            )
        return [text for text in texts if text is not None]

    @cached_property
    def sampler(self) -> dict[str, Any] | None:  # type: ignore[override]
        """The record of what drew the set; None: there is no `dataset.json` that tells it."""
        try:
            file = labels_file(self._all_names)
            if file is None:
                return None
            data = self._storage.read(file, largest_labels_file(len(self.names)))
            return parse_sampler_of_set(data, most_labels(len(self.names)))
        except (ValueError, MemoryError):  # who asks for labels learns of it
            return None

    def examples(self, indices: Sequence[int]) -> Tensor:
        """What the files at `indices` hold: [B, C, H, W]."""
        return torch.from_numpy(np.stack([self._fitting(self.names[index]) for index in indices]))

    def _shape_of_set(self) -> tuple[int, int, int]:
        """(C, H, W) of every file: that of the first."""
        channels, height, width = self._read(self.names[0]).shape
        return channels, height, width

    def _coloured(self, name: str) -> np.ndarray:
        array = self._read(name)
        return as_coloured(array) if (len(array), self.shape[0]) == (1, 3) else array

    def _fitting(self, name: str) -> np.ndarray:
        array = self._coloured(name)
        if array.shape != self.shape:
            raise RequestError(
                f"{self.path}: {name} is {array.shape} (C, H, W), {self.names[0]} is {self.shape}; "
                f"expected {self.contents} of one size{self.otherwise}"
            )
        return array

    def _read(self, name: str) -> np.ndarray:
        data = self._storage.read(name)
        with self._decoding(name):
            return self.decode(data)

    @contextlib.contextmanager
    def _decoding(self, name: str) -> Iterator[None]:
        """Names the file in what `decode` finds wrong with it."""
        try:
            yield
        except ValueError as error:
            raise RequestError(
                f"{self.path}: {name} cannot be read as {self.one_of_them} ({error}); make it again"
            ) from error

    @staticmethod
    @abstractmethod
    def decode(data: bytes) -> np.ndarray:
        """The array [C, H, W] of a file's content; a ValueError if it holds none."""

    def _labels_in(self, file: str) -> list[int] | None:
        """The labels of the files by `dataset.json`, which names them as they are seen from its folder, or ours."""
        data = self._storage.read(file, largest_labels_file(len(self.names)))
        try:
            by_name = parse_labels(data, most_labels(len(self.names)))
        except (ValueError, MemoryError) as error:
            raise RequestError(f"{self.path}: {file} is not of the form {FORM}: {error}") from error
        if by_name is None:
            return None
        around = file.removesuffix(LABELS_FILE)
        keys = [plain(name) for name in self.names]
        labels = [by_name.get(key.removeprefix(around), by_name.get(key)) for key in keys]
        unlabelled = [name for name, label in zip(self.names, labels, strict=True) if label is None]
        if unlabelled:
            raise RequestError(
                f"{self.path}: {file} has no label for {len(unlabelled)} of {len(self.names)} "
                f"{self.contents}, the first is {unlabelled[0]}"
            )
        if len(by_name) > len(self.names):
            warn(f"{self.path}: {file} has {len(by_name)} labels, but {len(self.names)} {self.contents} are there")
        return [label for label in labels if label is not None]

    def _labels_by_folder(self) -> list[int] | None:
        if not self.folders_are_classes:
            return None
        found = folder_classes(self.names, [name for name in self._all_names if name.endswith("/")])
        if found is None:
            return None
        note(f"{self.path}: {found}")
        return found.labels


class ImageDataset(FileDataset):
    """The images of a folder or zip: uint8 [C, H, W], C 1 or 3; grey ones among coloured ones count as r = g = b."""

    encoded = False
    contents, one_of_them = "images", "an image"
    suffixes = IMAGE_SUFFIXES
    left_out = OTHER_SUFFIXES
    otherwise = "; scores by Inception's features take others, resized as --resize MODE says"
    decode = staticmethod(decode_image)

    def __init__(self, path: str | os.PathLike[str]) -> None:
        super().__init__(path)
        self.image_shape = self.shape

    def images(self, indices: Sequence[int]) -> list[Tensor]:
        """The images at `indices`, uint8 [C, H, W] each of its own size, C as of the set."""
        return [torch.from_numpy(self._coloured(self.names[index]).copy(order="K")) for index in indices]

    def _shape_of_set(self) -> tuple[int, int, int]:
        """That of the first coloured image, if there is one: only a set of grey images is looked through."""
        channels, height, width = super()._shape_of_set()
        coloured = channels == 3 or not all(map(self._is_grey, self.names))
        return 3 if coloured else 1, height, width

    def _is_grey(self, name: str) -> bool:
        with self._storage.open(name) as file, self._decoding(name):
            return is_grey(file)


def has_suffix(name: str, suffixes: Collection[str]) -> bool:
    """Whether `name` is a file with one of these suffixes; a folder's ends with a slash."""
    return not name.endswith("/") and PurePosixPath(name).suffix.lower() in suffixes


def subset_indices(num_images: int, max_size: int, seed: int) -> list[int]:
    """The images, in ascending order, that are kept of a set cut down to `max_size` (EDM's rule); all if fewer."""
    order = np.arange(num_images)
    np.random.RandomState(seed).shuffle(order)
    return sorted(order[:max_size].tolist())


class Subset(Labelled):
    """A random part of a set, in the order of the set."""

    def __init__(self, whole: TrainingImages, max_size: int, seed: int) -> None:
        self._whole, self._indices = whole, subset_indices(len(whole), max_size, seed)
        self.path, self.image_shape, self.encoded = whole.path, whole.image_shape, whole.encoded

    def __len__(self) -> int:
        return len(self._indices)

    @cached_property
    def labels(self) -> Tensor | None:  # type: ignore[override]
        return None if self._whole.labels is None else self._whole.labels[torch.as_tensor(self._indices)]

    @cached_property
    def texts(self) -> list[str] | None:  # type: ignore[override]
        return None if self._whole.texts is None else [self._whole.texts[i] for i in self._indices]

    @cached_property
    def sampler(self) -> dict[str, Any] | None:  # type: ignore[override]
        return self._whole.sampler

    def examples(self, indices: Sequence[int]) -> Tensor:
        return self._whole.examples([self._indices[i] for i in indices])


class Prompted(Labelled):
    """A set whose labels are the numbers of its images' prompts among others."""

    def __init__(self, whole: TrainingImages, prompts: Sequence[str]) -> None:
        """`whole` has texts.

        Raises:
            RequestError: one of them is not among `prompts`.
        """
        self._whole, self.texts = whole, whole.texts
        self.path, self.image_shape, self.encoded = whole.path, whole.image_shape, whole.encoded
        self.sampler = whole.sampler
        assert self.texts is not None
        numbers = {text: number for number, text in enumerate(prompts)}
        if others := [text for text in self.texts if text not in numbers]:
            raise RequestError(
                f"{self.path}: its prompt {others[0][:60]!r} is none of the {len(prompts):,} that the network is asked "
                "by; name a file with all of them, with --prompts"
            )
        self.labels = torch.tensor([numbers[text] for text in self.texts])

    def __len__(self) -> int:
        return len(self._whole)

    def examples(self, indices: Sequence[int]) -> Tensor:
        return self._whole.examples(indices)


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
