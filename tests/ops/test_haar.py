"""Haar transform: exact inverse, orthonormality, and agreement with two other libraries."""

import pytest
import pywt
import torch

from models.ops.haar import haar_dwt2, haar_idwt2

SIZES = [(8, 8), (4, 12), (20, 16)]
ODD_SIZES = [(7, 5), (9, 14), (1, 3)]


@pytest.mark.parametrize("hw", SIZES, ids=str)
@pytest.mark.parametrize("levels", [1, 2])
def test_inverse_is_exact(hw, levels):
    x = torch.randn(3, 2, *hw, dtype=torch.float64)
    torch.testing.assert_close(haar_idwt2(*haar_dwt2(x, levels)), x, rtol=0, atol=1e-12)


@pytest.mark.parametrize("hw", SIZES, ids=str)
def test_energy_is_kept(hw):
    x = torch.randn(2, 3, *hw, dtype=torch.float64)
    low, highs = haar_dwt2(x, 2)
    energy = low.square().sum() + sum(high.square().sum() for high in highs)
    torch.testing.assert_close(energy, x.square().sum())


@pytest.mark.parametrize("hw", SIZES + ODD_SIZES, ids=str)
def test_bands_are_those_of_pywavelets(hw):
    x = torch.randn(2, 3, *hw, dtype=torch.float64)
    low, highs = haar_dwt2(x, 2)
    expected = pywt.wavedec2(x.numpy(), "haar", mode="symmetric", level=2)
    torch.testing.assert_close(low, torch.from_numpy(expected[0]))
    for high, bands in zip(highs, reversed(expected[1:]), strict=True):
        for ours, theirs in zip(high.unbind(2), bands, strict=True):
            torch.testing.assert_close(ours, torch.from_numpy(theirs))


@pytest.mark.parametrize("hw", SIZES, ids=str)
def test_bands_are_those_of_pytorch_wavelets(hw):
    pytorch_wavelets = pytest.importorskip("pytorch_wavelets")
    x = torch.randn(2, 3, *hw)
    low, highs = haar_dwt2(x, 2)
    expected_low, expected_highs = pytorch_wavelets.DWTForward(J=2, wave="haar")(x)
    torch.testing.assert_close(low, expected_low)
    for ours, theirs in zip(highs, expected_highs, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("hw", ODD_SIZES, ids=str)
def test_odd_map_comes_back_after_cropping(hw):
    x = torch.randn(1, 2, *hw, dtype=torch.float64)
    rebuilt = haar_idwt2(*haar_dwt2(x, 2))[..., : hw[0], : hw[1]]
    torch.testing.assert_close(rebuilt, x)


def test_gradients():
    x = torch.randn(1, 2, 5, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: haar_idwt2(*haar_dwt2(t, 2)), x)


def test_levels_are_checked():
    with pytest.raises(ValueError, match="at least 1, got 0"):
        haar_dwt2(torch.zeros(1, 1, 4, 4), levels=0)
