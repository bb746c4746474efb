"""Fusion without a network, to lay beside any method: mean, maximum, Laplacian pyramid."""

from collections.abc import Callable
from types import MappingProxyType

import cv2
import numpy as np

_PYRAMID_LEVELS = 4
_SMALLEST_TOP = 8  # pixels; a pyramid ends before its top's shorter side falls below


def fuse_mean(rgb: np.ndarray, thermal: np.ndarray) -> np.ndarray:
    """The mean of luma and thermal, rounded; see BASELINES."""
    return _to_grey((_luma(rgb) + thermal) / 2)


def fuse_maximum(rgb: np.ndarray, thermal: np.ndarray) -> np.ndarray:
    """The brighter of luma and thermal, pixel by pixel; see BASELINES."""
    return _to_grey(np.maximum(_luma(rgb), thermal))


def fuse_laplacian(rgb: np.ndarray, thermal: np.ndarray) -> np.ndarray:
    """Of each level of two Laplacian pyramids the stronger detail, of the tops the mean."""
    (top, *details), (other_top, *other_details) = map(_laplacian_pyramid, (_luma(rgb), thermal))
    fused = (top + other_top) / 2
    for detail, other in zip(details, other_details, strict=True):
        stronger = np.where(np.abs(detail) >= np.abs(other), detail, other)
        fused = _enlarge(fused, detail) + stronger
    return _to_grey(fused)


#: name -> (rgb (H, W, 3) uint8, thermal (H, W) uint8) -> grey (H, W) uint8
BASELINES: MappingProxyType[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = MappingProxyType(
    {"mean": fuse_mean, "max": fuse_maximum, "laplacian": fuse_laplacian}
)


def _laplacian_pyramid(image: np.ndarray) -> list[np.ndarray]:
    """(H, W) -> the smallest image, then details from coarse to fine; their sum is the image."""
    image, details = image.astype(np.float32), []
    while len(details) < _PYRAMID_LEVELS and min(image.shape) >= 2 * _SMALLEST_TOP:
        smaller = cv2.pyrDown(image)
        details.append(image - _enlarge(smaller, image))
        image = smaller
    return [image, *reversed(details)]


def _enlarge(image: np.ndarray, like: np.ndarray) -> np.ndarray:
    return cv2.pyrUp(image, dstsize=like.shape[::-1])


def _luma(rgb: np.ndarray) -> np.ndarray:
    return cv2.cvtColor(rgb, cv2.COLOR_RGB2GRAY).astype(np.float32)


def _to_grey(image: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(image), 0, 255).astype(np.uint8)
