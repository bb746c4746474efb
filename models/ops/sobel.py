"""Fixed Sobel gradients, shared by the loss and the fusion head; never trained."""

from torch import Tensor

from models.ops.padding import replicate_pad


def sobel(x: Tensor) -> tuple[Tensor, Tensor]:
    """Signed horizontal and vertical Sobel gradients (3x3, weights 1 2 1, borders replicated).

    x: (B, C, H, W) -> two maps of the same shape, each channel on its own. A horizontal ramp of
    slope 1 gives 8 in the first map.
    """
    padded = replicate_pad(x, 1, 1, 1, 1)
    across = padded[..., 2:] - padded[..., :-2]
    along = padded[..., 2:, :] - padded[..., :-2, :]
    gradient_x = across[..., :-2, :] + 2 * across[..., 1:-1, :] + across[..., 2:, :]
    gradient_y = along[..., :-2] + 2 * along[..., 1:-1] + along[..., 2:]
    return gradient_x, gradient_y
