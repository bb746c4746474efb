"""The four-direction scan on NVIDIA GPUs (models/ops/cuda) as a custom operator.

The pixels are brought into two orders (of a "cross" scan the first is the map's own); all
directions are projected by one product on the map; one kernel walks both orders both ways, making
dt of dt_low as it goes; what the four directions say of a pixel is added at the end. No dt and no
copy for the reversed directions exists. Saved for the backward are the map in its other order, the
projections, and one state per chunk. Deterministic.

Direction = order + 2 · walk, everywhere.
"""

import torch
from torch import Tensor

from models.ops.cuda.library import check_tensor
from models.ops.cuda.reorder import Move, from_orders, merge_orders, to_orders
from models.ops.cuda.scan import Scan, count_borders, scan_backward, scan_forward
from models.ops.cuda.sums import sum_first
from models.ops.layout import contiguous
from models.ops.ss2d_scan.orders import scan_orders
from models.ops.triton_support import has_triton


def ss2d_scan_cuda(
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
        RuntimeError: tensors that are not on an NVIDIA GPU, float64 x, or no run-time compiler.
    """
    check_tensor(x)
    kind = x.device.type
    if torch.is_autocast_enabled(kind):
        x_proj_weight = x_proj_weight.to(torch.get_autocast_dtype(kind))
    y, *_ = _forward(
        x,
        x_proj_weight,
        dt_projs_weight.float(),
        dt_projs_bias.float(),
        A_logs.float().unflatten(0, (4, -1)),
        Ds.float().unflatten(0, (4, -1)),
        scan,
        window,
    )
    return y


@torch.library.custom_op("cmfs::ss2d_scan_cuda", mutates_args=())
def _forward(
    x: Tensor,
    to_projected: Tensor,
    weight: Tensor,
    bias: Tensor,
    A_logs: Tensor,
    D: Tensor,
    scan: str,
    window: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y (B, D, H, W), and for the backward: orders, projections, and states between chunks.

    x (B, D, H, W); to_projected (4, R + 2N, D); weight (4, D, R), bias and D (4, D) and A_logs
    (4, D, N) in float32.
    """
    x = x.contiguous()
    batch, channels, *hw = x.shape
    pixels, steps = _tables(*hw, scan, window, x.device)
    orders = _empty_orders(x, scan)
    tokens = x.flatten(2)
    slots, projections = _empty_projections(x, to_projected, scan)
    product = to_projected.flatten(0, 1).expand(batch, -1, -1), tokens.to(to_projected.dtype)
    if scan == "cross":  # the first order's projections stay where the product puts them
        on_map = slots[:, :4]
        torch.bmm(*product, out=on_map.flatten(1, 2))
    else:
        on_map = torch.bmm(*product).unflatten(1, (4, -1))
    first = 2 - len(orders)
    move = Move(_by_order(on_map)[first:], projections[first:])
    to_orders([_map_move(tokens, orders), move], hw, pixels, first_source=first)
    y = torch.empty_like(x)
    directions = _by_order(x.new_empty(batch, 4, channels, tokens.shape[2]))
    task = _as_scan(tokens, orders, projections, weight, bias, A_logs, D)
    borders = scan_forward(task, directions)
    merge_orders(directions, y.flatten(2), hw, steps)
    return y, orders, projections, borders


@_forward.register_fake
def _(x, to_projected, weight, bias, A_logs, D, scan, window):
    batch, channels, height, width = x.shape
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    count = count_borders(batch, 4, channels, height * width, A_logs.shape[2])
    _, projections = _empty_projections(x, to_projected, scan)
    return y, _empty_orders(x, scan), projections, A_logs.new_empty(count)


@torch.library.custom_op("cmfs::ss2d_scan_cuda_backward", mutates_args=())
def _backward(
    grad_y: Tensor,
    x: Tensor,
    to_projected: Tensor,
    weight: Tensor,
    bias: Tensor,
    A_logs: Tensor,
    D: Tensor,
    orders: Tensor,
    projections: Tensor,
    borders: Tensor,
    scan: str,
    window: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, to_projected and weight; of A_logs, D and bias side by side (4, D, N + 2)."""
    x, grad_y = x.contiguous(), grad_y.contiguous()
    batch, channels, *hw = x.shape
    rank = weight.shape[2]
    tokens, grad_tokens = x.flatten(2), grad_y.flatten(2)
    pixels, steps = _tables(*hw, scan, window, x.device)
    grad_orders = torch.empty_like(orders)
    to_orders([_map_move(grad_tokens, grad_orders)], hw, pixels, first_source=2 - len(orders))
    grad_directions, grad_dt = (x.new_empty(batch, 4, channels, tokens.shape[2]) for _ in range(2))
    parts, rows = scan_backward(
        _as_scan(tokens, orders, projections, weight, bias, A_logs, D),
        borders,
        _sources(grad_tokens, grad_orders),
        _by_order(grad_directions),
        _by_order(grad_dt),
    )
    grad_x = torch.empty_like(x)
    of_low, of_weight = _linear_gradients(
        grad_dt.unflatten(1, (2, 2)),  # (B, 2 walks, 2 orders, D, L)
        projections[:, :, :, :rank].permute(1, 2, 0, 3, 4),
        weight.unflatten(0, (2, 2)).expand(batch, -1, -1, -1, -1),
    )
    del grad_dt
    on_map = weight.new_empty(batch, 4, to_projected.shape[1], tokens.shape[2])  # of projections
    grad_by_order = _by_order(on_map)
    move = Move(of_low.permute(0, 3, 1, 2, 4, 5), grad_by_order[:, :, :, :rank])
    from_orders([move, Move(parts.flatten(4, 5), grad_by_order[:, :, :, rank:])], hw, steps)
    on_map = on_map.flatten(1, 2).to(x.dtype)
    back = to_projected.flatten(0, 1).T.expand(batch, -1, -1)
    torch.bmm(back.to(x.dtype), on_map, out=grad_x.flatten(2))
    merge_orders(_by_order(grad_directions), grad_x.flatten(2), hw, steps, adds=True)
    of_projection = _long_product(on_map, tokens)
    # over parts of the tokens, and images
    of_weight, of_projection, rows = sum_first(
        of_weight.flatten(0, 1), of_projection.flatten(0, 1), rows
    )
    return (
        grad_x,
        of_projection.view_as(to_projected).to(to_projected.dtype),
        of_weight.flatten(0, 1),
        rows,
    )


@_backward.register_fake
def _(grad_y, x, to_projected, weight, bias, A_logs, D, *others):
    whole = torch.contiguous_format
    tensors = (torch.empty_like(t, memory_format=whole) for t in (x, to_projected, weight))
    return *tensors, A_logs.new_empty(*A_logs.shape[:2], A_logs.shape[2] + 2)


def _setup_context(ctx, inputs, output) -> None:
    *tensors, ctx.scan, ctx.window = inputs
    ctx.save_for_backward(*tensors, *output[1:])
    ctx.set_materialize_grads(False)


def _differentiate(ctx, grad_y: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if grad_y is None:
        return (None,) * 8
    *of_tensors, rows = _backward(grad_y, *ctx.saved_tensors, ctx.scan, ctx.window)
    of_A, of_D, of_bias = rows.split([rows.shape[2] - 2, 1, 1], dim=2)
    return *of_tensors, of_bias.squeeze(2), of_A, of_D.squeeze(2), None, None


_forward.register_autograd(_differentiate, setup_context=_setup_context)


def _tables(
    height: int, width: int, scan: str, window: int, device: torch.device
) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """Of both orders in windows, the pixel of each step and the step of each pixel (2, L)."""
    if scan == "cross":
        return None, None
    pixels, steps = scan_orders(height, width, scan, window, device, torch.int32)
    return pixels[:2], steps[:2]


def _empty_orders(x: Tensor, scan: str) -> Tensor:
    """(1 or 2, B, D, L): a whole map is its own first order."""
    return x.new_empty(1 if scan == "cross" else 2, *x.shape[:2], x.shape[2] * x.shape[3])


def _empty_projections(x: Tensor, to_projected: Tensor, scan: str) -> tuple[Tensor, Tensor]:
    """(B, slots, R + 2N, L), and a view (2 orders, B, 2 walks, R + 2N, L): what is scanned.

    Inside windows there is a slot for each direction. Of a whole map there are seven: the product
    fills the first four, with all directions on the map; slots 1 and 3 hold the second order's,
    which are brought into that order to slots 4 and 6.
    """
    is_whole = scan == "cross"
    shape = (x.shape[0], 7 if is_whole else 4, to_projected.shape[1], x.shape[2] * x.shape[3])
    slots = x.new_empty(shape, dtype=to_projected.dtype)
    if is_whole:
        return slots, slots[:, ::2].unflatten(1, (2, 2)).transpose(0, 1)
    return slots, _by_order(slots)


def _map_move(tokens: Tensor, orders: Tensor) -> Move:
    return Move(tokens.expand_as(orders)[:, :, None], orders[:, :, None])


def _by_order(x: Tensor) -> Tensor:
    """(B, 4 directions, rows, L) -> a view (2 orders, B, 2 walks, rows, L)."""
    return x.unflatten(1, (2, 2)).permute(2, 0, 1, 3, 4)


def _sources(tokens: Tensor, orders: Tensor) -> tuple[Tensor, Tensor]:
    first, second = (tokens, *orders) if len(orders) == 1 else orders
    return first, second


def _as_scan(
    tokens: Tensor,
    orders: Tensor,
    projections: Tensor,
    weight: Tensor,
    bias: Tensor,
    A_logs: Tensor,
    D: Tensor,
) -> Scan:
    weight, bias, A_logs, D = contiguous(weight, bias, A_logs, D)
    rank, states = weight.shape[2], A_logs.shape[2]
    low, B, C = projections.split([rank, states, states], dim=3)
    return Scan(
        u=_sources(tokens, orders),
        delta=None,
        low=low,
        B=B,
        C=C,
        A=A_logs,
        D=D,
        bias=bias,
        weight=weight,
        softplus=True,
        has_logs=True,
    )


def _linear_gradients(gradient: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """As linear_gradients of products.py."""
    if gradient.is_cuda and has_triton():
        from models.ops.ss2d_scan.products import linear_gradients

        return linear_gradients(gradient, x, weight)
    of_x = torch.matmul(weight.mT, gradient.float())
    return of_x[None], torch.matmul(gradient.float(), x.float().mT)[None]


def _long_product(gradient: Tensor, x: Tensor) -> Tensor:
    """As long_product of products.py."""
    if gradient.is_cuda and has_triton():
        from models.ops.ss2d_scan.products import long_product

        return long_product(gradient, x)
    return torch.matmul(gradient.float(), x.float().mT)[None]
