"""What follows a convolution by PyTorch's own operators."""

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS = {None: lambda x: x, "gelu": F.gelu, "relu": F.relu, "silu": F.silu}


def epilogue_reference(
    x: Tensor,
    bias: Tensor | None,
    activation: str | None,
    factor: Tensor | None,
    residual: Tensor | None,
) -> Tensor:
    """residual + factor · activation(x + bias), in float32 at least."""
    dtype = result_dtype(x, residual)
    ones = (1,) * (x.dim() - 2)
    y = x.to(torch.promote_types(dtype, torch.float32))
    if bias is not None:
        y = y + bias.view(-1, *ones)
    y = ACTIVATIONS[activation](y)
    if factor is not None:
        y = factor.reshape(-1, 1, *ones) * y
    if residual is not None:
        y = residual + y
    return y.to(dtype)


def result_dtype(x: Tensor, residual: Tensor | None) -> torch.dtype:
    """x's dtype; with a residual, the one that both are promoted to."""
    return x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
