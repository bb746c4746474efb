"""Hands Sobel gradients to a backend."""

from torch import Tensor

from models.ops.sobel.reference import sobel_reference
from models.ops.triton_support import pick_backend


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
    backend = pick_backend("sobel", backend, x)
    if backend == "reference":
        return sobel_reference(x)
    from models.ops.sobel.triton import sobel_triton

    return sobel_triton(x)
