"""In which order the four directions of the scan visit the pixels of a map."""

import functools

import torch
from torch import Tensor


@functools.lru_cache(maxsize=64)
def scan_orders(
    height: int,
    width: int,
    scan: str,
    window: int,
    device: torch.device,
    dtype: torch.dtype = torch.int64,
) -> tuple[Tensor, Tensor]:
    """For each direction the pixel that step l visits, and the step that visits pixel p; (4, L)."""
    with torch.inference_mode(False):  # kept for training, even if evaluation comes first
        order, back = _make_permutations(height, width, scan, window, device)
        return order.to(dtype), back.to(dtype)


def _make_permutations(
    height: int, width: int, scan: str, window: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    pixel = torch.arange(height * width, device=device)
    row, column = pixel // width, pixel % width
    side_y, side_x = (height, width) if scan == "cross" else (window, window)
    tile = (row // side_y) * width + column // side_x
    rows_first = torch.argsort((tile * height + row) * width + column)
    columns_first = torch.argsort((tile * width + column) * height + row)
    forward = torch.stack([rows_first, columns_first])
    order = torch.cat([forward, forward.flip(1)])
    return order, torch.argsort(order, dim=1)
