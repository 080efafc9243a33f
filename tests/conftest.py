"""One thread: the networks of the tests are too small to gain from more. And a device for golden cases that exists."""

import os
from collections.abc import Iterator

import pytest
import torch

from tests.workers import Workers

torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")


LONGEST = (
    "test_gpu_script", "test_demo", "test_toy", "test_improve", "test_edm_programs", "test_imm_programs", "test_fuzz",
    "test_tuned_sampler", "test_tuning", "test_trackers", "test_inception", "test_var_programs", "test_devices",
    "test_adapters", "test_notebooks", "test_tune",
)  # fmt: skip
"""files of tests, the longest first: of several processes, the one that began such a file last would end alone"""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))


def pytest_configure() -> None:
    name = os.environ.get("NEON_GOLDEN_DEVICE", "cpu")
    try:
        torch.ones(1, device=name).item()
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise pytest.UsageError(f"NEON_GOLDEN_DEVICE={name}: no such device ({reason})") from None


@pytest.fixture(scope="session")
def workers() -> Iterator[Workers]:
    """Four processes for all the tests that need several; they start with the first of these tests."""
    with Workers(4) as pool:
        yield pool
