"""Gradient alignment: the cosine between the gradients of the loss on real images and on the base's own samples.

At the base theta_r, let g be the gradient on real images and h that on samples. Self-training steps along -h, so a
small w > 0 changes the loss on real images by w <g, h>: anti-aligned gradients (a cosine below 0) are what the theory
of the method asks for (arXiv 2510.03597, section 3). It is about the *loss*: of the w with the best Frechet distance it
gets the sign wrong in five of seven cases (`benchmarks/align.py`); neon.tune.predict tells that.
Networks are in eval mode, so their own dropout is off; what a loss itself draws from the noise, such as which labels
are dropped, is drawn as in training.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call

from neon.data.images import TrainingImages
from neon.errors import RequestError, WorkError
from neon.model import GenerativeModel
from neon.noise import SEEDS_PER_PURPOSE, ImageNoise, Purpose, image_seeds
from neon.runtime.blocks import rows_in_order
from neon.runtime.distributed import Processes
from neon.selftrain import asked, check_trainable, largest_divisor, visit
from neon.tune.predict import Estimate

NUM_IMAGES, BATCH_SIZE, MICRO_BATCH = 2048, 128, 32
_FIRST_NOISE = SEEDS_PER_PURPOSE // 2
"""half a range from the noise of trainings: theta_s is fitted to what it saw"""
_CHUNK = 1 << 20  # columns of the gradients in float64 at a time


@dataclass(frozen=True, kw_only=True)
class Alignment:
    """How the gradient on real images lies to that on synthetic ones."""

    inner: Estimate
    """<g, h>: the rate at which w changes the loss on real images, for a self-training whose steps add up to 1"""
    cosine: Estimate | None
    """between g and h; None: of one of them nothing is seen but noise. An unbiased scale may carry it beyond -1 or 1"""
    real_norm: float | None
    """of g, without that of its noise"""
    synthetic_norm: float | None
    """of h"""


@dataclass(frozen=True, kw_only=True)
class GradientReport:
    """An alignment and what it was computed from; plain data, so `asdict` of it is JSON."""

    architecture: str
    real: str
    synthetic: str
    num_real: int
    num_synthetic: int
    batch_size: int
    seed: int
    alignment: Alignment

    def __str__(self) -> str:
        cosine = "hidden in noise" if self.alignment.cosine is None else str(self.alignment.cosine)
        return (
            f"cosine between the gradients of the loss on {self.num_real} real and {self.num_synthetic} synthetic "
            f"images: {cosine}"
        )


def gradients(
    model: GenerativeModel,
    dataset: TrainingImages,
    *,
    batches: int,
    batch_size: int,
    micro_batch: int,
    seed: int,
    processes: Processes,
    first_noise: int = 0,
) -> Iterator[Tensor]:
    """Gradients of the mean loss on disjoint batches of random images: float32 [P], in every process, on its device.

    Processes take batches in turn, each whole, so that gradients do not depend on their number. Sets that are to be
    independent must not share noise: image by image it is that of the seeds from `first_noise` on.

    Raises:
        RequestError: the images do not fit the model, or are too few.
        WorkError: a gradient is not finite.
    """
    dataset = asked(model, dataset)
    check_trainable(model, dataset, batch_size, micro_batch)
    total = batches * batch_size
    if total > len(dataset):
        raise RequestError(f"{dataset.path}: {len(dataset)} images; {batches} batches of {batch_size} need {total}")
    model.network.eval()
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed)).tolist()
    seeds = image_seeds(Purpose.TRAINING, seed, total, start=_FIRST_NOISE + first_noise)
    weights = {name: p.detach().requires_grad_() for name, p in model.network.named_parameters()}
    placed = {f"model.network.{name}": values for name, values in weights.items()}
    mean_loss, device = _MeanLoss(model), processes.device

    size = sum(p.numel() for p in weights.values())

    def gradient(batch: range) -> Tensor:
        mean = torch.zeros(size, device=device)
        for first in range(batch.start, batch.stop, micro_batch):
            part = slice(first, first + micro_batch)
            loss = functional_call(mean_loss, placed, visit(model, dataset, order[part], seeds[part], device))
            loss = loss / (batch_size // micro_batch)
            parts = torch.autograd.grad(loss, list(weights.values()), materialize_grads=True)
            mean += torch.cat([part.flatten() for part in parts])
        if not mean.isfinite().all():
            raise WorkError(
                f"the gradient on batch {batch.start // batch_size} of {dataset.path} is not finite; "
                "look at the weights and at these images"
            )
        return mean[None]

    title = f"gradients on {dataset.path.name}"
    rows = rows_in_order(gradient, total, size, batch_size=batch_size, processes=processes, title=title, one_row=True)
    return (row[0] for row in rows)


def alignment(real: Sequence[Tensor], synthetic: Sequence[Tensor]) -> Alignment:
    """The alignment of gradients [P] on n >= 2 real and m >= 2 synthetic batches, all independent.

    The noise of a mean gradient adds to its length, which would pull the cosine of the means towards 0; so lengths
    come from products of different batches only. A mean of the n m products <g_i, h_j> varies with its rows, its
    columns and the residual of each product; counting rows and columns alone would count the residual twice.
    """
    n, m = len(real), len(synthetic)
    products = _products([*real, *synthetic])
    among_real, among_synthetic, across = products[:n, :n], products[n:, n:], products[:n, n:]
    rows, columns, inner = across.mean(1), across.mean(0), across.mean()
    residual = (across - rows[:, None] - columns + inner).square().sum() / ((n - 1) * (m - 1) * n * m)

    def error(of_real: Tensor, of_synthetic: Tensor, scale: float) -> float:
        """Standard error of a mean to which each batch contributes these values; never less than the residual's."""
        own = of_real.var() / n + of_synthetic.var() / m
        return math.sqrt(max(own - residual / scale**2, residual / scale**2))

    g, h = (_products_with_others(among) for among in (among_real, among_synthetic))
    squares = float(g.mean()), float(h.mean())
    cosine = None
    if min(squares) > 0:
        scale = math.sqrt(squares[0] * squares[1])
        value = float(inner) / scale
        # A batch moves the cosine through the product and through the length that divides it.
        moves = (rows / scale - value * g / squares[0], columns / scale - value * h / squares[1])
        cosine = Estimate(value=value, error=error(*moves, scale))
    norms = [math.sqrt(square) if square > 0 else None for square in squares]
    return Alignment(
        inner=Estimate(value=float(inner), error=error(rows, columns, 1.0)),
        cosine=cosine,
        real_norm=norms[0],
        synthetic_norm=norms[1],
    )


