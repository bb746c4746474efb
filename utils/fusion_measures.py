"""The formulas behind the fusion metrics, each on grey images (B, H, W) float64 in 0..255 -> (B,).

Where a formula has no value on a constant or small image, its docstring says what stands in.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

LEVELS = 256


def entropy(image: Tensor) -> Tensor:
    """EN: Shannon entropy of the grey levels, bits."""
    return _entropy(_histogram(image, LEVELS)) / math.log(2)


def standard_deviation(image: Tensor) -> Tensor:
    """SD of the population."""
    return image.std((1, 2), correction=0)


def spatial_frequency(image: Tensor) -> Tensor:
    """SF: √(RF² + CF²), means of squared differences of neighbours along rows and columns."""
    along_rows = image.diff(dim=2).square().mean((1, 2))
    along_columns = image.diff(dim=1).square().mean((1, 2))
    return torch.sqrt(along_rows + along_columns)


def average_gradient(image: Tensor) -> Tensor:
    """AG: mean of √((gx² + gy²) / 2), central differences, one-sided at the border."""
    gradient_y, gradient_x = torch.gradient(image, dim=(1, 2))
    return torch.sqrt((gradient_x**2 + gradient_y**2) / 2).mean((1, 2))


def mutual_information(first: Tensor, second: Tensor, *, last_level: int = LEVELS - 1) -> Tensor:
    """MI of the grey levels of two images, nats; levels above last_level count as it, if joint."""
    first, second = first.round(), second.round()
    levels = (x.clamp_max(last_level) for x in (first, second))
    joint = _entropy(_histogram(next(levels) * LEVELS + next(levels), LEVELS**2))
    return _entropy(_histogram(first, LEVELS)) + _entropy(_histogram(second, LEVELS)) - joint


def mean_squared_error(thermal: Tensor, rgb: Tensor, fused: Tensor) -> Tensor:
    """MSE: mean of the fused image's squared distances to both."""
    return ((thermal - fused).square() + (rgb - fused).square()).mean((1, 2)) / 2


def correlation(first: Tensor, second: Tensor) -> Tensor:
    """Pearson's correlation; NaN where an image is constant."""
    first = first - first.mean((1, 2), keepdim=True)
    second = second - second.mean((1, 2), keepdim=True)
    scale = torch.sqrt(first.square().sum((1, 2)) * second.square().sum((1, 2)))
    product = (first * second).sum((1, 2))
    return product / scale


def sum_of_correlations_of_differences(thermal: Tensor, rgb: Tensor, fused: Tensor) -> Tensor:
    """SCD (Aslantas and Bendes, 2015): what fusion adds to one source is the other."""
    return correlation(fused - rgb, thermal) + correlation(fused - thermal, rgb)


def visual_information_fidelity(source: Tensor, fused: Tensor) -> Tensor:
    """Pixel-domain VIF (Sheikh and Bovik, 2006) over 4 scales, noise variance 2.

    1 where the source is constant, because nothing can be lost; NaN where min(H, W) < 41, because
    the last scale has no room for its window.
    """
    if min(source.shape[1:]) < 41:
        return source.new_full((len(source),), math.nan)
    noise, epsilon = 2.0, 1e-10
    kept = available = torch.zeros(len(source), dtype=source.dtype, device=source.device)
    for scale in range(4):
        side = 2 ** (4 - scale) + 1
        window = gaussian_window(side, side / 5)
        if scale > 0:
            source, fused = (smooth(x, window)[:, ::2, ::2] for x in (source, fused))
        mean_s, mean_f = smooth(source, window), smooth(fused, window)
        variance_s = (smooth(source**2, window) - mean_s**2).clamp_min(0)
        variance_f = (smooth(fused**2, window) - mean_f**2).clamp_min(0)
        covariance = smooth(source * fused, window) - mean_s * mean_f

        gain = covariance / (variance_s + epsilon)
        gain = gain.masked_fill((variance_s < epsilon) | (variance_f < epsilon), 0)
        residual = variance_f - gain * covariance
        residual = torch.where(gain < 0, variance_f, residual).clamp_min(epsilon)
        gain = gain.clamp_min(0)
        variance_s = variance_s.masked_fill(variance_s < epsilon, 0)
        kept = kept + torch.log1p(gain**2 * variance_s / (residual + noise)).sum((1, 2))
        available = available + torch.log1p(variance_s / noise).sum((1, 2))
    return torch.where(available > 0, kept / available.clamp_min(1e-300), torch.ones_like(kept))


