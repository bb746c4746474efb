"""Sobel gradients on GPU, in one pass, and another for the gradient. Deterministic."""

import torch
import triton
from torch import Tensor

from models.ops.layout import contiguous
from models.ops.sobel.kernels import _sobel_gradient_kernel, _sobel_kernel
from models.ops.triton_support import PLANE_TILE, check_tensor, on_device


def sobel_triton(x: Tensor) -> tuple[Tensor, Tensor]:
    """The same function as sobel_reference, computed in float32.

    Raises:
        RuntimeError: x that is not on a GPU, or float64.
    """
    check_tensor("sobel backend 'triton'", x, for_float64="reference")
    return _forward(x)


@torch.library.custom_op("cmfs::sobel", mutates_args=())
def _forward(x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.contiguous()
    gradients = torch.empty_like(x), torch.empty_like(x)
    _launch(_sobel_kernel, x, *gradients)
    return gradients


@_forward.register_fake
def _(x):
    return x.new_empty(x.shape), x.new_empty(x.shape)


@torch.library.custom_op("cmfs::sobel_gradient", mutates_args=())
def _backward(grad_gradient_x: Tensor, grad_gradient_y: Tensor) -> Tensor:
    grad_gradient_x, grad_gradient_y = contiguous(grad_gradient_x, grad_gradient_y)
    grad_x = torch.empty_like(grad_gradient_x)
    _launch(_sobel_gradient_kernel, grad_gradient_x, grad_gradient_y, grad_x)
    return grad_x


@_backward.register_fake
def _(grad_gradient_x, grad_gradient_y):
    return grad_gradient_x.new_empty(grad_gradient_x.shape)


def _launch(kernel: triton.JITFunction, *maps: Tensor) -> None:
    batch, channels, height, width = maps[0].shape
    planes = batch * channels
    if planes:
        with on_device(maps[0]):
            grid = PLANE_TILE.grid(planes, height * width)
            kernel[grid](*maps, planes, height, width, **PLANE_TILE.options())


def _setup_context(ctx, inputs, output) -> None:
    pass


def _differentiate(ctx, grad_gradient_x: Tensor, grad_gradient_y: Tensor) -> Tensor:
    return _backward(grad_gradient_x, grad_gradient_y)


_forward.register_autograd(_differentiate, setup_context=_setup_context)
