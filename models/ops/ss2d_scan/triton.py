"""The four-direction scan on GPU: Triton kernels as custom operators with backwards of their own.

The pixels are brought into two orders (rows first, columns first; one of them is the map's own
for a "cross" scan); each order is projected by one product and walked both ways by the same
program. No dt, no second copy for the reversed directions and no output per direction exists.
Saved for the backward are the two orders, their projections, and one state per chunk.
Deterministic: no atomics.
"""

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from models.ops.layout import contiguous
from models.ops.selective_scan.triton import _carry, _Shape
from models.ops.ss2d_scan.kernels import (
    _from_orders_kernel,
    _map_ends_kernel,
    _map_gradient_kernel,
    _map_output_kernel,
    _to_orders_kernel,
)
from models.ops.ss2d_scan.orders import scan_orders
from models.ops.ss2d_scan.products import linear_gradients, long_product
from models.ops.triton_support import INTERPRETED, check_tensor, on_device


class _Tuning(NamedTuple):
    """Shapes of the kernels; those of the scan cover one chunk of lanes x steps tokens."""

    ends: _Shape
    output: _Shape
    gradient: _Shape
    stream_programs: int  # walk along the rows if there are this many programs at least
    gradient_programs: int  # share the channels among programs until there are so many
    reorder: tuple[int, int]  # channels and tokens of a program


_GPU = _Tuning(
    ends=_Shape(4, 32, 8, 1),
    output=_Shape(2, 32, 8, 1, registers=128),
    gradient=_Shape(8, 32, 8, 4),
    stream_programs=1536,
    gradient_programs=2112,
    reorder=(4, 1024),
)
# The interpreter runs the same code on a CPU for tests: small tiles, all paths.
_INTERPRETER = _Tuning(
    ends=_Shape(2, 8, 2, 1),
    output=_Shape(2, 8, 2, 1),
    gradient=_Shape(2, 8, 2, 2),
    stream_programs=6,
    gradient_programs=4,
    reorder=(2, 16),
)
_tuning = _INTERPRETER if INTERPRETED else _GPU


def ss2d_scan_triton(
    x: Tensor,
    x_proj_weight: Tensor,
    dt_projs_weight: Tensor,
    dt_projs_bias: Tensor,
    A_logs: Tensor,
    Ds: Tensor,
    scan: str,
    window: int,
) -> Tensor:
    """The same function as ss2d_scan_reference; state and dt in float32.

    Raises:
        RuntimeError: tensors that are not on a GPU, or float64 x.
    """
    check_tensor("scan backend 'triton'", x, for_float64="chunked")
    ordered = _to_orders(x, scan, window)  # (2, B, D, L)
    # (2 orders, 2 walks · (R + 2N), D) from (4 directions, ...); direction = order + 2 · walk
    weight = x_proj_weight.unflatten(0, (2, 2)).transpose(0, 1).flatten(1, 2)
    projected = _project(*_in_one_type(ordered, weight)).unflatten(2, (2, -1))
    A = -torch.exp(A_logs.float()).unflatten(0, (4, -1))
    parameters = (
        dt_projs_weight.float(),
        dt_projs_bias.float(),
        A,
        Ds.float().unflatten(0, (4, -1)),
    )
    y, _ = _forward(ordered, projected, *parameters)
    return _from_orders(y, *x.shape[2:], scan, window).to(x.dtype)


@torch.library.custom_op("cmfs::map_to_orders", mutates_args=())
def _to_orders(x: Tensor, scan: str, window: int) -> Tensor:
    """(B, D, H, W) -> (2, B, D, L): the tokens with rows first and with columns first."""
    x = x.contiguous()
    batch, channels, height, width = x.shape
    out = x.new_empty(2, batch, channels, height * width)
    pixels, _ = _orders(height, width, scan, window, x.device)
    if x.numel():
        with on_device(x):
            _to_orders_kernel[(*_reorder_grid(out), 2)](
                x, pixels, out, *_reorder_sizes(out), *_tuning.reorder
            )
    return out


@_to_orders.register_fake
def _(x, scan, window):
    return x.new_empty(2, *x.shape[:2], x.shape[2] * x.shape[3])


@torch.library.custom_op("cmfs::map_from_orders", mutates_args=())
def _from_orders(x: Tensor, height: int, width: int, scan: str, window: int) -> Tensor:
    """(2, B, D, L) -> (B, D, H, W): the sum of what both orders hold for a pixel."""
    x = x.contiguous()
    out = x.new_empty(*x.shape[1:3], height, width)
    _, steps = _orders(height, width, scan, window, x.device)
    if out.numel():
        with on_device(x):
            _from_orders_kernel[_reorder_grid(x)](
                x, steps, out, *_reorder_sizes(x), *_tuning.reorder
            )
    return out


@_from_orders.register_fake
def _(x, height, width, scan, window):
    return x.new_empty(*x.shape[1:3], height, width)


