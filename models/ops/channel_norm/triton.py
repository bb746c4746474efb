"""Layer and RMS normalisation over channels on GPU: one pass over a map that stays channel-first.

PyTorch's own wants channels last: the map would be copied there, and what follows would have to
take it so or copy it back. Deterministic: no atomics.
"""

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from models.ops.channel_norm.kernels import _norm_gradient_kernel, _norm_kernel
from models.ops.triton_support import INTERPRETED, check_tensor, on_device

_ELEMENTS = 64 if INTERPRETED else 4096  # of a tile, where the channels leave the choice
_PROGRAMS = 4 if INTERPRETED else 528  # of the gradient, each with tiles of its own


def channel_norm_triton(
    x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, dtype: torch.dtype
) -> Tensor:
    """The same function as channel_norm_reference, in one pass, and rounded to `dtype`.

    Raises:
        RuntimeError: tensors that are not on a GPU, or float64 x.
    """
    check_tensor("channel_norm backend 'triton'", x, for_float64="reference")
    return _forward(x, weight, bias, eps, dtype)[0]


@torch.library.custom_op("cmfs::channel_norm", mutates_args=())
def _forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """y (B, C, H, W) of `dtype`; each pixel's mean and 1 / sqrt(variance + eps), (B, H · W)."""
    x = x.contiguous()
    y = torch.empty_like(x, dtype=dtype)
    mean, rstd = (x.new_empty(x.shape[0], _pixels(x), dtype=torch.float32) for _ in range(2))
    if x.numel():
        cut = _cut(x)
        with on_device(x):
            _norm_kernel[(triton.cdiv(_pixels(x), cut.pixels), x.shape[0])](
                x,
                weight,
                bias,
                y,
                mean,
                rstd,
                _pixels(x),
                x.shape[1],
                eps,
                CHANNELS=cut.channels,
                PIXELS=cut.pixels,
                num_warps=cut.warps,
            )
    return y, mean, rstd


@_forward.register_fake
def _(x, weight, bias, eps, dtype):
    y = torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)
    mean, rstd = (x.new_empty(x.shape[0], _pixels(x), dtype=torch.float32) for _ in range(2))
    return y, mean, rstd


@torch.library.custom_op("cmfs::channel_norm_backward", mutates_args=())
def _backward(
    grad_y: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, is_centered: bool
) -> tuple[Tensor, Tensor]:
    """The gradient of x; those of weight and bias side by side (2, C), float32."""
    grad_y, x = grad_y.contiguous(), x.contiguous()
    batch, channels = x.shape[:2]
    cut, grad_x = _cut(x), torch.empty_like(x)
    blocks = triton.cdiv(_pixels(x), cut.pixels)
    rounds = max(1, triton.cdiv(blocks * batch, _PROGRAMS))
    programs = triton.cdiv(blocks, rounds)
    parts = x.new_empty((batch * programs, 2, channels), dtype=torch.float32)
    if x.numel():
        with on_device(x):
            _norm_gradient_kernel[(programs, batch)](
                grad_y,
                x,
                weight,
                mean,
                rstd,
                grad_x,
                parts,
                _pixels(x),
                channels,
                rounds,
                CENTERED=is_centered,
                CHANNELS=cut.channels,
                PIXELS=cut.pixels,
                num_warps=cut.warps,
            )
    return grad_x, parts.sum(0)


@_backward.register_fake
def _(grad_y, x, weight, mean, rstd, is_centered):
    grad_x = torch.empty_like(x, memory_format=torch.contiguous_format)
    return grad_x, weight.new_empty((2, *weight.shape), dtype=torch.float32)


def _setup_context(ctx, inputs, output) -> None:
    x, weight, bias, *_ = inputs
    ctx.is_centered = bias is not None
    ctx.save_for_backward(x, weight, *output[1:])


def _differentiate(ctx, grad_y: Tensor, _grad_mean: Tensor, _grad_rstd: Tensor):
    x, weight, mean, rstd = ctx.saved_tensors  # once: a recomputed tensor is given out once
    for_x, sums = _backward(grad_y, x, weight, mean, rstd, ctx.is_centered)
    for_weight, for_bias = sums.to(weight.dtype)
    return for_x, for_weight, for_bias if ctx.is_centered else None, None, None


_forward.register_autograd(_differentiate, setup_context=_setup_context)


class _Cut(NamedTuple):
    """A program's tile and its warps."""

    channels: int
    pixels: int
    warps: int


def _cut(x: Tensor) -> _Cut:
    channels = max(2, triton.next_power_of_2(x.shape[1]))
    least = 4 if INTERPRETED else 16 if channels == 512 else 8
    pixels = max(least, min(64, _ELEMENTS // channels))
    warps = min(16, max(4, channels * pixels // 1024))  # 32 values a thread
    return _Cut(channels, pixels, warps)


def _pixels(x: Tensor) -> int:
    return x.shape[2] * x.shape[3]
