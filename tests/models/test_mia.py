"""MIA: regions come apart and together again, the gate acts per region, any size works."""

import pytest
import torch

from models.mia import (
    HybridAttention,
    ModalInteractionAlignment,
    RegionModalInteraction,
    ShuffleMambaBlock,
    merge_regions,
    split_regions,
)
from models.text_prior import TextPrior


@pytest.fixture
def text_prior():
    return TextPrior(torch.linalg.qr(torch.randn(16, 3))[0].T.contiguous(), source="test")


def make_mia(per_side=5, channels=8, grid=(2, 3)):
    torch.manual_seed(0)
    return ModalInteractionAlignment(
        channels,
        d_state=2,
        regions_per_side=per_side,
        region_grid=grid,
        num_texts=3,
        text_dimension=16,
    )


def test_regions_round_trip():
    x = torch.randn(2, 3, 10, 15)
    regions = split_regions(x, 5)
    assert regions.shape == (50, 3, 2, 3)
    assert torch.equal(regions[7], x[0, :, 2:4, 6:9])  # region (1, 2) of image 0
    assert torch.equal(merge_regions(regions, 5), x)


def test_regions_must_divide():
    with pytest.raises(ValueError, match="11x15 does not divide into 5x5 regions"):
        split_regions(torch.zeros(1, 1, 11, 15), 5)


@pytest.mark.parametrize("hw", [(10, 15), (8, 8), (7, 13), (1, 2)], ids=str)
@pytest.mark.parametrize("per_side", [1, 5])
def test_any_size_and_batch_equals_singles(hw, per_side, text_prior):
    """Defect 3: the published MIA works for one image size only."""
    mia = make_mia(per_side).eval()
    rgb, thermal = torch.randn(3, 8, *hw), torch.randn(3, 8, *hw)
    out_rgb, out_thermal = mia(rgb, thermal, text_prior)
    assert out_rgb.shape == out_thermal.shape == rgb.shape
    for i in range(3):
        one_rgb, one_thermal = mia(rgb[i : i + 1], thermal[i : i + 1], text_prior)
        torch.testing.assert_close(one_rgb[0], out_rgb[i], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(one_thermal[0], out_thermal[i], rtol=1e-4, atol=1e-5)


def test_exchange_formula():
    """F_rgb' = (a_c + a_s) F_th w g + F_rgb, written out for one region."""
    torch.manual_seed(0)
    interaction = RegionModalInteraction(4, regions_per_side=1)
    rgb, thermal = torch.randn(2, 4, 6, 5), torch.randn(2, 4, 6, 5)
    gate = torch.tensor([0.25, 0.75]).view(2, 1, 1, 1)
    w = interaction.exchange_weight(torch.cat([rgb, thermal], dim=1))
    expected_rgb = interaction.rgb_attention(rgb) * thermal * w * gate + rgb
    expected_thermal = interaction.thermal_attention(thermal) * rgb * (1 - w) * gate + thermal
    out_rgb, out_thermal = interaction(rgb, thermal, gate)
    torch.testing.assert_close(out_rgb, expected_rgb)
    torch.testing.assert_close(out_thermal, expected_thermal)


def test_gate_closes_single_regions():
    """A closed gate leaves its region as it was, and only its region, at a size that is padded."""
    torch.manual_seed(0)
    interaction = RegionModalInteraction(4, regions_per_side=5)
    rgb, thermal = torch.randn(1, 4, 9, 13), torch.randn(1, 4, 9, 13)  # padded to 10 x 15
    gate = torch.ones(1, 1, 5, 5)
    gate[0, 0, 4, 4] = 0  # rows 8-9, columns 12-14
    out, _ = interaction(rgb, thermal, gate)
    changed = (out != rgb).any(1)[0]
    assert not changed[8:, 12:].any()
    assert changed[:8].all()
    assert changed[:, :12].all()


def test_attention_sees_its_own_region_only(text_prior):
    torch.manual_seed(0)
    interaction = RegionModalInteraction(4, regions_per_side=5)
    x = torch.randn(1, 4, 10, 10)
    before = interaction._attend(interaction.rgb_attention, x)
    x[..., :2, :2] += 1.0
    changed = (interaction._attend(interaction.rgb_attention, x) != before).any(1)[0]
    assert changed[:2, :2].all()
    assert not changed[2:].any()
    assert not changed[:, 2:].any()


def test_attention_range():
    attention = HybridAttention(6)(torch.randn(3, 6, 4, 5) * 10)
    assert attention.shape == (3, 6, 4, 5)
    assert attention.min() > 0
    assert attention.max() < 2


def test_gate_depends_on_the_text(text_prior):
    mia = make_mia()
    context = torch.randn(2, 8, 10, 15)
    gate = mia.text_gate(context, text_prior)
    assert gate.shape == (2, 1, 5, 5)
    assert gate.min() > 0
    assert gate.max() < 1
    other = TextPrior(text_prior.features.flip(0).contiguous(), source="test")
    assert not torch.allclose(gate, mia.text_gate(context, other))


def test_shuffle_block_residual_starts_after_the_shuffle():
    block = ShuffleMambaBlock(4, d_state=2)
    torch.nn.init.zeros_(block.mixer.out_proj.weight)
    x = torch.randn(1, 4, 3, 3)
    assert torch.equal(block(x), x[:, [0, 2, 1, 3]])


def test_all_parameters_get_a_gradient(text_prior):
    mia = make_mia()
    out_rgb, out_thermal = mia(torch.randn(2, 8, 10, 15), torch.randn(2, 8, 10, 15), text_prior)
    (out_rgb.square().mean() + out_thermal.square().mean()).backward()
    assert [name for name, p in mia.named_parameters() if p.grad is None] == []
    assert not any(p.requires_grad for p in text_prior.parameters())
