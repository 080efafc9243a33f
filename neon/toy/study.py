"""Neon on the toy models: base, synthetic set, self-training, distance against w, and the alignment of gradients.

The data are Gaussian with covariance [[2, 1], [1, 2]]. All distances are Fréchet distances in closed form, so that the
only randomness left is that of training: of the points, the batches and the synthetic set.

Letters: R bases, K knobs, B budgets, W merge weights, P weights of a model.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Generator, Tensor

from neon.errors import RequestError
from neon.merge import LiveMerge
from neon.metrics import FrechetReference, Statistics
from neon.toy.models import Autoregressive, Diffusion, ToyModel

Array = NDArray[np.float64]
State = dict[str, Tensor]

DATA = Statistics(mu=np.zeros(2), sigma=np.array([[2.0, 1.0], [1.0, 2.0]]), name="data")
DATA_DEVIATION = 3**0.25
"""of an isotropic Gaussian whose covariance has the data's determinant, 3"""
STARTS = {"narrow": 0.5, "wide": 2.0, "converged": 1.0}
"""a base's standard deviation before training, over that of the data; the first two are stopped early"""
LEARNING_RATE, SELF_LEARNING_RATE = 5e-3, 2e-3
ADAM_EPS = 1e-8
GRADIENT_BATCHES = 32
"""of which Adam's second moment is the mean square"""


@dataclass(frozen=True, kw_only=True)
class Toy:
    """A kind of model, how its bases are trained, and its samplers."""

    name: str
    build: Callable[[float], ToyModel]
    num_points: int
    batch_size: int
    steps: dict[str, int]
    """of training a base, by its start"""
    knob: str
    mode_seeking: float
    diversity_seeking: float
    knobs: tuple[float, ...]
    """at which the alignment is computed"""
    budgets: tuple[int, int]
    """steps of self-training"""
    num_synthetic: int = 4000

    @property
    def samplers(self) -> dict[str, float]:
        """The two knobs that synthetic sets are sampled with, by name."""
        return {"mode-seeking": self.mode_seeking, "diversity-seeking": self.diversity_seeking}


DIFFUSION = Toy(
    name="diffusion",
    build=Diffusion,
    num_points=1000,
    batch_size=500,
    steps={"narrow": 330, "wide": 160, "converged": 600},
    knob="score scale",
    mode_seeking=1.1,
    diversity_seeking=0.9,
    knobs=(0.8, 0.85, 0.9, 0.95, 1.0, 1.05, 1.1, 1.15, 1.2),
    budgets=(50, 300),
)
AUTOREGRESSIVE = Toy(
    name="autoregressive",
    build=Autoregressive,
    num_points=100,
    batch_size=100,
    steps={"narrow": 220, "wide": 140, "converged": 600},
    knob="temperature",
    mode_seeking=0.5,
    diversity_seeking=1.6,
    knobs=(0.3, 0.5, 0.7, 0.9, 1.0, 1.1, 1.3, 1.6, 1.9),
    budgets=(50, 200),
)


@dataclass(frozen=True, kw_only=True)
class StudySettings:
    """How much is computed."""

    bases: int
    """each of its own points and seed"""
    w_step: float
    gradient_points: int
    """real and synthetic ones each, of which the alignment is the mean"""

    @property
    def ws(self) -> Array:
        """Merge weights float64 [W] from -1 to 2, with 0 among them."""
        per_unit = round(1 / self.w_step)
        return np.arange(-per_unit, 2 * per_unit + 1) / per_unit


SETTINGS = {
    "fast": StudySettings(bases=2, w_step=0.2, gradient_points=6_000),
    "default": StudySettings(bases=8, w_step=0.05, gradient_points=20_000),
    "large": StudySettings(bases=32, w_step=0.025, gradient_points=50_000),
}


@dataclass(frozen=True, kw_only=True, eq=False)
class Example:
    """The first base and what became of it, for the pictures."""

    points: Tensor
    weights: State
    """of the base"""
    self_trained_weights: dict[str, State]
    """by sampler of the synthetic set, at the largest budget"""
    base: Statistics
    synthetic: dict[str, Statistics]
    """what each sampler draws from the base"""
    self_trained: dict[str, Statistics]
    """at the largest budget, with the plain sampler"""
    neon: dict[str, Statistics]
    """the same, at the w in `best_w`"""
    best_w: dict[str, float]


