"""The heads: sizes, range, fixed gradients."""

import pytest
import torch
import torch.nn.functional as F

from models.heads import FusionHead, GradientResidualBlock, SegmentationHead

WIDTHS = (6, 8, 10, 12)


def stage_maps(hw, batch=2):
    return [
        torch.randn(batch, width, *(-(-side // (4 * 2**stage)) for side in hw))
        for stage, width in enumerate(WIDTHS)
    ]


@pytest.mark.parametrize("hw", [(64, 96), (33, 47), (32, 32)], ids=str)
def test_segmentation_head_gives_logits_at_the_image_size(hw):
    head = SegmentationHead(WIDTHS, num_classes=5, hidden=16, d_state=2)
    assert head(stage_maps(hw), hw).shape == (2, 5, *hw)


def test_segmentation_head_drops_whole_channels_of_one_in_ten():
    head = SegmentationHead(WIDTHS, num_classes=5, hidden=16, d_state=2).train()
    kept = head.classify[1](torch.ones(20, 100, 3, 3)).flatten(2)
    assert (kept == kept[..., :1]).all()
    assert 100 < (kept[..., 0] == 0).sum() < 300


@pytest.mark.parametrize("hw", [(64, 96), (33, 47)], ids=str)
def test_segmentation_head_fuses_embedded_resized_maps(hw):
    """As the method has it: Linear, bilinear to stride 4, concatenate, 1x1 convolution, norm."""
    head = SegmentationHead(WIDTHS, num_classes=5, hidden=16, d_state=2).double()
    maps = [x.double() for x in stage_maps(hw)]
    embedded = [
        F.interpolate(embed(x), maps[0].shape[-2:], mode="bilinear")
        for embed, x in zip(head.embed, maps, strict=True)
    ]
    expected = head.fuse(torch.cat(embedded, dim=1))
    torch.testing.assert_close(head._fused(maps), expected)


@pytest.mark.parametrize("hw", [(64, 96), (33, 47)], ids=str)
def test_fusion_head_stays_in_range(hw):
    head = FusionHead(WIDTHS, hidden=4)
    rgb, thermal = torch.rand(2, 3, *hw), torch.rand(2, 3, *hw)
    fused = head(stage_maps(hw), stage_maps(hw), rgb, thermal)
    assert fused.shape == rgb.shape
    assert fused.min() >= 0
    assert fused.max() <= 1


def test_fusion_head_is_the_same_with_channels_to_fill(monkeypatch):
    """As on a GPU, where zero maps make the channels a multiple of four."""
    torch.manual_seed(0)
    for hidden in (4, 8):
        head = FusionHead(WIDTHS, hidden=hidden).eval()
        maps, (rgb, thermal) = stage_maps((64, 96)), torch.rand(2, 2, 3, 64, 96)
        expected = head(maps, maps, rgb, thermal)
        missing = -head.fuse[0].in_channels % 4
        assert missing > 0
        monkeypatch.setattr(head, "_filling", lambda x, n=missing: [torch.zeros_like(x)[:, :n]])
        torch.testing.assert_close(head(maps, maps, rgb, thermal), expected)


def test_fusion_head_draws_no_frame():
    """Even maps and images give an even fused image, up to its outermost pixels."""
    torch.manual_seed(0)
    head = FusionHead(WIDTHS, hidden=4).eval()
    maps = [x[..., :1, :1].expand_as(x) for x in stage_maps((64, 96))]
    rgb, thermal = torch.rand(2, 2, 3, 1, 1).expand(-1, -1, -1, 64, 96)
    fused = head(maps, maps, rgb, thermal)
    torch.testing.assert_close(fused, fused[..., 30:31, 30:31].expand_as(fused))


def test_fusion_head_is_not_stretched_per_image():
    """Defect 6: evaluation stretched by its own extremes, so one pixel moved them all."""
    torch.manual_seed(0)
    head = FusionHead(WIDTHS, hidden=4).eval()
    maps = stage_maps((64, 64), batch=1)
    rgb, thermal = torch.rand(1, 3, 64, 64), torch.rand(1, 3, 64, 64)
    before = head(maps, maps, rgb, thermal)
    rgb[..., 0, 0] = 1.0 - rgb[..., 0, 0]
    after = head(maps, maps, rgb, thermal)
    torch.testing.assert_close(after[..., 10:, 10:], before[..., 10:, 10:])


def test_gradient_block_trains_no_sobel_filter():
    """Defect 6: the published "Sobel" filters were trainable."""
    block = GradientResidualBlock(4)
    assert {tuple(p.shape[-2:]) for p in block.gradient.parameters() if p.dim() == 4} == {(1, 1)}
    flat = torch.full((1, 4, 8, 8), 0.3)
    torch.nn.init.zeros_(block.project.weight)
    torch.nn.init.zeros_(block.project.bias)
    torch.nn.init.zeros_(block.gradient.bias)
    assert block(flat).abs().max() < 1e-5  # no edges, nothing to add
