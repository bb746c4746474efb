"""For tests of kernels against a float64 reference."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


@contextmanager
def poisoned_empty() -> Iterator[None]:
    """torch.empty is filled with NaN, so that what a kernel leaves out shows."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def assert_near(name: str, result: Tensor, goal: Tensor, tolerance: float) -> None:
    """||result - goal|| / ||goal|| < tolerance, and no NaN or infinity."""
    assert result.isfinite().all(), name
    error = (result.double() - goal).norm() / goal.norm().clamp_min(1e-12)
    assert error < tolerance, f"{name}: relative error {error:.2e}"
