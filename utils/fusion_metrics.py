"""Fusion metrics of batches of images, by named protocol.

Published programs disagree by more than fusion methods do, so every number belongs to a protocol:
"cddfuse" is the Python Evaluator of MMIF-CDDFuse, the most used one; "tang" the MATLAB toolbox
Evaluation-for-Image-Fusion, the most cited one; "strict" has each formula as it was published,
without the slips of the two.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from utils import fusion_edges as edges
from utils import fusion_measures as measure
from utils import fusion_statistics as statistics
from utils.exposure_similarity import exposure_similarity

# Every metric of any protocol, in the order of tables.
METRICS = ("EN", "SD", "SF", "AG", "MI", "MSE", "PSNR", "CC", "SCD", "VIF", "Qabf", "Nabf", "SSIM",
           "MS-SSIM")  # fmt: skip
MATLAB_LUMA = (0.298936021293775, 0.587043074451121, 0.114020904255103)  # rgb2gray
# Pixels of images that are scored together: a GPU's memory is the bound, about 2 GB; a CPU takes
# image by image, which its cache likes.
PIXELS_AT_ONCE = {"cpu": 1, "cuda": 2**23}


def fusion_metrics(
    rgb: Tensor, thermal: Tensor, fused: Tensor, protocol: str = "cddfuse"
) -> dict[str, Tensor]:
    """Score fused images against both sources.

    Args:
        rgb, thermal, fused: uint8 (B, 3 or 1, H, W), all of one size, on one device; H, W >= 2.
        protocol: a name of PROTOCOLS.
    Returns:
        Metric name to (B,) float64; NaN only where an image is too small for the scales of VIF
        (min(H, W) < 41), MS-SSIM (< 176, in "tang" < 41) or the 7x7 box of SSIM in "cddfuse".
    Raises:
        ValueError: another dtype or shape, or an unknown protocol.
    """
    if protocol not in PROTOCOLS:
        raise ValueError(f"unknown protocol '{protocol}'; known: {', '.join(PROTOCOLS)}")
    for name, image in (("rgb", rgb), ("thermal", thermal), ("fused", fused)):
        _check(name, image, rgb)
    at_once = max(1, PIXELS_AT_ONCE.get(rgb.device.type, 1) // (rgb.shape[2] * rgb.shape[3]))
    parts = zip(*(x.split(at_once) for x in (rgb, thermal, fused)), strict=True)
    scores = [PROTOCOLS[protocol](*part) for part in parts]
    names = [name for name in METRICS if name in scores[0]]
    return {name: torch.cat([score[name] for score in scores]) for name in names}


def _cddfuse(rgb: Tensor, thermal: Tensor, fused: Tensor) -> dict[str, Tensor]:
    """MI in nats; SSIM with data range 2 (what its scikit-image took for floats); VIF a sum.

    PSNR's peak is the fused image's own maximum; Qabf's ratio of equal edges is their strength.
    """
    images = _stack(_opencv_grey, rgb, thermal, fused)
    joint = statistics.joint_histogram(images)
    error = statistics.mean_squared_error(images)
    return {
        **_common(images, joint),
        "AG": statistics.average_gradient(images[2]),
        "MI": statistics.mutual_information(joint).sum(0),
        "MSE": error,
        "PSNR": _decibel(images[2].amax((-2, -1)).double(), error),
        "VIF": measure.visual_information_fidelity(images).sum(0),
        "Qabf": edges.edge_preservation(images, equal_is_one=False),
        "SSIM": measure.uniform_similarity(images, data_range=2).sum(0),
    }


def _tang(rgb: Tensor, thermal: Tensor, fused: Tensor) -> dict[str, Tensor]:
    """MI in bits, levels 254 and 255 in one joint bin; MSE on [0, 1], but PSNR of 255 over it.

    AG is a sum over (rows - 1)(columns - 1); SSIM has data range 1 on 0..255; MS-SSIM is MEF-SSIM;
    Nabf takes rgb and the fused image for its sources and thermal for the fused one: its function's
    arguments in another order than its caller's.
    """
    images = _stack(_matlab_grey, rgb, thermal, fused)
    joint = statistics.joint_histogram(images)
    error = statistics.mean_squared_error(images) / 255**2
    rows, columns = images.shape[-2:]
    too_few = (rows * columns) / ((rows - 1) * (columns - 1))
    return {
        **_common(images, joint),
        "AG": statistics.average_gradient(images[2]) * too_few,
        "MI": statistics.mutual_information(joint, last_level=254).sum(0) / math.log(2),
        "MSE": error,
        "PSNR": _decibel(torch.full_like(error, 255.0), error),
        "VIF": measure.visual_information_fidelity(images).sum(0),
        "Qabf": edges.edge_preservation(images, equal_is_one=False),
        "Nabf": edges.fusion_artifacts(images.roll(-1, 0)),
        "SSIM": measure.structural_similarity(images, data_range=1).mean(0),
        "MS-SSIM": exposure_similarity(*images.double()),
    }


def _strict(rgb: Tensor, thermal: Tensor, fused: Tensor) -> dict[str, Tensor]:
    """Each formula as its paper has it: means over both sources, bits, data range 255.

    Grey levels are rounded, as OpenCV does, for EN and MI alone.
    """
    images = _stack(_exact_grey, rgb, thermal, fused)
    joint = statistics.joint_histogram(_stack(_opencv_grey, rgb, thermal, fused))
    error = statistics.mean_squared_error(images)
    return {
        **_common(images, joint),
        "AG": statistics.average_gradient(images[2]),
        "MI": statistics.mutual_information(joint).sum(0) / math.log(2),
        "MSE": error,
        "PSNR": _decibel(torch.full_like(error, 255.0), error),
        "VIF": measure.visual_information_fidelity(images).mean(0),
        "Qabf": edges.edge_preservation(images, equal_is_one=True),
        "Nabf": edges.fusion_artifacts(images),
        "SSIM": measure.structural_similarity(images, data_range=255).mean(0),
        "MS-SSIM": measure.multi_scale_similarity(images, data_range=255).mean(0),
    }


def _common(images: Tensor, joint: Tensor) -> dict[str, Tensor]:
    """What all protocols agree on."""
    covariance = statistics.covariances(images)
    return {
        "EN": statistics.fused_entropy(joint),
        "SD": covariance[:, 2, 2].clamp_min(0).sqrt(),
        "SF": statistics.spatial_frequency(images[2]),
        "CC": statistics.correlation_with_sources(covariance),
        "SCD": statistics.sum_of_correlations_of_differences(covariance),
    }


def _check(name: str, image: Tensor, rgb: Tensor) -> None:
    shape = tuple(image.shape)
    if image.dtype != torch.uint8 or image.dim() != 4 or image.shape[1] not in (1, 3):
        raise ValueError(f"{name} must be uint8 (B, 3 or 1, H, W), got {image.dtype} {shape}")
    if image.shape[0] != rgb.shape[0] or image.shape[2:] != rgb.shape[2:]:
        raise ValueError(f"{name} is {shape}, rgb is {tuple(rgb.shape)}: sizes must agree")
    if len(image) == 0 or min(image.shape[2:]) < 2:
        raise ValueError(f"{name} is {shape}; give at least one image of at least 2x2")


def _decibel(peak: Tensor, error: Tensor) -> Tensor:
    """10·log10(peak² / MSE), kept finite for a black image and for a perfect one."""
    return 10 * torch.log10(peak.clamp_min(1).square() / error.clamp_min(1e-10))


def _stack(
    grey: Callable[[Tensor, Tensor, Tensor], Tensor], rgb: Tensor, thermal: Tensor, fused: Tensor
) -> Tensor:
    """Thermal, rgb and fused as (3, B, H, W) float32, grey in 0..255."""
    levels = [x[:, 0] if x.shape[1] == 1 else grey(*x.unbind(1)) for x in (thermal, rgb, fused)]
    return torch.stack([x.float() for x in levels])


def _opencv_grey(red: Tensor, green: Tensor, blue: Tensor) -> Tensor:
    """OpenCV's luma of bytes, in its fixed point: .299, .587 and .114 of 2^15, rounded."""
    return (red.int() * 9798 + green.int() * 19235 + blue.int() * 3735 + 2**14) >> 15


def _matlab_grey(red: Tensor, green: Tensor, blue: Tensor) -> Tensor:
    channels = zip(MATLAB_LUMA, (red, green, blue), strict=True)
    return (sum(weight * channel.double() for weight, channel in channels) + 0.5).floor()


def _exact_grey(red: Tensor, green: Tensor, blue: Tensor) -> Tensor:
    """OpenCV's weights, not rounded; equal channels give exactly their level.

    A GPU multiplies by 1 / 1000 instead, which in float32 moves halves off their place.
    """
    return (red.int() * 299 + green.int() * 587 + blue.int() * 114).double() / 1000


PROTOCOLS = {"cddfuse": _cddfuse, "tang": _tang, "strict": _strict}
