"""Padding with the border's pixels, and its own gradient."""

import pytest
import torch
import torch.nn.functional as F

from models.ops.padding import crop, replicate_pad


@pytest.mark.parametrize("sides", [(1, 1, 1, 1), (0, 3, 0, 2), (2, 0, 0, 0), (0, 0, 1, 4)], ids=str)
@pytest.mark.parametrize("hw", [(5, 7), (1, 1), (1, 6)], ids=str)
def test_equals_the_built_in_one(hw, sides):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, *hw, dtype=torch.float64, generator=generator, requires_grad=True)
    expected = F.pad(x, sides, mode="replicate")
    weight = torch.randn(expected.shape, dtype=torch.float64, generator=generator)
    padded = replicate_pad(x, *sides)
    assert torch.equal(padded, expected)
    (gradient,) = torch.autograd.grad(padded, x, weight)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, x, weight)[0])


def test_nothing_to_add_costs_nothing():
    x = torch.randn(1, 2, 3, 4)
    assert replicate_pad(x, 0, 0, 0, 0) is x


def test_crop_is_the_top_left_and_a_whole_map_itself():
    x = torch.randn(2, 3, 5, 7)
    assert torch.equal(crop(x, (4, 6)), x[:, :, :4, :6])
    assert crop(x, (5, 7)) is x
