"""The selective scan on NVIDIA GPUs (models/ops/cuda) as a custom operator.

One pass forward and one backward, parallel over chunks of the sequence that hand states to one
another. Saved for the backward are the arguments and one state per chunk. Deterministic.
"""

import torch
from torch import Tensor

from models.ops.cuda.library import check_tensor
from models.ops.cuda.scan import Scan, count_borders, scan_backward, scan_forward
from models.ops.cuda.sums import sum_first
from models.ops.layout import contiguous
from models.ops.selective_scan.gradients import register_gradients


def selective_scan_cuda(
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
        RuntimeError: tensors that are not on an NVIDIA GPU, float64 u, or no run-time compiler.
    """
    check_tensor(u)
    tokens = u.dtype if delta.dtype == u.dtype else torch.float32
    matrix = B.dtype if B.dtype == C.dtype != torch.float64 else torch.float32
    y, _ = _forward(
        u.to(tokens),
        delta.to(tokens),
        A.float(),
        B.to(matrix),
        C.to(matrix),
        None if D is None else D.float(),
        None if delta_bias is None else delta_bias.float(),
        delta_softplus,
    )
    return y.to(u.dtype)


@torch.library.custom_op("cmfs::selective_scan_cuda", mutates_args=())
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
    """y (batch, D, L) and the states between chunks, flat."""
    scan = _as_scan(u, delta, A, B, C, D, delta_bias, delta_softplus)
    y = torch.empty_like(u, memory_format=torch.contiguous_format)
    return y, scan_forward(scan, _grouped(y, B.shape[1])[:, :, None])


@_forward.register_fake
def _(u, delta, A, B, C, D, delta_bias, delta_softplus):
    y = torch.empty_like(u, memory_format=torch.contiguous_format)
    groups = B.shape[1]
    sizes = (u.shape[0], groups, u.shape[1] // groups, u.shape[2], A.shape[1])
    return y, A.new_empty(count_borders(*sizes))


@torch.library.custom_op("cmfs::selective_scan_cuda_backward", mutates_args=())
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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of u and delta, of B and C side by side (groups, batch, 2, N, L), and of A, D and
    delta_bias side by side (D, N + 2); the last two in float32.
    """
    scan = _as_scan(u, delta, A, B, C, D, delta_bias, delta_softplus)
    groups = B.shape[1]
    grad_u, grad_delta = (torch.empty_like(x, memory_format=torch.contiguous_format)
                          for x in (u, delta))  # fmt: skip
    parts, rows = scan_backward(
        scan,
        borders,
        _grouped(grad_y.contiguous(), groups).unbind(),
        _grouped(grad_u, groups)[:, :, None],
        _grouped(grad_delta, groups)[:, :, None],
    )
    matrices, rows = sum_first(parts, rows)
    return grad_u, grad_delta, matrices.squeeze(2), rows.flatten(0, 1)


@_backward.register_fake
def _(grad_y, u, delta, A, B, C, D, delta_bias, borders, delta_softplus):
    whole = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (u, delta))
    batch, groups, states, length = B.shape
    matrices = A.new_empty(groups, batch, 2, states, length)
    return *whole, matrices, A.new_empty(A.shape[0], states + 2)


def _gradients(grad_y: Tensor, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, *others):
    """Gradients of u, delta, A, B, C, D and delta_bias, also of ones that are absent."""
    grad_u, grad_delta, matrices, rows = _backward(grad_y, u, delta, A, B, *others)
    grad_B, grad_C = matrices.to(B.dtype).transpose(0, 1).unbind(2)
    grad_A, grad_D, grad_bias = rows.split([A.shape[1], 1, 1], dim=1)
    return grad_u, grad_delta, grad_A, grad_B, grad_C, grad_D.squeeze(1), grad_bias.squeeze(1)


register_gradients(_forward, _gradients)


def _grouped(x: Tensor, groups: int) -> Tensor:
    """(batch, D, L) -> a view (groups, batch, D / groups, L)."""
    return x.unflatten(1, (groups, x.shape[1] // groups)).transpose(0, 1)


def _as_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
) -> Scan:
    """Each group of channels as a source that is walked once."""
    u, delta, A, B, C, D, delta_bias = contiguous(u, delta, A, B, C, D, delta_bias)
    groups = B.shape[1]
    return Scan(
        u=_grouped(u, groups).unbind(),
        delta=_grouped(delta, groups)[:, :, None],
        low=None,
        B=B.transpose(0, 1)[:, :, None],
        C=C.transpose(0, 1)[:, :, None],
        A=A.unflatten(0, (groups, A.shape[0] // groups)),
        D=D,
        bias=delta_bias,
        weight=None,
        softplus=delta_softplus,
    )