def _setup_to_orders(ctx, inputs, output) -> None:
    x, ctx.scan, ctx.window = inputs
    ctx.hw = x.shape[2:]


def _setup_from_orders(ctx, inputs, output) -> None:
    _, _, _, ctx.scan, ctx.window = inputs


_to_orders.register_autograd(
    lambda ctx, grad: (_from_orders(grad, *ctx.hw, ctx.scan, ctx.window), None, None),
    setup_context=_setup_to_orders,
)
_from_orders.register_autograd(
    lambda ctx, grad: (_to_orders(grad, ctx.scan, ctx.window), None, None, None, None),
    setup_context=_setup_from_orders,
)


def _orders(
    height: int, width: int, scan: str, window: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Of both orders, the pixel that step l visits and the step that visits pixel p; (2, L)."""
    pixels, steps = scan_orders(height, width, scan, window, device, torch.int32)
    return pixels[:2], steps[:2]


def _reorder_grid(ordered: Tensor) -> tuple[int, int]:
    length, rows = _reorder_sizes(ordered)
    row_block, token_block = _tuning.reorder
    return triton.cdiv(length, token_block), triton.cdiv(rows, row_block)


def _reorder_sizes(ordered: Tensor) -> tuple[int, int]:
    """Tokens and rows of (2, B, D, L)."""
    return ordered.shape[3], ordered.shape[1] * ordered.shape[2]


def _in_one_type(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """A map and the weight of a product with it in one type: autocast's, else the weight's."""
    kind, dtype = x.device.type, weight.dtype
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
    return x.to(dtype), weight.to(dtype)


@torch.library.custom_op("cmfs::project_orders", mutates_args=())
def _project(x: Tensor, weight: Tensor) -> Tensor:
    """weight (2 orders, outputs, D) · x (2, B, D, L) -> (2, B, outputs, L)."""
    return torch.matmul(weight[:, None], x)


@_project.register_fake
def _(x, weight):
    return x.new_empty(2, x.shape[1], weight.shape[1], x.shape[3])


@torch.library.custom_op("cmfs::project_orders_weight_gradient", mutates_args=())
def _project_weight_gradient(gradient: Tensor, x: Tensor) -> Tensor:
    """dL/dweight (2, outputs, D) from gradient (2, B, outputs, L) and x (2, B, D, L)."""
    gradient, x = gradient.contiguous(), x.contiguous()
    return long_product(gradient, x).sum((0, 2)).to(x.dtype)


@_project_weight_gradient.register_fake
def _(gradient, x):
    return x.new_empty(2, gradient.shape[2], x.shape[2])


def _setup_project(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate_project(ctx, gradient: Tensor) -> tuple[Tensor, Tensor]:
    x, weight = ctx.saved_tensors
    return torch.matmul(weight.mT[:, None], gradient), _project_weight_gradient(gradient, x)


_project.register_autograd(_differentiate_project, setup_context=_setup_project)


@torch.library.custom_op("cmfs::ss2d_scan", mutates_args=())
def _forward(
    x: Tensor, projected: Tensor, weight: Tensor, bias: Tensor, A: Tensor, D: Tensor
) -> tuple[Tensor, Tensor]:
    """y (2, B, D, L), of each order the sum of both walks, and the states between chunks.

    x (2, B, D, L); projected (2, B, 2, R + 2N, L); weight (4, D, R), bias and D (4, D) and A
    (4, D, N) in float32.
    """
    x, projected, weight, bias, A, D = contiguous(x, projected, weight, bias, A, D)
    sizes = _sizes(x, weight, A)
    y = torch.empty_like(x)
    states = _empty_states(x, sizes)
    if y.numel() == 0:
        return y, states
    shape = _tuning.output
    programs = triton.cdiv(sizes.channels, shape.rows) * 2 * sizes.batch
    stream = programs >= _tuning.stream_programs
    with on_device(x):
        if not stream:
            _enter_chunks(sizes, x, projected, weight, bias, A, states, gradient=False)
            programs *= sizes.chunks
        _map_output_kernel[(programs,)](
            x,
            projected,
            weight,
            bias,
            A,
            D,
            y,
            states,
            *sizes.of_kernels(shape.rows),
            STREAM=stream,
            **shape.options(),
        )
    return y, states


@_forward.register_fake
def _(x, projected, weight, bias, A, D):
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    return y, _empty_states(x, _sizes(x, weight, A))


@torch.library.custom_op("cmfs::ss2d_scan_backward", mutates_args=())
def _backward(
    grad_y: Tensor,
    x: Tensor,
    projected: Tensor,
    weight: Tensor,
    bias: Tensor,
    A: Tensor,
    D: Tensor,
    states: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, projected, weight, bias, A and D."""
    grad_y = grad_y.contiguous()
    x, projected, weight, bias, A, D = contiguous(x, projected, weight, bias, A, D)
    sizes = _sizes(x, weight, A)
    rank, states_count, length = sizes.rank, sizes.states, sizes.length
    grad_x = torch.empty_like(x)
    grad_dt = x.new_empty(2, sizes.batch, 2, sizes.channels, length)
    shape = _tuning.gradient
    blocks = triton.cdiv(sizes.channels, shape.rows)
    programs = max(1, 2 * sizes.batch * sizes.chunks)
    splits = min(blocks, triton.cdiv(_tuning.gradient_programs, programs))
    matrices = (2, sizes.batch, 2, 2 * states_count, length)
    grad_matrices = x.new_empty(splits, *matrices, dtype=torch.float32)
    rows = (4, sizes.batch, sizes.chunks, sizes.channels, states_count + 2)
    grad_rows = x.new_empty(rows, dtype=torch.float32)
    if x.numel():
        with on_device(x):
            gradients = torch.empty_like(states)
            _enter_chunks(sizes, grad_y, projected, weight, bias, A, gradients, gradient=True)
            kernel_sizes = sizes.of_kernels(shape.rows)
            _map_gradient_kernel[(programs * splits,)](
                grad_y,
                x,
                projected,
                weight,
                bias,
                A,
                D,
                states,
                gradients,
                grad_x,
                grad_dt,
                grad_matrices,
                grad_rows,
                *kernel_sizes[:-1],
                splits,
                kernel_sizes[-1],
                WARPS=shape.warps,
                **shape.options(),
            )
    grad_projected = torch.empty_like(projected)
    # (2 orders, batch, 2 walks, D, R) from (4 directions, D, R)
    by_order = weight.unflatten(0, (2, 2)).transpose(0, 1)[:, None]
    by_order = by_order.expand(-1, sizes.batch, -1, -1, -1)
    of_low, of_weight = linear_gradients(grad_dt, projected[:, :, :, :rank], by_order)
    grad_projected[:, :, :, :rank] = of_low.sum(0)
    grad_projected[:, :, :, rank:] = grad_matrices.sum(0)
    of_A, of_D, of_bias = grad_rows.sum((1, 2)).split([states_count, 1, 1], dim=2)
    return (
        grad_x,
        grad_projected,
        of_weight.sum((0, 2)).transpose(0, 1).flatten(0, 1),
        of_bias.flatten(1).contiguous(),
        of_A.contiguous(),
        of_D.flatten(1).contiguous(),
    )


@_backward.register_fake
def _(grad_y, x, projected, weight, bias, A, D, states):
    whole = torch.contiguous_format
    return tuple(
        torch.empty_like(t, memory_format=whole) for t in (x, projected, weight, bias, A, D)
    )


def _setup_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs, output[1])


