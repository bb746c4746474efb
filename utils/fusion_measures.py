"""Fusion metrics from weighted windows: VIF, SSIM, MS-SSIM, and the filters under them.

`images` is (3, B, H, W): thermal, rgb and fused, grey in 0..255. Results are float64, (2, B) for
the two sources, and NaN where the image is too small for the formula.
"""

import functools
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Window = tuple[float, ...]  # weights along each side, sum 1

_SCALE_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)  # of MS-SSIM


class LocalStatistics(NamedTuple):
    """Weighted statistics of the window around each position, float64.

    mean, variance: (3, B, h, w); covariance: (2, B, h, w), of each source with the fused image.
    """

    mean: Tensor
    variance: Tensor
    covariance: Tensor


def visual_information_fidelity(images: Tensor) -> Tensor:
    """Pixel-domain VIF (Sheikh and Bovik, 2006) of each source over 4 scales, noise variance 2.

    1 where the source is constant, because nothing can be lost; NaN where min(H, W) < 41, because
    the last scale has no room for its window.
    """
    if min(images.shape[-2:]) < 41:
        return _undefined(images)
    kept = available = images.new_zeros((2, images.shape[1]), dtype=torch.float64)
    for scale in range(4):
        side = 2 ** (4 - scale) + 1
        window = gaussian_window(side, side / 5)
        if scale > 0:
            images = smooth(_about_first_pixel(images), window, step=2)
        scale_kept, scale_available = _information(local_statistics(images, window))
        kept, available = kept + scale_kept, available + scale_available
    return torch.where(available > 0, kept / available, 1.0)


