"""What training consumes: examples and labels of a set that fit a model, encoded where that is done once."""

import os

from torch import Tensor

from neon import __version__
from neon.data.encoded import ExampleSet, encode_set
from neon.data.images import Prompted, TrainingImages
from neon.data.prompts import TEXT_FORM, TEXTS_FILE
from neon.errors import RequestError, WorkError
from neon.model import GenerativeModel
from neon.noise import ImageNoise
from neon.runtime.distributed import Processes
from neon.sampling import check_classes
from neon.selftrain.visits import prepares


def asked(model: GenerativeModel, dataset: TrainingImages) -> TrainingImages:
    """The set with labels that are numbers of prompts of `model`, if it is asked by prompts and the set has them.

    A model that has none yet gets those of the set.

    Raises:
        RequestError: the set has others.
    """
    if model.prompts is None or (texts := dataset.texts) is None:
        return dataset
    if not model.prompts:
        model.use_prompts(tuple(dict.fromkeys(texts)))
    return Prompted(dataset, model.prompts)


def check_trainable(model: GenerativeModel, dataset: TrainingImages, batch_size: int, micro_batch: int) -> None:
    """Raise a RequestError unless the images fit the model and the sizes each other."""
    if tuple(dataset.image_shape) != tuple(model.image_shape):
        raise RequestError(
            f"{dataset.path}: images are {dataset.image_shape} (C, H, W); the model makes {model.image_shape}"
        )
    if model.prompts is not None and (not model.prompts or dataset.labels is None):
        raise RequestError(
            f"{dataset.path}: no {TEXTS_FILE}, but the model is asked by prompts; expected a line "
            f"{TEXT_FORM} for each image"
        )
    if model.num_classes and dataset.labels is None:
        raise RequestError(
            f"{dataset.path}: no labels, but the model knows {model.num_classes} classes; "
            "expected a dataset.json or one folder per class"
        )
    if model.num_classes and dataset.labels is not None:
        check_classes(dataset.labels, model.num_classes, f"{dataset.path}: labels")
    if batch_size < 1 or micro_batch < 1 or batch_size % micro_batch or micro_batch % model.batch_multiple:
        raise RequestError(
            f"a batch of {batch_size} images in micro-batches of {micro_batch}: expected the micro-batch to "
            f"divide the batch and to be a multiple of {model.batch_multiple}"
        )


def encoded_once(
    model: GenerativeModel,
    dataset: TrainingImages,
    folder: str | os.PathLike[str],
    processes: Processes,
    batch_size: int = 64,
) -> TrainingImages:
    """The set of what `model` encodes the images of `dataset` as, made in `folder` or found there.

    `dataset` itself where it is encoded, or the model encodes images at every visit. `folder` is that of a run which is
    held for the model; `batch_size` images are encoded at a time.

    Raises:
        RequestError: the images do not fit the model, or `folder` holds something else.
        WorkError: examples are not finite, or the disk is full.
    """
    dataset = asked(model, dataset)
    if dataset.encoded or not model.example_kind:
        return dataset

    def encode(images: Tensor) -> Tensor:
        if prepares(model):
            images = model.prepare(images.cpu(), ImageNoise([0] * len(images))).to(images.device)
        with model.precision.allowed_on(processes.device):
            examples = model.encode(images, ImageNoise([0] * len(images), images.device)).cpu()
        if not examples.isfinite().all():
            raise WorkError(
                f"{dataset.path}: {model.example_kind} are not finite in {model.precision.name}; compute in another "
                "precision (--precision bf16 or fp32)"
            )
        return examples

    encode_set(
        encode,
        dataset,
        folder,
        kind=model.example_kind,
        image_shape=model.image_shape,
        batch_size=batch_size,
        processes=processes,
        identity={"neon": __version__, **model.precision.recorded},
        fresh=False,
    )
    return ExampleSet(folder, model.example_kind)
