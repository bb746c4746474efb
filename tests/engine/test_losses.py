"""The joint loss: formulas by hand, valid pixels only, signed gradients."""

from types import SimpleNamespace

import pytest
import torch

from configs import load_config
from engine.losses import (
    PixelCounts,
    color_loss,
    count_pixels,
    fusion_targets,
    gradient_loss,
    intensity_loss,
    joint_loss,
    segmentation_loss,
)
from models import CMFSOutput


def make_batch(hw=(8, 10), batch=2):
    torch.manual_seed(0)
    return SimpleNamespace(
        rgb=torch.rand(batch, 3, *hw),
        thermal=torch.rand(batch, 1, *hw).repeat(1, 3, 1, 1),
        label=torch.randint(0, 5, (batch, *hw)),
        valid=torch.ones(batch, *hw, dtype=torch.bool),
    )


def make_output(batch, classes=5):
    logits = torch.randn(*batch.label.shape[:1], classes, *batch.label.shape[1:])
    return CMFSOutput(logits, torch.rand_like(batch.rgb), torch.tensor(1.5))


@pytest.mark.parametrize("name", ["mfnet", "fmb", "pst900", "msrs"])
def test_total_is_the_weighted_sum(name):
    config = load_config(name).loss
    batch = make_batch()
    parts = joint_loss(make_output(batch), batch, config)
    fusion = (
        config.intensity_weight * parts["intensity"]
        + config.gradient_weight * parts["gradient"]
        + config.color_weight * parts["color"]
    )
    total = parts["segmentation"] + 0.1 * fusion + 0.01 * 1.5
    torch.testing.assert_close(parts["fusion"], fusion)
    torch.testing.assert_close(parts["total"], total)
    assert set(parts) == {
        "total", "segmentation", "fusion", "intensity", "gradient", "color", "balance",
    }  # fmt: skip


def test_the_paper_s_weights():
    assert load_config("mfnet").loss.gradient_weight == 0.2
    assert load_config("fmb").loss.gradient_weight == 1
    for name, gamma, contrast in (("mfnet", 0.5, 1.7), ("fmb", 0.8, 1), ("pst900", 0.5, 1.8)):
        loss = load_config(name).loss
        assert (loss.rgb_gamma, loss.thermal_contrast) == (gamma, contrast)


def test_targets():
    batch = make_batch()
    visible, thermal = fusion_targets(batch.rgb, batch.thermal, batch.valid, 0.5, 1.7)
    torch.testing.assert_close(visible, batch.rgb.sqrt())
    mean = batch.thermal.mean((1, 2, 3), keepdim=True)
    torch.testing.assert_close(thermal, (mean + 1.7 * (batch.thermal - mean)).clamp(0, 1))


def test_perfect_fusion_costs_nothing():
    batch = make_batch()
    batch.thermal = torch.zeros_like(batch.thermal)
    config = load_config("msrs").loss
    output = CMFSOutput(torch.zeros(2, 5, 8, 10), batch.rgb.clone(), torch.tensor(0.0))
    parts = joint_loss(output, batch, config)
    for name in ("intensity", "gradient", "color", "fusion"):
        assert parts[name] < 1e-6, name


def test_intensity_is_the_distance_to_the_brighter():
    dark, bright = torch.full((1, 3, 4, 4), 0.2), torch.full((1, 3, 4, 4), 0.9)
    valid = torch.ones(1, 4, 4, dtype=torch.bool)
    torch.testing.assert_close(intensity_loss(dark, dark, bright, valid), torch.tensor(0.7))
    torch.testing.assert_close(intensity_loss(bright, bright, dark, valid), torch.tensor(0.0))


def test_gradient_target_keeps_the_larger_edge_and_its_sign():
    """Defect 6: a maximum of signed gradients prefers rising edges over stronger falling ones."""
    ramp = torch.arange(8.0).expand(1, 3, 6, 8) / 10
    falling, flat = 0.8 - ramp, torch.zeros_like(ramp)
    valid = torch.ones(1, 6, 8, dtype=torch.bool)
    assert gradient_loss(falling, falling, flat, valid) < 1e-6
    assert gradient_loss(falling, flat, falling, valid) < 1e-6
    weaker_rise = 0.5 * ramp
    assert gradient_loss(falling, weaker_rise, falling, valid) < 1e-6
    assert gradient_loss(ramp, weaker_rise, falling, valid) > 0.5