def edge_preservation(thermal: Tensor, rgb: Tensor, fused: Tensor, *, equal_is_one: bool) -> Tensor:
    """Qabf (Xydeas and Petrović, 2000): edges of both sources found again in the fused image.

    0 where neither source has an edge.

    Args:
        equal_is_one: the ratio of two edges of the same strength is 1; False: it is that strength,
            as published programs have it by a slip.
    """
    strength_f, angle_f = _edges(fused)
    kept = available = torch.zeros(len(fused), dtype=fused.dtype, device=fused.device)
    for source in (thermal, rgb):
        strength, angle = _edges(source)
        weaker, stronger = torch.minimum(strength, strength_f), torch.maximum(strength, strength_f)
        ratio = weaker / stronger.clamp_min(1e-300)
        equal = torch.ones_like(ratio) if equal_is_one else strength_f
        ratio = torch.where(strength == strength_f, equal, ratio)
        turn = 1 - (angle - angle_f).abs() * 2 / math.pi
        by_strength = 0.9994 / (1 + torch.exp(-15 * (ratio - 0.5)))
        by_angle = 0.9879 / (1 + torch.exp(-22 * (turn - 0.8)))
        kept = kept + (by_strength * by_angle * strength).sum((1, 2))
        available = available + strength.sum((1, 2))
    return kept / available.clamp_min(1e-300)


def fusion_artifacts(first: Tensor, second: Tensor, fused: Tensor) -> Tensor:
    """Nabf (Shreyamsha Kumar, 2013): edges of the fused image that neither source has; 0 = none."""
    strength_f, angle_f = _mirrored_edges(fused)
    lost, available = torch.zeros_like(fused), 0.0
    is_new = torch.ones_like(strength_f, dtype=torch.bool)
    for source in (first, second):
        strength, angle = _mirrored_edges(source)
        weaker, stronger = torch.minimum(strength, strength_f), torch.maximum(strength, strength_f)
        ratio = weaker / stronger.clamp_min(1e-300)
        turn = ((angle - angle_f).abs() - math.pi / 2).abs() * 2 / math.pi
        by_strength = 0.9999 / (1 + torch.exp(-19 * (ratio - 0.5)))
        by_angle = 0.9995 / (1 + torch.exp(-22 * (turn - 0.5)))
        weight = torch.where(strength >= 2, strength**1.5, torch.full_like(strength, 0.001))
        is_new = is_new & (strength_f > strength)
        lost = lost + (1 - torch.sqrt(by_strength * by_angle)) * weight
        available = available + weight.sum((1, 2))
    return (lost * is_new).sum((1, 2)) / available


def structural_similarity(
    first: Tensor, second: Tensor, window: Tensor, *, data_range: float, correction: float = 1.0
) -> Tensor:
    """SSIM (Wang et al., 2004): mean over the positions where the window fits.

    Args:
        window: (n,) weights along each side, sum 1.
        correction: factor of variances and covariance, n²/(n² - 1) for sample statistics.
    """
    luminance, structure = _similarity_maps(first, second, window, data_range, correction)
    return (luminance * structure).mean((1, 2))


