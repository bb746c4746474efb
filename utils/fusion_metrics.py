"""Fusion metrics of batches of images, by named protocol.

Published programs disagree by more than fusion methods do, so every number belongs to a protocol:
"cddfuse" is the Python Evaluator of MMIF-CDDFuse, the most used one; "tang" the MATLAB toolbox
Evaluation-for-Image-Fusion, the most cited one; "strict" has each formula as it was published,
without the slips of the two.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from utils import fusion_measures as measure
from utils.exposure_similarity import exposure_similarity

# Every metric of any protocol, in the order of tables.
METRICS = ("EN", "SD", "SF", "AG", "MI", "MSE", "PSNR", "CC", "SCD", "VIF", "Qabf", "Nabf", "SSIM",
           "MS-SSIM")  # fmt: skip
# Thousandths: as whole numbers they leave a grey image of three channels exactly as it is.
OPENCV_LUMA = (299, 587, 114)
MATLAB_LUMA = (298.936021293775, 587.043074451121, 114.020904255103)  # rgb2gray


def fusion_metrics(
    rgb: Tensor, thermal: Tensor, fused: Tensor, protocol: str = "cddfuse"
) -> dict[str, Tensor]:
    """Score fused images against both sources.

    Args:
        rgb, thermal, fused: uint8 (B, 3 or 1, H, W), all of one size, on one device; H, W >= 32.
        protocol: a name of PROTOCOLS.
    Returns:
        Metric name to (B,) float64; NaN where a metric has no value (a correlation with a constant
        image, or an image too small for its scales).
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
    scores = PROTOCOLS[protocol](rgb, thermal, fused)
    return {name: scores[name] for name in METRICS if name in scores}


def _cddfuse(rgb: Tensor, thermal: Tensor, fused: Tensor) -> dict[str, Tensor]:
    """MI in nats; SSIM with data range 2 (what its scikit-image took for floats); VIF a sum."""
    a, b, f = (_grey(image, OPENCV_LUMA).round() for image in (thermal, rgb, fused))
    error = measure.mean_squared_error(a, b, f)
    window = measure.uniform_window(7)
    similarity = {"data_range": 2.0, "correction": 49 / 48}
    return {
        **_common(a, b, f),
        "AG": measure.average_gradient(f),
        "MI": measure.mutual_information(a, f) + measure.mutual_information(b, f),
        "MSE": error,
        "PSNR": _decibel(f.amax((1, 2)), error),
        "VIF": measure.visual_information_fidelity(a, f)
        + measure.visual_information_fidelity(b, f),
        "Qabf": measure.edge_preservation(a, b, f, equal_is_one=False),
        "SSIM": measure.structural_similarity(a, f, window, **similarity)
        + measure.structural_similarity(b, f, window, **similarity),
    }


def _tang(rgb: Tensor, thermal: Tensor, fused: Tensor) -> dict[str, Tensor]:
    """MI in bits, levels 254 and 255 in one joint bin; MSE on [0, 1], but PSNR of 255 over it.

    AG is a sum over (rows - 1)(columns - 1); SSIM has data range 1 on 0..255; MS-SSIM is MEF-SSIM;
    Nabf takes (thermal, rgb) for its sources' places and the fused image for a source: its
    function's arguments in another order than its caller's.
    """
    a, b, f = (_grey(image, MATLAB_LUMA).round() for image in (thermal, rgb, fused))
    error = measure.mean_squared_error(a, b, f) / 255**2
    rows, columns = f.shape[1:]
    edges = {"last_level": 254}
    bordered = [F.pad(x[:, None], (5, 5, 5, 5), mode="replicate")[:, 0] for x in (a, b, f)]
    window = measure.gaussian_window(11, 1.5)
    return {
        **_common(a, b, f),
        "AG": measure.average_gradient(f) * (rows * columns) / ((rows - 1) * (columns - 1)),
        "MI": (
            measure.mutual_information(a, f, **edges) + measure.mutual_information(b, f, **edges)
        )
        / math.log(2),
        "MSE": error,
        "PSNR": _decibel(torch.full_like(error, 255.0), error),
        "VIF": measure.visual_information_fidelity(a, f)
        + measure.visual_information_fidelity(b, f),
        "Qabf": measure.edge_preservation(a, b, f, equal_is_one=False),
        "Nabf": measure.fusion_artifacts(b, f, a),
        "SSIM": _mean_of_both(measure.structural_similarity, *bordered, window, data_range=1.0),
        "MS-SSIM": exposure_similarity(a, b, f),
    }


def _strict(rgb: Tensor, thermal: Tensor, fused: Tensor) -> dict[str, Tensor]:
    """Each formula as its paper has it: means over both sources, bits, data range 255."""
    a, b, f = (_grey(image, OPENCV_LUMA) for image in (thermal, rgb, fused))
    error = measure.mean_squared_error(a, b, f)
    window = measure.gaussian_window(11, 1.5)
    range_255 = {"data_range": 255.0}
    return {
        **_common(a, b, f),
        "AG": measure.average_gradient(f),
        "MI": (measure.mutual_information(a, f) + measure.mutual_information(b, f)) / math.log(2),
        "MSE": error,
        "PSNR": _decibel(torch.full_like(error, 255.0), error),
        "VIF": _mean_of_both(measure.visual_information_fidelity, a, b, f),
        "Qabf": measure.edge_preservation(a, b, f, equal_is_one=True),
        "Nabf": measure.fusion_artifacts(a, b, f),
        "SSIM": _mean_of_both(measure.structural_similarity, a, b, f, window, **range_255),
        "MS-SSIM": _mean_of_both(measure.multi_scale_similarity, a, b, f, **range_255),
    }


def _common(a: Tensor, b: Tensor, f: Tensor) -> dict[str, Tensor]:
    """What all protocols agree on."""
    return {
        "EN": measure.entropy(f),
        "SD": measure.standard_deviation(f),
        "SF": measure.spatial_frequency(f),
        "CC": _mean_of_both(measure.correlation, a, b, f),
        "SCD": measure.sum_of_correlations_of_differences(a, b, f),
    }


def _mean_of_both(
    score: Callable[..., Tensor], a: Tensor, b: Tensor, f: Tensor, *rest: Tensor, **options: float
) -> Tensor:
    return (score(a, f, *rest, **options) + score(b, f, *rest, **options)) / 2


def _decibel(peak: Tensor, error: Tensor) -> Tensor:
    """10·log10(peak² / MSE), kept finite for a black image and for a perfect one."""
    return 10 * torch.log10(peak.clamp_min(1).square() / error.clamp_min(1e-10))


def _grey(image: Tensor, weights: tuple[float, float, float]) -> Tensor:
    """(B, 3 or 1, H, W) uint8 -> (B, H, W) float64."""
    image = image.double()
    if image.shape[1] == 1:
        return image[:, 0]
    red, green, blue = image.unbind(1)
    return (weights[0] * red + weights[1] * green + weights[2] * blue) / 1000


PROTOCOLS = {"cddfuse": _cddfuse, "tang": _tang, "strict": _strict}
