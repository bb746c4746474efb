"""Bilinear resize by PyTorch's own, and its gradient by two matrix products.

The built-in gradient adds every output to its inputs with atomics: on a GPU it is slower than the
rest of a head together, and not deterministic.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def bilinear_resize_reference(x: Tensor, height: int, width: int) -> Tensor:
    """(B, C, height, width)."""
    return _Resize.apply(x, height, width)


class _Resize(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, height: int, width: int) -> Tensor:
        ctx.hw = x.shape[2:]
        return F.interpolate(x, size=(height, width), mode="bilinear", align_corners=False)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        return resize_gradient(grad, *ctx.hw), None, None


def resize_gradient(grad: Tensor, height: int, width: int) -> Tensor:
    """The gradient of a map (B, C, height, width) from that of its resized version."""
    rows = _interpolation_matrix(height, grad.shape[2], grad)
    columns = _interpolation_matrix(width, grad.shape[3], grad)
    with torch.autocast(grad.device.type, enabled=False):
        return rows.mT @ (grad @ columns)


def _interpolation_matrix(size: int, resized: int, like: Tensor) -> Tensor:
    """(resized, size): each output of a 1-D linear interpolation as weights of the inputs."""
    kind = {"device": like.device, "dtype": torch.promote_types(like.dtype, torch.float32)}
    centre = (torch.arange(resized, **kind) + 0.5) * (size / resized) - 0.5
    distance = centre.clamp(0, size - 1)[:, None] - torch.arange(size, **kind)
    return (1 - distance.abs()).clamp_min(0).to(like.dtype)
