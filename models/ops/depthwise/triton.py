"""Depthwise convolution on GPU: one pass forward, two backward, as a custom operator.

PyTorch's own kernels load a value for every tap and take several times as long as the bytes do;
its activation and the bias's gradient are passes of their own. Saved for the backward is the input
alone: what SiLU was applied to is made anew. Deterministic: no atomics.
"""

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from models.ops.depthwise.kernels import _conv_kernel, _sums_kernel
from models.ops.layout import contiguous, with_dense_images
from models.ops.triton_support import INTERPRETED, check_tensor, has_triton_tuples, on_device


class _Tile(NamedTuple):
    """What a program covers: `lanes` that each go down `rows` of two columns, in `warps`."""

    rows: int
    lanes: int
    warps: int


_CONV = _Tile(2, 16, 1) if INTERPRETED else _Tile(8, 128, 4)
_SUMS = _Tile(2, 16, 1) if INTERPRETED else _Tile(4, 64, 2)
_VALUES = 48  # that a lane keeps, at most
_PROGRAMS = 8 if INTERPRETED else 4224  # of the sums, each with blocks of lanes of its own


def depthwise_conv_triton(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None
) -> Tensor:
    """The same function as depthwise_conv_reference; sums in float32, the weights as they are.

    Raises:
        RuntimeError: tensors that are not on a GPU, float64 x, or a Triton before 3.3.
    """
    check_tensor("depthwise_conv backend 'triton'", x, for_float64="reference")
    if not (INTERPRETED or has_triton_tuples()):
        raise RuntimeError(
            f"depthwise_conv backend 'triton' needs triton 3.3 or later, got {triton.__version__}"
        )
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    return _forward(x, weight, bias, activation == "silu")


@torch.library.custom_op("cmfs::depthwise_conv", mutates_args=())
def _forward(x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool) -> Tensor:
    return _convolve(x, weight, bias, silu=silu)


@_forward.register_fake
def _(x, weight, bias, silu):
    return x.new_empty(x.shape)


@torch.library.custom_op("cmfs::depthwise_conv_backward", mutates_args=())
def _backward(
    grad_y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool
) -> tuple[Tensor, Tensor]:
    """The gradient of x; those of weight and bias one after the other (C · taps + C,), float32."""
    grad_z, sums = _sum(grad_y, x, weight, bias, silu=silu)
    return _convolve(grad_z, weight, None, flip=True), sums


@_backward.register_fake
def _(grad_y, x, weight, bias, silu):
    sums = weight.new_empty(weight.numel() + x.shape[1], dtype=torch.float32)
    return x.new_empty(x.shape), sums


def _setup_context(ctx, inputs, output) -> None:
    *tensors, ctx.silu = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx, grad_y: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, bias = ctx.saved_tensors
    grad_x, sums = _backward(grad_y, x, weight, bias, ctx.silu)
    for_weight, for_bias = sums.split([weight.numel(), weight.shape[0]])
    for_weight = for_weight.view_as(weight).to(weight.dtype)
    return grad_x, for_weight, None if bias is None else for_bias.to(bias.dtype), None


_forward.register_autograd(_differentiate, setup_context=_setup_context)


def _convolve(
    x: Tensor, weight: Tensor, bias: Tensor | None, *, silu: bool = False, flip: bool = False
) -> Tensor:
    x, stride = with_dense_images(x)
    weight, bias = contiguous(weight, bias)
    y = x.new_empty(x.shape)
    if x.numel():
        batch, channels, height, width = x.shape
        tile = _fit(_CONV, x, weight)
        strips, blocks = _count(x, tile)
        with on_device(x):
            _conv_kernel[(blocks, channels, batch)](
                x,
                weight,
                bias,
                y,
                height,
                width,
                strips,
                stride,
                *weight.shape[2:],
                SILU=silu,
                FLIP=flip,
                PAIR=_pair(x),
                ROWS=tile.rows,
                LANES=tile.lanes,
                num_warps=tile.warps,
            )
    return y


def _sum(
    grad_y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, *, silu: bool
) -> tuple[Tensor, Tensor]:
    """The convolution's gradient before SiLU; those of weight and bias, as _backward."""
    (x, stride), (grad_y, grad_stride) = with_dense_images(x), with_dense_images(grad_y)
    weight, bias = contiguous(weight, bias)
    batch, channels, height, width = x.shape
    tile = _fit(_SUMS, x, weight)
    strips, blocks = _count(x, tile)
    rounds = max(1, triton.cdiv(blocks * channels * batch, _PROGRAMS))
    programs = triton.cdiv(blocks, rounds)
    taps = weight.shape[2] * weight.shape[3]
    parts = x.new_empty((batch * programs, channels * (taps + 1)), dtype=torch.float32)
    grad_z = x.new_empty(x.shape) if silu else grad_y
    if x.numel():
        with on_device(x):
            _sums_kernel[(programs, channels, batch)](
                grad_y,
                x,
                weight,
                bias,
                grad_z,
                parts,
                height,
                width,
                strips,
                grad_stride,
                stride,
                rounds,
                *weight.shape[2:],
                SILU=silu,
                PAIR=_pair(x),
                ROWS=tile.rows,
                LANES=tile.lanes,
                num_warps=tile.warps,
            )
    return grad_z, parts.sum(0)


def _fit(tile: _Tile, x: Tensor, weight: Tensor) -> _Tile:
    """The tile made smaller for a large filter or a small map."""
    kernel_h, kernel_w = weight.shape[2:]
    rows = min(tile.rows, triton.next_power_of_2(max(1, x.shape[2])))
    while rows > 1 and (rows + kernel_h - 1) * (kernel_w + 1) > _VALUES:
        rows //= 2
    lanes, warps = tile.lanes, tile.warps
    while warps > 1 and _count(x, _Tile(rows, lanes // 2, 1))[1] == 1:
        lanes, warps = lanes // 2, warps // 2
    return _Tile(rows, lanes, warps)


def _count(x: Tensor, tile: _Tile) -> tuple[int, int]:
    """Strips of a plane, and blocks of lanes, each of two columns."""
    height, width = x.shape[2:]
    strips = triton.cdiv(height, tile.rows)
    return strips, triton.cdiv(strips * triton.cdiv(width, 2), tile.lanes)


def _pair(x: Tensor) -> int:
    """Bytes of two values, if pairs of columns have an address that is a multiple of it; or 0."""
    return 0 if x.shape[3] % 2 else 2 * x.element_size()