def multi_scale_similarity(first: Tensor, second: Tensor, *, data_range: float) -> Tensor:
    """MS-SSIM (Wang et al., 2003): 5 levels, Gaussian window of 11 and σ 1.5.

    NaN where min(H, W) < 176, because the last level has no room for its window.
    """
    if min(first.shape[1:]) < 176:
        return first.new_full((len(first),), math.nan)
    window, result = gaussian_window(11, 1.5), 1.0
    weights = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
    for level, weight in enumerate(weights, start=1):
        luminance, structure = _similarity_maps(first, second, window, data_range, 1.0)
        value = structure if level < len(weights) else luminance * structure
        result = result * value.mean((1, 2)).clamp_min(0) ** weight
        first, second = (F.avg_pool2d(x, 2) for x in (first, second))
    return result


def _similarity_maps(
    first: Tensor, second: Tensor, window: Tensor, data_range: float, correction: float
) -> tuple[Tensor, Tensor]:
    """SSIM's luminance, and its contrast times structure, where the window fits."""
    mean_a, mean_b = smooth(first, window), smooth(second, window)
    variances = smooth(first**2, window) - mean_a**2 + smooth(second**2, window) - mean_b**2
    covariance = smooth(first * second, window) - mean_a * mean_b
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    luminance = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
    return luminance, (2 * correction * covariance + c2) / (correction * variances + c2)


def gaussian_window(side: int, sigma: float) -> Tensor:
    """(side,) float64 weights, sum 1."""
    offset = torch.arange(side, dtype=torch.float64) - (side - 1) / 2
    window = torch.exp(-(offset**2) / (2 * sigma**2))
    return window / window.sum()


def uniform_window(side: int) -> Tensor:
    """(side,) float64 weights, sum 1."""
    return torch.full((side,), 1 / side, dtype=torch.float64)


def smooth(image: Tensor, window: Tensor) -> Tensor:
    """Separable filter (B, H, W) -> (B, H - n + 1, W - n + 1)."""
    window = window.to(image)
    image = F.conv2d(image[:, None], window.view(1, 1, -1, 1))
    return F.conv2d(image, window.view(1, 1, 1, -1))[:, 0]


def _edges(image: Tensor) -> tuple[Tensor, Tensor]:
    """Sobel strength and angle with zeros outside the image, π/2 where the slope is vertical."""
    gradient_x, gradient_y = _sobel(F.pad(image, (1, 1, 1, 1)))
    strength = torch.sqrt(gradient_x**2 + gradient_y**2)
    angle = torch.atan(-gradient_y / gradient_x)
    return strength, angle.masked_fill(gradient_x == 0, math.pi / 2)


def _mirrored_edges(image: Tensor) -> tuple[Tensor, Tensor]:
    """Sobel strength and angle of Nabf: an eighth of the gradient, mirrored at the border."""
    gradient_x, gradient_y = _sobel(F.pad(image[:, None], (1, 1, 1, 1), mode="reflect")[:, 0] / 8)
    strength = torch.sqrt(gradient_x**2 + gradient_y**2)
    return strength, torch.atan(gradient_x / gradient_y).masked_fill(strength == 0, 0)


def _sobel(padded: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients across the columns and along them: (B, H + 2, W + 2) -> (B, H, W) each."""
    across = padded[..., 2:] - padded[..., :-2]
    along = padded[:, 2:] - padded[:, :-2]
    gradient_x = across[:, :-2] + 2 * across[:, 1:-1] + across[:, 2:]
    gradient_y = along[..., :-2] + 2 * along[..., 1:-1] + along[..., 2:]
    return gradient_x, gradient_y


def _histogram(values: Tensor, bins: int) -> Tensor:
    """Shares of integer values 0 … bins - 1 in each image: (B, H, W) -> (B, bins)."""
    batch = len(values)
    offset = torch.arange(batch, device=values.device)[:, None] * bins
    flat = values.flatten(1).round().long() + offset
    counts = torch.bincount(flat.flatten(), minlength=batch * bins)
    return counts.view(batch, bins).double() / values[0].numel()


def _entropy(shares: Tensor) -> Tensor:
    return -torch.special.xlogy(shares, shares).flatten(1).sum(1)
