"""What the Triton backends share: whether one can run, and where. Does not itself import triton."""

import contextlib
import functools
import importlib.util
import os
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

# On a CPU, for tests; chosen when triton is imported.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


class PlaneTile(NamedTuple):
    """What a program has of maps (planes, pixels): some pixels of some of them, in turn."""

    planes: int
    pixels: int
    warps: int

    def grid(self, planes: int, pixels: int) -> tuple[int]:
        """Programs that maps take, along one axis; models.ops.plane_kernels shares them out."""
        return (-(-pixels // self.pixels) * -(-planes // self.planes),)

    def options(self) -> dict[str, int]:
        """Keyword arguments of a launch."""
        return {"PLANES": self.planes, "PIXELS": self.pixels, "num_warps": self.warps}


_COMPUTED = (torch.float32, torch.bfloat16, torch.float16)  # by kernels, in float32
PLANE_TILE = PlaneTile(2, 16, 4) if INTERPRETED else PlaneTile(4, 512, 4)
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


def pick_backend(
    function: str,
    backend: str,
    x: Tensor,
    *,
    dtype: torch.dtype | None = None,
    is_there: Callable[[], bool] = has_triton,
) -> str:
    """The backend to take: of "auto" triton on a GPU for float32 and narrower, else reference.

    Args:
        function: its name in the message.
        x: what it is called with.
        dtype: in which it computes, if not x's.
        is_there: whether triton can run it.
    Raises:
        ValueError: an unknown backend.
    """
    if backend == "auto":
        is_fast = x.is_cuda and (dtype or x.dtype) in _COMPUTED and is_there()
        return "triton" if is_fast else "reference"
    if backend not in ("reference", "triton"):
        raise ValueError(f"unknown {function} backend '{backend}'; known: auto, reference, triton")
    return backend


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
