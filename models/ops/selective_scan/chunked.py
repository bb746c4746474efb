"""The selective scan in plain PyTorch, parallel over chunks, with a backward of its own.

The sequence is walked in blocks. Inside a block every chunk advances at once (a two-level linear
recurrence), so that a step is one wide operation instead of a short one. Only the state at block
borders is kept for the backward pass; the states inside are computed again, so that saved memory
grows with B·D·L and never with N. All factors are products of decays exp(dt·A), never quotients:
for A < 0 nothing can overflow, whatever dt.

Tensors are time-major here, (L, B, K, N, D/K), so that each step reads and writes one slab.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

_BLOCK_ELEMENTS = {"cpu": 2**17, "other": 2**27}  # states alive at once; on CPU they fit the cache
_LEAST_BLOCK = 64
_WIDE_STEP = 2**11  # on CPU a step this wide gains nothing from chunks


def selective_scan_chunked(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
) -> Tensor:
    """The same function as selective_scan_reference, in far fewer and wider steps."""
    state_dtype = torch.float64 if u.dtype == torch.float64 else torch.float32
    groups = B.shape[1]
    with torch.autocast(u.device.type, enabled=False):
        dt = delta.to(state_dtype)
        if delta_bias is not None:
            dt = dt + delta_bias.to(state_dtype)[:, None]
        if delta_softplus:
            dt = F.softplus(dt)
        inputs = u.to(state_dtype)
        y = _ChunkedScan.apply(
            _time_major(inputs, groups),
            _time_major(dt, groups),
            A.to(state_dtype).unflatten(0, (groups, -1)).transpose(1, 2),  # (K, N, D/K)
            B.to(state_dtype).permute(3, 0, 1, 2)[..., None],  # (L, B, K, N, 1)
            C.to(state_dtype).permute(3, 0, 1, 2)[..., None],
        )
        y = y.flatten(2).permute(1, 2, 0)  # (B, D, L)
        if D is not None:
            y = y + D.to(state_dtype)[:, None] * inputs
    return y.to(u.dtype)


def _time_major(x: Tensor, groups: int) -> Tensor:
    """(B, D, L) -> (L, B, K, 1, D/K), contiguous."""
    return x.permute(2, 0, 1).unflatten(2, (groups, 1, -1)).contiguous()


class _ChunkedScan(torch.autograd.Function):
    """y (L, B, K, 1, D/K) from time-major u, dt, A, B, C without softplus, bias and skip."""

    @staticmethod
    def forward(ctx, u, dt, A, B, C):
        y = torch.empty_like(u)
        carry = u.new_zeros(*u.shape[1:3], *A.shape[1:])  # (B, K, N, D/K)
        borders = []
        for block in _blocks(u, A):
            borders.append(carry)
            decay, state = _block_states(u[block], dt[block], A, B[block], carry)
            torch.sum(state * C[block], dim=-2, keepdim=True, out=y[block])
            carry = state[-1].clone()
            del decay, state
        ctx.save_for_backward(u, dt, A, B, C, *borders)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y):
        u, dt, A, B, C, *borders = ctx.saved_tensors
        grad_u, grad_dt = torch.empty_like(u), torch.empty_like(dt)
        grad_A, grad_B, grad_C = torch.zeros_like(A), torch.empty_like(B), torch.empty_like(C)
        carry = torch.zeros_like(grad_y[0]).expand(-1, -1, A.shape[1], -1)
        for block, border in zip(reversed(_blocks(u, A)), reversed(borders), strict=True):
            u_b, dt_b, B_b = u[block], dt[block], B[block]
            decay, state = _block_states(u_b, dt_b, A, B_b, border)
            grad_C[block] = (state * grad_y[block]).sum(-1, keepdim=True)
            state -= dt_b * u_b * B_b  # what the block inherited: exp(dt·A) h_{l-1}

            # The gradient runs backward in time: dL/dh_l += exp(dt_{l+1}·A) dL/dh_{l+1}.
            grad_state = C[block].flip(0) * grad_y[block].flip(0)
            grad_state[0] += carry
            later = torch.arange(len(decay), 0, -1, device=u.device) % len(decay)
            _recurrence_(decay[later], grad_state)
            grad_state = grad_state.flip(0)
            carry = decay[0] * grad_state[0]

            through_input = (grad_state * B_b).sum(-2, keepdim=True)
            grad_B[block] = (grad_state * (dt_b * u_b)).sum(-1, keepdim=True)
            grad_exponent = grad_state.mul_(state)
            grad_A += (grad_exponent * dt_b).sum((0, 1))
            grad_dt[block] = (grad_exponent * A).sum(-2, keepdim=True) + through_input * u_b
            grad_u[block] = through_input * dt_b
        return grad_u, grad_dt, grad_A, grad_B, grad_C


def _blocks(u: Tensor, A: Tensor) -> list[slice]:
    """Cut the L tokens so that the states of one block stay within the memory budget."""
    length = u.shape[0]
    states_per_token = max(1, math.prod(u.shape[1:]) * A.shape[1])
    budget = _BLOCK_ELEMENTS.get(u.device.type, _BLOCK_ELEMENTS["other"])
    size = max(_LEAST_BLOCK, budget // states_per_token)
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]


def _block_states(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, carry: Tensor
) -> tuple[Tensor, Tensor]:
    """Decays exp(dt·A) and states of one block, both (T, B, K, N, D/K)."""
    decay = torch.exp_(dt * A)
    state = (dt * u) * B
    state[0].addcmul_(decay[0], carry)
    _recurrence_(decay, state)
    return decay, state


def _recurrence_(decay: Tensor, x: Tensor) -> None:
    """x[t] += decay[t] · x[t-1] for t = 1 …, in place; decay[0] is not read."""
    length = x.shape[0]
    if length <= 16 or (x.device.type == "cpu" and x[0].numel() >= _WIDE_STEP):
        for step in range(1, length):
            x[step].addcmul_(decay[step], x[step - 1])
        return
    size = math.isqrt(length)
    whole = length // size * size
    chunks = x[:whole].unflatten(0, (-1, size))  # (chunks, size, ...)
    products = decay[:whole].unflatten(0, (-1, size)).clone()
    for step in range(1, size):
        chunks[:, step].addcmul_(products[:, step], chunks[:, step - 1])
        products[:, step] *= products[:, step - 1]
    ends = chunks[:, -1]
    _recurrence_(products[:, -1], ends)
    chunks[1:, :-1].addcmul_(products[1:, :-1], ends[:-1, None])
    for step in range(whole, length):
        x[step].addcmul_(decay[step], x[step - 1])
