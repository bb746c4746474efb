"""The parts around a Mamba scan on GPU, each one pass: custom operators with their backwards.

A backward pass over the sequence needs no flipped copies: its convolution reads x from the end,
the gate its result. Deterministic: no atomics.
"""

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from models.ops.layout import contiguous, with_dense_images
from models.ops.mamba_path.kernels import (
    _conv_gradient_kernel,
    _conv_input_gradient_kernel,
    _conv_kernel,
    _gate_gradient_kernel,
    _gate_kernel,
)
from models.ops.triton_support import INTERPRETED, check_tensor, on_device


class _Tile(NamedTuple):
    rows: int
    tokens: int


_TILE = _Tile(2, 16) if INTERPRETED else _Tile(1, 1024)


def conv_silu_triton(x: Tensor, weight: Tensor, bias: Tensor, flip: bool) -> Tensor:
    """The same function as conv_silu_reference.

    Raises:
        RuntimeError: tensors that are not on a GPU, or float64 x.
    """
    check_tensor("mamba_path backend 'triton'", x, for_float64="reference")
    return _conv(x, weight, bias, flip)


def gate_triton(y: Tensor, flipped: Tensor | None, z: Tensor) -> Tensor:
    """The same function as gate_reference; RuntimeError as conv_silu_triton."""
    check_tensor("mamba_path backend 'triton'", z, for_float64="reference")
    return _gate(y, flipped, z)


@torch.library.custom_op("cmfs::conv_silu", mutates_args=())
def _conv(x: Tensor, weight: Tensor, bias: Tensor, flip: bool) -> Tensor:
    x, stride = with_dense_images(x)
    weight, bias = weight.contiguous(), bias.contiguous()
    y = x.new_empty(x.shape)
    if x.numel():
        with on_device(x):
            _conv_kernel[_grid(x)](
                x,
                weight,
                bias,
                y,
                x.shape[2],
                x.shape[1],
                stride,
                WIDTH=weight.shape[1],
                FLIP=flip,
                ROWS=_TILE.rows,
                TOKENS=_TILE.tokens,
            )
    return y


@_conv.register_fake
def _(x, weight, bias, flip):
    return x.new_empty(x.shape)


@torch.library.custom_op("cmfs::conv_silu_backward", mutates_args=())
def _conv_backward(
    grad_y: Tensor, x: Tensor, weight: Tensor, bias: Tensor, flip: bool
) -> tuple[Tensor, Tensor]:
    """The gradient of x; those of weight and bias one after the other (D · K + D,), float32."""
    x, stride = with_dense_images(x)
    grad_y, weight, bias = grad_y.contiguous(), weight.contiguous(), bias.contiguous()
    gradient, grad_x = (x.new_empty(x.shape) for _ in range(2))
    blocks, _, batch = grid = _grid(x)
    width = weight.shape[1]
    cut = {"WIDTH": width, "FLIP": flip, "ROWS": _TILE.rows, "TOKENS": _TILE.tokens}
    parts = x.new_empty((batch, blocks, x.shape[1] * (width + 1)), dtype=torch.float32)
    if x.numel():
        with on_device(x):
            _conv_gradient_kernel[grid](
                grad_y, x, weight, bias, gradient, parts, x.shape[2], x.shape[1], stride, **cut
            )
            _conv_input_gradient_kernel[grid](
                gradient, weight, grad_x, x.shape[2], x.shape[1], **cut
            )
    return grad_x, parts.sum((0, 1))


@_conv_backward.register_fake
def _(grad_y, x, weight, bias, flip):
    sums = weight.new_empty(weight.numel() + bias.numel(), dtype=torch.float32)
    return x.new_empty(x.shape), sums


@torch.library.custom_op("cmfs::mamba_gate", mutates_args=())
def _gate(y: Tensor, flipped: Tensor | None, z: Tensor) -> Tensor:
    (y, flipped), (z, stride) = contiguous(y, flipped), with_dense_images(z)
    out = y.new_empty(y.shape, dtype=torch.promote_types(y.dtype, z.dtype))
    if y.numel():
        with on_device(y):
            _gate_kernel[_grid(y)](y, flipped, z, out, y.shape[2], y.shape[1], stride, *_TILE)
    return out


@_gate.register_fake
def _(y, flipped, z):
    return y.new_empty(y.shape, dtype=torch.promote_types(y.dtype, z.dtype))


@torch.library.custom_op("cmfs::mamba_gate_backward", mutates_args=())
def _gate_backward(
    grad_out: Tensor, y: Tensor, flipped: Tensor | None, z: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of y, flipped (an unused vector if that is absent) and z."""
    grad_out, y, flipped = contiguous(grad_out, y, flipped)
    z, stride = with_dense_images(z)
    grad_y, grad_z = y.new_empty(y.shape), z.new_empty(z.shape)
    grad_flipped = y.new_empty(0) if flipped is None else flipped.new_empty(y.shape)
    if y.numel():
        with on_device(y):
            _gate_gradient_kernel[_grid(y)](
                grad_out,
                y,
                flipped,
                z,
                grad_y,
                grad_flipped,
                grad_z,
                y.shape[2],
                y.shape[1],
                stride,
                *_TILE,
            )
    return grad_y, grad_flipped, grad_z


@_gate_backward.register_fake
def _(grad_out, y, flipped, z):
    grad_flipped = y.new_empty(0) if flipped is None else flipped.new_empty(y.shape)
    return y.new_empty(y.shape), grad_flipped, z.new_empty(z.shape)


def _setup_conv(ctx, inputs, output) -> None:
    *tensors, ctx.flip = inputs
    ctx.save_for_backward(*tensors)


def _differentiate_conv(ctx, grad_y: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, bias = ctx.saved_tensors
    grad_x, sums = _conv_backward(grad_y, x, weight, bias, ctx.flip)
    for_weight, for_bias = sums.split([weight.numel(), bias.numel()])
    return grad_x, for_weight.view_as(weight).to(weight.dtype), for_bias.to(bias.dtype), None


def _setup_gate(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate_gate(ctx, grad_out: Tensor) -> tuple[Tensor | None, ...]:
    y, flipped, z = ctx.saved_tensors
    grad_y, grad_flipped, grad_z = _gate_backward(grad_out, y, flipped, z)
    return grad_y, None if flipped is None else grad_flipped, grad_z


_conv.register_autograd(_differentiate_conv, setup_context=_setup_conv)
_gate.register_autograd(_differentiate_gate, setup_context=_setup_gate)


def _grid(x: Tensor) -> tuple[int, int, int]:
    batch, channels, length = x.shape
    return triton.cdiv(length, _TILE.tokens), triton.cdiv(channels, _TILE.rows), batch
