"""Hands a bilinear resize to a backend."""

from torch import Tensor

from models.ops.resize.reference import bilinear_resize_reference
from models.ops.triton_support import pick_backend


def bilinear_resize(x: Tensor, hw: tuple[int, int], *, backend: str = "auto") -> Tensor:
    """F.interpolate(x, hw, mode="bilinear"), pixel centres aligned, with a gradient of its own.

    Args:
        x: (B, C, height, width).
        hw: the new height and width.
        backend: "reference", "triton", or "auto": triton on a GPU, unless x is float64.
    Returns:
        (B, C, *hw) in x's dtype, also under autocast, which would widen it for what comes next to
        round again; computed in float32 at least. x itself if it has this size.
    Raises:
        ValueError: an unknown backend, or sizes that are none.
    """
    if x.dim() != 4 or len(hw) != 2 or min(*x.shape[2:], *hw) < 1:
        raise ValueError(
            f"bilinear_resize takes (B, C, H, W) and (H, W) of 1 at least, got {tuple(x.shape)} "
            f"and {tuple(hw)}"
        )
    backend = pick_backend("bilinear_resize", backend, x)
    if x.shape[2:] == tuple(hw):
        return x
    if backend == "reference":
        return bilinear_resize_reference(x, *hw).to(x.dtype)
    from models.ops.resize.triton import bilinear_resize_triton

    return bilinear_resize_triton(x, *hw)
