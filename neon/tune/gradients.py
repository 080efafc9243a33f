"""Gradient alignment: which sign of w lowers the loss on real images, and how far, before anything is sampled.

At the base theta_r, let g be the gradient of the loss on real images and h that on its own samples. Self-training
steps along -P h (P = 1, or Adam's diagonal), so a small w > 0 changes the loss on real images by w <g, P h>: if that
is negative, w > 0 helps, if it is positive, w < 0 does (arXiv 2510.03597). With theta_s at hand, d = theta_r - theta_s
is the step itself, and the loss along theta_r + w d has slope <g, d> and curvature d'Hd at w = 0.

All of this predicts the *loss*. The w with the best Frechet distance often lies elsewhere, even on the other side
(`benchmarks/align.py`); neon.tune.predict tells more of it.
Networks are in eval mode, so their own dropout is off; what a loss itself draws from the noise, such as which labels
are dropped, is drawn as in training.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from neon.data.images import TrainingImages
from neon.errors import RequestError, WorkError
from neon.merge.states import check_pair, specs_of
from neon.model import GenerativeModel
from neon.noise import SEEDS_PER_PURPOSE, ImageNoise, Purpose, image_seeds
from neon.runtime.distributed import Processes
from neon.runtime.progress import Progress
from neon.selftrain import check_trainable, largest_divisor, visit
from neon.tune.predict import Estimate, Sign, sign_of

NUM_IMAGES, BATCH_SIZE, MICRO_BATCH = 2048, 128, 32
CURVE_IMAGES = 1024
"""real images behind the curvature: it varies little, and a second derivative costs as much as four gradients"""
FIT_STEP = 0.25
"""the loss is fitted at w = -FIT_STEP, 0, FIT_STEP"""
AGREEMENT = 0.1
"""relative difference up to which derivatives and fit say the same; a slope is compared with its range in the fit"""
_FIRST_VISIT = SEEDS_PER_PURPOSE // 2
"""half a range from the noise of trainings: theta_s is fitted to what it saw"""
_CHUNK = 1 << 20  # columns of the gradients in float64 at a time


@dataclass(frozen=True, kw_only=True)
class Alignment:
    """How the gradient on real images lies to that on synthetic ones, in the metric of some preconditioner."""

    inner: Estimate
    """<g, P h>: the rate at which w changes the loss on real images, for a self-training whose steps add up to 1"""
    cosine: Estimate | None
    """between g and h; None: of one of them nothing is seen but noise. An unbiased scale may carry it beyond -1 or 1"""
    real_norm: float | None
    """of g, without that of its noise"""
    synthetic_norm: float | None
    """of h"""
    predicts: Sign


@dataclass(frozen=True, kw_only=True)
class Curve:
    """The loss on real images along theta_r + w (theta_r - theta_s), at w = 0."""

    loss: Estimate
    slope: Estimate
    """by one derivative"""
    curvature: Estimate
    """by two: one Hessian-vector product"""
    fitted_slope: Estimate
    """of the parabola through three losses with the same noise"""
    fitted_curvature: Estimate
    agree: bool
    """whether both ways say the same; they need not if the loss is no parabola there, or if it has a target whose
    gradient training ignores (IMM): the derivatives hold it still, the fit moves it"""
    num_images: int


@dataclass(frozen=True, kw_only=True)
class GradientReport:
    """What `gradient_report` found; plain data, so `asdict` of it is JSON."""

    architecture: str
    real: str
    synthetic: str
    num_real: int
    num_synthetic: int
    batch_size: int
    visits: int
    seed: int
    plain: Alignment
    adam: Alignment
    """in the metric of the steps of a short run of Adam on the synthetic images"""
    slope: Estimate | None
    """of the loss in w, from the gradients of all real images; as all below only with self-trained weights"""
    slope_predicts: Sign | None
    loss_optimal_w: Estimate | None
    """-slope / curvature; None: the loss does not curve upwards"""
    curve: Curve | None


def gradients(
    model: GenerativeModel,
    dataset: TrainingImages,
    *,
    batches: int,
    batch_size: int,
    micro_batch: int,
    seed: int,
    processes: Processes,
    visits: int = 1,
    first_visit: int = 0,
) -> Iterator[Tensor]:
    """Gradients of the mean loss on disjoint batches of random images: float32 [P], in every process, on its device.

    Each batch is computed whole by one process, so they do not depend on the number of processes. Every image is looked
    at `visits` times with fresh noise. Sets that are to be independent must not share noise: it is that of as many
    visits from `first_visit` on.

    Raises:
        RequestError: the images do not fit the model, or are too few.
        WorkError: a gradient is not finite.
    """
    parts = parts_of(model, dataset, batches, batch_size, micro_batch, seed, visits, first_visit)
    weights = {name: p.detach().requires_grad_() for name, p in model.network.named_parameters()}

    def compute(batch: int) -> Tensor:
        total = torch.zeros(sum(p.numel() for p in weights.values()), device=processes.device)
        for indices, seeds in parts[batch]:
            loss = loss_of(model, dataset, indices, seeds, weights, processes.device) / len(parts[batch])
            found = torch.autograd.grad(loss, list(weights.values()), materialize_grads=True)
            total += torch.cat([gradient.flatten() for gradient in found])
        return _finite(total, f"the gradient on batch {batch} of {dataset.path}")

    size = sum(p.numel() for p in weights.values())
    title = f"gradients on {dataset.path.name}"
    return _dealt(compute, batches, size, torch.float32, batch_size, processes, title)


def alignment(real: Sequence[Tensor], synthetic: Sequence[Tensor], *, adam_eps: float | None = None) -> Alignment:
    """The alignment of gradients [P] on n >= 2 real and m >= 2 synthetic batches, all independent.

    The noise of a mean gradient adds to its length, which would pull the cosine of the means towards 0; so lengths
    come from products of different batches only. A mean of the n m products <g_i, h_j> varies with its rows, its
    columns and what is left of each product; counting rows and columns alone would count what is left twice.

    With `adam_eps` both are multiplied by the root of Adam's P = 1 / (sqrt(v) + adam_eps), v the mean square of the
    synthetic gradients, which leaves <g, P h>; P is 0 where v is, as Adam moves nothing there.
    """
    n, m = len(real), len(synthetic)
    products = _products([*real, *synthetic], n, adam_eps)
    among_real, among_synthetic, across = products[:n, :n], products[n:, n:], products[:n, n:]
    rows, columns, inner = across.mean(1), across.mean(0), across.mean()
    left = (across - rows[:, None] - columns + inner).square().sum() / ((n - 1) * (m - 1) * n * m)

    def error(of_real: Tensor, of_synthetic: Tensor, scale: float) -> float:
        """Standard error of a mean to which each batch contributes these values; never less than what is left."""
        own = of_real.var() / n + of_synthetic.var() / m
        return math.sqrt(max(own - left / scale**2, left / scale**2))

    g, h = (_products_with_others(among) for among in (among_real, among_synthetic))
    squares = float(g.mean()), float(h.mean())
    cosine = None
    if min(squares) > 0:
        scale = math.sqrt(squares[0] * squares[1])
        value = float(inner) / scale
        # A batch moves the cosine through the product and through the length that divides it.
        moves = (rows / scale - value * g / squares[0], columns / scale - value * h / squares[1])
        cosine = Estimate(value=value, error=error(*moves, scale))
    found = Estimate(value=float(inner), error=error(rows, columns, 1.0))
    norms = [math.sqrt(square) if square > 0 else None for square in squares]
    return Alignment(inner=found, cosine=cosine, real_norm=norms[0], synthetic_norm=norms[1], predicts=sign_of(found))


def _products(gradients: Sequence[Tensor], num_real: int, adam_eps: float | None) -> Tensor:
    """All inner products of gradients [P], the first `num_real` on real images: float64 [n, n] on the CPU."""
    products = torch.zeros(len(gradients), len(gradients), dtype=torch.float64)
    for pieces in zip(*(gradient.split(_CHUNK) for gradient in gradients), strict=True):
        rows = torch.stack(pieces).to("cpu", torch.float64)
        if adam_eps is not None:
            v = rows[num_real:].square().mean(0)
            rows *= torch.where(v > 0, 1 / (v.sqrt() + adam_eps), 0).sqrt()
        products += rows @ rows.T
    return products


def _products_with_others(products: Tensor) -> Tensor:
    """The mean product of each vector with the other ones [n]; the mean of these has no part of their noise."""
    return (products.sum(1) - products.diagonal()) / (len(products) - 1)


def curve(
    model: GenerativeModel,
    dataset: TrainingImages,
    self_trained: Mapping[str, Tensor],
    *,
    batches: int,
    batch_size: int,
    micro_batch: int,
    seed: int,
    processes: Processes,
    visits: int = 1,
    step: float = FIT_STEP,
) -> Curve:
    """Slope and curvature of the loss on `dataset` along theta_r + w (theta_r - theta_s), by derivatives and by a fit.

    Of the loss terms with a target that has no gradient (IMM) the derivatives are those that training sees. Attention
    is computed by torch's plain kernel: the fused ones have no second derivative.

    Raises:
        RequestError: the weights do not fit or are equal, the images do not fit the model, or are too few.
        WorkError: a loss or a derivative is not finite.
    """
    parts = parts_of(model, dataset, batches, batch_size, micro_batch, seed, visits, 0)
    base = {name: p.detach() for name, p in model.network.named_parameters()}
    step_of = {name: p - self_trained[name].to(p) for name, p in base.items()}
    if not any(bool(direction.any()) for direction in step_of.values()):
        raise RequestError("base and self-trained weights are equal: there is no step to look along")
    device = processes.device

    def compute(batch: int) -> Tensor:
        def loss_at(w: Tensor, indices: list[int], seeds: list[int]) -> Tensor:
            weights = {name: p + w * step_of[name] for name, p in base.items()}
            return loss_of(model, dataset, indices, seeds, weights, device)

        total = torch.zeros(5, dtype=torch.float64, device=device)
        with sdpa_kernel(SDPBackend.MATH):
            for part in parts[batch]:
                w = torch.zeros((), device=device, requires_grad=True)
                loss = loss_at(w, *part)
                (slope,) = torch.autograd.grad(loss, w, create_graph=True)
                (curvature,) = torch.autograd.grad(slope, w)
                with torch.no_grad():
                    below, above = (loss_at(w + offset, *part) for offset in (-step, step))
                values = torch.stack([x.detach().double() for x in (loss, slope, curvature, below, above)])
                total += values / len(parts[batch])
        return _finite(total, f"the loss on batch {batch} of {dataset.path}, or a derivative of it,")

    title = "loss along the step"
    rows = torch.stack(list(_dealt(compute, batches, 5, torch.float64, batch_size, processes, title))).cpu()
    loss, slope, curvature, below, above = rows.T
    fitted_slope, fitted_curvature = (above - below) / (2 * step), (above - 2 * loss + below) / step**2
    mean_slope, mean_curvature = _mean(slope), _mean(curvature)
    agree = _agree(slope, fitted_slope, abs(mean_slope.value) + step * abs(mean_curvature.value))
    return Curve(
        loss=_mean(loss),
        slope=mean_slope,
        curvature=mean_curvature,
        fitted_slope=_mean(fitted_slope),
        fitted_curvature=_mean(fitted_curvature),
        agree=agree and _agree(curvature, fitted_curvature, abs(mean_curvature.value)),
        num_images=batches * batch_size,
    )


def lowest(slope: Estimate, curvature: Estimate) -> Estimate | None:
    """The w at which a parabola of this slope and curvature at w = 0 is lowest; None if it does not curve upwards.

    Its standard error takes both as independent; that of the slope is by far the larger part unless |w| is large.
    """
    if curvature.value <= 0:
        return None
    w = -slope.value / curvature.value
    return Estimate(value=w, error=math.hypot(slope.error, w * curvature.error) / curvature.value)


def gradient_report(
    model: GenerativeModel,
    real: TrainingImages,
    synthetic: TrainingImages,
    self_trained: Mapping[str, Tensor] | None = None,
    *,
    num_images: int = NUM_IMAGES,
    batch_size: int = BATCH_SIZE,
    micro_batch: int | None = None,
    visits: int = 1,
    seed: int = 0,
    processes: Processes,
) -> GradientReport:
    """The gradient alignment of `model`, and with self-trained weights the loss along the step; in every process.

    The main process keeps a gradient for each batch: (2 `num_images` / `batch_size`) times the network in float32.

    Args:
        real: images that the base was not trained on.
        synthetic: samples of the base.
        self_trained: theta_s, a state dict of `model.network`.
        num_images: of each set, as far as there are as many.
        micro_batch: images per forward pass; chosen if not given. It moves results by rounding.
        visits: how often each image is looked at, with fresh noise: more tell more of few images.

    Raises:
        RequestError: images or weights do not fit the model, or a set is too small for two batches.
        WorkError: a loss or a gradient is not finite.
    """
    multiple = model.batch_multiple
    fitting = multiple * largest_divisor(max(batch_size // multiple, 1), max(MICRO_BATCH // multiple, 1))
    micro_batch = micro_batch or fitting
    counts = []
    for dataset in (real, synthetic):
        check_trainable(model, dataset, batch_size, micro_batch)
        counts.append(min(num_images, len(dataset)) // batch_size)
        if counts[-1] < 2:
            raise RequestError(
                f"{dataset.path}: {min(num_images, len(dataset))} images do not make two batches of {batch_size}, "
                "without which noise cannot be told; give more images or a smaller batch"
            )
    if self_trained is not None:
        check_pair(specs_of(model.network.state_dict()), specs_of(self_trained))
    settings = {"batch_size": batch_size, "micro_batch": micro_batch, "seed": seed, "visits": visits}

    def kept(dataset: TrainingImages, batches: int, first_visit: int) -> list[Tensor]:
        found = gradients(model, dataset, batches=batches, first_visit=first_visit, processes=processes, **settings)
        return [gradient.cpu() if processes.is_main else gradient[:0] for gradient in found]

    slope, along = None, None
    if self_trained is not None:
        batches = min(counts[0], max(CURVE_IMAGES // batch_size, 2))
        along = curve(model, real, self_trained, batches=batches, processes=processes, **settings)
    on_real = kept(real, counts[0], 0)
    on_synthetic = kept(synthetic, counts[1], visits * counts[0] * batch_size)
    if self_trained is not None:
        slope = processes.on_main(lambda: _slope(model.network, self_trained, on_real))
    return GradientReport(
        architecture=model.architecture,
        real=str(real.path),
        synthetic=str(synthetic.path),
        num_real=counts[0] * batch_size,
        num_synthetic=counts[1] * batch_size,
        batch_size=batch_size,
        visits=visits,
        seed=seed,
        plain=processes.on_main(lambda: alignment(on_real, on_synthetic)),
        adam=processes.on_main(lambda: alignment(on_real, on_synthetic, adam_eps=model.recipe.eps)),
        slope=slope,
        slope_predicts=None if slope is None else sign_of(slope),
        loss_optimal_w=None if slope is None or along is None else lowest(slope, along.curvature),
        curve=along,
    )


def _slope(network: nn.Module, self_trained: Mapping[str, Tensor], gradients: Sequence[Tensor]) -> Estimate:
    """The slope of the loss along theta_r + w (theta_r - theta_s) at w = 0."""
    steps = (p.detach() - self_trained[name].to(p) for name, p in network.named_parameters())
    step = torch.cat([step.flatten() for step in steps]).to("cpu", torch.float64)
    return _mean(torch.stack([gradient.double() @ step for gradient in gradients]))


def text_table(report: GradientReport) -> str:
    """The report as lines for a terminal."""
    lines = [
        f"{report.architecture}: {report.num_real} real images, {report.num_synthetic} synthetic ones, batches of "
        f"{report.batch_size}",
        f"{'gradients':<12}{'cosine':>22}{'inner product':>26}  predicts",
    ]
    for name, found in (("plain", report.plain), ("Adam", report.adam)):
        cosine = "hidden in noise" if found.cosine is None else str(found.cosine)
        lines.append(f"{name:<12}{cosine:>22}{found.inner!s:>26}  {found.predicts}")
    if (along := report.curve) is not None:
        lines += [
            f"{'loss in w':<12}{'slope':>22}{'curvature':>26}  predicts",
            f"{'all images':<12}{report.slope!s:>22}{'':>26}  {report.slope_predicts}",
            f"{along.num_images:<5} images{along.slope!s:>22}{along.curvature!s:>26}",
            f"{'their fit':<12}{along.fitted_slope!s:>22}{along.fitted_curvature!s:>26}"
            f"  {'agrees' if along.agree else 'does not agree'}",
            "lowest loss at w = "
            + ("nowhere: it does not curve upwards" if report.loss_optimal_w is None else str(report.loss_optimal_w))
            + ", which need not be where samples are best",
        ]
    return "\n".join(lines)


def parts_of(
    model: GenerativeModel,
    dataset: TrainingImages,
    batches: int,
    batch_size: int,
    micro_batch: int,
    seed: int,
    visits: int,
    first_visit: int,
) -> list[list[tuple[list[int], list[int]]]]:
    """For each batch its micro-batches: which images, and the seeds of their noise. Puts the network in eval mode."""
    check_trainable(model, dataset, batch_size, micro_batch)
    total = batches * batch_size
    if total > len(dataset):
        raise RequestError(f"{dataset.path}: {len(dataset)} images; {batches} batches of {batch_size} need {total}")
    model.network.eval()
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed)).tolist()
    seeds = image_seeds(Purpose.TRAINING, seed, visits * total, start=_FIRST_VISIT + first_visit)
    return [
        [
            (order[first : first + micro_batch], seeds[start + first : start + first + micro_batch])
            for start in range(0, visits * total, total)
            for first in range(batch * batch_size, (batch + 1) * batch_size, micro_batch)
        ]
        for batch in range(batches)
    ]


class _MeanLoss(nn.Module):
    """The mean loss of a model as a module, into which `functional_call` can put other weights."""

    def __init__(self, model: GenerativeModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, examples: Tensor, labels: Tensor | None, noise: ImageNoise) -> Tensor:
        return self.model.training_loss(examples, labels, noise).mean()


def loss_of(
    model: GenerativeModel,
    dataset: TrainingImages,
    indices: list[int],
    seeds: list[int],
    weights: Mapping[str, Tensor],
    device: torch.device,
) -> Tensor:
    """The mean loss of some images, with `weights` in the place of the network's parameters."""
    placed = {f"model.network.{name}": values for name, values in weights.items()}
    return functional_call(_MeanLoss(model), placed, visit(model, dataset, indices, seeds, device))


