"""How far thermal lies from rgb: phase correlation between maps of their edges."""

from collections.abc import Mapping
from typing import NamedTuple

import cv2
import numpy as np

MOST_SHIFT = 8.0  # pixels; beyond it a set or pair is taken for unregistered
_LARGEST_SIDE = 640  # pixels; larger images are measured at this size
_SMALLEST_SIDE = 32  # pixels; below it edges say nothing
_RELIABLE = 0.05  # least response of a pair that counts for the set
_CERTAIN = 0.15  # least response of a pair that is named alone
_LEAST_PAIRS = 5  # reliable ones, for a word on the set


class Shift(NamedTuple):
    """Where thermal lies from rgb, in pixels of the image, and how clear that is."""

    right: float
    down: float
    response: float  # 0 to 1, the share of the correlation in its peak

    @property
    def length(self) -> float:
        return float(np.hypot(self.right, self.down))

    def __str__(self) -> str:
        sides = "right" if self.right > 0 else "left", "down" if self.down > 0 else "up"
        return f"{abs(self.right):.1f} px {sides[0]} and {abs(self.down):.1f} px {sides[1]}"


def measure_shift(rgb: np.ndarray, thermal: np.ndarray) -> Shift | None:
    """The shift between rgb (H, W, 3) and thermal (H, W), uint8; None for too small images.

    A single pair can mislead where the two show different things: see the response.
    """
    height, width = thermal.shape
    if min(height, width) < _SMALLEST_SIDE:
        return None
    scale = min(1.0, _LARGEST_SIDE / max(height, width))
    grey = cv2.cvtColor(rgb, cv2.COLOR_RGB2GRAY)
    edges = [_edges(image, scale) for image in (grey, thermal)]
    window = cv2.createHanningWindow(edges[0].shape[::-1], cv2.CV_32F)
    (right, down), response = cv2.phaseCorrelate(*edges, window)
    return Shift(right / scale, down / scale, response)


def common_shift(shifts: Mapping[str, Shift]) -> tuple[Shift, int] | None:
    """The median of the reliable shifts and their number; None if they are too few."""
    reliable = [shift for shift in shifts.values() if shift.response >= _RELIABLE]
    if len(reliable) < _LEAST_PAIRS:
        return None
    return Shift(*(float(value) for value in np.median(reliable, axis=0))), len(reliable)


def far_pairs(shifts: Mapping[str, Shift], most_shift: float) -> dict[str, Shift]:
    """The pairs with a clear shift beyond most_shift pixels, the farthest first."""
    far = [
        (stem, shift)
        for stem, shift in shifts.items()
        if shift.response >= _CERTAIN and shift.length > most_shift
    ]
    return dict(sorted(far, key=lambda item: -item[1].length))


def _edges(image: np.ndarray, scale: float) -> np.ndarray:
    """Strength of edges, levelled so that faint ones count too: float32, zero mean."""
    if scale < 1:
        image = cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
    smooth = cv2.GaussianBlur(image.astype(np.float32), (0, 0), 1.5)
    strength = cv2.magnitude(
        cv2.Sobel(smooth, cv2.CV_32F, 1, 0), cv2.Sobel(smooth, cv2.CV_32F, 0, 1)
    )
    levelled = strength / (strength + strength.mean() + 1e-6)
    return levelled - levelled.mean()
