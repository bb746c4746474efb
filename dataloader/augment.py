"""Stronger augmentation, off by default: torchvision's transforms, drawn from a sample's generator.

What is geometry moves the whole pair; what is colour changes rgb alone, what is a camera's own
drift changes thermal alone.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torchvision import tv_tensors
from torchvision.transforms import v2

from configs.schema import AugmentConfig
from dataloader.transforms import PADDING, Pair
from utils.image import UNKNOWN_LABEL


class StrongAugmentation:
    """Turns and shears pairs, changes colours and blur of rgb, and gain, offset, noise of thermal.

    Each of the three groups acts on a sample with settings.probability, by amounts drawn evenly
    from the ranges of the settings. What a turn brings in from outside is padding.
    """

    def __init__(self, settings: AugmentConfig) -> None:
        self.settings = settings
        affine = v2.RandomAffine(
            settings.rotation,
            shear=settings.shear,
            interpolation=v2.InterpolationMode.BILINEAR,  # of images; masks are never blended
            fill={tv_tensors.Image: None, tv_tensors.Mask: UNKNOWN_LABEL},  # None: a faster 0
        )
        self._geometry = affine if settings.rotation or settings.shear else v2.Identity()
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
        outside = pair.valid == 0
        images = [pair.rgb.copy(), pair.thermal.copy()]
        for image, padding in zip(images, PADDING, strict=False):
            image[outside] = padding
        return Pair(*images, pair.label, pair.valid)

    def _move(self, pair: Pair) -> Pair:
        images = np.concatenate((pair.rgb.transpose(2, 0, 1), pair.thermal[None]))
        masks = np.stack((pair.label, 1 - pair.valid))  # filled with 255: unknown, and padding
        images, masks = self._geometry(
            tv_tensors.Image(torch.from_numpy(images)), tv_tensors.Mask(torch.from_numpy(masks))
        )
        rgb, thermal = _to_array(images[:3]), images[3].numpy()
        label, is_padding = masks.numpy()
        return Pair(rgb, thermal, label, (is_padding == 0).astype(np.uint8))

    def _change_rgb(self, pair: Pair) -> Pair:
        image = torch.from_numpy(np.ascontiguousarray(pair.rgb.transpose(2, 0, 1)))
        return pair._replace(rgb=_to_array(self._photometry(tv_tensors.Image(image))))

    def _change_thermal(self, pair: Pair) -> Pair:
        gain_at, offset_at, noise_at = (2 * torch.rand(3) - 1).tolist()
        gain = 1 + gain_at * self.settings.thermal_gain
        offset = 255 * offset_at * self.settings.thermal_offset
        noise = 255 * abs(noise_at) * self.settings.thermal_noise
        image = torch.from_numpy(pair.thermal) * gain + offset
        image += noise * torch.randn(image.shape)
        return pair._replace(thermal=image.round().clamp(0, 255).to(torch.uint8).numpy())


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


def _to_array(image: torch.Tensor) -> np.ndarray:
    """(3, H, W) -> (H, W, 3), contiguous."""
    return np.ascontiguousarray(image.numpy().transpose(1, 2, 0))
