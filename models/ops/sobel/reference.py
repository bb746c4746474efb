"""Sobel gradients as differences and sums of shifted maps."""

from torch import Tensor

from models.ops.padding.reference import replicate_pad_reference


def sobel_reference(x: Tensor) -> tuple[Tensor, Tensor]:
    """Two maps of x's shape (B, C, H, W)."""
    padded = replicate_pad_reference(x, 1, 1, 1, 1)
    across = padded[..., 2:] - padded[..., :-2]
    along = padded[..., 2:, :] - padded[..., :-2, :]
    gradient_x = across[..., :-2, :] + 2 * across[..., 1:-1, :] + across[..., 2:, :]
    gradient_y = along[..., :-2] + 2 * along[..., 1:-1] + along[..., 2:]
    return gradient_x, gradient_y
