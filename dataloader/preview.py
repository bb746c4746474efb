"""What the training augmentation makes of the first pairs, as one picture."""

import cv2
import numpy as np

from dataloader.dataset import SegmentationPairs
from dataloader.transforms import Pair
from utils.image import colorize, contact_sheet

_COUNT = 4
_TITLES = ("rgb", "thermal", "label")


def augmentation_sheet(pairs: SegmentationPairs) -> np.ndarray:
    """The first pairs as they are stored and, beside that, as epoch 0 trains on them.

    pairs: of a training loader, all transformed to one size. Gives (height, width, 3) uint8.
    """
    rows = []
    for index in range(min(_COUNT, len(pairs))):
        after = pairs.transformed(index).pair
        before = [_fit(image, after.label.shape) for image in _draw(pairs.read(index), pairs)]
        rows.append([*before, *_draw(after, pairs)])
    return contact_sheet(rows, [*_TITLES, *(f"{title}, augmented" for title in _TITLES)])


def _draw(pair: Pair, pairs: SegmentationPairs) -> tuple[np.ndarray, ...]:
    return pair.rgb, pair.thermal, colorize(pair.label, pairs.config.palette)


def _fit(image: np.ndarray, size_hw: tuple[int, int]) -> np.ndarray:
    """Scaled to lie inside this size, its sides in proportion, the rest white."""
    height, width = image.shape[:2]
    scale = min(size_hw[0] / height, size_hw[1] / width)
    shown = max(1, round(height * scale)), max(1, round(width * scale))
    fitted = np.full((*size_hw, *image.shape[2:]), 255, np.uint8)
    fitted[: shown[0], : shown[1]] = cv2.resize(
        image, shown[::-1], interpolation=cv2.INTER_NEAREST_EXACT
    )
    return fitted
