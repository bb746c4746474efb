"""Hands a convolution with repeated borders to a backend."""

import torch
from torch import Tensor

from models.ops.replicate_conv.reference import replicate_conv_reference
from models.ops.triton_support import has_triton

_MOST_CHANNELS = 32  # out; of more cuDNN's kernels make good use


def replicate_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, backend: str = "auto"
) -> Tensor:
    """A 3x3 convolution, stride 1, of the map with one more row and column of its border around it.

    Args:
        x: (B, C, H, W), at least one pixel.
        weight: (O, C, 3, 3); bias: (O,) or None.
        backend: "reference", "triton" (up to 32 channels out), or "auto": triton where it can, on a
            GPU, unless x is float64.
    Returns:
        (B, O, H, W) in x's dtype, or that of autocast where it is on.
    Raises:
        ValueError: an unknown backend, or shapes that do not fit.
    """
    out_channels = weight.shape[0]
    if (
        x.dim() != 4
        or weight.shape[1:] != (x.shape[1], 3, 3)
        or (bias is not None and bias.shape != (out_channels,))
    ):
        raise ValueError(
            f"replicate_conv takes (B, C, H, W), (O, C, 3, 3) and (O,), got {tuple(x.shape)}, "
            f"{tuple(weight.shape)} and {None if bias is None else tuple(bias.shape)}"
        )
    if backend == "auto":
        is_fast = x.is_cuda and x.dtype != torch.float64 and has_triton()
        backend = "triton" if is_fast and out_channels <= _MOST_CHANNELS else "reference"
    if backend == "reference":
        return replicate_conv_reference(x, weight, bias)
    if backend == "triton":
        from models.ops.replicate_conv.triton import replicate_conv_triton

        return replicate_conv_triton(x, weight, bias)
    raise ValueError(f"unknown replicate_conv backend '{backend}'; known: auto, reference, triton")