@dataclass(frozen=True, kw_only=True, eq=False)
class Study:
    """What was measured on bases of one start."""

    toy: Toy
    start: str
    ws: Array
    plain: dict[str, Array]
    """by sampler of the synthetic set: distance of the plain sampler's samples to the data [R, B, W]"""
    same: dict[str, Array]
    """the same, sampled as the synthetic set was"""
    cosines: Array
    """[R, K]"""
    spreads: Array
    """log of the base's standard deviation over the data's [R]: below 0 it is too narrow"""
    example: Example

    @property
    def zero(self) -> int:
        """Where w = 0, the base, stands in `ws`."""
        return int(np.flatnonzero(self.ws == 0)[0])

    def cosine(self, sampler: str) -> Array:
        """The cosine of each base [R] for one of the two samplers."""
        return self.cosines[:, self.toy.knobs.index(self.toy.samplers[sampler])]

    def best_w(self, sampler: str, budget: int = -1, *, same: bool = False) -> float:
        """The w of the lowest distance, averaged over bases."""
        return float(self.ws[self._distances(sampler, budget, same).mean(0).argmin()])

    def best_ws(self, sampler: str, budget: int = -1, *, same: bool = False) -> Array:
        """The w of the lowest distance of each base [R]."""
        return self.ws[self._distances(sampler, budget, same).argmin(1)]

    def _distances(self, sampler: str, budget: int, same: bool) -> Array:
        return (self.same if same else self.plain)[sampler][:, budget]

    def table(self, *, same: bool = False) -> str:
        """Mean distances and cosines as lines of text; of best w and cosine also the range over bases.

        Distances are the plain sampler's; with `same` those of the sampler that the synthetic set came from.
        """
        spread = np.exp(self.spreads)
        lines = [
            f"{self.toy.name}: {len(self.spreads)} bases, each of {self.toy.num_points} points; "
            f"standard deviation {spread.mean():.2f} ({spread.min():.2f} to {spread.max():.2f}) of the data's",
            f"{'sampler of S':<25}{'steps':>6}{'base':>8}{'w = -1':>8}{'lowest':>8}{'best w':>8}{'of each base':>17}"
            f"{'cosine':>9}{'of each base':>17}",
        ]
        for name, knob in self.toy.samplers.items():
            cosine = self.cosine(name)
            for budget, steps in enumerate(self.toy.budgets):
                mean, each = self._distances(name, budget, same).mean(0), self.best_ws(name, budget, same=same)
                lines.append(
                    f"{name + f' ({knob:g})':<25}{steps:>6}{mean[self.zero]:>8.3f}{mean[0]:>8.3f}{mean.min():>8.3f}"
                    f"{self.best_w(name, budget, same=same):>+8.2f}{f'{each.min():+.2f} to {each.max():+.2f}':>17}"
                    f"{cosine.mean():>+9.2f}{f'{cosine.min():+.2f} to {cosine.max():+.2f}':>17}"
                )
        return "\n".join(lines)


