"""Pairs as bytes in blocks of memory: nothing is lost, and no block is filled too early."""

import numpy as np
import pytest
import torch

from dataloader.packing import NamedPair, Packer, pack, unpack
from dataloader.transforms import Pair
from utils.errors import InputError


def random_pair(seed, height=6, width=10):
    rng = np.random.default_rng(seed)
    rgb = rng.integers(0, 256, (height, width, 3), np.uint8)
    thermal, label = rng.integers(0, 256, (2, height, width), np.uint8)
    return Pair(rgb, thermal, label, rng.integers(0, 2, (height, width)).astype(np.uint8))


def named(*seeds, **size):
    return [NamedPair(random_pair(seed, **size), f"pair{seed}") for seed in seeds]


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


@pytest.mark.parametrize("used", ["rgb", "thermal"])
def test_withheld_modality_is_mid_grey_in_a_batch(used):
    ((planes, _),) = Packer(1)(named(0, 1))
    both, alone = unpack(planes, "both"), unpack(planes, used)
    for index, name in enumerate(("rgb", "thermal")):
        expected = both[index] if name == used else torch.full_like(both[index], 0.5)
        assert torch.equal(alone[index], expected)


def test_neighbours_of_one_size_make_a_batch():
    pairs = [*named(0, 1), *named(2, height=9, width=4), *named(3)]
    batches = Packer(2)(pairs)
    assert [names for _, names in batches] == [["pair0", "pair1"], ["pair2"], ["pair3"]]
    unpacked = [planes for planes_of, _ in batches for planes in planes_of]
    for planes, (pair, _) in zip(unpacked, pairs, strict=True):
        assert_holds(planes, pair)


@pytest.mark.parametrize("blocks", [1, 3])
def test_a_batch_stays_for_as_many_calls_as_there_are_blocks(blocks):
    packer = Packer(blocks)
    seen = [packer(named(seed))[0].planes for seed in range(blocks)]
    for seed, planes in enumerate(seen):
        assert_holds(planes[0], random_pair(seed))
    packer(named(99))
    assert_holds(seen[0][0], random_pair(99))  # the oldest is used again, the others are not
    for seed, planes in list(enumerate(seen))[1:]:
        assert_holds(planes[0], random_pair(seed))


def test_larger_batches_get_larger_blocks():
    packer = Packer(1)
    small = packer(named(0))[0].planes
    large = packer(named(1, 2, height=20))[0].planes
    assert_holds(small[0], random_pair(0))  # in memory that it keeps alone
    assert_holds(large[1], random_pair(2, height=20))
    again = packer(named(3))[0].planes
    assert again.data_ptr() == large.data_ptr()
    assert_holds(again[0], random_pair(3))


def test_the_result_is_not_in_the_block():
    """A batch that is kept, by a list of all of them say, does not change."""
    packer = Packer(1)
    rgb, thermal, label, valid = unpack(packer(named(0))[0].planes, "both")
    packer(named(1))
    expected = unpack(pack(random_pair(0)), "both")
    for part, other in zip((rgb, thermal, label, valid), expected, strict=True):
        assert torch.equal(part[0], other)


def test_an_error_passes():
    error = InputError("x")
    assert Packer(2)([error]) == [error]


def test_memory_is_shared_in_workers_alone():
    """A container's /dev/shm may be small; without workers nothing needs it."""
    assert not Packer(1)(named(0))[0].planes.is_shared()
