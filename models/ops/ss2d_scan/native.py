"""The four-direction scan on CPU in C++ (models/ops/native/scan.cpp).

One product gives every pixel its dt_low, B and C for all directions; the rest, from the order of
the pixels to the merged output, happens inside: no copy of the map, and no dt, per direction.
"""

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
from models.ops.ss2d_scan.orders import scan_orders


def ss2d_scan_native(
    x: Tensor,
    x_proj_weight: Tensor,
    dt_projs_weight: Tensor,
    dt_projs_bias: Tensor,
    A_logs: Tensor,
    Ds: Tensor,
    scan: str,
    window: int,
) -> Tensor:
    """The same function as ss2d_scan_reference; state in float32.

    Raises:
        RuntimeError: tensors that are not on the CPU, float64 x, or no library and no compiler.
    """
    if x.device.type != "cpu":
        raise RuntimeError(f"scan backend 'native' needs CPU tensors, got {x.device}")
    if x.dtype == torch.float64:
        raise RuntimeError("scan backend 'native' has a float32 state; use 'chunked' for float64")
    height, width = x.shape[2:]
    tokens = x.flatten(2)
    # (B, L, 4 (R + 2N)): as a product of (L, D) and (D, 4 (R + 2N)) per image
    to_projected = x_proj_weight.flatten(0, 1).t()
    projected = torch.matmul(tokens.transpose(1, 2).to(to_projected.dtype), to_projected)
    order, _ = scan_orders(height, width, scan, window, x.device)
    floats = (tokens, projected.unflatten(2, (4, -1)), dt_projs_weight, dt_projs_bias)
    A = -torch.exp(A_logs.float()).unflatten(0, (4, -1))
    y, _ = _forward(*(t.float() for t in floats), A, Ds.float().unflatten(0, (4, -1)), order)
    return y.unflatten(2, (height, width)).to(x.dtype)


@torch.library.custom_op("cmfs::ss2d_scan_native", mutates_args=(), device_types="cpu")
def _forward(
    x: Tensor, projected: Tensor, weight: Tensor, bias: Tensor, A: Tensor, D: Tensor, order: Tensor
) -> tuple[Tensor, Tensor]:
    """y (B, D, L) and the states at the borders of tiles.

    x (B, D, L); projected (B, L, 4, R + 2N); weight (4, D, R); bias, D (4, D); A (4, D, N), all
    float32; order (4, L) int64.
    """
    library = require_library()
    inputs = contiguous(x, projected, weight, bias, A, D)
    y = torch.zeros_like(inputs[0])
    borders = _empty_borders(x, A)
    if y.numel():
        library.cmfs_map_forward(
            _sizes(x, weight, A),
            pointers(inputs),
            pointer(order.contiguous()),
            pointer(y),
            pointer(borders),
        )
    return y, borders


@_forward.register_fake
def _(x, projected, weight, bias, A, D, order):
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    return y, _empty_borders(x, A)


@torch.library.custom_op("cmfs::ss2d_scan_native_backward", mutates_args=(), device_types="cpu")
def _backward(
    grad_y: Tensor,
    x: Tensor,
    projected: Tensor,
    weight: Tensor,
    bias: Tensor,
    A: Tensor,
    D: Tensor,
    order: Tensor,
    borders: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, projected, weight, bias, A and D."""
    inputs = contiguous(x, projected, weight, bias, A, D)
    grad_y, order = grad_y.contiguous(), order.contiguous()
    sizes = _sizes(x, weight, A)
    parts = sizes[7]
    grad_x = torch.zeros_like(inputs[0])
    grad_projected = projected.new_empty(parts, *projected.shape)
    by_image = [t.new_zeros(x.shape[0], *t.shape) for t in (weight, bias, A, D)]
    if x.numel():
        require_library().cmfs_map_backward(
            sizes,
            pointers(inputs),
            pointer(order),
            pointer(grad_y),
            pointer(borders),
            pointers([grad_x, grad_projected, *by_image]),
        )
    return grad_x, grad_projected.sum(0), *(t.sum(0) for t in by_image)


@_backward.register_fake
def _(grad_y, x, projected, weight, bias, A, D, order, borders):
    whole = torch.contiguous_format
    return tuple(
        torch.empty_like(t, memory_format=whole) for t in (x, projected, weight, bias, A, D)
    )


def _setup_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs, output[1])


def _differentiate(ctx, grad_y: Tensor, _grad_borders: Tensor) -> tuple[Tensor | None, ...]:
    return *_backward(grad_y, *ctx.saved_tensors), None


_forward.register_autograd(_differentiate, setup_context=_setup_context)


def _empty_borders(x: Tensor, A: Tensor) -> Tensor:
    batch, channels, length = x.shape
    states = A.shape[2]
    borders = max((length - 1) // tile_of(states), 0)
    return x.new_empty(batch, 4, channels, borders, states)


def _sizes(x: Tensor, weight: Tensor, A: Tensor) -> ctypes.Array:
    """What scan.cpp calls sizes; delta always passes through softplus."""
    batch, channels, length = x.shape
    rank, states, threads = weight.shape[2], A.shape[2], torch.get_num_threads()
    parts = parts_of(channels, batch, threads)
    shape = (length, states, tile_of(states), True)
    return integers(*shape, batch, channels, rank, parts, threads)
