"""Randomness belongs to images."""

import pytest
import torch

from neon.errors import RequestError
from neon.noise import ImageNoise, Purpose, image_seeds


def test_the_draws_of_an_image_do_not_depend_on_its_neighbours() -> None:
    together, alone = ImageNoise([1, 2, 3]), ImageNoise([2])
    for draw in ("normal", "uniform"):
        assert torch.equal(getattr(together, draw)(4, 5)[1:2], getattr(alone, draw)(4, 5))
    assert torch.equal(together.integers(1000)[1:2], alone.integers(1000))


def test_a_restarted_source_repeats_its_first_draws() -> None:
    noise = ImageNoise([7, 8])
    first = noise.normal(3)
    noise.normal(3)
    assert torch.equal(noise.restarted().normal(3), first)


def test_seeds_of_different_purposes_and_runs_never_meet() -> None:
    every = [
        seed
        for purpose in Purpose
        for run in (0, 1, 2, 1023)
        for seed in (*image_seeds(purpose, run, 100), *image_seeds(purpose, run, 100, start=2**20 - 100))
    ]
    assert len(set(every)) == len(every)
    assert min(every) >= 0 and max(every) < 2**32


def test_a_set_is_the_start_of_a_longer_one_and_blocks_continue_it() -> None:
    assert image_seeds(Purpose.REPORT, 3, 10) == image_seeds(Purpose.REPORT, 3, 6) + image_seeds(
        Purpose.REPORT, 3, 4, start=6
    )


def test_a_negative_seed_is_refused() -> None:
    with pytest.raises(RequestError, match="--seed"):
        image_seeds(Purpose.REPORT, -1, 10)
