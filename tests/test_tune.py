"""The search for w, guidance and budget, on functions whose minimum is known."""

import math
from collections.abc import Callable, Sequence
from itertools import product

import numpy as np
import pytest
from scipy.interpolate import Akima1DInterpolator

from neon.errors import RequestError, WorkError
from neon.metrics import FrechetReference, Statistics
from neon.tune.search import Evaluation, EvaluationFailed, Point, Search, grid, search

Value = Callable[[Point], float]

# w -> Fréchet distance on selection seeds: small EDMs of Fashion-MNIST with 5, 5 and 4 Euler steps, a small VAR (two
# kinds of synthetic sets; temperature 0.8; no guidance) and two small xARs (benchmarks/results).
CURVES = {
    "edm_0": {-1.0: 98.4, -0.5: 69.5, 0.0: 40.7, 0.5: 18.1, 1.0: 9.99, 1.5: 30.9},
    "edm_1": {-1.0: 103.7, -0.5: 69.6, 0.0: 37.2, 0.5: 13.6, 1.0: 6.3, 1.5: 36.1},
    "edm_4_steps": {-1.0: 70.0, 0.0: 32.7, 0.5: 18.9, 0.75: 14.4, 1.0: 12.5, 1.5: 19.5},
    "var_tokens": {-1.0: 40.8, 0.0: 23.1, 0.25: 19.3, 0.5: 17.6, 0.75: 18.8, 1.0: 22.8, 1.5: 39.6},
    "var_pixels": {-1.0: 53.1, 0.0: 23.1, 0.25: 17.6, 0.5: 14.3, 0.75: 13.4, 1.0: 15.2, 1.5: 26.7},
    "var_cold": {-1.0: 29.4, 0.0: 24.6, 0.25: 24.4, 0.5: 24.2, 0.75: 24.5, 1.0: 25.8, 1.5: 28.7},
    "var_unguided": {-1.0: 24.3, 0.0: 24.6, 0.25: 25.1, 0.5: 25.3, 0.75: 25.7, 1.0: 26.1, 1.5: 26.6},
    "xar": {-1.0: 152.0, 0.0: 90.9, 0.5: 75.4, 1.0: 67.5, 1.5: 66.5},
    "xar_strong_guidance": {-1.0: 218.0, 0.0: 142.9, 0.5: 162.0, 1.0: 220.0, 1.5: 309.6},
}
LENGTHS = (0.45, 0.75, 1.0)
GUIDANCE = (1.25, 4.0)


def parabola(optimum: float) -> Value:
    return lambda point: 10 + 30 * (point.w - optimum) ** 2


def value(evaluation: Evaluation) -> float:
    assert evaluation.value is not None
    return evaluation.value


def visited(found: Search) -> list[Point]:
    return [evaluation.point for evaluation in found.evaluations]


