"""The search for a sampler's settings, on features whose moments are known functions of the settings."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest

from neon.errors import RequestError, WorkError
from neon.metrics import FrechetReference, Statistics
from neon.tunable import Choice, Range, Tunables
from neon.tune.sampler import SamplerSearch, search_sampler
from neon.tune.search import EvaluationFailed

FEATURES = 12
REAL = FrechetReference(Statistics(mu=np.zeros(FEATURES), sigma=np.eye(FEATURES)))


@dataclass(frozen=True, kw_only=True)
class Numbers:
    """Five numbers, each searched in another range."""

    a: float = 0.5
    b: float = 1.0
    c: int = 100
    d: float = 0.0
    e: float = 0.0


RANGES: Tunables = {
    "a": Range(0.0, 1.0),
    "b": Range(0.01, 100.0, "log"),
    "c": Range(10, 1000, "log", integer=True),
    "d": Range(-2.0, 2.0),
    "e": Range(0.0, 6.0),
}


def parts(settings: Numbers) -> Any:
    """The numbers in parts of their ranges."""
    return np.array(
        [
            settings.a,
            np.log(settings.b / 0.01) / np.log(1e4),
            np.log(settings.c / 10) / np.log(100),
            (settings.d + 2) / 4,
            settings.e / 6,
        ]
    )


class Problem:
    """Gaussian features that bend with the settings, nearest to the real ones at settings drawn by `seed`."""

    def __init__(self, seed: int, dims: int) -> None:
        random = np.random.default_rng(seed)
        self.dims = dims
        self.tunable = dict(list(RANGES.items())[:dims])
        self.best = random.uniform(0.15, 0.85, dims)
        self.slope = random.normal(size=(FEATURES, dims)) * np.exp(random.normal(0, 0.5, dims))
        self.bend = 0.7 * random.normal(size=(FEATURES, dims, dims))
        self.widening = 0.5 * random.normal(size=(FEATURES, dims))
        across = np.linalg.qr(np.hstack([self.slope, np.ones((FEATURES, 1))]))[0][:, -1]
        self.bias = 0.6 * across  # of the best sampler, which no setting takes away
        start = np.clip(self.best + random.choice([-1, 1], dims) * random.uniform(0.1, 0.6, dims), 0, 1)
        low = [0.0, 0.01, 10, -2.0, 0.0]
        wide = [1.0, 1e4, 100, 4.0, 6.0]
        values = [
            low[i] * wide[i] ** start[i] if i in (1, 2) else low[i] + wide[i] * start[i] for i in range(dims)
        ]  # b and c are searched by their logarithm
        self.given = replace(Numbers(), **dict(zip(RANGES, values, strict=False)))
        self.lowest = self.distance_at(np.zeros(dims))

    def statistics_at(self, away: Any) -> Statistics:
        bent = np.einsum("kij,i,j->k", self.bend, away, away)
        return Statistics(
            mu=self.bias + self.slope @ away + bent, sigma=np.diag(np.exp(self.widening @ away) ** 2), count=1000
        )

    def distance_at(self, away: Any) -> float:
        return REAL.distance(self.statistics_at(away))

    def __call__(self, settings: Numbers) -> Statistics:
        return self.statistics_at(parts(settings)[: self.dims] - self.best)

    def value(self, settings: Numbers) -> float:
        return REAL.distance(self(settings))

    def left(self, found: SamplerSearch) -> float:
        """The part of what could be gained that was not."""
        assert found.best.value is not None and found.given.value is not None
        return (found.best.value - self.lowest) / (found.given.value - self.lowest)


def uncounted(settings: Any) -> None:
    return None


def find(problem: Problem, **kwargs: Any) -> SamplerSearch:
    return search_sampler(problem, problem.given, problem.tunable, uncounted, reference=REAL, **kwargs)


@pytest.mark.parametrize(("dims", "worst", "usual"), [(3, 0.03, 0.01), (5, 0.06, 0.02)])
def test_moments_lead_to_the_best_settings_within_twelve_scores(dims: int, worst: float, usual: float) -> None:
    problems = [Problem(seed, dims) for seed in range(8)]
    searches = [find(problem) for problem in problems]
    left = [problem.left(found) for problem, found in zip(problems, searches, strict=True)]
    assert max(left) < worst and np.median(left) < usual
    for problem, found in zip(problems, searches, strict=True):
        assert len(found.evaluations) <= 12
        assert found.evaluations[0] == found.given and found.given.settings == problem.given
        assert found.best in found.evaluations
        settings = [point.settings for point in found.evaluations]
        assert len(set(settings)) == len(settings), "nothing is evaluated twice"
        assert all(isinstance(one.c, int) for one in settings[1:] if one.c != problem.given.c)
        for one in settings[1:]:
            assert 0 <= one.a <= 1 and 0.01 <= one.b <= 100 and 10 <= one.c <= 1000


def test_values_alone_lead_to_better_settings_too() -> None:
    problems = [Problem(seed, 3) for seed in range(8)]
    left = []
    for problem in problems:
        found = search_sampler(problem.value, problem.given, problem.tunable, uncounted, reference=None)
        assert all(point.statistics is None for point in found.evaluations)
        left.append(problem.left(found))
    assert max(left) < 0.3 and np.median(left) < 0.03


def test_values_may_be_negative() -> None:
    found = search_sampler(
        lambda one: -8 + 10 * (one.a - 0.9) ** 2, Numbers(), {"a": RANGES["a"]}, uncounted, reference=None
    )
    assert found.best.value is not None and found.best.value < -7.9


def test_the_same_values_give_the_same_search() -> None:
    first = find(Problem(1, 4))
    np.random.seed(5)  # the global generator must not matter
    again = find(Problem(1, 4))
    assert first.evaluations == again.evaluations and first.best == again.best and first.reason == again.reason


@pytest.mark.parametrize("limit", [1, 2, 6])
def test_the_limit_holds(limit: int) -> None:
    found = find(Problem(2, 5), limit=limit)
    assert len(found.evaluations) == limit and f"limit of {limit}" in found.reason
    if limit == 1:
        assert found.best == found.given


def test_nothing_to_search_leaves_the_given_settings() -> None:
    problem = Problem(2, 3)
    found = search_sampler(problem, problem.given, {}, uncounted, reference=REAL)
    assert found.evaluations == (found.given,) and found.best == found.given
    assert "no settings" in found.reason


def test_a_limit_without_room_for_the_given_settings_is_refused() -> None:
    with pytest.raises(RequestError, match="limit = 0"):
        find(Problem(2, 3), limit=0)


@pytest.mark.parametrize("by_moments", [True, False])
def test_the_best_sampler_is_left_as_it_is_after_few_scores(by_moments: bool) -> None:
    problem = Problem(3, 3)
    a, b, c = problem.best
    given = Numbers(a=a, b=0.01 * 1e4**b, c=10 * 100**c)  # between the integers
    evaluate: Callable[[Any], Any] = problem if by_moments else problem.value
    found = search_sampler(evaluate, given, problem.tunable, uncounted, reference=REAL if by_moments else None)
    assert found.best == found.given
    assert len(found.evaluations) <= (6 if by_moments else 12)


def test_a_larger_tolerance_takes_fewer_scores() -> None:
    problems = [Problem(seed, 4) for seed in range(4)]
    fine, coarse = (
        sum(len(find(problem, tolerance=tolerance, limit=20).evaluations) for problem in problems)
        for tolerance in (0.001, 0.3)
    )
    assert coarse < fine


def test_failures_are_recorded_and_kept_away_from() -> None:
    problem = Problem(4, 3)
    low, high = sorted([problem.given.a, float(problem.best[0])])

    def evaluate(settings: Numbers) -> Statistics:
        if not low - 0.1 < settings.a < high + 0.1:
            raise EvaluationFailed("features are not finite")
        return problem(settings)

    found = search_sampler(evaluate, problem.given, problem.tunable, uncounted, reference=REAL)
    failed = [point for point in found.evaluations if point.value is None]
    assert all(point.note == "features are not finite" for point in failed)
    assert 1 <= len(failed) <= 3
    assert problem.left(found) < 0.1


def test_values_that_are_not_finite_are_failures() -> None:
    found = search_sampler(
        lambda one: float("nan") if one.a > 0.6 else 1 + (one.a - 0.1) ** 2,
        Numbers(a=0.4),
        {"a": RANGES["a"]},
        uncounted,
        reference=None,
    )
    assert "the value is nan" in [point.note for point in found.evaluations]
    assert found.best.settings.a < 0.4


def test_given_settings_without_a_value_end_the_search() -> None:
    def evaluate(settings: Numbers) -> float:
        raise EvaluationFailed("images are all black")

    with pytest.raises(WorkError, match="images are all black"):
        search_sampler(evaluate, Numbers(), RANGES, uncounted, reference=None)


@dataclass(frozen=True, kw_only=True)
class Stepping:
    """A sampler in steps, as EDM's is."""

    num_steps: int = 5
    solver: str = "euler"
    guidance: float = 0.0
    level: float = 0.0

    def __post_init__(self) -> None:
        if self.num_steps < 2 or self.level > 0.9:
            raise ValueError("no such sampler")