def _differentiate(ctx, grad_y: Tensor, _grad_states: Tensor) -> tuple[Tensor, ...]:
    return _backward(grad_y, *ctx.saved_tensors)


_forward.register_autograd(_differentiate, setup_context=_setup_context)


class _Sizes(NamedTuple):
    length: int
    channels: int
    rank: int
    states: int
    chunks: int
    batch: int

    def of_kernels(self, rows: int) -> tuple[int, ...]:
        """length, channels, R, N, chunks, blocks of `rows` channels, batches."""
        return (*self[:5], triton.cdiv(self.channels, rows), self.batch)


def _sizes(x: Tensor, weight: Tensor, A: Tensor) -> _Sizes:
    _, batch, channels, length = x.shape
    chunk = _tuning.output.lanes * _tuning.output.steps
    chunks = (length + chunk - 1) // chunk
    return _Sizes(length, channels, weight.shape[2], A.shape[2], chunks, batch)


def _empty_states(x: Tensor, sizes: _Sizes) -> Tensor:
    """States between chunks; of a single chunk one of zeros, which kernels read and drop."""
    shape = (4, sizes.batch, max(sizes.chunks - 1, 1), sizes.channels, sizes.states)
    make = x.new_empty if sizes.chunks > 1 else x.new_zeros
    return make(shape, dtype=torch.float32)


def _enter_chunks(
    sizes: _Sizes,
    x: Tensor,
    projected: Tensor,
    weight: Tensor,
    bias: Tensor,
    A: Tensor,
    states: Tensor,
    *,
    gradient: bool,
) -> None:
    """Fill `states` with what crosses the borders of chunks."""
    if sizes.chunks == 1:
        return
    shape = _tuning.ends
    spans = states.new_empty(4, sizes.batch, sizes.chunks, sizes.channels)
    ends = states.new_empty(*spans.shape, sizes.states)
    kernel_sizes = sizes.of_kernels(shape.rows)
    blocks = kernel_sizes[-2]
    _map_ends_kernel[(blocks * sizes.chunks * 2 * sizes.batch,)](
        x,
        projected,
        weight,
        bias,
        A,
        ends,
        spans,
        *kernel_sizes,
        GRADIENT=gradient,
        **shape.options(),
    )
    reversed_sets = 0b0011 if gradient else 0b1100  # directions from the last chunk to the first
    _carry(ends, spans, A, states, sizes.chunks, reversed_sets)
