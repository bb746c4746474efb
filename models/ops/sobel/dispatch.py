"""Hands Sobel gradients to a backend."""

import torch
from torch import Tensor

from models.ops.sobel.reference import sobel_reference
from models.ops.triton_support import has_triton


def sobel(x: Tensor, *, backend: str = "auto") -> tuple[Tensor, Tensor]:
    """Signed horizontal and vertical Sobel gradients (3x3, weights 1 2 1, borders replicated).

    Args:
        x: (B, C, H, W), each channel on its own.
        backend: "reference", "triton", or "auto": triton on a GPU, unless x is float64.
    Returns:
        Two maps of x's shape and dtype. A horizontal ramp of slope 1 gives 8 in the first.
    Raises:
        ValueError: an unknown backend, or an empty map.
    """
    if x.dim() != 4 or min(x.shape[2:]) < 1:
        raise ValueError(f"sobel takes (B, C, H, W) of one pixel at least, got {tuple(x.shape)}")
    if backend not in ("auto", "reference", "triton"):
        raise ValueError(f"unknown sobel backend '{backend}'; known: auto, reference, triton")
    if backend == "auto":
        is_fast = x.is_cuda and x.dtype != torch.float64 and has_triton()
        backend = "triton" if is_fast else "reference"
    if backend == "reference":
        return sobel_reference(x)
    from models.ops.sobel.triton import sobel_triton

    return sobel_triton(x)
