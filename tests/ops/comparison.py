"""For tests of kernels against a float64 reference, and of which are called."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


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


class CalledOperators(TorchDispatchMode):
    """Keeps the operators' names."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def assert_compiles(call: Callable[..., Tensor], *leaves: Tensor) -> None:
    """Compiled without a graph break, a function gives the same bits, and so do its gradients."""
    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    results = compiled(*leaves), call(*leaves)
    assert torch.equal(*results)
    weight = torch.randn_like(results[0])
    gradients = (torch.autograd.grad(y, leaves, weight) for y in results)
    assert all(map(torch.equal, *gradients))
