"""A convolution with repeated borders on GPU, to few channels.

For a few channels out of many, at the size of the image, cuDNN's kernels take several times as long
as the map takes to be read, and the padded map is a copy of it. Deterministic: no atomics.
"""

import torch
import triton
from torch import Tensor

from models.ops.layout import contiguous
from models.ops.replicate_conv.kernels import (
    _forward_kernel,
    _input_gradient_kernel,
    _weight_gradient_kernel,
)
from models.ops.triton_support import INTERPRETED, check_tensor, on_device

_PIXELS = 16 if INTERPRETED else 128  # of a tile
_SUMMED_PIXELS = 16 if INTERPRETED else 64  # of a tile whose pixels are summed over
_CHANNELS = 16 if INTERPRETED else 32  # in, at a time
_PROGRAMS = 4 if INTERPRETED else 2112  # of the weight's gradient, about


def replicate_conv_triton(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The same function as replicate_conv_reference; in TF32 where convolutions are.

    Raises:
        RuntimeError: tensors that are not on a GPU, or float64 x.
    """
    check_tensor("replicate_conv backend 'triton'", x, for_float64="reference")
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    return _forward(x, weight, bias)


@torch.library.custom_op("cmfs::replicate_conv", mutates_args=())
def _forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    x = x.contiguous()
    batch, in_channels, height, width = x.shape
    out_channels = weight.shape[0]
    y = x.new_empty(batch, out_channels, height, width)
    if y.numel():
        with on_device(x):
            _forward_kernel[(triton.cdiv(height * width, _PIXELS), batch)](
                x,
                _by_tap(weight),
                bias,
                y,
                height,
                width,
                in_channels,
                out_channels,
                _padded(out_channels),
                _CHANNELS if in_channels > 16 else 16,
                _PIXELS,
                _precision(x),
            )
    return y


@_forward.register_fake
def _(x, weight, bias):
    return x.new_empty(x.shape[0], weight.shape[0], *x.shape[2:])


@torch.library.custom_op("cmfs::replicate_conv_backward", mutates_args=())
def _backward(grad_y: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of x and weight."""
    grad_y, x = contiguous(grad_y, x)
    batch, in_channels, height, width = x.shape
    out_channels = weight.shape[0]
    grad_x = torch.empty_like(x)
    sizes = (height, width, in_channels, out_channels)
    columns = _CHANNELS if in_channels > 16 else 16
    channel_tiles = triton.cdiv(in_channels, columns)
    tiles = triton.cdiv(height * width, _SUMMED_PIXELS)
    rounds = max(1, tiles * batch * channel_tiles * 3 // _PROGRAMS)
    splits = triton.cdiv(tiles * batch, rounds)
    parts = x.new_zeros((splits, 3, 3, out_channels, in_channels), dtype=torch.float32)
    if grad_x.numel():
        with on_device(x):
            _input_gradient_kernel[(triton.cdiv(height * width, _PIXELS), channel_tiles, batch)](
                grad_y,
                _by_tap(weight),
                grad_x,
                *sizes,
                _padded(out_channels),
                columns,
                _PIXELS,
                _precision(x),
            )
            _weight_gradient_kernel[(splits, channel_tiles, 3)](
                grad_y,
                x,
                parts,
                *sizes,
                batch,
                tiles,
                rounds,
                _padded(out_channels),
                columns,
                _SUMMED_PIXELS,
                _precision(x),
            )
    return grad_x, parts.sum(0).permute(2, 3, 0, 1).to(weight.dtype).contiguous()


@_backward.register_fake
def _(grad_y, x, weight):
    whole = torch.contiguous_format
    return tuple(torch.empty_like(t, memory_format=whole) for t in (x, weight))


def _setup_context(ctx, inputs, output) -> None:
    x, weight, bias = inputs
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(x, weight)


def _differentiate(ctx, grad_y: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    grad_bias = None
    if ctx.bias_dtype is not None:
        grad_bias = grad_y.sum((0, 2, 3), dtype=torch.float32).to(ctx.bias_dtype)
    return *_backward(grad_y, *ctx.saved_tensors), grad_bias


_forward.register_autograd(_differentiate, setup_context=_setup_context)


def _by_tap(weight: Tensor) -> Tensor:
    """(O, C, 3, 3) -> (9, O, C)."""
    return weight.permute(2, 3, 0, 1).contiguous()


def _padded(channels: int) -> int:
    """Rows of a product: a power of two, at least 16."""
    return max(16, triton.next_power_of_2(channels))


def _precision(x: Tensor) -> str:
    """Half precision has no more bits than TF32."""
    is_exact = x.dtype == torch.float32 and not torch.backends.cudnn.allow_tf32
    return "ieee" if is_exact else "tf32"
