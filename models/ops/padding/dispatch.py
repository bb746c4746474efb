"""Hands a replicate padding to a backend."""

from torch import Tensor

from models.ops.padding.reference import replicate_pad_reference
from models.ops.triton_support import has_triton, pick_backend

_MOST_COPIES = 32  # of a corner: the gradient's kernel is written out for each


def replicate_pad(
    x: Tensor, left: int, right: int, top: int, bottom: int, *, backend: str = "auto"
) -> Tensor:
    """F.pad in mode "replicate", with a gradient of its own; x itself where nothing is added.

    Args:
        x: (B, C, H, W).
        left, right, top, bottom: pixels to add, none negative.
        backend: "reference", "triton", or "auto": triton on a GPU, unless x is float64 or a
            corner has more than 32 copies, for which it would take long to compile.
    Returns:
        (B, C, top + H + bottom, left + W + right), in x's dtype.
    Raises:
        ValueError: an unknown backend, an empty map, or a negative side.
    """
    if x.dim() != 4 or min(x.shape[2:]) < 1 or min(left, right, top, bottom) < 0:
        raise ValueError(
            f"replicate_pad takes (B, C, H, W) of one pixel at least and sides of 0 at least, got "
            f"{tuple(x.shape)} and {(left, right, top, bottom)}"
        )
    copies = (left + 1 + right) * (top + 1 + bottom)
    backend = pick_backend(
        "replicate_pad", backend, x, is_there=lambda: has_triton() and copies <= _MOST_COPIES
    )
    if not (left or right or top or bottom):
        return x
    if backend == "reference":
        return replicate_pad_reference(x, left, right, top, bottom)
    from models.ops.padding.triton import replicate_pad_triton

    return replicate_pad_triton(x, left, right, top, bottom)


def crop(x: Tensor, hw: tuple[int, int]) -> Tensor:
    """The top left (H, W) of a map; x itself where that is all of it.

    Even of a whole map a slice's gradient would be filled with zeros first, then copied.
    """
    return x if x.shape[-2:] == hw else x[..., : hw[0], : hw[1]]
