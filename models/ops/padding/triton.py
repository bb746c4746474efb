"""Replicate padding on GPU. Deterministic: its gradient gathers, without atomics."""

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from models.ops.padding.kernels import _pad_gradient_kernel, _pad_kernel
from models.ops.triton_support import INTERPRETED, check_tensor, on_device


class _Tile(NamedTuple):
    """Planes and pixels of a program, and its warps."""

    planes: int
    pixels: int
    warps: int = 4


_TILE = _Tile(2, 16) if INTERPRETED else _Tile(4, 512)


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
            _pad_kernel[_grid(planes, length)](
                x, y, planes, height, width, y.shape[3], length, left, top,
                PLANES=_TILE.planes, PIXELS=_TILE.pixels, num_warps=_TILE.warps,
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
            _pad_gradient_kernel[_grid(planes, height * width)](
                grad_y, grad_x, planes, height, width, grad_y.shape[3], grad_y[0, 0].numel(),
                LEFT=left, RIGHT=right, TOP=top, BOTTOM=bottom,
                PLANES=_TILE.planes, PIXELS=_TILE.pixels, num_warps=_TILE.warps,
            )  # fmt: skip
    return grad_x


@_backward.register_fake
def _cropped(grad_y, left, right, top, bottom):
    batch, channels, height, width = grad_y.shape
    return grad_y.new_empty(batch, channels, height - top - bottom, width - left - right)


def _grid(planes: int, pixels: int) -> tuple[int, int]:
    return triton.cdiv(pixels, _TILE.pixels), triton.cdiv(planes, _TILE.planes)


def _setup_context(ctx, inputs, output) -> None:
    ctx.sides = inputs[1:]


def _differentiate(ctx, grad_y: Tensor) -> tuple[Tensor | None, ...]:
    return _backward(grad_y, *ctx.sides), None, None, None, None


_forward.register_autograd(_differentiate, setup_context=_setup_context)
