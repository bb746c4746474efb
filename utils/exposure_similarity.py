"""MEF-SSIM (Ma, Zeng and Wang, 2015): a fused image against the best patch its sources could give.

For each window the desired patch has the strength of the strongest source patch and the direction
of their weighted sum; SSIM compares the fused patch with it. Written with window sums alone: the
desired patch is never formed.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from utils.fusion_measures import gaussian_window, smooth, uniform_window

_SIDE = 11
_STEEPEST = 10.0  # exponent of the weights where the sources agree entirely
_WEIGHTS = (0.0448, 0.2856, 0.3001)  # of the levels, normalised


def exposure_similarity(first: Tensor, second: Tensor, fused: Tensor) -> Tensor:
    """MS-SSIM of the toolbox: MEF-SSIM in 3 levels.

    Args:
        first, second, fused: grey (B, H, W) float64 in 0..255.
    Returns:
        (B,); NaN where min(H, W) < 41, because the last level has no room for its window.
    """
    if min(first.shape[1:]) < 41:
        return first.new_full((len(first),), math.nan)
    result: Tensor | float = 1.0
    for weight in _WEIGHTS:
        level = _one_level(first, second, fused).clamp_min(0)  # unlike images have no real root
        result = result * level ** (weight / sum(_WEIGHTS))
        first, second, fused = map(_halve, (first, second, fused))
    return result


def _one_level(first: Tensor, second: Tensor, fused: Tensor) -> Tensor:
    """Mean similarity with the desired patches."""
    size, tiny = _SIDE**2, torch.finfo(torch.float64).eps
    box, bell = uniform_window(_SIDE), gaussian_window(_SIDE, 1.5)
    sources = (first, second)
    means = [smooth(x, box) for x in sources]
    # squared strengths of the patches, and their product
    squares = [
        (smooth(x**2, box) - m**2).clamp_min(0) * size for x, m in zip(sources, means, strict=True)
    ]
    product = (smooth(first * second, box) - means[0] * means[1]) * size
    strengths = [torch.sqrt(square) for square in squares]
    raised = [strength + 0.001 for strength in strengths]

    together = torch.sqrt((squares[0] + squares[1] + 2 * product).clamp_min(0))
    agreement = ((together + tiny) / (strengths[0] + strengths[1] + tiny)).clamp_max(1 - tiny)
    steepness = torch.tan(math.pi / 2 * agreement).clamp_max(_STEEPEST)
    weights = [(x / _SIDE) ** steepness + tiny for x in raised]
    factors = [w / (weights[0] + weights[1]) / x for w, x in zip(weights, raised, strict=True)]

    # the desired patch: factors[0] · (first - its mean) + factors[1] · (second - its mean)
    length = torch.sqrt(
        (
            factors[0] ** 2 * squares[0]
            + factors[1] ** 2 * squares[1]
            + 2 * factors[0] * factors[1] * product
        ).clamp_min(0)
    )
    strongest = torch.maximum(*raised)
    scale = torch.where(length > 0, strongest / length, strongest)
    factors = [factor * scale for factor in factors]

    bells = [smooth(x, bell) for x in sources]
    desired_mean = sum(f * (b - m) for f, b, m in zip(factors, bells, means, strict=True))

    def centred(i: int, j: int) -> Tensor:
        """Bell-weighted mean of the product of two patches, each less its plain mean."""
        both = smooth(sources[i] * sources[j], bell)
        return both - means[i] * bells[j] - means[j] * bells[i] + means[i] * means[j]

    desired_variance = (
        factors[0] ** 2 * centred(0, 0)
        + factors[1] ** 2 * centred(1, 1)
        + 2 * factors[0] * factors[1] * centred(0, 1)
        - desired_mean**2
    )
    fused_mean = smooth(fused, bell)
    fused_variance = smooth(fused**2, bell) - fused_mean**2
    covariance = (
        sum(
            f * (smooth(x * fused, bell) - m * fused_mean)
            for f, x, m in zip(factors, sources, means, strict=True)
        )
        - desired_mean * fused_mean
    )
    constant = (0.03 * 255) ** 2
    return ((2 * covariance + constant) / (desired_variance + fused_variance + constant)).mean(
        (1, 2)
    )


def _halve(image: Tensor) -> Tensor:
    """Means of 2x2 pixels, every second one; (B, H, W) -> (B, ceil(H/2), ceil(W/2))."""
    padded = F.pad(image[:, None], (0, 1, 0, 1), mode="replicate")
    return F.avg_pool2d(padded, 2, stride=1)[:, 0, ::2, ::2]
