"""The selective scan as a plain loop: the truth that every other backend is tested against."""

import torch
import torch.nn.functional as F
from torch import Tensor


def selective_scan_reference(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
) -> Tensor:
    """Run h_l = exp(dt_l·A) h_{l-1} + dt_l·B_l·u_l, y_l = C_l·h_l + D·u_l, one token at a time.

    Shapes as in selective_scan. State in float32, in float64 if u is float64.
    """
    state_dtype = torch.float64 if u.dtype == torch.float64 else torch.float32
    batch, channels, length = u.shape
    group = channels // B.shape[1]
    inputs = u.to(state_dtype)
    dt = delta.to(state_dtype)
    if delta_bias is not None:
        dt = dt + delta_bias.to(state_dtype)[:, None]
    if delta_softplus:
        dt = F.softplus(dt)
    A = A.to(state_dtype)
    B = B.to(state_dtype).repeat_interleave(group, dim=1)  # (batch, D, N, L)
    C = C.to(state_dtype).repeat_interleave(group, dim=1)
    state = inputs.new_zeros(batch, channels, A.shape[1])
    outputs = []
    for step in range(length):
        decay = torch.exp(dt[:, :, step, None] * A)
        state = decay * state + (dt[:, :, step] * inputs[:, :, step])[..., None] * B[..., step]
        outputs.append((state * C[..., step]).sum(-1))
    y = torch.stack(outputs, dim=-1) if outputs else torch.zeros_like(inputs)
    if D is not None:
        y = y + D.to(state_dtype)[:, None] * inputs
    return y.to(u.dtype)