STEPPING: Tunables = {
    "solver": Choice(("euler", "heun")),
    "guidance": Range(0.0, 3.0),
    "level": Range(0.0, 1.0),
}


def calls_of(settings: Stepping) -> int:
    each = settings.num_steps if settings.solver == "euler" else 2 * settings.num_steps - 1
    return each * (2 if settings.guidance else 1)


def stepped(settings: Stepping) -> Statistics:
    """Errors of order 1 or 2 in the steps, and one that the level takes away."""
    mu = np.zeros(FEATURES)
    mu[0] = 16 / settings.num_steps if settings.solver == "euler" else 40 / settings.num_steps**2
    mu[1] = 0.3 * (1 - settings.guidance)
    mu[2] = 4 * (settings.level - 0.7)
    return Statistics(mu=mu, sigma=np.eye(FEATURES))


@pytest.mark.parametrize(
    ("given", "best"),
    [
        (Stepping(num_steps=5), Stepping(num_steps=5)),  # Heun's 3 steps and guidance's 2 are too few
        (Stepping(num_steps=25), Stepping(num_steps=13, solver="heun")),
        (Stepping(num_steps=4, guidance=2.0), Stepping(num_steps=8)),
    ],
)
def test_samplers_are_compared_at_an_equal_number_of_calls(given: Stepping, best: Stepping) -> None:
    found = search_sampler(stepped, given, STEPPING, calls_of, reference=REAL, limit=16)
    budget = calls_of(given)
    for settings in (point.settings for point in found.evaluations):
        assert calls_of(settings) <= budget < calls_of(replace(settings, num_steps=settings.num_steps + 1))
    assert (found.best.settings.num_steps, found.best.settings.solver) == (best.num_steps, best.solver)
    assert abs(found.best.settings.level - 0.7) < 0.08
    assert (found.best.settings.guidance > 0) == (best.guidance > 0)


