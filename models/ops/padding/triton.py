"""Replicate padding on GPU. Deterministic: its gradient gathers, without atomics."""

import torch
from torch import Tensor

from models.ops.padding.kernels import _pad_gradient_kernel, _pad_kernel
from models.ops.triton_support import PLANE_TILE, check_tensor, on_device


def replicate_pad_triton(x: Tensor, left: int, right: int, top: int, bottom: int) -> Tensor:
    """The same function as replicate_pad_reference.

    Raises:
        RuntimeError: x that is not on a GPU, or float64.
    """
    check_tensor("replicate_pad backend 'triton'", x, for_float64="reference")
    return _forward(x, left, right, top, bottom)


@torch.library.custom_op("cmfs::replicate_pad", mutates_args=())
def _forward(x: Tensor, left: int, right: int, top: int, bottom: int) -> Tensor:
    x = x.contiguous()
    batch, channels, height, width = x.shape
    y = _padded(x, left, right, top, bottom)
    planes, length = batch * channels, y[0, 0].numel() if y.numel() else 0
    if planes:
        with on_device(x):
            _pad_kernel[PLANE_TILE.grid(planes, length)](
                x, y, planes, height, width, y.shape[3], length, left, top,
                **PLANE_TILE.options(),
            )  # fmt: skip
    return y


@_forward.register_fake
def _padded(x, left, right, top, bottom):
    batch, channels, height, width = x.shape
    return x.new_empty(batch, channels, top + height + bottom, left + width + right)


@torch.library.custom_op("cmfs::replicate_pad_gradient", mutates_args=())
def _backward(grad_y: Tensor, left: int, right: int, top: int, bottom: int) -> Tensor:
    grad_y = grad_y.contiguous()
    grad_x = _cropped(grad_y, left, right, top, bottom)
    batch, channels, height, width = grad_x.shape
    planes = batch * channels
    if planes:
        with on_device(grad_y):
            _pad_gradient_kernel[PLANE_TILE.grid(planes, height * width)](
                grad_y, grad_x, planes, height, width, grad_y.shape[3], grad_y[0, 0].numel(),
                LEFT=left, RIGHT=right, TOP=top, BOTTOM=bottom,
                **PLANE_TILE.options(),
            )  # fmt: skip
    return grad_x


@_backward.register_fake
def _cropped(grad_y, left, right, top, bottom):
    batch, channels, height, width = grad_y.shape
    return grad_y.new_empty(batch, channels, height - top - bottom, width - left - right)


def _setup_context(ctx, inputs, output) -> None:
    ctx.sides = inputs[1:]


def _differentiate(ctx, grad_y: Tensor) -> tuple[Tensor | None, ...]:
    return _backward(grad_y, *ctx.sides), None, None, None, None


_forward.register_autograd(_differentiate, setup_context=_setup_context)
