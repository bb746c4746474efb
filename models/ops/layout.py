"""How tensors lie in memory, for kernels that are given addresses."""

from torch import Tensor


def contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    """All tensors dense, absent ones left out of it."""
    return [None if x is None else x.contiguous() for x in tensors]
