"""Joint transforms: rgb, thermal, label and valid mask of a pair always move together."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import cv2
import numpy as np
import torch

from utils.image import UNKNOWN_LABEL


class Pair(NamedTuple):
    """A decoded pair; what transforms take and return, never changed in place."""

    rgb: np.ndarray  # (H, W, 3) uint8
    thermal: np.ndarray  # (H, W) uint8
    label: np.ndarray  # (H, W) uint8, 255 = ignored
    valid: np.ndarray  # (H, W) uint8, 1 = a pixel of the image, 0 = padding


PADDING = Pair(rgb=0, thermal=0, label=UNKNOWN_LABEL, valid=0)
# Exact, because plain INTER_NEAREST is half a pixel off from where INTER_LINEAR samples.
_INTERPOLATION = Pair(
    rgb=cv2.INTER_LINEAR,
    thermal=cv2.INTER_LINEAR,
    label=cv2.INTER_NEAREST_EXACT,
    valid=cv2.INTER_NEAREST_EXACT,
)

Transform = Callable[[Pair, torch.Generator], Pair]


class RandomScaleCropMirror:
    """Training augmentation: a random scale, a random crop at that scale, a mirror image or not.

    Where the scaled image is smaller than the crop it is padded on the right and bottom: images
    with 0, label with 255, valid with 0. Only the window that the crop shows is resized, so the
    scale of a side is exact to half a pixel of that window.

    Args:
        crop: height and width of the result.
        scales: factors to choose from, all equally likely.
        use_mirror: mirror left and right with probability 1/2.
    """

    def __init__(self, crop: tuple[int, int], scales: Sequence[float], *, use_mirror: bool) -> None:
        self.crop = crop
        self.scales = tuple(scales)
        self.use_mirror = use_mirror

    def __call__(self, pair: Pair, generator: torch.Generator) -> Pair:
        scale_at, top_at, left_at, mirror_at = torch.rand(4, generator=generator).tolist()
        scale = self.scales[int(scale_at * len(self.scales))]
        height, width = pair.label.shape
        top, source_height, shown_height = _choose_window(height, self.crop[0], scale, top_at)
        left, source_width, shown_width = _choose_window(width, self.crop[1], scale, left_at)
        rows, columns = slice(top, top + source_height), slice(left, left + source_width)
        is_mirrored = self.use_mirror and mirror_at < 0.5
        results = []
        for image, interpolation, padding in zip(pair, _INTERPOLATION, PADDING, strict=True):
            shown = _resize(image[rows, columns], (shown_height, shown_width), interpolation)
            if is_mirrored:
                shown = cv2.flip(shown, 1)  # far faster than copying a view in steps of -1
            results.append(_pad(shown, self.crop, padding))
        return Pair(*results)


class InTurn:
    """Several transforms as one, all drawing from the same generator."""

    def __init__(self, transforms: Sequence[Transform]) -> None:
        self.transforms = tuple(transforms)

    def __call__(self, pair: Pair, generator: torch.Generator) -> Pair:
        for transform in self.transforms:
            pair = transform(pair, generator)
        return pair


def _choose_window(length: int, crop: int, scale: float, at: float) -> tuple[int, int, int]:
    """Start and length of the window along a side, and its length in the result; at in [0, 1)."""
    shown = min(crop, max(1, round(length * scale)))
    window = length if shown < crop else min(length, max(1, round(shown / scale)))
    return int(at * (length - window + 1)), window, shown


def _resize(image: np.ndarray, size: tuple[int, int], interpolation: int) -> np.ndarray:
    if image.shape[:2] == size:
        return image
    if interpolation == cv2.INTER_NEAREST_EXACT and (image == image[0, 0]).all():
        return np.full(size, image[0, 0])  # the valid mask, nearly always: a tenth of the time
    return cv2.resize(image, size[::-1], interpolation=interpolation)


def _pad(image: np.ndarray, size: tuple[int, int], value: int) -> np.ndarray:
    height, width = image.shape[:2]
    if (height, width) == size:
        return image
    padded = np.full((*size, *image.shape[2:]), value, image.dtype)
    padded[:height, :width] = image
    return padded