def test_fewer_steps_are_tried_last() -> None:
    found = search_sampler(stepped, Stepping(), STEPPING, calls_of, reference=REAL, limit=12)
    steps = [point.settings.num_steps for point in found.evaluations]
    assert steps[:3] == [5, 5, 5] and min(steps) < 5


def test_steps_stay_as_they_are_where_calls_are_not_counted() -> None:
    found = search_sampler(stepped, Stepping(), STEPPING, uncounted, reference=REAL)
    assert {point.settings.num_steps for point in found.evaluations} == {5}


@dataclass(frozen=True)
class Drawing:
    """A sampler of tokens, which a limit of 0 leaves all."""

    top_k: int = 0
    mode: str = "a"


def test_a_number_that_means_no_limit_counts_as_the_highest() -> None:
    tunable: Tunables = {"top_k": Range(10, 1000, "log", integer=True, unlimited=0), "mode": Choice(("a", "b", "c"))}
    visited: list[Drawing] = []

    def evaluate(settings: Drawing) -> float:
        visited.append(settings)
        k = settings.top_k or 1000
        return 5 + 3 * (settings.mode != "c") + abs(np.log(k / 300))

    found = search_sampler(evaluate, Drawing(), tunable, uncounted, reference=None)
    assert visited[0] == Drawing() and 100 < visited[1].top_k < 500
    assert found.best.settings.mode == "c" and 150 < found.best.settings.top_k < 600


def test_a_best_value_at_the_end_of_its_range_is_told() -> None:
    found = search_sampler(lambda one: 1 + (one.a - 1.5) ** 2, Numbers(), {"a": RANGES["a"]}, uncounted, reference=None)
    assert "the best a is an end of its range, 1:" in found.reason
