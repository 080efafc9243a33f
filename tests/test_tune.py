"""The search for w, on functions whose minimum is known."""

import math

import pytest

from neon.tune import HIGHEST_W, search_w, vertex


@pytest.mark.parametrize("optimum", [0.1, 0.4, 0.85, 1.2, 1.45])
def test_a_parabola_is_solved_within_four_evaluations(optimum: float) -> None:
    calls: list[float] = []

    def distance(w: float) -> float:
        calls.append(w)
        return 10 + 30 * (w - optimum) ** 2

    choice = search_w(distance)
    assert choice.distance - 10 < 0.2
    assert len(calls) <= 5 and len(set(calls)) == len(calls)
    assert choice.points == {w: 10 + 30 * (w - optimum) ** 2 for w in calls}


@pytest.mark.parametrize("optimum", [0.6, 0.9, 1.2])
def test_a_steep_wall_costs_little(optimum: float) -> None:
    def distance(w: float) -> float:
        return 10 + 20 * (w - optimum) ** 2 + 5 * math.exp(4 * (w - optimum - 0.8))

    grid = min(distance(w / 100) for w in range(0, 151))
    assert search_w(distance).distance < 1.06 * grid


def test_where_neon_does_not_help_the_base_is_chosen() -> None:
    assert search_w(lambda w: 5 + w).w == 0


def test_a_falling_distance_stops_at_the_cap() -> None:
    assert search_w(lambda w: -w).w == HIGHEST_W


def test_the_best_evaluated_point_is_kept_even_if_the_parabola_misleads() -> None:
    values = {0.0: 10.0, 0.5: 4.0, 1.0: 9.0}
    choice = search_w(lambda w: values.get(w, 50.0))
    assert (choice.w, choice.distance) == (0.5, 4.0)


def test_the_vertex_stays_within_bounds() -> None:
    assert vertex({0.0: 3.0, 0.5: 2.0, 1.0: 1.5}, 0.0, 1.5) == pytest.approx(1.25)
    assert vertex({0.0: 3.0, 0.5: 2.0, 1.0: 1.1}, 0.0, 1.5) == 1.5
    assert vertex({0.0: 1.0, 0.5: 1.0, 1.0: 1.0}, 0.0, 1.5) == 0.0