def family(member: int, *, guided: bool, lengths: Sequence[float], negative: bool = False) -> Value:
    """A random function shaped like the measured ones.

    Along the update a parabola that is steeper on its far side (A d^2 exp(k d), k near 0.4 in the curves above), an
    exponential wall beyond, a valley in guidance that leans upwards with w, and snapshots whose optima and depths
    differ a little.
    """
    random = np.random.default_rng(member)
    optimum = random.choice([random.uniform(0.15, 0.6), random.uniform(0.5, 1.2), random.uniform(1.2, 1.8)])
    optimum = -random.uniform(0.1, 0.6) if negative else optimum
    floor = random.uniform(5, 20)
    base = floor * math.exp(random.uniform(math.log(1.15), math.log(4.5)))
    skew, wall, rate = random.uniform(0, 0.7), random.uniform(1.6, 2.5), random.uniform(2, 6)
    lean, across, start = random.uniform(0.1, 1.2), base * random.uniform(0.15, 0.7), random.uniform(1.3, 2.3)
    shifts, best_budget, loss = np.exp(random.normal(0, 0.1, 3)), random.uniform(0, 2), random.uniform(0, 0.15)

    def evaluate(point: Point) -> float:
        along = point.w * lengths[point.snapshot] / lengths[len(lengths) // 2]
        best, depth = optimum, floor
        if len(lengths) > 1:
            best = optimum * shifts[point.snapshot]
            depth = min(floor * (1 + loss * (point.snapshot - best_budget) ** 2), 0.98 * base)
        steepness = (base - depth) / (best**2 * math.exp(-skew * best))
        away = along - best
        found = depth + steepness * away**2 * math.exp(skew * away)
        if along > 0:
            found += 0.2 * base * math.exp(min(rate * (along - max(wall, best + 0.5)), 30))
        if guided:
            assert point.guidance is not None
            found += across * (point.guidance - start - lean * along) ** 2
        return float(found)

    return evaluate


@pytest.mark.parametrize("optimum", [0.1, 0.4, 0.85, 1.2, 1.45])
def test_a_parabola_is_solved_within_five_evaluations(optimum: float) -> None:
    found = search(parabola(optimum), w=(0, 1.5))
    assert value(found.best) < 10.1
    assert len(found.evaluations) <= 5
    assert [e.value for e in found.evaluations] == [parabola(optimum)(point) for point in visited(found)]
    assert found.base.point == Point(0.0) and found.gain == value(found.base) - value(found.best)


@pytest.mark.parametrize("curve", CURVES.values(), ids=CURVES.keys())
def test_measured_curves_are_solved_to_a_hundredth_within_six_evaluations(curve: dict[float, float]) -> None:
    interpolate = Akima1DInterpolator(list(curve), list(curve.values()))
    found = search(lambda point: float(interpolate(point.w)), w=(-1, 1.5))
    assert value(found.best) < 1.015 * interpolate(np.linspace(-1, 1.5, 251)).min()
    assert len(found.evaluations) <= 6


def test_a_best_w_beyond_all_first_steps_is_walked_to() -> None:
    found = search(parabola(3.6), w=(0, 5.2))
    assert value(found.best) < 10.5 and len(found.evaluations) <= 8


def test_a_best_w_between_self_trained_and_base_is_found() -> None:
    found = search(parabola(-0.3), w=(-1, 2))
    assert value(found.best) < 10.1 and found.best.point.w < 0
    found = search(parabola(-0.7), w=(-1, -0.2))
    assert value(found.best) < 10.1
    assert found.base.point.w == 0, "0 is evaluated though the range leaves it out"


def test_the_base_is_recommended_where_nothing_beats_it() -> None:
    for flat in (lambda point: 5.0, lambda point: 5 + abs(point.w)):
        found = search(flat, w=(-0.5, 2))
        assert found.best is found.base and found.best.point == Point(0.0)
        assert found.gain == 0
        assert len(found.evaluations) <= 6


def test_a_gain_within_the_noise_is_no_gain() -> None:
    def noisy(point: Point) -> float:
        return 20 + 0.2 * math.sin(100 * point.w)

    quiet, aware = search(noisy, w=(0, 2)), search(noisy, w=(0, 2), noise=0.3)
    assert 0 < quiet.gain <= 2 * 0.3
    assert aware.best is aware.base and aware.gain == 0


def test_noise_costs_little_more_than_itself() -> None:
    excess = []
    for seed in range(20):
        random = np.random.default_rng(seed)
        draws: dict[Point, float] = {}
        found = search(
            lambda point, d=draws, r=random: parabola(0.8)(point) + d.setdefault(point, r.normal(0, 0.3)),  # type: ignore[misc]
            w=(0, 2),
            noise=0.3,
        )
        assert len(found.evaluations) <= 6
        excess.append(parabola(0.8)(found.best.point) - 10)
    assert np.mean(excess) < 0.3


@pytest.mark.parametrize("optimum", [0.2, 0.6, 0.9, 1.2])
def test_a_steep_wall_misleads_nobody(optimum: float) -> None:
    def wall(point: Point) -> float:
        return parabola(optimum)(point) + 5 * math.exp(min(15 * (point.w - optimum - 0.2), 50))

    found = search(wall, w=(-0.5, 2))
    assert value(found.best) < 1.03 * min(wall(Point(w / 100)) for w in range(150))
    assert len(found.evaluations) <= 7


def test_points_that_fail_are_walked_around() -> None:
    def fails_beyond_a_wall(point: Point) -> float:
        if point.w > 0.7:
            raise EvaluationFailed("NaN in 3 tensors")
        return math.nan if point.w < -0.2 else parabola(0.5)(point)

    found = search(fails_beyond_a_wall, w=(-0.5, 2))
    assert value(found.best) < 10.3
    failed = [evaluation for evaluation in found.evaluations if evaluation.value is None]
    assert [(evaluation.point.w, evaluation.note) for evaluation in failed] == [(1.0, "NaN in 3 tensors")]
    everything_else = search(lambda point: 10.0 if point.w == 0 else math.inf, w=(-0.5, 2))
    assert everything_else.best is everything_else.base
    assert all(evaluation.note == "the value is inf" for evaluation in everything_else.evaluations[1:])


def test_a_base_without_a_value_is_an_error_that_says_why() -> None:
    def broken(point: Point) -> float:
        raise EvaluationFailed("all images are alike")

    for guidance in (None, GUIDANCE):
        with pytest.raises(WorkError, match=r"w = 0.*all images are alike"):
            search(broken, w=(0, 2), guidance=guidance)
    with pytest.raises(WorkError, match="all images are alike"):
        grid(broken, [0.5, 1])


def test_a_minimum_at_the_edge_of_a_range_is_reported() -> None:
    found = search(lambda point: 10 - point.w, w=(0, 1.5))
    assert found.best.point.w == 1.5 and "best w is the edge of its range, 1.5" in found.reason
    found = search(lambda point: parabola(1)(point) + (point.guidance or 0), w=(0, 2), guidance=(1, 4))
    assert found.best.point.guidance == 1 and "best guidance is the edge of its range, 1" in found.reason
    assert "edge" not in search(parabola(0.8), w=(0, 1.5)).reason
    assert "edge" not in search(parabola(-1), w=(0, 1.5)).reason, "the base is no edge"


def test_the_best_guidance_of_base_and_neon_are_found_along_a_diagonal_valley() -> None:
    def valley(point: Point) -> float:
        assert point.guidance is not None
        return 2 + (point.w - 1) ** 2 + (point.guidance - 1.8 - 0.9 * point.w) ** 2

    found = search(valley, w=(0, 2), guidance=GUIDANCE)
    assert value(found.best) < 2.04 and len(found.evaluations) <= 10
    assert found.base.point.guidance == pytest.approx(1.8, abs=0.1), "the base is judged at its own best guidance"
    assert sum(point.w == 0 for point in visited(found)) <= 4


def test_a_valley_so_steep_that_w_alone_only_hurts_is_followed() -> None:
    def valley(point: Point) -> float:
        assert point.guidance is not None
        return 5 + 2 * (point.w - 1) ** 2 + 6 * (point.guidance - 1.3 - 1.2 * point.w) ** 2

    assert all(valley(Point(w / 10, 1.3)) > valley(Point(0.0, 1.3)) for w in range(5, 21))
    found = search(valley, w=(-0.5, 2), guidance=GUIDANCE)
    assert value(found.best) < 5.15 and len(found.evaluations) <= 11


def test_other_snapshots_are_first_tried_where_their_updates_are_as_long() -> None:
    def one_direction(point: Point) -> float:
        along = point.w * LENGTHS[point.snapshot]
        return 10 + 30 * (along - 0.6) ** 2 + (0 if point.w == 0 else (0.5, 0.0, 0.8)[point.snapshot])

    found = search(one_direction, w=(0, 2), snapshots=LENGTHS)
    assert found.best.point.snapshot == 1 and value(found.best) < 10.1
    assert len(found.evaluations) <= 8
    first = {snapshot: next(p.w for p in visited(found) if p.w and p.snapshot == snapshot) for snapshot in (0, 2)}
    assert first[0] * LENGTHS[0] == pytest.approx(first[2] * LENGTHS[2], rel=0.01) == pytest.approx(0.6, abs=0.1)


@pytest.mark.parametrize(
    ("guided", "lengths", "negative", "usual", "members"),
    [
        (False, (1.0,), False, 5, range(1000, 1020)),
        (False, (1.0,), True, 5, range(1000, 1020)),
        (True, (1.0,), False, 10, range(1000, 1010)),
        (False, LENGTHS, False, 8, range(1000, 1012)),
        (True, LENGTHS, False, 13, range(1000, 1006)),
    ],
    ids=["w", "negative_w", "w_guidance", "w_snapshots", "w_guidance_snapshots"],
)
def test_the_choice_is_close_to_a_fine_grid_at_a_fraction_of_its_cost(
    guided: bool, lengths: tuple[float, ...], negative: bool, usual: int, members: range
) -> None:
    """Mean excess at most 3% over a grid of 101 w (times 12 scales, times 3 snapshots). No member was tuned on."""
    low, high = (-1.0 if negative else 0.0, 2.0)
    scales = list(np.linspace(*GUIDANCE, 12)) if guided else [None]
    excess, spent = [], []
    for member in members:
        evaluate = family(member, guided=guided, lengths=lengths, negative=negative)
        found = search(evaluate, w=(low, high), guidance=GUIDANCE if guided else None, snapshots=lengths, limit=14)
        axes = product(np.linspace(low, high, 101), scales, range(len(lengths)))
        best = min(evaluate(Point(*point)) for point in axes)
        excess.append(value(found.best) / best - 1)
        spent.append(len(found.evaluations))
    print(f"mean excess {np.mean(excess):.2%}, most {max(excess):.2%}; {np.mean(spent):.1f} evaluations")
    assert np.mean(excess) < 0.03 and max(excess) < 0.15
    assert np.mean(spent) <= usual


def features(member: int, *, noise: float = 0.0) -> Callable[[Point], Statistics]:
    """Features of a random generator: it falls short of the real ones, N(0, 1) each, in a direction that the update
    reverses, with less variance; guidance moves it sideways and narrows it; all of it curves."""
    random = np.random.default_rng(member)
    dim = 12
    short, sideways, curves, bends = (random.normal(size=dim) for _ in range(4))
    short, sideways = 3 * short / np.linalg.norm(short), 2 * sideways / np.linalg.norm(sideways)
    own = 0.2 * random.normal(size=(3, dim))
    best = random.uniform(0.5, 1.4)

    def evaluate(point: Point) -> Statistics:
        along = point.w * LENGTHS[point.snapshot] / LENGTHS[1]
        guided = 0.0 if point.guidance is None else point.guidance - 1.75 - 0.7 * along
        mean = short * (1 - along / best) + guided * sideways + 0.15 * along**2 * curves + 0.1 * guided**2 * bends
        mean = mean + along * own[point.snapshot] + 0.3
        spread = 0.75 + 0.2 * along / best - 0.1 * guided + 0.05 * along**2
        seed = hash((point.w, point.guidance or 0.0, point.snapshot)) % 2**32  # hash(None) differs between processes
        jitter = np.random.default_rng(seed).normal(size=dim) * noise
        return Statistics(mu=mean + jitter, sigma=np.eye(dim) * spread**2)

    return evaluate


REAL_FEATURES = FrechetReference(Statistics(mu=np.zeros(12), sigma=np.eye(12)))


def lowest(evaluate: Callable[[Point], Statistics], scales: list, snapshot: int) -> float:
    """The lowest distance of a snapshot on a grid of 126 w and all scales; its valley is found on a coarser grid."""

    def distance(point: tuple) -> float:
        return REAL_FEATURES.distance(evaluate(Point(*point, snapshot)))

    ws = np.linspace(-0.5, 2, 126)
    w, scale = min(product(ws[::5], scales[::2]), key=distance)
    first = max(scales.index(scale) - 2, 0)
    return min(map(distance, product(ws[abs(ws - w) < 0.11], scales[first : first + 5])))


@pytest.mark.parametrize(
    ("guided", "snapshots", "usual"),
    [(False, 1, 4.5), (True, 1, 7), (False, 3, 7), (True, 3, 9.5)],
    ids=["w", "w_guidance", "w_snapshots", "w_guidance_snapshots"],
)
def test_with_the_features_in_sight_the_choice_takes_fewer_points(guided: bool, snapshots: int, usual: float) -> None:
    """Mean excess at most 1% over a grid of 126 w (times 23 scales, times 3 snapshots)."""
    lengths = LENGTHS if snapshots == 3 else (LENGTHS[1],)
    scales = list(np.linspace(*GUIDANCE, 23)) if guided else [None]
    excess, spent = [], []
    for member in range(8):
        every = features(member)

        def evaluate(point: Point, every: Callable[[Point], Statistics] = every) -> Statistics:
            return every(point if snapshots == 3 else point._replace(snapshot=1))

        bounds = GUIDANCE if guided else None
        found = search(evaluate, w=(-0.5, 2), guidance=bounds, snapshots=lengths, reference=REAL_FEATURES, limit=16)
        best = min(lowest(evaluate, scales, snapshot) for snapshot in range(snapshots))
        assert value(found.best) == REAL_FEATURES.distance(evaluate(found.best.point))
        excess.append(value(found.best) / best - 1)
        spent.append(len(found.evaluations))
    print(f"mean excess {np.mean(excess):.2%}, most {max(excess):.2%}; {np.mean(spent):.1f} evaluations")
    assert np.mean(excess) < 0.01 and max(excess) < 0.05
    assert np.mean(spent) <= usual


def test_two_points_tell_where_along_a_line_the_real_features_are_nearest() -> None:
    def line(point: Point) -> Statistics:
        return Statistics(mu=np.full(12, 1 - point.w / 1.1), sigma=np.eye(12))

    found = search(line, w=(0, 2), reference=REAL_FEATURES)
    assert [point.w for point in visited(found)][:2] == [0.0, 0.5]
    assert visited(found)[2].w == pytest.approx(1.1, abs=0.2)
    assert value(found.best) < 0.01 and len(found.evaluations) <= 5
    assert found.fitted(0.8) == pytest.approx(REAL_FEATURES.distance(line(Point(0.8))), abs=0.02)


def test_features_that_only_jitter_recommend_the_base() -> None:
    def still(point: Point) -> Statistics:
        found = features(0, noise=0.02)(point)
        return Statistics(mu=found.mu - features(0)(point).mu + features(0)(Point(0.0)).mu, sigma=np.eye(12))

    found = search(still, w=(-0.5, 2), reference=REAL_FEATURES, noise=0.2)
    assert found.best is found.base and len(found.evaluations) <= 8


def test_points_without_features_are_walked_around() -> None:
    def fails_beyond_a_wall(point: Point) -> Statistics:
        if point.w > 0.6:
            raise EvaluationFailed("NaN in 3 tensors")
        return features(1)(point._replace(snapshot=1))

    found = search(fails_beyond_a_wall, w=(-0.5, 2), reference=REAL_FEATURES)
    assert 0.5 <= found.best.point.w <= 0.6 and found.gain > 0
    assert sum(evaluation.value is None for evaluation in found.evaluations) <= 4


def test_many_features_are_followed_by_their_leading_directions() -> None:
    """200 features, 64 of them with nearly all of the variance: as many points, nearly the same choice."""
    few = features(2)
    turn = np.linalg.qr(np.random.default_rng(0).normal(size=(200, 200)))[0]
    rest = 1e-3 * np.eye(188)

    def many(point: Point) -> Statistics:
        found = few(point._replace(snapshot=1))
        sigma = np.block([[found.sigma, np.zeros((12, 188))], [np.zeros((188, 12)), rest]])
        return Statistics(mu=turn @ np.concatenate([found.mu, np.zeros(188)]), sigma=turn @ sigma @ turn.T)

    sigma = np.block([[np.eye(12), np.zeros((12, 188))], [np.zeros((188, 12)), rest]])
    real = FrechetReference(Statistics(mu=np.zeros(200), sigma=turn @ sigma @ turn.T))
    found = search(many, w=(-0.5, 2), reference=real)
    alike = search(lambda point: few(point._replace(snapshot=1)), w=(-0.5, 2), reference=REAL_FEATURES)
    assert value(found.best) == pytest.approx(value(alike.best), rel=0.03)


def test_the_limit_holds_and_a_longer_search_begins_like_a_shorter_one() -> None:
    evaluate = family(3, guided=True, lengths=LENGTHS)
    longest = search(evaluate, w=(-0.5, 2), guidance=GUIDANCE, snapshots=LENGTHS, limit=30)
    total = len(longest.evaluations)
    assert total < 20 and "limit" not in longest.reason
    for limit in (1, 2, 4, 7, total - 1, total):
        found = search(evaluate, w=(-0.5, 2), guidance=GUIDANCE, snapshots=LENGTHS, limit=limit)
        assert found.evaluations == longest.evaluations[:limit], "hence a killed search goes on from cached values"
        assert ("limit" in found.reason) == (limit < total)
    points = visited(longest)
    assert len(set(points)) == total
    assert all(point.snapshot == 0 for point in points if point.w == 0)
    assert all(-0.5 <= w <= 2 and guidance is not None and 1.25 <= guidance <= 4 for w, guidance, _ in points)


def test_the_fitted_curve_follows_the_function_around_the_best_point_and_is_silent_far_off() -> None:
    found = search(parabola(0.8), w=(0, 2))
    for w in (0.3, 0.8, 1.2):
        assert found.fitted(w) == pytest.approx(parabola(0.8)(Point(w)), rel=0.03)
    assert found.fitted(9.0) is None
    assert search(parabola(0.8), w=(0, 2), limit=2).fitted(0.5) is None, "two points fit nothing"
    valley = search(lambda point: parabola(0.8)(point) + (point.guidance or 0) ** 2, w=(0, 2), guidance=(-2, 2))
    assert valley.fitted(0.8, 1.0) == pytest.approx(11, rel=0.05)


def test_a_grid_evaluates_each_point_once_and_the_base_once_per_guidance() -> None:
    calls: list[Point] = []

    def evaluate(point: Point) -> float:
        calls.append(point)
        return parabola(1)(point) + ((point.guidance or 0) - 1) ** 2 + point.snapshot

    found = grid(evaluate, [0, 1, 1], [1.0, 2.0], LENGTHS)
    assert calls == visited(found) and len(calls) == len(set(calls)) == 2 + 3 * 2
    assert sum(point.w == 0 for point in calls) == 2
    assert found.best.point == Point(1, 1.0, 0) and found.base.point == Point(0, 1.0, 0)
    assert found.gain == pytest.approx(30)
    assert visited(grid(parabola(1), [0.5, 1])) == [Point(0.0), Point(0.5), Point(1)], "0 is added"


def test_requests_that_mean_nothing_are_refused() -> None:
    for wrong, word in (
        ({"w": (1.0, 0.0)}, "w"),
        ({"w": (0.0, math.inf)}, "w"),
        ({"guidance": (4.0, 1.0)}, "guidance"),
        ({"guidance": (2.0, 2.0)}, "guidance"),
        ({"snapshots": ()}, "snapshots"),
        ({"snapshots": (1.0, 0.0)}, "snapshots"),
        ({"limit": 0}, "limit"),
    ):
        with pytest.raises(RequestError, match=word):
            search(parabola(1), **{"w": (0.0, 2.0), **wrong})  # type: ignore[arg-type]
