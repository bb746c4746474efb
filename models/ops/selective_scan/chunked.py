"""The selective scan in plain PyTorch, parallel over chunks, with a backward of its own.

The sequence is cut into blocks and each block into chunks of S steps. Step s of every chunk of a
block is taken at once, so that one operation is wide instead of short; then the chunks' end states
are chained, and each chunk gets what reaches it from before. Only the state at block borders is
kept for the backward pass; the states inside are computed again, so that saved memory grows with
B·D·L and never with N. All factors are products of decays exp(dt·A), never quotients: for A < 0
nothing can overflow, whatever dt.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

_BLOCK_ELEMENTS = {"cpu": 2**17, "other": 2**27}  # states alive at once; on CPU they fit the cache
_LEAST_BLOCK = 64  # tokens
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
    layout = _layout(u.shape[0], *A.shape, u.shape[2], u.device.type)
    with torch.autocast(u.device.type, enabled=False):
        dt = delta.to(state_dtype)
        if delta_bias is not None:
            dt = dt + delta_bias.to(state_dtype)[:, None]
        if delta_softplus:
            dt = F.softplus(dt)
        inputs = u.to(state_dtype)
        y = _ChunkedScan.apply(
            _to_blocks(inputs.unflatten(1, (groups, 1, -1)), *layout),  # (..., B, K, 1, D/K)
            _to_blocks(dt.unflatten(1, (groups, 1, -1)), *layout),
            A.to(state_dtype).unflatten(0, (groups, -1)).transpose(1, 2),  # (K, N, D/K)
            _to_blocks(B.to(state_dtype)[:, :, :, None], *layout),  # (..., B, K, N, 1)
            _to_blocks(C.to(state_dtype)[:, :, :, None], *layout),
        )
        y = _from_blocks(y, u.shape[2]).flatten(1, 3)
        if D is not None:
            y = y + D.to(state_dtype)[:, None] * inputs
    return y.to(u.dtype)


class _ChunkedScan(torch.autograd.Function):
    """y from u, dt, A, B, C in blocks (see _to_blocks), without softplus, bias and skip."""

    @staticmethod
    def forward(ctx, u, dt, A, B, C):
        y = torch.empty_like(u)
        carry = u.new_zeros(*u.shape[3:5], *A.shape[1:])  # (B, K, N, D/K)
        borders = []
        for block in range(len(u)):
            borders.append(carry)
            _, state = _block_states(u[block], dt[block], A, B[block], carry)
            torch.sum(state * C[block], dim=-2, keepdim=True, out=y[block])
            carry = state[-1, -1].clone()
        ctx.save_for_backward(u, dt, A, B, C, *borders)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y):
        u, dt, A, B, C, *borders = ctx.saved_tensors
        grad_u, grad_dt = torch.empty_like(u), torch.empty_like(dt)
        grad_A, grad_B, grad_C = torch.zeros_like(A), torch.empty_like(B), torch.empty_like(C)
        later = torch.zeros_like(borders[0]) if borders else None
        for block in reversed(range(len(u))):
            u_b, dt_b, B_b = u[block], dt[block], B[block]
            decay, state = _block_states(u_b, dt_b, A, B_b, borders[block])
            grad_C[block] = (state * grad_y[block]).sum(-1, keepdim=True)
            state -= dt_b * u_b * B_b  # what each token inherited: exp(dt_l·A) h_{l-1}
            grad_state = C[block] * grad_y[block]
            later = _accumulate_backward_(decay, grad_state, later)

            through_input = (grad_state * B_b).sum(-2, keepdim=True)
            grad_B[block] = (grad_state * (dt_b * u_b)).sum(-1, keepdim=True)
            grad_exponent = grad_state.mul_(state)  # of dt_l·A
            grad_A += (grad_exponent * dt_b).sum((0, 1, 2))
            grad_dt[block] = (grad_exponent * A).sum(-2, keepdim=True) + through_input * u_b
            grad_u[block] = through_input * dt_b
        return grad_u, grad_dt, grad_A, grad_B, grad_C


def _block_states(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, carry: Tensor
) -> tuple[Tensor, Tensor]:
    """Decays exp(dt·A) and states of one block, both (S, chunks, B, K, N, D/K).

    carry (B, K, N, D/K) is the state before the block.
    """
    decay = torch.exp_(dt * A)
    state = (dt * u) * B
    state[0, 0].addcmul_(decay[0, 0], carry)
    steps, chunks = state.shape[:2]
    for step in range(1, steps):
        state[step].addcmul_(decay[step], state[step - 1])
    if chunks > 1:
        reach = decay.clone()  # of the state before the chunk: the product of decays up to here
        for step in range(1, steps):
            reach[step] *= reach[step - 1]
        before = torch.empty_like(state[0, 1:])
        for chunk in range(1, chunks):
            before[chunk - 1] = state[-1, chunk - 1]
            state[-1, chunk].addcmul_(reach[-1, chunk], before[chunk - 1])
        state[:-1, 1:].addcmul_(reach[:-1, 1:], before)
    return decay, state


def _accumulate_backward_(decay: Tensor, grad_state: Tensor, later: Tensor) -> Tensor:
    """Add to each state's gradient what it passes on: dL/dh_l += exp(dt_{l+1}·A) dL/dh_{l+1}.

    In place. later (B, K, N, D/K) comes from the block after this one; returns the same for the
    block before it.
    """
    grad_state[-1, -1] += later
    steps, chunks = grad_state.shape[:2]
    for step in reversed(range(steps - 1)):
        grad_state[step].addcmul_(decay[step + 1], grad_state[step + 1])
    if chunks > 1:
        reach = torch.empty_like(decay)
        reach[-1] = 1
        for step in reversed(range(steps - 1)):
            torch.mul(decay[step + 1], reach[step + 1], out=reach[step])
        after = torch.empty_like(grad_state[0, 1:])
        for chunk in reversed(range(chunks - 1)):
            torch.mul(decay[0, chunk + 1], grad_state[0, chunk + 1], out=after[chunk])
            grad_state[0, chunk].addcmul_(reach[0, chunk], after[chunk])
        grad_state[1:, :-1].addcmul_(reach[1:, :-1], after)
    return decay[0, 0] * grad_state[0, 0]


def _layout(batch: int, channels: int, states: int, length: int, device: str) -> tuple[int, int]:
    """Steps and chunks of a block, so that its states stay within the memory budget."""
    width = max(1, batch * channels * states)
    budget = _BLOCK_ELEMENTS.get(device, _BLOCK_ELEMENTS["other"])
    tokens = max(1, min(length, max(_LEAST_BLOCK, budget // width)))
    if device == "cpu" and width >= _WIDE_STEP:
        return tokens, 1
    steps = math.isqrt(tokens)
    return steps, -(-tokens // steps)


def _to_blocks(x: Tensor, steps: int, chunks: int) -> Tensor:
    """(..., L) -> (blocks, S, chunks, ...), contiguous; token l = (block·chunks + chunk)·S + step.

    The end is padded with zeros: dt = 0 leaves the state as it is.
    """
    x = F.pad(x, (0, -x.shape[-1] % (steps * chunks)))
    x = x.unflatten(-1, (-1, chunks, steps))
    return x.movedim((-3, -1, -2), (0, 1, 2)).contiguous()


def _from_blocks(x: Tensor, length: int) -> Tensor:
    """The inverse of _to_blocks, cropped: (blocks, S, chunks, ...) -> (..., L)."""
    return x.movedim((0, 1, 2), (-3, -1, -2)).flatten(-3)[..., :length]