def structural_similarity(images: Tensor, *, data_range: float) -> Tensor:
    """SSIM (Wang et al., 2004): Gaussian window of 11 and σ 1.5, pixels of the border repeated."""
    window = gaussian_window(11, 1.5)
    extended = F.pad(images, (len(window) // 2,) * 4, mode="replicate")
    local = local_statistics(extended, window)
    return _mean(_luminance(local, data_range).mul_(_structure(local, data_range)))


def uniform_similarity(images: Tensor, *, data_range: float) -> Tensor:
    """SSIM under a 7x7 box with sample variances, where the box fits; NaN where it never does."""
    side = 7
    if min(images.shape[-2:]) < side:
        return _undefined(images)
    mean, variance, covariance = local_statistics(images, uniform_window(side))
    sample = side**2 / (side**2 - 1)
    local = LocalStatistics(mean, variance.mul_(sample), covariance.mul_(sample))
    return _mean(_luminance(local, data_range).mul_(_structure(local, data_range)))


def multi_scale_similarity(images: Tensor, *, data_range: float) -> Tensor:
    """MS-SSIM (Wang et al., 2003): 5 levels, Gaussian window of 11 and σ 1.5, where it fits.

    A negative mean counts as 0. NaN where min(H, W) < 176, because the last level has no room for
    its window.
    """
    if min(images.shape[-2:]) < 176:
        return _undefined(images)
    window, images, result = gaussian_window(11, 1.5), images.double(), 1.0
    for level, weight in enumerate(_SCALE_WEIGHTS, start=1):
        local = local_statistics(images, window)
        value = _structure(local, data_range)
        if level == len(_SCALE_WEIGHTS):
            value = value.mul_(_luminance(local, data_range))
        result = result * _mean(value).clamp_min(0) ** weight
        images = F.avg_pool2d(images, 2)
    return result


def local_statistics(images: Tensor, window: Window) -> LocalStatistics:
    """Means, variances and covariances under a window, where it fits.

    In float64, because a variance is the small difference of two large numbers, and about the first
    pixel, so that a constant image has exactly none.
    """
    centred = _about_first_pixel(images)
    mean = smooth(centred, window)
    power = smooth(torch.cat([centred.square(), centred[:2] * centred[2]]), window)
    covariance = power[3:].sub_(mean[:2] * mean[2])
    variance = power[:3].sub_(mean.square()).clamp_min_(0)
    return LocalStatistics(mean.add_(images[..., :1, :1]), variance, covariance)


def gaussian_window(side: int, sigma: float) -> Window:
    """Weights of a Gaussian cut off at `side` taps."""
    weights = [math.exp(-(((i - (side - 1) / 2) / sigma) ** 2) / 2) for i in range(side)]
    return tuple(weight / sum(weights) for weight in weights)


def uniform_window(side: int) -> Window:
    """Equal weights."""
    return (1 / side,) * side


def smooth(x: Tensor, window: Window, step: int = 1) -> Tensor:
    """Separable filter where the window fits.

    Args:
        x: (..., H, W), any leading sizes.
        step: distance of the positions that are kept, along both sides.
    Returns:
        (..., ceil((H - n + 1) / step), ceil((W - n + 1) / step)) for n taps.
    """
    maps = x.flatten(0, -3)
    # One map at a time stays in a CPU's cache; a GPU is better off with few large steps.
    if x.device.type == "cpu":
        filtered = torch.stack([_sum_of_shifts(one, window, step) for one in maps])
    else:
        filtered = _depthwise(maps, window, step)
    return filtered.unflatten(0, x.shape[:-2])


def _sum_of_shifts(x: Tensor, window: Window, step: int) -> Tensor:
    """One map (H, W): on a CPU many times faster than a convolution of one channel."""
    for dim in (0, 1):
        first, *others = x.unfold(dim, len(window), step).unbind(-1)
        x = first * window[0]
        for tap, weight in zip(others, window[1:], strict=True):
            x.add_(tap, alpha=weight)
    return x


def _depthwise(maps: Tensor, window: Window, step: int) -> Tensor:
    """All maps (M, H, W) in two launches, each value read from memory about once."""
    weights = _weights(window, maps.dtype, maps.device).expand(len(maps), 1, 1, -1)
    along_columns = F.conv2d(maps[None], weights.mT, stride=(step, 1), groups=len(maps))
    return F.conv2d(along_columns, weights, stride=(1, step), groups=len(maps))[0]


@functools.cache
def _weights(window: Window, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Kept, because to copy them anew would wait for the GPU each time."""
    return torch.tensor(window, dtype=dtype, device=device)


def _about_first_pixel(images: Tensor) -> Tensor:
    return images.double() - images[..., :1, :1]


def _information(local: LocalStatistics) -> tuple[Tensor, Tensor]:
    """What the fused image keeps of each source, and what there is: (2, B) each, nats."""
    noise, epsilon = 2.0, 1e-10
    source, fused = local.variance[:2], local.variance[2]
    gain = local.covariance / (source + epsilon)
    gain.masked_fill_((source < epsilon) | (fused < epsilon), 0)
    residual = torch.where(gain < 0, fused, fused - gain * local.covariance)
    residual = residual.clamp_min_(epsilon).add_(noise)
    source = source.masked_fill(source < epsilon, 0)
    kept = gain.clamp_min_(0).square_().mul_(source).div_(residual)
    return kept.log1p_().sum((-2, -1)), source.div_(noise).log1p_().sum((-2, -1))


def _luminance(local: LocalStatistics, data_range: float) -> Tensor:
    source, fused, constant = local.mean[:2], local.mean[2], (0.01 * data_range) ** 2
    squares = source.square().add_(fused.square()).add_(constant)
    return (source * fused).mul_(2).add_(constant).div_(squares)


def _structure(local: LocalStatistics, data_range: float) -> Tensor:
    """SSIM's contrast times structure."""
    source, fused, constant = local.variance[:2], local.variance[2], (0.03 * data_range) ** 2
    return (2 * local.covariance).add_(constant).div_((source + fused).add_(constant))


def _mean(x: Tensor) -> Tensor:
    return x.mean((-2, -1))


def _undefined(images: Tensor) -> Tensor:
    return images.new_full((2, images.shape[1]), math.nan, dtype=torch.float64)
