"""One thread: the networks of the tests are too small to gain from more. And a device for golden cases that exists."""

import os
from collections.abc import Iterator

import pytest
import torch

from tests.workers import Workers

torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_configure() -> None:
    name = os.environ.get("NEON_GOLDEN_DEVICE", "cpu")
    try:
        torch.ones(1, device=name).item()
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise pytest.UsageError(f"NEON_GOLDEN_DEVICE={name}: no such device ({reason})") from None


@pytest.fixture(scope="session")
def workers() -> Iterator[Workers]:
    """Three processes for all the tests that need several; they start with the first of these tests."""
    with Workers(3) as pool:
        yield pool
