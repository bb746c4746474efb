"""The four-direction scan: a permutation of tokens around one selective scan with 4 groups."""

import torch
from torch import Tensor

from models.ops.selective_scan import selective_scan
from models.ops.ss2d_scan.orders import scan_orders


def ss2d_scan_composed(
    x: Tensor,
    x_proj_weight: Tensor,
    dt_projs_weight: Tensor,
    dt_projs_bias: Tensor,
    A_logs: Tensor,
    Ds: Tensor,
    scan: str,
    window: int,
    backend: str,
) -> Tensor:
    """Project every pixel once, scan the four orders together, and merge.

    The projections act on single tokens, so they come before the permutation: one product for all
    directions on the map as it lies in memory.
    """
    batch, channels, height, width = x.shape
    rank, states = dt_projs_weight.shape[2], A_logs.shape[1]
    order, back = scan_orders(height, width, scan, window, x.device)
    tokens = x.flatten(2)  # (B, D, L)
    to_projected = x_proj_weight.flatten(0, 1)
    projected = torch.matmul(to_projected, tokens.to(to_projected.dtype)).unflatten(1, (4, -1))
    projected = _Permute.apply(projected, order, back)
    dt_low, B, C = projected.split([rank, states, states], dim=2)  # (B, 4, R or N, L)
    delta = torch.matmul(dt_projs_weight, dt_low.to(dt_projs_weight.dtype))
    delta = delta.flatten(1, 2)  # (B, 4·D, L)
    inputs = _Permute.apply(tokens[:, None].expand(-1, 4, -1, -1), order, back).flatten(1, 2)
    y = selective_scan(
        inputs,
        delta.to(inputs.dtype),
        -torch.exp(A_logs.float() if A_logs.dtype != torch.float64 else A_logs),
        B.to(inputs.dtype),
        C.to(inputs.dtype),
        Ds,
        delta_bias=dt_projs_bias.flatten(),
        backend=backend,
    )
    y = _Permute.apply(y.unflatten(1, (4, channels)), back, order).sum(1)
    return y.unflatten(2, (height, width))


class _Permute(torch.autograd.Function):
    """Reorder the tokens of each direction; the gradient is the inverse gather, not a scatter."""

    @staticmethod
    def forward(ctx, x, order, back):
        ctx.save_for_backward(order, back)
        return torch.stack([x[:, k].index_select(-1, order[k]) for k in range(4)], dim=1)

    @staticmethod
    def backward(ctx, grad):
        order, back = ctx.saved_tensors
        return _Permute.apply(grad, back, order), None, None
