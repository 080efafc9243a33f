"""One thread: the networks of the tests are too small to gain from more. And a device for golden cases that exists."""

import os

import pytest
import torch

torch.set_num_threads(1)


def pytest_configure() -> None:
    name = os.environ.get("NEON_GOLDEN_DEVICE", "cpu")
    try:
        torch.ones(1, device=name).item()
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise pytest.UsageError(f"NEON_GOLDEN_DEVICE={name}: no such device ({reason})") from None
