"""What a drawn scene is painted on: parts with a color, a temperature and a class each."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import cv2
import numpy as np
from numpy.random import Generator

BACKGROUND, PERSON, CAR, CONE, KERB = range(5)  # the classes of configs/config_demo.yaml
CIRCLE = np.array([(math.cos(turn), math.sin(turn)) for turn in np.arange(24) * math.pi / 12])
Color = Sequence[float] | np.ndarray  # reflected red, green, blue in [0, 1]
Points = Sequence[tuple[float, float]] | np.ndarray  # (N, 2), column and row


class Light(NamedTuple):
    """A lamp: part is the painted lamp, which must be in sight; None = its light on things."""

    x: float
    y: float
    radius: float  # pixels
    strength: float
    color: Color
    part: int | None


class Canvas:
    """For each pixel the part of a thing that is seen there; what is painted later is in front.

    Color, temperature and label are all looked up from the same part, so a label is exact.
    """

    def __init__(self, height: int, width: int) -> None:
        self.parts = np.zeros((height, width), np.uint16)
        self.shade = np.zeros((height, width), np.uint8)  # 1 where the ground lies in shadow
        self.lights: list[Light] = []
        self._looks: list[tuple[float, ...]] = [(0.0,) * 6]  # part 0: what nobody paints over
        self._labels: list[int] = [BACKGROUND]

    def add_part(
        self,
        color: Color,
        temperature: float,
        glow: float = 0.0,
        *,
        distance: float = 0.0,
        label: int = BACKGROUND,
    ) -> int:
        """Number of a new part, to paint with.

        Args:
            glow: share of color that shines by itself.
            distance: metres to the camera; 0 = part of the ground, whose row tells the distance.
        """
        self._looks.append((*color, temperature, glow, distance))
        self._labels.append(label)
        return len(self._labels) - 1

    def polygon(self, points: Points, part: int) -> None:
        fill(self.parts, points, part)

    def looks(self) -> np.ndarray:
        """(H, W, 6) float32: red, green, blue, temperature, glow, distance."""
        return np.array(self._looks, np.float32)[self.parts]

    def label(self) -> np.ndarray:
        """(H, W) uint8 class of each pixel."""
        return np.array(self._labels, np.uint8)[self.parts]

    def color_near(self, x: float, y: float, reach: float) -> np.ndarray:
        """(3,) mean color of five points around a place, as painted so far."""
        height, width = self.parts.shape
        total = np.zeros(3)
        for dx, dy in ((-1, -1), (1, -1), (-1, 1), (1, 1), (0, 0)):
            row = min(max(int(y + dy * reach), 0), height - 1)
            column = min(max(int(x + dx * reach), 0), width - 1)
            total += self._looks[self.parts[row, column]][:3]
        return total / 5


def fill(image: np.ndarray, points: Points, value: int) -> None:
    """Fill a polygon in an (H, W) image; its corners may lie between pixels and outside."""
    corners = np.round(np.asarray(points, np.float64) * 16).astype(np.int32)
    cv2.fillPoly(image, [corners], value, cv2.LINE_8, 4)


def jitter(rng: Generator, color: Color, spread: float = 0.05) -> np.ndarray:
    """A color of random difference: at most `spread` in each of red, green and blue."""
    return np.clip(np.asarray(color) + rng.uniform(-spread, spread, 3), 0.02, 1.0)


def pick(rng: Generator, colors: Sequence[Color]) -> np.ndarray:
    """One of the colors, a little changed."""
    return jitter(rng, colors[rng.integers(len(colors))])
