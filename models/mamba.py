"""The one-dimensional Mamba mixer and its bidirectional form, for sequences (B, C, L)."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.ops.mamba_path import conv_silu, gate
from models.ops.selective_scan import selective_scan
from models.ss2d import initial_A_log, initial_dt_bias

EXPAND = 2
CONV_WIDTH = 4


class Mamba(nn.Module):
    """Mamba mixer (Gu and Dao, 2023): in_proj, causal conv, SiLU, selective scan, z gate, out_proj.

    x: (B, C, L) -> (B, C, L); expand 2, conv width 4, dt rank ceil(C/16).
    """

    def __init__(self, channels: int, *, d_state: int) -> None:
        super().__init__()
        inner = EXPAND * channels
        self.in_proj = nn.Conv1d(channels, 2 * inner, 1, bias=False)
        self.scan = CausalScan(inner, rank=math.ceil(channels / 16), d_state=d_state)
        self.out_proj = nn.Conv1d(inner, channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x, z = self.in_proj(x).chunk(2, dim=1)
        return self.out_proj(gate(self.scan(x), None, z))


class BidirectionalMamba(nn.Module):
    """Mamba over a sequence and its reverse (Vision Mamba, Zhu et al., 2024), outputs averaged.

    The two passes share the projections in and out and have their own convolution and scan.
    x: (B, C, L) -> (B, C, L).
    """

    def __init__(self, channels: int, *, d_state: int) -> None:
        super().__init__()
        inner, rank = EXPAND * channels, math.ceil(channels / 16)
        self.in_proj = nn.Conv1d(channels, 2 * inner, 1, bias=False)
        self.forward_scan = CausalScan(inner, rank=rank, d_state=d_state)
        self.backward_scan = CausalScan(inner, rank=rank, d_state=d_state)
        self.out_proj = nn.Conv1d(inner, channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x, z = self.in_proj(x).chunk(2, dim=1)
        return self.out_proj(gate(self.forward_scan(x), self.backward_scan(x, flip=True), z))


class CausalScan(nn.Module):
    """One pass of Mamba: causal depthwise conv, SiLU, selective scan. (B, D, L) -> (B, D, L).

    With `flip` from the last token to the first, in which order the result stays.
    """

    def __init__(self, inner: int, *, rank: int, d_state: int) -> None:
        super().__init__()
        self.splits = [rank, d_state, d_state]
        self.scan_backend = "auto"
        self.conv1d = nn.Conv1d(inner, inner, CONV_WIDTH, groups=inner)  # only its parameters
        self.x_proj = nn.Conv1d(inner, sum(self.splits), 1, bias=False)
        self.dt_proj = nn.Linear(rank, inner)
        self.A_log = nn.Parameter(initial_A_log(inner, d_state))
        self.D = nn.Parameter(torch.ones(inner))
        nn.init.uniform_(self.dt_proj.weight, -(rank**-0.5), rank**-0.5)
        with torch.no_grad():
            self.dt_proj.bias.copy_(initial_dt_bias(inner))

    def forward(self, x: Tensor, *, flip: bool = False) -> Tensor:
        x = conv_silu(x, self.conv1d.weight[:, 0], self.conv1d.bias, flip=flip)
        dt_low, B, C = self.x_proj(x).split(self.splits, dim=1)
        return selective_scan(
            x,
            F.conv1d(dt_low, self.dt_proj.weight[..., None]),  # matmul would copy what it gives
            -torch.exp(self.A_log),
            B[:, None],
            C[:, None],
            self.D,
            delta_bias=self.dt_proj.bias,
            backend=self.scan_backend,
        )
