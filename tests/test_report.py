"""What a report says about its figures."""

import pytest

from neon.evaluate import Scores
from neon.report import Report, Row, bias_undone, headline, text_table


def row(name: str, distances: tuple[float, ...], precision: float = 0.5, recall: float = 0.5) -> Row:
    scores = (Scores(distance=d, precision=precision, recall=recall, num_images=10, seconds=1.0) for d in distances)
    return Row(name=name, calls=5, blocks=tuple(scores))


def report(base: Row, neon: Row) -> Report:
    return Report(
        title="t", metric="fd_x", rows=(base, neon), base=base, neon=neon, w=1.0, curve={}, searched=(),
        grids=(), notes=(), provenance={},
    )  # fmt: skip


def test_a_gain_is_told_with_its_size_and_certainty() -> None:
    text = headline(report(row("base", (10.0, 11.0, 12.0)), row("Neon", (4.0, 5.0, 6.0))))
    assert "from 11.00 to 5.00 (-55%)" in text and "6 times the spread" in text


@pytest.mark.parametrize("neon", [(9.5, 10.5, 11.5), (14.0, 15.0, 16.0)])
def test_a_change_within_the_noise_or_for_the_worse_is_no_gain(neon: tuple[float, ...]) -> None:
    text = headline(report(row("base", (10.0, 11.0, 12.0)), row("Neon", neon)))
    assert text.startswith("No gain") and "keep the base" in text


def test_the_bias_undone_is_read_from_precision_and_recall() -> None:
    def told(before: tuple[float, float], after: tuple[float, float]) -> str:
        return bias_undone(row("base", (1.0,), *before), row("Neon", (1.0,), *after))

    assert "too concentrated" in told((0.9, 0.3), (0.8, 0.7))
    assert "too noisy" in told((0.5, 0.9), (0.7, 0.8))
    assert "both" in told((0.5, 0.5), (0.6, 0.6))
    assert "Neither" in told((0.6, 0.6), (0.5, 0.5))


def test_the_table_has_a_line_per_row_with_the_change_against_the_base() -> None:
    lines = text_table(report(row("base", (10.0, 12.0)), row("Neon", (5.0, 6.0)))).splitlines()
    assert len(lines) == 3 and "-50%" in lines[2] and "%" not in lines[1]
