"""The selective scan on CPU in C++ (models/ops/native/scan.cpp)."""

import ctypes

import torch
from torch import Tensor

from models.ops.layout import contiguous
from models.ops.native.library import (
    integers,
    parts_of,
    pointer,
    pointers,
    require_library,
    tile_of,
)
from models.ops.selective_scan.gradients import register_gradients


def selective_scan_native(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
) -> Tensor:
    """The same function as selective_scan_reference; state in float32.

    Raises:
        RuntimeError: tensors that are not on the CPU, float64 u, or no library and no compiler.
    """
    if u.device.type != "cpu":
        raise RuntimeError(f"scan backend 'native' needs CPU tensors, got {u.device}")
    if u.dtype == torch.float64:
        raise RuntimeError("scan backend 'native' has a float32 state; use 'chunked' for float64")
    floats = [x if x is None else x.float() for x in (u, delta, A, B, C, D, delta_bias)]
    floats[3:5] = (matrix.transpose(2, 3) for matrix in floats[3:5])
    return _forward(*floats, delta_softplus)[0].to(u.dtype)


@torch.library.custom_op("cmfs::selective_scan_native", mutates_args=(), device_types="cpu")
def _forward(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
) -> tuple[Tensor, Tensor]:
    """y (batch, D, L) and the states at the borders of tiles; B, C (batch, K, L, N), float32."""
    library = require_library()
    inputs = contiguous(u, delta, A, B, C, D, delta_bias)
    y = torch.empty_like(inputs[0])
    borders = _empty_borders(u, A)
    if y.numel():
        library.cmfs_scan_forward(
            _sizes(u, A, B, delta_softplus), pointers(inputs), pointer(y), pointer(borders)
        )
    return y, borders


@_forward.register_fake
def _(u, delta, A, B, C, D, delta_bias, delta_softplus):
    y = torch.empty_like(u, memory_format=torch.contiguous_format)
    return y, _empty_borders(u, A)


@torch.library.custom_op(
    "cmfs::selective_scan_native_backward", mutates_args=(), device_types="cpu"
)
def _backward(
    grad_y: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    borders: Tensor,
    delta_softplus: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of u, delta, A, B, C, D and delta_bias, the last two whether there is one or not.

    Those of A, D and the bias are summed over images, those of B and C over parts of the channels.
    """
    inputs = contiguous(u, delta, A, B, C, D, delta_bias)
    grad_y = grad_y.contiguous()
    sizes = _sizes(u, A, B, delta_softplus)
    parts = sizes[7]
    grad_u, grad_delta = torch.empty_like(inputs[0]), torch.empty_like(inputs[1])
    grad_A = u.new_zeros(u.shape[0], *A.shape)
    grad_D, grad_bias = u.new_zeros(2, *u.shape[:2])
    grad_B, grad_C = u.new_zeros(2, parts, *B.shape)
    if u.numel():
        gradients = [grad_u, grad_delta, grad_A, grad_D, grad_bias, grad_B, grad_C]
        require_library().cmfs_scan_backward(
            sizes, pointers(inputs), pointer(grad_y), pointer(borders), pointers(gradients)
        )
    sums = (x.sum(0) for x in (grad_A, grad_B, grad_C, grad_D, grad_bias))
    return grad_u, grad_delta, *sums


@_backward.register_fake
def _(grad_y, u, delta, A, B, C, D, delta_bias, borders, delta_softplus):
    vector = A.new_empty(A.shape[:1])
    whole = (
        torch.empty_like(x, memory_format=torch.contiguous_format) for x in (u, delta, A, B, C)
    )
    return *whole, vector, torch.empty_like(vector)


register_gradients(_forward, _backward)


def _empty_borders(u: Tensor, A: Tensor) -> Tensor:
    batch, channels, length = u.shape
    borders = max((length - 1) // tile_of(A.shape[1]), 0)
    return u.new_empty(batch, channels, borders, A.shape[1])


def _sizes(u: Tensor, A: Tensor, B: Tensor, delta_softplus: bool) -> ctypes.Array:
    """What scan.cpp calls sizes."""
    batch, channels, length = u.shape
    groups, states, threads = B.shape[1], A.shape[1], torch.get_num_threads()
    parts = parts_of(channels // groups, batch * groups, threads)
    shape = (length, states, tile_of(states), delta_softplus)
    return integers(*shape, batch, channels, groups, parts, threads)
