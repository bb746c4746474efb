"""The four-direction scan pixel by pixel: the truth that the fast paths are tested against."""

import torch
from torch import Tensor

from models.ops.selective_scan.reference import selective_scan_reference


def pixel_orders(height: int, width: int, scan: str, window: int) -> list[list[tuple[int, int]]]:
    """The pixels (row, column) in the order in which each of the four directions visits them.

    "cross": rows, columns, and both reversed over the whole map. "window": the same inside each
    window x window tile, tiles in raster order; tiles at the right and bottom edge may be smaller.
    """
    side_y, side_x = (height, width) if scan == "cross" else (window, window)
    rows_first, columns_first = [], []
    for top in range(0, height, side_y):
        for left in range(0, width, side_x):
            rows = range(top, min(top + side_y, height))
            columns = range(left, min(left + side_x, width))
            rows_first += [(row, column) for row in rows for column in columns]
            columns_first += [(row, column) for column in columns for row in rows]
    return [rows_first, columns_first, rows_first[::-1], columns_first[::-1]]


def ss2d_scan_reference(
    x: Tensor,
    x_proj_weight: Tensor,
    dt_projs_weight: Tensor,
    dt_projs_bias: Tensor,
    A_logs: Tensor,
    Ds: Tensor,
    scan: str,
    window: int,
) -> Tensor:
    """Scan each direction on its own, put every output back on its pixel, and add the four."""
    batch, channels, height, width = x.shape
    rank = dt_projs_weight.shape[2]
    states = A_logs.shape[1]
    merged = x.new_zeros(batch, channels, height * width)
    for direction, order in enumerate(pixel_orders(height, width, scan, window)):
        own = slice(direction * channels, (direction + 1) * channels)
        index = torch.tensor([row * width + column for row, column in order], device=x.device)
        tokens = x.flatten(2)[:, :, index]  # (B, D, L)
        projected = x_proj_weight[direction] @ tokens.to(x_proj_weight.dtype)
        dt_low, B, C = projected.split([rank, states, states], dim=1)
        y = selective_scan_reference(
            tokens,
            dt_projs_weight[direction] @ dt_low.to(dt_projs_weight.dtype),
            -torch.exp(A_logs[own]),
            B[:, None],
            C[:, None],
            Ds[own],
            dt_projs_bias[direction],
            True,
        )
        back = torch.empty_like(index)
        back[index] = torch.arange(len(index), device=x.device)
        merged = merged + y[:, :, back]
    return merged.unflatten(2, (height, width))
