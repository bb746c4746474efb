"""Fusion metrics of batches of images, by named protocol.

Published programs disagree by more than fusion methods do, so every number belongs to a protocol:
"cddfuse" is the Python Evaluator of MMIF-CDDFuse, the most used one.
"""

import torch
from torch import Tensor

from utils import fusion_measures as measure

LUMA = (0.299, 0.587, 0.114)


def fusion_metrics(
    rgb: Tensor, thermal: Tensor, fused: Tensor, protocol: str = "cddfuse"
) -> dict[str, Tensor]:
    """Score fused images against both sources.

    Args:
        rgb, thermal, fused: uint8 (B, 3 or 1, H, W), all of one size, on one device; H, W >= 32.
        protocol: a name of PROTOCOLS.
    Returns:
        Metric name to (B,) float64.
    Raises:
        ValueError: another dtype or shape, or an unknown protocol.
    """
    if protocol not in PROTOCOLS:
        raise ValueError(f"unknown protocol '{protocol}'; known: {', '.join(PROTOCOLS)}")
    for name, image in (("rgb", rgb), ("thermal", thermal), ("fused", fused)):
        if image.dtype != torch.uint8 or image.dim() != 4 or image.shape[1] not in (1, 3):
            raise ValueError(
                f"{name} must be uint8 (B, 3 or 1, H, W), got {image.dtype} {tuple(image.shape)}"
            )
        if image.shape[0] != rgb.shape[0] or image.shape[2:] != rgb.shape[2:]:
            raise ValueError(
                f"{name} is {tuple(image.shape)}, rgb is {tuple(rgb.shape)}: sizes must agree"
            )
    return PROTOCOLS[protocol](rgb, thermal, fused)


def _cddfuse(rgb: Tensor, thermal: Tensor, fused: Tensor) -> dict[str, Tensor]:
    """MI in nats; SSIM with data range 2 (what its scikit-image took for floats); VIF a sum."""
    a, b, f = (_luma(image).round() for image in (thermal, rgb, fused))
    error = measure.mean_squared_error(a, b, f)
    window = measure.uniform_window(7)
    similarity = {"data_range": 2.0, "correction": 49 / 48}
    return {
        "EN": measure.entropy(f),
        "SD": measure.standard_deviation(f),
        "SF": measure.spatial_frequency(f),
        "AG": measure.average_gradient(f),
        "MI": measure.mutual_information(a, f) + measure.mutual_information(b, f),
        "MSE": error,
        "PSNR": _decibel(f.amax((1, 2)), error),
        "CC": (measure.correlation(a, f) + measure.correlation(b, f)) / 2,
        "SCD": measure.sum_of_correlations_of_differences(a, b, f),
        "VIF": measure.visual_information_fidelity(a, f)
        + measure.visual_information_fidelity(b, f),
        "Qabf": measure.edge_preservation(a, b, f),
        "SSIM": measure.structural_similarity(a, f, window, **similarity)
        + measure.structural_similarity(b, f, window, **similarity),
    }


def _decibel(peak: Tensor, error: Tensor) -> Tensor:
    """10·log10(peak² / MSE), kept finite for a black image and for a perfect one."""
    return 10 * torch.log10(peak.clamp_min(1).square() / error.clamp_min(1e-10))


def _luma(image: Tensor) -> Tensor:
    """(B, 3 or 1, H, W) uint8 -> (B, H, W) float64, OpenCV's weights."""
    image = image.double()
    if image.shape[1] == 1:
        return image[:, 0]
    weights = torch.tensor(LUMA, dtype=image.dtype, device=image.device)
    return (image * weights[:, None, None]).sum(1)


PROTOCOLS = {"cddfuse": _cddfuse}
