"""SS2D: the two-dimensional selective-scan mixer of VMamba, whole-map or in windows."""

import math

import torch
from torch import Tensor, nn

from models.layers import DepthwiseConv2d, LayerNorm2d, Linear2d, Recomputed
from models.ops.mamba_path import gate
from models.ops.ss2d_scan import ss2d_scan


class SS2D(Recomputed):
    """in_proj -> depthwise 3x3 -> SiLU -> four-direction scan -> norm -> (· SiLU(z)) -> out_proj.

    VMamba (Liu et al., 2024); without z it is variant "v05_noz" and keeps the official parameter
    names. x: (B, C, H, W) -> (B, C, H, W).
    """

    def __init__(
        self,
        channels: int,
        *,
        d_state: int,
        expand: int,
        scan: str = "cross",
        use_z_gate: bool = True,
        conv_bias: bool = True,
    ) -> None:
        super().__init__()
        inner = expand * channels
        rank = math.ceil(channels / 16)
        self.scan = scan
        self.scan_backend = "auto"
        self.use_z_gate = use_z_gate
        self.in_proj = Linear2d(channels, 2 * inner if use_z_gate else inner, bias=False)
        self.conv2d = DepthwiseConv2d(inner, bias=conv_bias, activation="silu")
        self.x_proj_weight = nn.Parameter(torch.empty(4, rank + 2 * d_state, inner))
        self.dt_projs_weight = nn.Parameter(torch.empty(4, inner, rank))
        self.dt_projs_bias = nn.Parameter(initial_dt_bias(4 * inner).view(4, inner))
        self.A_logs = nn.Parameter(initial_A_log(4 * inner, d_state))
        self.Ds = nn.Parameter(torch.ones(4 * inner))
        self.out_norm = LayerNorm2d(inner)
        self.out_proj = Linear2d(inner, channels, bias=False)
        nn.init.uniform_(self.x_proj_weight, -(inner**-0.5), inner**-0.5)
        nn.init.uniform_(self.dt_projs_weight, -(rank**-0.5), rank**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.in_proj(x)
        z = None
        if self.use_z_gate:
            x, z = x.chunk(2, dim=1)
        x = self.conv2d(x)
        y = ss2d_scan(
            x,
            self.x_proj_weight,
            self.dt_projs_weight,
            self.dt_projs_bias,
            self.A_logs,
            self.Ds,
            scan=self.scan,
            backend=self.scan_backend,
        )
        y = self.out_norm(y)
        if z is not None:
            y = gate(y.flatten(2), None, z.flatten(2)).view_as(y)
        return self.out_proj(y)


def initial_A_log(channels: int, d_state: int) -> Tensor:
    """(D, N): A = -exp(A_log) = -1 … -N for every channel (S4D-real, as in Mamba)."""
    return torch.log(torch.arange(1, d_state + 1, dtype=torch.float32)).repeat(channels, 1)


def initial_dt_bias(channels: int, *, least: float = 1e-3, most: float = 0.1) -> Tensor:
    """(D,): softplus(bias) is log-uniform in [least, most], as in Mamba."""
    low, high = math.log(least), math.log(most)
    dt = torch.exp(low + torch.rand(channels) * (high - low))
    return dt + torch.log(-torch.expm1(-dt))
