"""What the Triton backends share: whether one can run, and where. Does not itself import triton."""

import contextlib
import functools
import importlib.util
import os

import torch
from torch import Tensor

# On a CPU, for tests; chosen when triton is imported.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_HAS_TRITON = importlib.util.find_spec("triton") is not None


def has_triton() -> bool:
    """Whether the package triton is installed."""
    return _HAS_TRITON


@torch.compiler.assume_constant_result
def has_triton_tuples() -> bool:
    """Whether triton is installed and its kernels may hold tuples of tensors, as from 3.3 on.

    A compiler need not look into how it is found.
    """
    return has_triton() and _triton_version() >= (3, 3)


@functools.cache
def _triton_version() -> tuple[int, ...]:
    import triton

    return tuple(map(int, triton.__version__.split(".")[:2]))


def check_tensor(backend: str, x: Tensor, *, for_float64: str) -> None:
    """Raise a RuntimeError where `backend` cannot run on x.

    Args:
        backend: its name in the message.
        for_float64: the backend that can take float64.
    """
    if not (x.is_cuda or INTERPRETED):
        raise RuntimeError(f"{backend} needs GPU tensors, got {x.device}")
    if x.dtype == torch.float64:
        raise RuntimeError(f"{backend} computes in float32; use '{for_float64}' for float64")


def on_device(x: Tensor) -> contextlib.AbstractContextManager:
    """Triton launches on the current device: make it x's."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()