def test_color_ignores_brightness():
    batch = make_batch()
    shifted = batch.rgb * 0.5 + 0.1
    grey_shift = batch.rgb + 0.05
    assert color_loss(grey_shift, batch.rgb, batch.valid) < 1e-6
    assert color_loss(shifted, batch.rgb, batch.valid) > 1e-3


def test_padding_changes_nothing():
    """Every part is the same when the pair is padded on the right and bottom."""
    config = load_config("mfnet").loss
    batch = make_batch()
    output = make_output(batch)
    pad = torch.nn.functional.pad
    padded = SimpleNamespace(
        rgb=pad(batch.rgb, (0, 7, 0, 5)),
        thermal=pad(batch.thermal, (0, 7, 0, 5)),
        label=pad(batch.label, (0, 7, 0, 5), value=255),
        valid=pad(batch.valid, (0, 7, 0, 5)),
    )
    padded_output = CMFSOutput(
        pad(output.logits, (0, 7, 0, 5), value=3.0),
        pad(output.fused, (0, 7, 0, 5), value=0.7),
        output.balance_loss,
    )
    whole, part = joint_loss(output, batch, config), joint_loss(padded_output, padded, config)
    for name in ("segmentation", "intensity", "color", "balance"):
        torch.testing.assert_close(part[name], whole[name], msg=name)
    inside = slice(0, -1)  # next to padding a gradient is the padding's: those pixels are left out
    cropped = batch.valid.clone()
    cropped[:, -1] = cropped[:, :, -1] = False
    visible, thermal = fusion_targets(batch.rgb, batch.thermal, batch.valid, 0.5, 1.7)
    from models.ops.sobel import sobel

    expected = 0
    for f, v, t in zip(sobel(output.fused), sobel(visible), sobel(thermal), strict=True):
        target = torch.where(v.abs() >= t.abs(), v, t)
        expected = expected + 0.5 * (f - target).abs()[..., inside, inside].mean()
    torch.testing.assert_close(part["gradient"], expected)


def test_unlabelled_batch_has_zero_segmentation_loss_and_a_graph():
    logits = torch.randn(1, 3, 4, 4, requires_grad=True)
    loss = segmentation_loss(logits, torch.full((1, 4, 4), 255))
    loss.backward()
    assert loss == 0
    assert torch.equal(logits.grad, torch.zeros_like(logits))


def test_gradcheck_of_the_fusion_parts():
    torch.manual_seed(0)
    visible, thermal = (torch.rand(1, 3, 5, 6, dtype=torch.float64) for _ in range(2))
    valid = torch.ones(1, 5, 6, dtype=torch.bool)
    fused = torch.rand(1, 3, 5, 6, dtype=torch.float64, requires_grad=True)

    def loss(image):
        return (
            intensity_loss(image, visible, thermal, valid)
            + gradient_loss(image, visible, thermal, valid)
            + color_loss(image, visible, valid)
        )

    assert torch.autograd.gradcheck(loss, fused)


def test_parts_of_a_batch_weigh_by_their_pixels():
    """With the mean of their counts, parts give the loss and the gradient of the whole batch."""
    config = load_config("mfnet").loss
    batch = make_batch(batch=4)
    batch.valid[0, 3:] = batch.valid[2, :, 6:] = False
    batch.label[~batch.valid] = 255
    batch.label[1] = batch.label[3, :, 1:] = 255  # an image without labels, one with few
    output = make_output(batch)
    whole_image = output.fused.clone().requires_grad_()
    whole = joint_loss(output._replace(fused=whole_image), batch, config)
    whole["total"].backward()

    parts_image = output.fused.clone().requires_grad_()
    counts = PixelCounts(*(count / 4 for count in count_pixels(batch)))
    parts = []
    for row in range(4):
        rows = slice(row, row + 1)
        part = SimpleNamespace(**{name: field[rows] for name, field in vars(batch).items()})
        of_part = CMFSOutput(output.logits[rows], parts_image[rows], output.balance_loss)
        parts.append(joint_loss(of_part, part, config, counts))
    for name, value in whole.items():
        torch.testing.assert_close(torch.stack([part[name] for part in parts]).mean(), value)
    torch.stack([part["total"] for part in parts]).mean().backward()
    torch.testing.assert_close(parts_image.grad, whole_image.grad)


def test_a_step_without_any_label_or_valid_pixel_costs_nothing():
    batch = make_batch()
    batch.valid[:], batch.label[:] = False, 255
    parts = joint_loss(make_output(batch), batch, load_config("msrs").loss, count_pixels(batch))
    assert {name for name, value in parts.items() if value != 0} == {"balance", "total"}
    assert all(value.isfinite() for value in parts.values())
