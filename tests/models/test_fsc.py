"""FSC: band layout, exact wavelet path, signed inverse Fourier transform, any size."""

import pytest
import torch

from models.fsc import (
    FourierBranch,
    FrequencySpatialCollaboration,
    SpatialBranch,
    WaveletBranch,
    tile_bands,
    untile_bands,
)
from models.ops.haar import haar_dwt2

SIZES = [(8, 12), (7, 5), (4, 4), (2, 9)]


def make(part, channels=6, **options):
    torch.manual_seed(0)
    return part(channels, **options)


def test_band_layout():
    """LL2 top left, then LH2, HL2, HH2 around it, then LH1 right, HL1 below, HH1 across."""
    low, highs = haar_dwt2(torch.randn(1, 1, 8, 12))
    tiled = tile_bands(low, highs)
    assert tiled.shape == (1, 1, 8, 12)
    assert torch.equal(tiled[..., :2, :3], low)
    lh2, hl2, hh2 = highs[1].unbind(2)
    lh1, hl1, hh1 = highs[0].unbind(2)
    assert torch.equal(tiled[..., :2, 3:6], lh2)
    assert torch.equal(tiled[..., 2:4, :3], hl2)
    assert torch.equal(tiled[..., 2:4, 3:6], hh2)
    assert torch.equal(tiled[..., :4, 6:], lh1)
    assert torch.equal(tiled[..., 4:, :6], hl1)
    assert torch.equal(tiled[..., 4:, 6:], hh1)


def test_bands_round_trip():
    low, highs = haar_dwt2(torch.randn(2, 3, 8, 12))
    low_again, highs_again = untile_bands(tile_bands(low, highs))
    assert torch.equal(low_again, low)
    assert all(torch.equal(a, b) for a, b in zip(highs_again, highs, strict=True))


@pytest.mark.parametrize("hw", SIZES, ids=str)
def test_wavelet_branch_without_a_mixer_is_its_embedding(hw):
    """With s = 1 and a silent SS2D the transform and its inverse cancel, at padded sizes too."""
    branch = make(WaveletBranch, d_state=2, expand=2)
    torch.nn.init.zeros_(branch.ss2d.out_proj.weight)
    x = torch.randn(2, 6, *hw)
    torch.testing.assert_close(branch(x), branch.embed(x), rtol=1e-5, atol=1e-6)


def test_spatial_branch_without_mixers_is_its_scales():
    branch = make(SpatialBranch, d_state=2, expand=2)
    torch.nn.init.zeros_(branch.ss2d.out_proj.weight)
    convolution = branch.conv.get_submodule("2")
    torch.nn.init.zeros_(convolution.weight)
    torch.nn.init.zeros_(convolution.bias)
    torch.nn.init.constant_(branch.scan_scale.scale, 3.0)
    torch.nn.init.constant_(branch.conv_scale.scale, 0.5)
    x = torch.randn(1, 6, 5, 7)
    torch.testing.assert_close(branch(x), 1.5 * x)


def identity_magnitude(branch):
    """A Fourier branch whose magnitudes pass unchanged (they are positive, so LeakyReLU is too)."""
    for layer in (branch.magnitude[0], branch.magnitude[2]):
        torch.nn.init.zeros_(layer.bias)
        with torch.no_grad():
            layer.weight.copy_(torch.eye(layer.weight.shape[0])[:, :, None, None])


@pytest.mark.parametrize("hw", SIZES, ids=str)
def test_fourier_branch_keeps_the_sign(hw):
    """Defect 6: |irfft2| threw the sign away. With magnitudes unchanged the input comes back."""
    branch = make(FourierBranch)
    identity_magnitude(branch)
    seen = []
    branch.reduce.register_forward_hook(lambda module, args, output: seen.append(args[0]))
    spatial, wavelet = torch.randn(2, 6, *hw), torch.randn(2, 6, *hw)
    branch(spatial, wavelet)
    torch.testing.assert_close(seen[0], torch.cat([spatial, wavelet], dim=1), rtol=1e-4, atol=1e-5)


def test_fourier_branch_stays_in_float32_under_autocast():
    branch = make(FourierBranch)
    identity_magnitude(branch)
    seen = []
    branch.reduce.register_forward_hook(lambda module, args, output: seen.append(args[0]))
    spatial, wavelet = torch.randn(1, 6, 9, 8), torch.randn(1, 6, 9, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        branch(spatial, wavelet)
    torch.testing.assert_close(
        seen[0].float(), torch.cat([spatial, wavelet], dim=1), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("hw", SIZES, ids=str)
def test_any_size_and_batch_equals_singles(hw):
    fsc = make(FrequencySpatialCollaboration, d_state=2).eval()
    x = torch.randn(3, 6, *hw)
    together = fsc(x)
    assert together.shape == x.shape
    for i in range(3):
        torch.testing.assert_close(fsc(x[i : i + 1])[0], together[i], rtol=1e-4, atol=1e-5)


def test_all_parameters_get_a_gradient():
    fsc = make(FrequencySpatialCollaboration, d_state=2)
    fsc(torch.randn(2, 6, 8, 8)).square().mean().backward()
    assert [name for name, p in fsc.named_parameters() if p.grad is None] == []
    assert all(torch.isfinite(p.grad).all() for p in fsc.parameters())


def test_a_zero_spectrum_has_a_finite_gradient():
    branch = make(FourierBranch)
    x = torch.zeros(1, 6, 4, 4, requires_grad=True)
    branch(x, x).sum().backward()
    assert torch.isfinite(x.grad).all()


def test_a_sum_that_cancels_does_not_blow_up_the_gradient():
    """A floor of 1e-8 under magnitudes: a frequency of exactly 0 had 1e7 times the gradient."""
    branch = make(FourierBranch)
    x = torch.randint(-8, 9, (1, 6, 8, 12)).float()
    x[..., 0, 0] -= x.sum((2, 3))  # whole numbers: each channel's sum is exactly 0
    norms = []
    for offset in (0.0, 0.1):
        pixels = (x + offset).requires_grad_()
        branch(pixels, pixels).square().mean().backward()
        norms.append(pixels.grad.norm())
    assert norms[0] < 3 * norms[1]
