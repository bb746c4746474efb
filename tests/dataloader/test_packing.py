"""Pairs as bytes in blocks of memory: nothing is lost, and no block is filled too early."""

import numpy as np
import pytest
import torch

from dataloader.packing import NamedPair, Packer, Sample, pack, unpack
from dataloader.transforms import Pair
from utils.errors import InputError


def random_pair(seed, height=6, width=10):
    rng = np.random.default_rng(seed)
    rgb = rng.integers(0, 256, (height, width, 3), np.uint8)
    thermal, label = rng.integers(0, 256, (2, height, width), np.uint8)
    return Pair(rgb, thermal, label, rng.integers(0, 2, (height, width)).astype(np.uint8))


def named(*seeds, **size):
    return [NamedPair(random_pair(seed, **size), f"pair{seed}") for seed in seeds]


def packer_of(blocks, modalities="both"):
    return Packer(blocks, modalities)


def assert_holds(planes, pair):
    rgb, thermal, label, valid = unpack(planes, "both")
    np.testing.assert_array_equal(rgb.mul(255).round().byte().permute(1, 2, 0).numpy(), pair.rgb)
    for channel in thermal:
        np.testing.assert_array_equal(channel.mul(255).round().byte().numpy(), pair.thermal)
    assert (rgb.dtype, label.dtype, valid.dtype) == (torch.float32, torch.int64, torch.bool)
    np.testing.assert_array_equal(label.numpy(), pair.label)
    np.testing.assert_array_equal(valid.numpy(), pair.valid == 1)


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x,
        lambda x: x[:, ::-1],
        lambda x: x[1:4, 2:5],
        lambda x: np.asfortranarray(x),
    ],
    ids=["whole", "mirrored", "window", "columns first"],
)
def test_round_trip(view):
    pair = Pair(*map(view, random_pair(0)))
    assert_holds(pack(pair), pair)


def test_numbers_are_exact_256ths():
    values = np.arange(256, dtype=np.uint8).reshape(16, 16)
    pair = Pair(np.stack([values] * 3, -1), values, values, values % 2)
    rgb, thermal, *_ = unpack(pack(pair), "both")
    expected = torch.arange(256).reshape(16, 16) / 255
    assert torch.equal(rgb[1], expected)
    assert torch.equal(thermal[2], expected)


def numbers_of(pair, modalities):
    """What a Sample of one pair holds, by NumPy alone."""
    unit = np.float32(255)
    rgb = pair.rgb.transpose(2, 0, 1).astype(np.float32) / unit
    thermal = np.stack([pair.thermal.astype(np.float32) / unit] * 3)
    if modalities == "thermal":
        rgb[:] = 0.5
    if modalities == "rgb":
        thermal[:] = 0.5
    return rgb, thermal, pair.label.astype(np.int64), pair.valid == 1


@pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param(
            "cuda",
            marks=[
                pytest.mark.gpu,
                pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
            ],
        ),
    ],
)
@pytest.mark.parametrize("modalities", ["both", "rgb", "thermal"])
@pytest.mark.parametrize("hw", [(6, 10), (7, 5), (63, 33)], ids=str)
@pytest.mark.parametrize("count", [1, 3])
def test_numbers_are_the_same_bits_on_every_device(count, hw, modalities, device):
    pairs = named(*range(count), height=hw[0], width=hw[1])
    (batch,) = packer_of(1, modalities)(pairs)
    sample = batch.copy().to(torch.device(device))
    assert isinstance(sample, Sample)
    assert sample.name == [f"pair{seed}" for seed in range(count)]
    expected = [numbers_of(pair, modalities) for pair, _ in pairs]
    for part, single in zip(sample[:4], zip(*expected, strict=True), strict=True):
        goal = torch.from_numpy(np.stack(single))
        assert (part.device.type, part.dtype, part.shape) == (device, goal.dtype, goal.shape)
        assert part.is_contiguous()
        assert torch.equal(part.cpu(), goal)


def test_neighbours_of_one_size_make_a_batch():
    pairs = [*named(0, 1), *named(2, height=9, width=4), *named(3)]
    batches = packer_of(2)(pairs)
    assert [batch.name for batch in batches] == [["pair0", "pair1"], ["pair2"], ["pair3"]]
    stored = [planes for batch in batches for planes in batch.planes]
    for planes, (pair, _) in zip(stored, pairs, strict=True):
        assert_holds(planes, pair)


@pytest.mark.parametrize("blocks", [1, 3])
def test_a_batch_stays_for_as_many_calls_as_there_are_blocks(blocks):
    packer = packer_of(blocks)
    seen = [packer(named(seed))[0].planes for seed in range(blocks)]
    for seed, planes in enumerate(seen):
        assert_holds(planes[0], random_pair(seed))
    packer(named(99))
    assert_holds(seen[0][0], random_pair(99))  # the oldest is used again, the others are not
    for seed, planes in list(enumerate(seen))[1:]:
        assert_holds(planes[0], random_pair(seed))


def test_larger_batches_get_larger_blocks():
    packer = packer_of(1)
    small = packer(named(0))[0].planes
    large = packer(named(1, 2, height=20))[0].planes
    assert_holds(small[0], random_pair(0))  # in memory that it keeps alone
    assert_holds(large[1], random_pair(2, height=20))
    again = packer(named(3))[0].planes
    assert again.data_ptr() == large.data_ptr()
    assert_holds(again[0], random_pair(3))


def test_a_copy_is_not_in_the_block():
    """A batch that is kept, by a list of all of them say, does not change; nor do its numbers."""
    packer = packer_of(1)
    batch = packer(named(0))[0]
    kept, sample = batch.copy(), batch.to(torch.device("cpu"))
    packer(named(1))
    assert_holds(batch.planes[0], random_pair(1))
    assert_holds(kept.planes[0], random_pair(0))
    assert kept[1:] == (["pair0"], "both")
    for part, other in zip(sample[:4], unpack(pack(random_pair(0)), "both"), strict=True):
        assert torch.equal(part[0], other)


def test_an_error_passes():
    error = InputError("x")
    assert packer_of(2)([error]) == [error]


def test_memory_is_shared_in_workers_alone():
    """A container's /dev/shm may be small; without workers nothing needs it."""
    assert not packer_of(1)(named(0))[0].planes.is_shared()
