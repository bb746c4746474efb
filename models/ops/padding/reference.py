"""Replicate padding by PyTorch's own, and its gradient by sums of slices.

The built-in gradient keeps x, and on a GPU adds with atomics, in no fixed order.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def replicate_pad_reference(x: Tensor, left: int, right: int, top: int, bottom: int) -> Tensor:
    """(B, C, top + H + bottom, left + W + right)."""
    return _ReplicatePad.apply(x, left, right, top, bottom)


class _ReplicatePad(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, *sides: int) -> Tensor:
        ctx.sides = sides
        return F.pad(x, sides, mode="replicate")

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        left, right, top, bottom = ctx.sides
        grad = _fold(grad, -2, top, bottom)
        return _fold(grad, -1, left, right), None, None, None, None


def _fold(grad: Tensor, dim: int, before: int, after: int) -> Tensor:
    """What stands past either end of a dimension, added to that end."""
    size = grad.shape[dim] - before - after
    first, inner, last = grad.split([before, size, after], dim)
    inner = inner.clone(memory_format=torch.contiguous_format)
    inner.narrow(dim, 0, 1).add_(first.sum(dim, keepdim=True))
    inner.narrow(dim, size - 1, 1).add_(last.sum(dim, keepdim=True))
    return inner
