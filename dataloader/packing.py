"""Pairs on their way from a worker: bytes in memory that is used again, numbers where they arrive.

Fresh shared memory costs more time than all decoding, so that batches cross as bytes, a sixth of
their size as numbers, in a few blocks that each worker fills in turn.
"""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from dataloader.transforms import Pair
from utils.errors import InputError

_PLANES = 6  # red, green, blue, thermal, label, valid


class Sample(NamedTuple):
    """One pair as the network takes it; a batch is the same with B in front."""

    rgb: Tensor  # (3, H, W) float32 in [0, 1]
    thermal: Tensor  # (3, H, W) float32 in [0, 1], three equal channels
    label: Tensor  # (H, W) int64, 255 = ignored
    valid: Tensor  # (H, W) bool, False where padded
    name: str  # the stem; in a batch a list of them


class NamedPair(NamedTuple):
    """A pair as a dataset gives it to a Packer."""

    pair: Pair
    name: str


class PackedBatch(NamedTuple):
    """Pairs of one size."""

    planes: Tensor  # (B, 6, H, W) uint8, in memory that is filled anew some batches later
    names: list[str]


class Packer:
    """Collates pairs: neighbours of one size become a batch, in one of `blocks` blocks of memory.

    A process that holds one call's result until `blocks` more calls must have read it by then.
    """

    def __init__(self, blocks: int) -> None:
        self._blocks = [torch.empty(0, dtype=torch.uint8)] * blocks
        self._calls = 0

    def __call__(self, pairs: Sequence[NamedPair | InputError]) -> list[PackedBatch | InputError]:
        """The batches, or the error that took their place."""
        if isinstance(pairs[0], InputError):
            return [pairs[0]]
        block = self._next_block(sum(_PLANES * pair.label.size for pair, _ in pairs))
        batches, start = [], 0
        for (height, width), group in itertools.groupby(pairs, key=lambda x: x.pair.label.shape):
            members = list(group)
            shape = (len(members), _PLANES, height, width)
            planes = block[start : start + np.prod(shape)].view(shape)
            for place, (pair, _) in zip(planes.numpy(), members, strict=True):
                _pack_into(place, pair)
            batches.append(PackedBatch(planes, [name for _, name in members]))
            start += planes.numel()
        return batches

    def _next_block(self, size: int) -> Tensor:
        index = self._calls % len(self._blocks)
        self._calls += 1
        if len(self._blocks[index]) < size:
            block = torch.empty(size, dtype=torch.uint8)
            self._blocks[index] = block.share_memory_() if get_worker_info() else block
        return self._blocks[index]


def pack(pair: Pair) -> Tensor:
    """One pair as (6, H, W) uint8."""
    planes = np.empty((_PLANES, *pair.label.shape), np.uint8)
    _pack_into(planes, pair)
    return torch.from_numpy(planes)


def unpack(planes: Tensor, modalities: str, *, is_pinned: bool = False) -> tuple[Tensor, ...]:
    """rgb, thermal, label and valid of a Sample, in memory of their own.

    Args:
        planes: (6, H, W) or (B, 6, H, W) uint8.
        modalities: data.modalities; the one that it withholds is mid-grey.
        is_pinned: give tensors that a GPU copies while the program goes on.
    """
    *leading, _, height, width = planes.shape

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(*leading, *shape, height, width, dtype=dtype, pin_memory=is_pinned)

    rgb, thermal = empty(3), empty(3)
    if modalities == "thermal":
        rgb.fill_(0.5)
    if modalities == "rgb":
        thermal.fill_(0.5)
    images = (x.view(-1, *x.shape[-3:]) for x in (planes, rgb, thermal))
    for stored, rgb_place, thermal_place in zip(*images, strict=True):
        if modalities != "thermal":
            _to_unit_range(stored[:3], rgb_place)
        if modalities != "rgb":
            _to_unit_range(stored[3:4], thermal_place[:1])
            thermal_place[1:] = thermal_place[0]
    label = empty(dtype=torch.int64).copy_(planes[..., 4, :, :])
    valid = empty(dtype=torch.bool).copy_(planes[..., 5, :, :])
    return rgb, thermal, label, valid


def _to_unit_range(planes: Tensor, result: Tensor) -> None:
    """Divide (C, H, W) uint8 by 255 into float32, plane by plane: the second step is in cache."""
    for plane, place in zip(planes, result, strict=True):
        place.copy_(plane).div_(255)


def _pack_into(planes: np.ndarray, pair: Pair) -> None:
    """Write a pair into (6, H, W) uint8."""
    cv2.split(pair.rgb, list(planes[:3]))
    planes[3], planes[4], planes[5] = pair.thermal, pair.label, pair.valid