def study(toy: Toy, start: str, setting: StudySettings) -> Study:
    """Neon on `setting.bases` bases of `toy`; the same arguments give the same numbers.

    Raises:
        RequestError: `start` is not one of STARTS.
    """
    if start not in STARTS:
        raise RequestError(f"start {start!r}: expected one of {', '.join(STARTS)}")
    measured = [_measure(toy, start, setting, seed) for seed in range(setting.bases)]

    def by_sampler(of: Callable[[_Measured], dict[str, Array]]) -> dict[str, Array]:
        return {name: np.array([of(one)[name] for one in measured]) for name in toy.samplers}

    return Study(
        toy=toy,
        start=start,
        ws=setting.ws,
        plain=by_sampler(lambda one: one.plain),
        same=by_sampler(lambda one: one.same),
        cosines=np.array([one.cosines for one in measured]),
        spreads=np.array([one.spread for one in measured]),
        example=measured[0].example,
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class _Measured:
    """A row of a `Study`."""

    plain: dict[str, Array]
    same: dict[str, Array]
    cosines: list[float]
    spread: float
    example: Example


def _measure(toy: Toy, start: str, setting: StudySettings, seed: int) -> _Measured:
    """Train the base of this seed, self-train it on either sampler's set, and measure all of it."""
    generator = torch.Generator().manual_seed(seed)
    points = real_points(toy.num_points, generator)
    model = toy.build(STARTS[start] * DATA_DEVIATION)
    fit(model, points, toy.steps[start], toy.batch_size, LEARNING_RATE, generator)
    base, own = state_of(model), model.moments()
    cosines = [cosine(model, knob, toy.batch_size, setting.gradient_points, generator) for knob in toy.knobs]
    plain, same, best_w, last = {}, {}, {}, {}
    self_trained: dict[str, Statistics] = {}
    neon: dict[str, Statistics] = {}
    for name, knob in toy.samplers.items():
        states = self_train(toy, model, base, knob, generator)
        plain[name], same[name] = (
            np.array([distances_at(model, base, state, setting.ws, sampled_with) for state in states])
            for sampled_with in (1.0, knob)
        )
        last[name] = states[-1]
        best_w[name] = float(setting.ws[plain[name][-1].argmin()])
        live = LiveMerge(model, base, states[-1])
        for moments, w in ((self_trained, -1.0), (neon, best_w[name])):
            live.set(w)
            moments[name] = model.moments()
        live.set(0.0)
    return _Measured(
        plain=plain,
        same=same,
        cosines=cosines,
        spread=float(np.log(np.linalg.det(own.sigma) / np.linalg.det(DATA.sigma)) / 4),
        example=Example(
            points=points,
            weights=base,
            self_trained_weights=last,
            base=own,
            synthetic={name: model.moments(knob) for name, knob in toy.samplers.items()},
            self_trained=self_trained,
            neon=neon,
            best_w=best_w,
        ),
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class Stop:
    """One w on the line through base and self-trained model, sampled as the synthetic set was."""

    w: float
    points: Tensor
    moments: Statistics
    distance: float
    """of these moments to the data"""


def walk(study: Study, sampler: str, ws: Sequence[float], num_points: int, seed: int = 0) -> list[Stop]:
    """The first base walked along w; point i comes from the same noise at every w."""
    example, knob = study.example, study.toy.samplers[sampler]
    model, reference = study.toy.build(1.0), FrechetReference(DATA)
    live, stops = LiveMerge(model, example.weights, example.self_trained_weights[sampler]), []
    for w in ws:
        live.set(w)
        moments = model.moments(knob)
        points = model.sample(num_points, knob, torch.Generator().manual_seed(seed))
        stops.append(Stop(w=w, points=points, moments=moments, distance=reference.distance(moments)))
    return stops


def real_points(num: int, generator: Generator) -> Tensor:
    """Points of the data, float32 [num, 2]."""
    factor = torch.from_numpy(np.linalg.cholesky(DATA.sigma)).float()
    return torch.randn(num, 2, generator=generator) @ factor.T


def fit(
    model: ToyModel, points: Tensor, steps: int, batch_size: int, learning_rate: float, generator: Generator
) -> None:
    """Adam on random batches of points [N, 2], in place."""
    optimizer = torch.optim.Adam(model.parameters(), lr=learning_rate, eps=ADAM_EPS, fused=True)
    for _ in range(steps):
        batch = points[torch.randint(len(points), (batch_size,), generator=generator)]
        optimizer.zero_grad()
        model.loss(batch, generator).backward()
        optimizer.step()


def self_train(toy: Toy, model: ToyModel, base: State, knob: float, generator: Generator) -> list[State]:
    """Weights after each budget of training on one synthetic set of the base, at a reduced learning rate.

    `model` is left as the base.
    """
    model.load_state_dict(base)
    synthetic = model.sample(toy.num_synthetic, knob, generator)
    states = []
    for steps in toy.budgets:
        model.load_state_dict(base)
        fit(model, synthetic, steps, toy.batch_size, SELF_LEARNING_RATE, generator)
        states.append(state_of(model))
    model.load_state_dict(base)
    return states


def distances_at(model: ToyModel, base: State, self_trained: State, ws: Array, knob: float) -> list[float]:
    """The distance of samples to the data at each w; `model` is left as the base."""
    live, reference, distances = LiveMerge(model, base, self_trained), FrechetReference(DATA), []
    for w in ws:
        live.set(float(w))
        distances.append(reference.distance(model.moments(knob)))
    live.set(0.0)
    return distances


def cosine(model: ToyModel, knob: float, batch_size: int, num_points: int, generator: Generator) -> float:
    """The cosine between the gradients of the real and the synthetic risk at the base, in Adam's metric.

    <r_d, P r_s> / (|r_d| |r_s|), all in P = 1 / (sqrt(v) + eps), v the mean square of gradients on synthetic batches
    (arXiv 2510.03597, section 3). Below 0 the two are anti-aligned: a step that lowers the synthetic risk raises the
    real one, and a step away from it, w > 0, lowers it.
    """
    synthetic = model.sample(num_points, knob, generator)
    real_gradient = gradient(model, real_points(num_points, generator), generator)
    synthetic_gradient = gradient(model, synthetic, generator)
    batches = torch.randint(num_points, (GRADIENT_BATCHES, batch_size), generator=generator)
    v = torch.stack([gradient(model, synthetic[batch], generator) for batch in batches]).square().mean(0)
    p = 1 / (v.sqrt() + ADAM_EPS)
    lengths = [(p * g * g).sum().sqrt() for g in (real_gradient, synthetic_gradient)]
    return float((p * real_gradient * synthetic_gradient).sum() / (lengths[0] * lengths[1]))


def gradient(model: ToyModel, points: Tensor, generator: Generator) -> Tensor:
    """Of the mean loss of points [N, 2]: float64 [P]."""
    parts = torch.autograd.grad(model.loss(points, generator), list(model.parameters()))
    return torch.cat([part.flatten() for part in parts]).double()


def state_of(model: ToyModel) -> State:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}
