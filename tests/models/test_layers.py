"""The shared layers of the network."""

import pytest
import torch
import torch.nn.functional as F

from models.layers import resize, shuffle_channels

SIZES = [((5, 7), (20, 28)), ((3, 4), (7, 9)), ((1, 1), (4, 3)), ((9, 8), (3, 5)), ((6, 6), (6, 6))]


@pytest.mark.parametrize(("small", "large"), SIZES, ids=str)
def test_resize_and_its_gradient_are_those_of_interpolate(small, large):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, *small, dtype=torch.float64, generator=generator, requires_grad=True)
    grad = torch.randn(2, 3, *large, dtype=torch.float64, generator=generator)
    expected = F.interpolate(x, size=large, mode="bilinear", align_corners=False)
    result = resize(x, large)
    assert torch.equal(result, expected)
    (expected_grad,) = torch.autograd.grad(expected, x, grad)
    (result_grad,) = torch.autograd.grad(result, x, grad)
    torch.testing.assert_close(result_grad, expected_grad)


def test_resize_keeps_half_precision():
    x = torch.randn(1, 2, 4, 4, dtype=torch.bfloat16, requires_grad=True)
    resize(x, (16, 16)).sum().backward()
    torch.testing.assert_close(x.grad, torch.full_like(x, 16.0))


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_shuffled_channels_are_those_of_torch_and_have_a_gradient(groups):
    x = torch.randn(2, 8, 3, 5, requires_grad=True)
    shuffled = shuffle_channels(x, groups)
    assert torch.equal(shuffled, torch.nn.ChannelShuffle(groups)(x.detach()))
    weight = torch.randn(shuffled.shape)
    (gradient,) = torch.autograd.grad(shuffled, x, weight)
    assert torch.equal(shuffle_channels(gradient, groups), weight)
