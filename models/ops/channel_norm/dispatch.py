"""Hands a normalisation over channels to a backend."""

import torch
from torch import Tensor

from models.ops.channel_norm.reference import channel_norm_reference
from models.ops.triton_support import has_triton


def channel_norm(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, *, backend: str = "auto"
) -> Tensor:
    """(x - mean) / sqrt(variance + eps) · weight + bias, over the channels of each pixel.

    Args:
        x: (B, C, H, W).
        weight, bias: (C,).
        backend: "reference", "triton", or "auto": triton on a GPU, unless x is float64.
    Returns:
        (B, C, H, W) in x's dtype; float32 where autocast is on, as F.layer_norm.
    Raises:
        ValueError: an unknown backend, or shapes that do not fit.
    """
    if x.dim() != 4 or weight.shape != x.shape[1:2] or bias.shape != x.shape[1:2]:
        raise ValueError(
            f"channel_norm takes (B, C, H, W) and two vectors (C,), got {tuple(x.shape)}, "
            f"{tuple(weight.shape)}, {tuple(bias.shape)}"
        )
    if backend == "auto":
        is_fast = x.is_cuda and x.dtype != torch.float64 and has_triton()
        backend = "triton" if is_fast else "reference"
    if backend == "reference":
        return channel_norm_reference(x, weight, bias, eps)
    if backend == "triton":
        from models.ops.channel_norm.triton import channel_norm_triton

        return channel_norm_triton(x, weight, bias, eps)
    raise ValueError(f"unknown channel_norm backend '{backend}'; known: auto, reference, triton")
