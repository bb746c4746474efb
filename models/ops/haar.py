"""Orthonormal two-dimensional Haar wavelet transform and its exact inverse.

One level is a strided 2x2 convolution per channel, so that it stays differentiable, exports and
compiles. Band names follow PyWavelets: LH is low-pass along the width and high-pass along the
height (horizontal edges), HL the other way round.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


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
    channels = x.shape[1]
    weight = _kernels(x).repeat(channels, 1, 1, 1)
    highs = []
    for _ in range(levels):
        height, width = x.shape[-2:]
        x = F.pad(x, (0, width % 2, 0, height % 2), mode="replicate")
        bands = F.conv2d(x, weight, stride=2, groups=channels)
        bands = bands.unflatten(1, (channels, 4))  # (B, C, 4, H/2, W/2)
        x = bands[:, :, 0]
        highs.append(bands[:, :, 1:])
    return x, highs


def haar_idwt2(low: Tensor, highs: list[Tensor]) -> Tensor:
    """Rebuild the map from haar_dwt2's bands.

    Returns (B, C, 2·H_1, 2·W_1) for finest bands of H_1 x W_1: exact for even sizes; where an odd
    map was padded, the caller crops the last row or column.
    """
    channels = low.shape[1]
    weight = _kernels(low).repeat(channels, 1, 1, 1)
    for high in reversed(highs):
        height, width = high.shape[-2:]
        bands = torch.cat([low[:, :, None, :height, :width], high], dim=2)  # (B, C, 4, H, W)
        low = F.conv_transpose2d(bands.flatten(1, 2), weight, stride=2, groups=channels)
    return low


def _kernels(x: Tensor) -> Tensor:
    """(4, 1, 2, 2) analysis kernels LL, LH, HL, HH, made on the device without a host copy."""
    kernels = x.new_full((4, 1, 2, 2), 0.5)
    kernels[1, :, 1] = -0.5
    kernels[2, :, :, 1] = -0.5
    kernels[3, :, 0, 1] = -0.5
    kernels[3, :, 1, 0] = -0.5
    return kernels