def _finite(values: Tensor, what: str) -> Tensor:
    if not values.isfinite().all():
        raise WorkError(f"{what} is not finite; look at the weights and at these images")
    return values


def _dealt(
    compute: Callable[[int], Tensor],
    batches: int,
    size: int,
    dtype: torch.dtype,
    batch_size: int,
    processes: Processes,
    title: str,
) -> Iterator[Tensor]:
    """`compute(batch)`, `dtype` [`size`], for every batch in order, in every process; they take batches in turn."""
    world = processes.world_size
    with Progress(title, batches * batch_size, "img", processes) as progress:
        for first in range(0, batches, world):
            mine, failure = torch.zeros(size, dtype=dtype, device=processes.device), None
            try:
                if first + processes.rank < batches:
                    mine = compute(first + processes.rank)
            except (RequestError, WorkError) as error:
                failure = error
            processes.raise_first(failure)
            here = processes.gather(mine)[: batches - first]
            yield from here
            progress.advance(len(here) * batch_size)


def _mean(values: Tensor) -> Estimate:
    """The mean of one value [n] for each batch."""
    return Estimate(value=float(values.mean()), error=float(values.std()) / math.sqrt(len(values)))


def _agree(derivative: Tensor, fitted: Tensor, scale: float) -> bool:
    """Whether both, one value for each batch, are the same but for noise, or for a tenth of `scale`."""
    difference = _mean(fitted - derivative)
    return abs(difference.value) <= max(2 * difference.error, AGREEMENT * scale)
