"""Checks the arguments of the four-direction scan and hands them to a backend."""

import torch
from torch import Tensor

from models.ops.selective_scan.dispatch import fastest_backend
from models.ops.ss2d_scan.composed import ss2d_scan_composed
from models.ops.ss2d_scan.cuda import ss2d_scan_cuda
from models.ops.ss2d_scan.native import ss2d_scan_native
from models.ops.ss2d_scan.reference import ss2d_scan_reference

SCANS = ("cross", "window")


def ss2d_scan(
    x: Tensor,
    x_proj_weight: Tensor,
    dt_projs_weight: Tensor,
    dt_projs_bias: Tensor,
    A_logs: Tensor,
    Ds: Tensor,
    *,
    scan: str = "cross",
    window: int = 4,
    backend: str = "auto",
) -> Tensor:
    """Selective scan of a map in four directions, merged by addition (SS2D of VMamba, Liu 2024).

    Each direction projects its tokens to dt_low (R), B (N) and C (N), runs the selective scan with
    dt = softplus(dt_projs_weight · dt_low + dt_projs_bias) and A = -exp(A_logs), and puts every
    output back on its own pixel. Directions: rows, columns, rows reversed, columns reversed.

    Args:
        x: (batch, D, H, W), any H and W.
        x_proj_weight: (4, R + 2N, D).
        dt_projs_weight: (4, D, R).
        dt_projs_bias: (4, D).
        A_logs: (4·D, N).
        Ds: (4·D,).
        scan: "cross" over the whole map, or "window" inside window x window tiles in raster order
            (one sequence over all tiles; edge tiles may be smaller).
        backend: as in selective_scan.
    Returns:
        (batch, D, H, W) in x's dtype.
    Raises:
        ValueError: shapes that do not fit or an unknown scan.
    """
    _check(x, x_proj_weight, dt_projs_weight, dt_projs_bias, A_logs, Ds, scan, window)
    arguments = (x, x_proj_weight, dt_projs_weight, dt_projs_bias, A_logs, Ds, scan, window)
    if backend == "auto":
        backend = fastest_backend(x.device.type, x.dtype == torch.float64)
    if backend == "reference":
        return ss2d_scan_reference(*arguments)
    if backend == "native":
        return ss2d_scan_native(*arguments)
    if backend == "cuda":
        return ss2d_scan_cuda(*arguments)
    if backend == "triton":
        return _triton()(*arguments)
    return ss2d_scan_composed(*arguments, backend)


def _triton():
    try:
        from models.ops.ss2d_scan.triton import ss2d_scan_triton
    except ImportError as error:
        raise RuntimeError(
            "scan backend 'triton' needs the package triton, which comes with PyTorch on Linux"
        ) from error
    return ss2d_scan_triton


def _check(
    x: Tensor,
    x_proj_weight: Tensor,
    dt_projs_weight: Tensor,
    dt_projs_bias: Tensor,
    A_logs: Tensor,
    Ds: Tensor,
    scan: str,
    window: int,
) -> None:
    if scan not in SCANS:
        raise ValueError(f"unknown scan '{scan}'; known: {', '.join(SCANS)}")
    if window < 1:
        raise ValueError(f"window must be at least 1, got {window}")
    if x.dim() != 4:
        raise ValueError(f"x must be (batch, D, H, W), got {tuple(x.shape)}")
    channels, states = x.shape[1], A_logs.shape[-1]
    rank = dt_projs_weight.shape[-1]
    expected = {
        "x_proj_weight": (x_proj_weight, (4, rank + 2 * states, channels)),
        "dt_projs_weight": (dt_projs_weight, (4, channels, rank)),
        "dt_projs_bias": (dt_projs_bias, (4, channels)),
        "A_logs": (A_logs, (4 * channels, states)),
        "Ds": (Ds, (4 * channels,)),
    }
    for name, (tensor, shape) in expected.items():
        if tensor.shape != shape:
            raise ValueError(f"{name} must be {shape}, got {tuple(tensor.shape)}")
        if tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device}, x on {x.device}")
