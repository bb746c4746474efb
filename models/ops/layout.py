"""How tensors lie in memory, for kernels that are given addresses."""

import math

from torch import Tensor


def contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    """All tensors dense, absent ones left out of it."""
    return [None if x is None else x.contiguous() for x in tensors]


def with_dense_images(x: Tensor) -> tuple[Tensor, int]:
    """x (B, C, ...) with images that are contiguous each, copied only if they are not; its stride.

    Halves of a wider map along the channels are taken as they are: images lie further apart.
    """
    dense = tuple(math.prod(x.shape[dim + 1 :]) for dim in range(1, x.dim()))
    if x.stride()[1:] != dense:
        x = x.contiguous()
    return x, x.stride(0)