def _products(gradients: Sequence[Tensor]) -> Tensor:
    """All inner products of gradients [P]: float64 [n, n] on the CPU."""
    products = torch.zeros(len(gradients), len(gradients), dtype=torch.float64)
    for pieces in zip(*(gradient.split(_CHUNK) for gradient in gradients), strict=True):
        rows = torch.stack(pieces).to("cpu", torch.float64)
        products += rows @ rows.T
    return products


def _products_with_others(products: Tensor) -> Tensor:
    """The mean product of each vector with the other ones [n]; the mean of these has no part of their noise."""
    return (products.sum(1) - products.diagonal()) / (len(products) - 1)


def gradient_alignment(
    model: GenerativeModel,
    real: TrainingImages,
    synthetic: TrainingImages,
    *,
    num_images: int = NUM_IMAGES,
    batch_size: int = BATCH_SIZE,
    micro_batch: int | None = None,
    seed: int = 0,
    processes: Processes,
) -> GradientReport:
    """The gradient alignment of `model`, in every process.

    The main process keeps a gradient for each batch: (2 `num_images` / `batch_size`) times the network in float32.

    Args:
        real: images that the base was not trained on.
        synthetic: samples of the base.
        num_images: of each set, as far as there are as many.
        micro_batch: images per forward pass; chosen if not given. It moves results by rounding.

    Raises:
        RequestError: images do not fit the model, or a set is too small for two batches.
        WorkError: a gradient is not finite.
    """
    multiple = model.batch_multiple
    fitting = multiple * largest_divisor(max(batch_size // multiple, 1), max(MICRO_BATCH // multiple, 1))
    micro_batch = fitting if micro_batch is None else micro_batch
    counts = []
    for dataset in (real, synthetic):
        check_trainable(model, asked(model, dataset), batch_size, micro_batch)
        counts.append(min(num_images, len(dataset)) // batch_size)
        if counts[-1] < 2:
            raise RequestError(
                f"{dataset.path}: {min(num_images, len(dataset))} images do not make two batches of {batch_size}, "
                "without which noise cannot be told; give more images or a smaller batch"
            )

    def kept(dataset: TrainingImages, batches: int, first_noise: int) -> list[Tensor]:
        every = gradients(
            model,
            dataset,
            batches=batches,
            batch_size=batch_size,
            micro_batch=micro_batch,
            seed=seed,
            processes=processes,
            first_noise=first_noise,
        )
        return [gradient.cpu() if processes.is_main else gradient[:0] for gradient in every]

    on_real = kept(real, counts[0], 0)
    on_synthetic = kept(synthetic, counts[1], counts[0] * batch_size)
    return GradientReport(
        architecture=model.architecture,
        real=str(real.path),
        synthetic=str(synthetic.path),
        num_real=counts[0] * batch_size,
        num_synthetic=counts[1] * batch_size,
        batch_size=batch_size,
        seed=seed,
        alignment=processes.on_main(lambda: alignment(on_real, on_synthetic)),
    )


class _MeanLoss(nn.Module):
    """The mean loss of a model as a module, into which `functional_call` can put other weights."""

    def __init__(self, model: GenerativeModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, examples: Tensor, labels: Tensor | None, noise: ImageNoise) -> Tensor:
        return self.model.training_loss(examples, labels, noise).mean()
