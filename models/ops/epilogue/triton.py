"""What follows a convolution on GPU: one pass forward, one backward, as custom operators.

Saved for the backward are x and the bias, and neither of them without an activation. The backward
sums the bias's gradient as it writes that of x. Deterministic: no atomics.
"""

import math
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from models.ops.epilogue.kernels import _epilogue_gradient_kernel, _epilogue_kernel
from models.ops.epilogue.reference import result_dtype
from models.ops.layout import with_dense_images
from models.ops.triton_support import INTERPRETED, check_tensor, on_device


class _Tile(NamedTuple):
    """Channels and pixels that a program has at a time, and its warps."""

    rows: int
    pixels: int
    warps: int = 4


class _Tuning(NamedTuple):
    small: _Tile  # of maps of fewer pixels than `large_from`
    large: _Tile
    large_from: int
    programs: int  # of the gradient: share the tiles among about so many


_GPU = _Tuning(_Tile(8, 128), _Tile(1, 1024), large_from=4096, programs=2112)
# The interpreter runs the same code on a CPU for tests: small tiles, all paths.
_INTERPRETER = _Tuning(_Tile(2, 8), _Tile(1, 16), large_from=20, programs=8)
_tuning = _INTERPRETER if INTERPRETED else _GPU


def epilogue_triton(
    x: Tensor,
    bias: Tensor | None,
    activation: str | None,
    factor: Tensor | None,
    residual: Tensor | None,
) -> Tensor:
    """The same function as epilogue_reference, in one pass.

    Raises:
        RuntimeError: tensors that are not on a GPU, or a float64 map.
    """
    for tensor in (x, residual):
        if tensor is not None:
            check_tensor("epilogue backend 'triton'", tensor, for_float64="reference")
    return _forward(x, bias, activation, factor, residual)


@torch.library.custom_op("cmfs::epilogue", mutates_args=())
def _forward(
    x: Tensor,
    bias: Tensor | None,
    activation: str | None,
    factor: Tensor | None,
    residual: Tensor | None,
) -> Tensor:
    y = x.new_empty(x.shape, dtype=result_dtype(x, residual))
    if not x.numel():
        return y
    x, x_stride = _with_rows(x)
    residual, residual_stride = _with_rows(residual)
    bias, factor = _dense(bias), _dense(factor)
    batch, channels, length = x.shape
    tile = _tile(length)
    vector = math.gcd(16 // x.element_size(), length, x_stride, residual_stride)
    grid = triton.cdiv(length, tile.pixels), triton.cdiv(channels, tile.rows), batch
    with on_device(x):
        _epilogue_kernel[grid](
            x,
            bias,
            factor,
            residual,
            y,
            channels,
            length // vector,
            x_stride // vector,
            residual_stride // vector,
            ACTIVATION=activation,
            VECTOR=vector,
            ROWS=tile.rows,
            PIXELS=tile.pixels,
            num_warps=tile.warps,
        )
    return y


@_forward.register_fake
def _(x, bias, activation, factor, residual):
    return x.new_empty(x.shape, dtype=result_dtype(x, residual))


@torch.library.custom_op("cmfs::epilogue_backward", mutates_args=())
def _backward(
    grad_y: Tensor,
    x: Tensor | None,
    bias: Tensor | None,
    activation: str | None,
    factor: Tensor | None,
    dtype: torch.dtype,
    has_bias: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of x in `dtype` (empty if it is grad_y itself) and of the bias (empty without)."""
    grad_x, grad_bias = _empty_gradients(grad_y, activation, factor, dtype, has_bias)
    if not grad_y.numel():
        return grad_x, grad_bias.zero_()
    grad_y, grad_stride = _with_rows(grad_y)
    x, x_stride = _with_rows(x)
    bias, factor = _dense(bias), _dense(factor)
    batch, channels, length = grad_y.shape
    tile = _tile(length)
    tiles = batch * triton.cdiv(length, tile.pixels)
    groups = triton.cdiv(channels, tile.rows)
    rounds = triton.cdiv(tiles * groups, _tuning.programs)
    splits = triton.cdiv(tiles, rounds)
    parts = grad_bias.new_empty(splits, channels) if has_bias else None
    vector = math.gcd(16 // grad_y.element_size(), length, grad_stride, x_stride)
    with on_device(grad_y):
        _epilogue_gradient_kernel[(splits, groups)](
            grad_y,
            x,
            bias,
            factor,
            grad_x if grad_x.numel() else None,
            parts,
            channels,
            length // vector,
            grad_stride // vector,
            x_stride // vector,
            tiles,
            rounds,
            ACTIVATION=activation,
            VECTOR=vector,
            ROWS=tile.rows,
            PIXELS=tile.pixels,
            num_warps=tile.warps,
        )
    return grad_x, parts.sum(0) if has_bias else grad_bias


@_backward.register_fake
def _(grad_y, x, bias, activation, factor, dtype, has_bias):
    return _empty_gradients(grad_y, activation, factor, dtype, has_bias)


def _empty_gradients(
    grad_y: Tensor,
    activation: str | None,
    factor: Tensor | None,
    dtype: torch.dtype,
    has_bias: bool,
) -> tuple[Tensor, Tensor]:
    is_written = _is_written(grad_y, activation, factor, dtype)
    grad_x = grad_y.new_empty(grad_y.shape if is_written else 0, dtype=dtype)
    return grad_x, grad_y.new_empty(grad_y.shape[1] if has_bias else 0, dtype=torch.float32)


def _is_written(
    grad_y: Tensor, activation: str | None, factor: Tensor | None, dtype: torch.dtype
) -> bool:
    """Whether the gradient of x differs from grad_y."""
    return activation is not None or factor is not None or grad_y.dtype != dtype


def _setup_context(ctx, inputs, output) -> None:
    x, bias, ctx.activation, factor, _ = inputs
    ctx.dtype = x.dtype
    if ctx.activation is None:
        x = bias = None
    ctx.save_for_backward(x, bias, factor)


def _differentiate(ctx, grad_y: Tensor) -> tuple[Tensor | None, ...]:
    x, bias, factor = ctx.saved_tensors
    wants_x, wants_bias, _, _, wants_residual, *_ = ctx.needs_input_grad
    grad_x, grad_bias = grad_y, None
    is_written = _is_written(grad_y, ctx.activation, factor, ctx.dtype)
    if wants_bias or (wants_x and is_written):
        written, grad_bias = _backward(
            grad_y, x, bias, ctx.activation, factor, ctx.dtype, wants_bias
        )
        grad_x = written if is_written else grad_y  # an operator may not return its input
    return (
        grad_x,
        grad_bias if wants_bias else None,
        None,
        None,
        grad_y if wants_residual else None,
    )


_forward.register_autograd(_differentiate, setup_context=_setup_context)


def _tile(length: int) -> _Tile:
    return _tuning.small if length < _tuning.large_from else _tuning.large


def _with_rows(x: Tensor | None) -> tuple[Tensor | None, int]:
    """x (B, C, L) with its batch stride, as with_dense_images."""
    return (None, 0) if x is None else with_dense_images(x.flatten(2))


def _dense(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.flatten().contiguous()
