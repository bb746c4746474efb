"""Fusion metrics from grey levels and moments: EN, MI, SF, AG, MSE, SD, CC, SCD.

`images` is (3, B, H, W): thermal, rgb and fused, grey in 0..255, float32: whole levels and their
squares are exact in it. Sums are taken in float64, and so are results.
"""

import math

import torch
from torch import Tensor

LEVELS = 256

Factors = tuple[int, int, int]


def joint_histogram(images: Tensor) -> Tensor:
    """Shares of the pairs (source level, fused level), levels rounded: (2, B, 256, 256)."""
    batch, pixels = images.shape[1], images[0, 0].numel()
    levels = images.flatten(2).round().long()
    table = torch.arange(2 * batch, device=images.device).view(2, batch, 1)
    index = ((table * LEVELS + levels[:2]) * LEVELS + levels[2]).flatten()
    counts = torch.zeros(2 * batch * LEVELS**2, dtype=torch.float64, device=images.device)
    counts.scatter_add_(0, index, counts.new_ones(1).expand_as(index))
    return counts.view(2, batch, LEVELS, LEVELS) / pixels


def fused_entropy(joint: Tensor) -> Tensor:
    """EN: Shannon entropy of the fused image's levels, bits: (B,)."""
    return _entropy(joint[0].sum(-2)) / math.log(2)


def mutual_information(joint: Tensor, *, last_level: int = LEVELS - 1) -> Tensor:
    """MI of each source with the fused image, nats: (2, B, 256, 256) -> (2, B).

    Args:
        last_level: levels above it count as it in the joint entropy, but not in the others.
    """
    levels = _entropy(joint.sum(-1)) + _entropy(joint.sum(-2))
    for dim in (-1, -2):
        low, high = joint.split([last_level, LEVELS - last_level], dim)
        joint = torch.cat([low, high.sum(dim, keepdim=True)], dim)
    return levels - _entropy(joint.flatten(-2))


def spatial_frequency(image: Tensor) -> Tensor:
    """SF: √(RF² + CF²), means of squared differences of neighbours along rows and columns."""
    return torch.sqrt(_mean(image.diff(dim=-1).square_()) + _mean(image.diff(dim=-2).square_()))


def average_gradient(image: Tensor) -> Tensor:
    """AG: mean of √((gx² + gy²) / 2), central differences, one-sided at the border."""
    gradient_y, gradient_x = torch.gradient(image, dim=(-2, -1))
    return _mean(gradient_x.square_().add_(gradient_y.square_()).div_(2).sqrt_())


def mean_squared_error(images: Tensor) -> Tensor:
    """MSE: mean of the fused image's squared distances to both sources: (B,)."""
    return _mean((images[:2] - images[2]).square_()).mean(0)


def covariances(images: Tensor) -> Tensor:
    """Covariance matrix of thermal, rgb and fused over the pixels: (B, 3, 3).

    About the first pixel, so that a constant image has exactly none. Row by row, because a single
    product over all pixels is too long and narrow to fill a GPU.
    """
    rows = (images - images[..., :1, :1]).permute(1, 2, 0, 3).double()  # (B, H, 3, W)
    mean = rows.mean((1, 3))
    moments = (rows @ rows.mT).mean(1) / rows.shape[-1]
    return moments - mean[:, :, None] * mean[:, None, :]


def correlation(covariance: Tensor, first: Factors, second: Factors) -> Tensor:
    """Pearson's correlation of two sums of the images; 0 where one of them is constant.

    The formula has no value there (published programs give NaN, which spoils the mean of a set); a
    constant tells nothing of another image, and nothing added by fusion is no part of a source.

    Args:
        covariance: (B, 3, 3), of covariances().
        first, second: factors of thermal, rgb and fused in each sum.
    """
    variances = [_covariance_of_sums(covariance, x, x) for x in (first, second)]
    # What rounding can leave of the variance of a constant difference.
    least = [1e-12 * sum(covariance[:, i, i] for i in range(3) if x[i]) for x in (first, second)]
    is_constant = (variances[0] <= least[0]) | (variances[1] <= least[1])
    scale = variances[0].clamp_min(0).sqrt() * variances[1].clamp_min(0).sqrt()
    value = _covariance_of_sums(covariance, first, second) / scale
    return value.clamp(-1, 1).masked_fill(is_constant, 0)


def correlation_with_sources(covariance: Tensor) -> Tensor:
    """CC: mean of the fused image's correlations with both sources."""
    fused = (0, 0, 1)
    of_both = [correlation(covariance, source, fused) for source in ((1, 0, 0), (0, 1, 0))]
    return (of_both[0] + of_both[1]) / 2


def sum_of_correlations_of_differences(covariance: Tensor) -> Tensor:
    """SCD (Aslantas and Bendes, 2015): what fusion adds to one source is the other."""
    added_to_rgb = correlation(covariance, (0, -1, 1), (1, 0, 0))
    added_to_thermal = correlation(covariance, (-1, 0, 1), (0, 1, 0))
    return added_to_rgb + added_to_thermal


def _covariance_of_sums(covariance: Tensor, first: Factors, second: Factors) -> Tensor:
    return sum(
        covariance[:, i, j] * (a * b)
        for i, a in enumerate(first)
        for j, b in enumerate(second)
        if a * b != 0
    )


def _entropy(shares: Tensor) -> Tensor:
    return torch.special.entr(shares).sum(-1)


def _mean(x: Tensor) -> Tensor:
    return x.mean((-2, -1), dtype=torch.float64)
