"""Bilinear resize on GPU. Deterministic: its gradient is two matrix products."""

import torch
from torch import Tensor

from models.ops.resize.kernels import _resize_kernel
from models.ops.resize.reference import resize_gradient
from models.ops.triton_support import PLANE_TILE, check_tensor, on_device


def bilinear_resize_triton(x: Tensor, height: int, width: int) -> Tensor:
    """The same function as bilinear_resize_reference.

    Raises:
        RuntimeError: x that is not on a GPU, or float64.
    """
    check_tensor("bilinear_resize backend 'triton'", x, for_float64="reference")
    return _forward(x, height, width)


@torch.library.custom_op("cmfs::bilinear_resize", mutates_args=())
def _forward(x: Tensor, height: int, width: int) -> Tensor:
    x = x.contiguous()
    batch, channels, *hw = x.shape
    y = x.new_empty(batch, channels, height, width)
    planes, length = batch * channels, height * width
    if planes:
        with on_device(x):
            _resize_kernel[PLANE_TILE.grid(planes, length)](
                x,
                y,
                planes,
                *hw,
                width,
                length,
                hw[0] / height,
                hw[1] / width,
                **PLANE_TILE.options(),
            )
    return y


@_forward.register_fake
def _(x, height, width):
    return x.new_empty(*x.shape[:2], height, width)


def _setup_context(ctx, inputs, output) -> None:
    ctx.hw = inputs[0].shape[2:]


def _differentiate(ctx, grad_y: Tensor) -> tuple[Tensor | None, ...]:
    return resize_gradient(grad_y, *ctx.hw), None, None


_forward.register_autograd(_differentiate, setup_context=_setup_context)
