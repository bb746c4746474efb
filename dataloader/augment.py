"""Stronger augmentation, off by default: torchvision's transforms, drawn from a sample's generator.

What is geometry moves the whole pair; what is colour changes rgb alone, what is a camera's own
drift changes thermal alone. A turn is torchvision's RandomAffine, resampled by OpenCV: the same
pixels but for rounding, ten times as fast.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import cv2
import numpy as np
import torch
from torchvision.transforms import v2

from configs.schema import AugmentConfig
from dataloader.transforms import PADDING, Pair


class StrongAugmentation:
    """Turns and shears pairs, changes colours and blur of rgb, and gain, offset, noise of thermal.

    Each of the three groups acts on a sample with settings.probability, by amounts drawn evenly
    from the ranges of the settings. What a turn brings in from outside is padding.
    """

    def __init__(self, settings: AugmentConfig) -> None:
        self.settings = settings
        colors = v2.ColorJitter(
            settings.brightness, settings.contrast, settings.saturation, settings.hue
        )
        window = 2 * math.ceil(2 * settings.blur) + 1  # two sigmas to each side
        blur = v2.GaussianBlur(window, (1e-3, settings.blur)) if settings.blur else v2.Identity()
        self._photometry = v2.Compose([colors, blur])

    def __call__(self, pair: Pair, generator: torch.Generator) -> Pair:
        is_used = torch.rand(3, generator=generator) < self.settings.probability
        groups = (self._move, self._change_rgb, self._change_thermal)
        with global_draws_from(generator):
            for group, used in zip(groups, is_used.tolist(), strict=True):
                pair = group(pair) if used else pair
        rgb, thermal = (cv2.copyTo(x, pair.valid) for x in (pair.rgb, pair.thermal))  # else 0
        return pair._replace(rgb=rgb, thermal=thermal)

    def _move(self, pair: Pair) -> Pair:
        turn, shear = self.settings.rotation, self.settings.shear
        if not (turn or shear):
            return pair
        height, width = pair.label.shape
        angle, _, _, (lean, _) = v2.RandomAffine.get_params(
            [-turn, turn], None, None, [-shear, shear], [width, height]
        )
        matrix = _affine_matrix(height, width, angle, lean)

        def moved(image: np.ndarray, interpolation: int, padding: int) -> np.ndarray:
            return cv2.warpAffine(
                image, matrix, (width, height), flags=interpolation, borderValue=padding
            )

        images = cv2.cvtColor(pair.rgb, cv2.COLOR_RGB2RGBA)  # four channels: twice as fast as three
        cv2.insertChannel(pair.thermal, images, 3)
        images = moved(images, cv2.INTER_LINEAR, 0)
        return Pair(
            rgb=cv2.cvtColor(images, cv2.COLOR_RGBA2RGB),
            thermal=cv2.extractChannel(images, 3),
            label=moved(pair.label, cv2.INTER_NEAREST, PADDING.label),
            valid=moved(pair.valid, cv2.INTER_NEAREST, PADDING.valid),
        )

    def _change_rgb(self, pair: Pair) -> Pair:
        planes = np.empty((3, *pair.label.shape), np.uint8)
        cv2.split(pair.rgb, list(planes))
        changed = self._photometry(torch.from_numpy(planes))
        return pair._replace(rgb=cv2.merge(list(changed.numpy())))

    def _change_thermal(self, pair: Pair) -> Pair:
        gain_at, offset_at, noise_at = (2 * torch.rand(3) - 1).tolist()
        gain = 1 + gain_at * self.settings.thermal_gain
        offset = 255 * offset_at * self.settings.thermal_offset
        noise = 255 * abs(noise_at) * self.settings.thermal_noise
        image = torch.randn(pair.thermal.shape).mul_(noise).add_(offset)
        image.add_(torch.from_numpy(pair.thermal), alpha=gain).round_().clamp_(0, 255)
        return pair._replace(thermal=image.to(torch.uint8).numpy())


def paste_box(pair: Pair, other: Pair, generator: torch.Generator) -> Pair:
    """CutMix (Yun et al., ICCV 2019) of pairs of one size: a box of the other one in all parts.

    The box has a share of the area that is drawn evenly from [0, 1), lies anywhere, and is cut off
    at the borders.
    """
    share, row_at, column_at = torch.rand(3, generator=generator).tolist()
    box = []
    for length, at in zip(pair.label.shape, (row_at, column_at), strict=True):
        half = length * math.sqrt(share) / 2
        box.append(slice(max(0, round(length * at - half)), round(length * at + half)))
    mixed = [part.copy() for part in pair]
    for part, source in zip(mixed, other, strict=True):
        part[tuple(box)] = source[tuple(box)]
    return Pair(*mixed)


@contextmanager
def global_draws_from(generator: torch.Generator) -> Iterator[None]:
    """Let torch's global CPU generator, which torchvision draws from, go on as this one.

    Afterwards the generator has moved on by what was drawn, and the global one is as it was.
    """
    outside = torch.get_rng_state()
    torch.set_rng_state(generator.get_state())
    try:
        yield
    finally:
        generator.set_state(torch.get_rng_state())
        torch.set_rng_state(outside)


def _affine_matrix(height: int, width: int, angle: float, shear: float) -> np.ndarray:
    """(2, 3), source to result: shear along x, then clockwise turn (degrees), about the centre."""
    x, y = (width - 1) / 2, (height - 1) / 2
    slope = math.tan(math.radians(shear))
    lean = np.array([[1, -slope, slope * y], [0, 1, 0], [0, 0, 1]])
    return cv2.getRotationMatrix2D((x, y), -angle, 1) @ lean
