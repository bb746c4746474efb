"""Orthonormal two-dimensional Haar wavelet transform and its exact inverse.

One level is a butterfly of sums and differences, first of the rows of every 2x2 block, then of its
columns. (As a grouped convolution cuDNN would run it one channel after the other.) Band names
follow PyWavelets: LH is low-pass along the width and high-pass along the height (horizontal edges),
HL the other way round.
"""

import torch
from torch import Tensor

from models.ops.padding import crop, replicate_pad


def haar_dwt2(x: Tensor, levels: int = 2) -> tuple[Tensor, list[Tensor]]:
    """Decompose a map into its low band and the high bands of each level.

    Args:
        x: (B, C, H, W), real. An odd side is padded by one replicated row or column at each level
            (PyWavelets' "symmetric").
        levels: number of decompositions, at least 1.
    Returns:
        low (B, C, H', W') of the coarsest level, and highs, finest level first, each
        (B, C, 3, H_level, W_level) in the order LH, HL, HH.
    """
    if levels < 1:
        raise ValueError(f"levels must be at least 1, got {levels}")
    highs = []
    for _ in range(levels):
        height, width = x.shape[-2:]
        x = replicate_pad(x, 0, width % 2, 0, height % 2)
        upper, lower = (0.5 * x).unflatten(2, (-1, 2)).unbind(3)  # rows of the 2x2 blocks
        rows = torch.stack([upper + lower, upper - lower], dim=2)  # (B, C, 2, H/2, W)
        left, right = rows.unflatten(4, (-1, 2)).unbind(5)
        (ll, lh), (hl, hh) = (left + right).unbind(2), (left - right).unbind(2)
        x = ll
        highs.append(torch.stack([lh, hl, hh], dim=2))
    return x, highs


def haar_idwt2(low: Tensor, highs: list[Tensor]) -> Tensor:
    """Rebuild the map from haar_dwt2's bands.

    Returns (B, C, 2·H_1, 2·W_1) for finest bands of H_1 x W_1: exact for even sizes; where an odd
    map was padded, the caller crops the last row or column.
    """
    for high in reversed(highs):
        lh, hl, hh = (0.5 * high).unbind(2)
        ll = 0.5 * crop(low, high.shape[-2:])
        left, right = (ll + hl, lh + hh), (ll - hl, lh - hh)  # sum and difference of the rows
        upper = torch.stack([left[0] + left[1], right[0] + right[1]], dim=-1)
        lower = torch.stack([left[0] - left[1], right[0] - right[1]], dim=-1)
        low = torch.stack([upper, lower], dim=3).flatten(4).flatten(2, 3)
    return low
