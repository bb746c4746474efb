"""Pairs on their way from a worker to the device: bytes until they are there, then numbers.

Bytes are a sixth of the numbers' size. Fresh shared memory costs more time than all decoding, so
that they leave a worker in a few blocks that it fills in turn.
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
    """Pairs of one size as bytes, 6 a pixel, ready to be copied to a device."""

    planes: Tensor  # (B, 6, H, W) uint8
    name: list[str]  # the stems
    modalities: str  # data.modalities

    def copy(self) -> "PackedBatch":
        """The same in memory of its own, pinned where there is CUDA."""
        is_pinned = torch.cuda.is_available()
        planes = self.planes.pin_memory() if is_pinned else self.planes.clone()
        return self._replace(planes=planes)

    def to(self, device: torch.device) -> Sample:
        """The numbers, made on the device; pinned bytes are copied while the program goes on."""
        planes = self.planes.to(device, non_blocking=True)
        return Sample(*unpack(planes, self.modalities), self.name)


class Packer:
    """Collates pairs: neighbours of one size become a batch, in one of `blocks` blocks of memory.

    A call's result holds until `blocks` more calls; who needs it longer takes a copy by then.

    Args:
        modalities: data.modalities, which the batches tell.
    """

    def __init__(self, blocks: int, modalities: str) -> None:
        self._modalities = modalities
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
            names = [name for _, name in members]
            batches.append(PackedBatch(planes, names, self._modalities))
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


def unpack(planes: Tensor, modalities: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """rgb, thermal, label and valid of a Sample, in memory of their own on the planes' device.

    Every device gives the same bits.

    Args:
        planes: (6, H, W) or (B, 6, H, W) uint8.
        modalities: data.modalities; the one that it withholds is mid-grey.
    """
    *leading, _, height, width = planes.shape
    shape = (*leading, 3, height, width)
    rgb, thermal = (planes.new_empty(shape, dtype=torch.float32) for _ in range(2))
    if modalities == "thermal":
        rgb.fill_(0.5)
    else:
        _to_unit_range(planes[..., :3, :, :], rgb)
    if modalities == "rgb":
        thermal.fill_(0.5)
    else:
        _to_unit_range(planes[..., 3:4, :, :], thermal[..., :1, :, :])
        thermal[..., 1:, :, :] = thermal[..., :1, :, :]
    return rgb, thermal, planes[..., 4, :, :].long(), planes[..., 5, :, :].bool()


def _to_unit_range(planes: Tensor, result: Tensor) -> None:
    """Divide (..., H, W) uint8 by 255 into float32; on the CPU by planes, which its cache holds."""
    if planes.is_cpu and planes.dim() > 2:
        for part, place in zip(planes, result, strict=True):
            _to_unit_range(part, place)
        return
    divisor = result.new_full((), 255.0)  # CUDA multiplies by 1 / 255 where that is a plain number
    torch.div(planes, divisor, out=result)


def _pack_into(planes: np.ndarray, pair: Pair) -> None:
    """Write a pair into (6, H, W) uint8."""
    cv2.split(pair.rgb, list(planes[:3]))
    planes[3], planes[4], planes[5] = pair.thermal, pair.label, pair.valid
