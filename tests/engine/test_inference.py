"""Prediction whole, in windows, in scales, mirrored; with small networks of known behaviour."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from configs import load_config
from engine.inference import (
    describe_inference,
    inference_options,
    pair_to_tensors,
    predict,
)
from utils.errors import InputError

EXACT = 1e-6  # float32 weights that sum to 1
SIZES = [(32, 32), (45, 61), (64, 96)]


class PositionWise(nn.Module):
    """Every pixel's output follows from that pixel alone; notes the sizes it was given."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.register_buffer("weight", torch.randn(4, 6, generator=generator))
        self.seen = []
        self.eval()

    def forward(self, rgb, thermal):
        self.seen.append(tuple(rgb.shape[-2:]))
        pair = torch.cat([rgb, thermal], 1)
        logits = torch.einsum("kc,bchw->bkhw", self.weight, pair)
        return SimpleNamespace(logits=logits, fused=(rgb + thermal) / 2)


class WindowMean(PositionWise):
    """Its output differs from window to window: the mean of all that it sees, everywhere."""

    def forward(self, rgb, thermal):
        mean = (rgb.mean((-2, -1), keepdim=True) + 0 * rgb).clamp(0, 1)
        return super().forward(mean, mean)


class LeftToRight(PositionWise):
    """Not equivariant under mirroring: adds the position in the row."""

    def forward(self, rgb, thermal):
        output = super().forward(rgb, thermal)
        position = torch.linspace(0, 1, rgb.shape[-1])
        output.logits[:, 0] += 3 * position
        output.fused = output.fused * 0 + position
        return output


@pytest.fixture
def pair():
    return images(2, 45, 61)


def images(batch, height, width):
    generator = torch.Generator().manual_seed(height)
    rgb, thermal = torch.rand(2, batch, 3, height, width, generator=generator).unbind(0)
    return rgb, thermal


def assert_close(found, expected, tolerance=EXACT):
    torch.testing.assert_close(found.probabilities, expected.probabilities, atol=tolerance, rtol=0)
    torch.testing.assert_close(found.fused, expected.fused, atol=tolerance, rtol=0)


@pytest.mark.parametrize("hw", SIZES, ids=str)
def test_whole_image_is_softmax_of_the_network(hw):
    model, (rgb, thermal) = PositionWise(), images(2, *hw)
    found, expected = predict(model, rgb, thermal), model(rgb, thermal)
    assert torch.equal(found.probabilities, expected.logits.softmax(1))
    assert torch.equal(found.fused, expected.fused)
    assert torch.equal(found.segmentation, expected.logits.argmax(1))


@pytest.mark.parametrize("crop", [(32, 32), (33, 40), (45, 32), (44, 60), (32, 200)], ids=str)
@pytest.mark.parametrize("stride", [1.0, 2 / 3, 0.1])
def test_windows_of_a_position_wise_network_equal_the_whole(pair, crop, stride):
    model = PositionWise()
    whole = predict(model, *pair)
    model.seen.clear()
    assert_close(predict(model, *pair, crop=crop, stride=stride), whole)
    assert len(model.seen) > 1
    assert set(model.seen) == {(min(crop[0], 45), min(crop[1], 61))}


@pytest.mark.parametrize("crop", [(45, 61), (64, 61), (200, 300)], ids=str)
def test_one_window_that_covers_the_image_is_the_whole_image(pair, crop):
    model = WindowMean()
    assert_close(predict(model, *pair, crop=crop), predict(model, *pair), tolerance=0)
    assert model.seen == [(45, 61), (45, 61)]


def test_no_seam_where_windows_meet():
    """Windows of different answers blend: no step between neighbours exceeds a ramp's slope."""
    rgb = torch.zeros(1, 3, 32, 128)
    rgb[..., 64:] = 1
    found = predict(WindowMean(), rgb, rgb, crop=(32, 48))
    row = found.fused[0, 0, 16]
    assert row[0] == 0
    assert row[-1] == pytest.approx(1)
    assert row.diff().abs().max() < 0.08


def test_batch_equals_singles(pair):
    model = WindowMean()
    options = {"crop": (32, 40), "scales": (1.0, 1.5), "flip": True}
    batch = predict(model, *pair, **options)
    for index in range(2):
        single = predict(model, *(x[index : index + 1] for x in pair), **options)
        torch.testing.assert_close(batch.probabilities[index], single.probabilities[0])
        torch.testing.assert_close(batch.fused[index], single.fused[0])


def test_mirrored_input_changes_nothing_for_an_equivariant_network(pair):
    model = PositionWise()
    assert_close(predict(model, *pair, flip=True), predict(model, *pair))
    assert len(model.seen) == 3


def test_mirrored_input_is_averaged_at_its_own_place(pair):
    """Of an output that rises from 0 to 1 along the row, the average is 1/2 everywhere."""
    found = predict(LeftToRight(), *pair, flip=True)
    torch.testing.assert_close(found.fused, torch.full_like(found.fused, 0.5))
    mirrored = predict(LeftToRight(), *(x.flip(-1) for x in pair), flip=True)
    torch.testing.assert_close(found.probabilities, mirrored.probabilities.flip(-1))


@pytest.mark.parametrize("hw", [(64, 96), (65, 97)], ids=str)
def test_scales_change_nothing_on_an_even_image(hw):
    model, even = PositionWise(), torch.full((1, 3, *hw), 0.3)
    found = predict(model, even, even, scales=(0.5, 1.0, 1.75))
    assert_close(found, predict(model, even, even))
    assert model.seen[:3] == [tuple(round(s * x) for x in hw) for s in (0.5, 1.0, 1.75)]


def test_probabilities_are_the_mean_over_scales_and_fused_is_of_scale_1(pair):
    model = PositionWise()
    by_scale = [predict(model, *pair, scales=(scale,)) for scale in (1.0, 2.0)]
    found = predict(model, *pair, scales=(1.0, 2.0))
    mean = (by_scale[0].probabilities + by_scale[1].probabilities) / 2
    torch.testing.assert_close(found.probabilities, mean)
    assert torch.equal(found.fused, predict(model, *pair).fused)
    torch.testing.assert_close(found.probabilities.sum(1), torch.ones(2, 45, 61))


def test_fused_is_the_mean_over_scales_without_scale_1(pair):
    model = PositionWise()
    by_scale = [predict(model, *pair, scales=(scale,)).fused for scale in (0.8, 2.0)]
    found = predict(model, *pair, scales=(0.8, 2.0)).fused
    torch.testing.assert_close(found, (by_scale[0] + by_scale[1]) / 2)
    assert not torch.allclose(found, predict(model, *pair).fused)


def test_autocast_around_it_does_not_change_the_result(pair):
    model = PositionWise()
    expected = predict(model, *pair)
    with torch.autocast("cpu", torch.bfloat16):
        assert_close(predict(model, *pair), expected, tolerance=0)


def test_no_gradient_is_kept(pair):
    rgb, thermal = (x.requires_grad_() for x in pair)
    assert not predict(PositionWise(), rgb, thermal).probabilities.requires_grad


@pytest.mark.parametrize(
    ("hw", "scale", "message"), [((31, 64), 1.0, "64x31.*32x32"), ((60, 96), 0.5, "48x30.*32x32")]
)
def test_too_small_an_image_is_named(hw, scale, message):
    with pytest.raises(InputError, match=message):
        predict(PositionWise(), *images(1, *hw), scales=(scale,))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("which", ["logits", "fused"])
def test_numbers_that_are_not_finite_are_no_result(pair, which, bad):
    """A network that gives them would else be scored: its class is 0 everywhere."""

    class Diverged(PositionWise):
        def forward(self, rgb, thermal):
            output = super().forward(rgb, thermal)
            getattr(output, which)[1, 0, 3, 4] = bad
            return output

    with pytest.raises(FloatingPointError, match="output is not finite"):
        predict(Diverged(), *pair)


def test_training_mode_is_refused(pair):
    with pytest.raises(ValueError, match="eval"):
        predict(PositionWise().train(), *pair)


def test_pair_to_tensors():
    rgb = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
    thermal = np.array([[0, 255], [51, 102]], np.uint8)
    rgb_batch, thermal_batch = pair_to_tensors(rgb, thermal)
    assert torch.equal(rgb_batch[0, :, 1, 0], torch.tensor([6, 7, 8]) / 255)
    assert thermal_batch.shape == (1, 3, 2, 2)
    assert torch.equal(thermal_batch[0, 2], torch.tensor([[0, 1], [0.2, 0.4]]))
    with pytest.raises(InputError, match="2x2 .* 3x2"):
        pair_to_tensors(rgb, np.zeros((2, 3), np.uint8))


def test_luma_only_keeps_the_colours_of_rgb():
    """Where nothing is clipped, luma is the network's and Cb, Cr are those of rgb."""
    rgb, thermal = (0.4 + 0.2 * image for image in images(2, 33, 40))
    model = PositionWise()
    plain, found = (predict(model, rgb, thermal, luma_only=x) for x in (False, True))
    assert torch.equal(found.probabilities, plain.probabilities)
    weights = torch.tensor([0.299, 0.587, 0.114])
    lumas = [torch.einsum("c,bchw->bhw", weights, image) for image in (found.fused, plain.fused)]
    torch.testing.assert_close(*lumas)
    shift = found.fused - rgb  # the same for red, green and blue
    torch.testing.assert_close(shift, shift[:, :1].expand_as(shift))
    assert not torch.allclose(found.fused, plain.fused)


def test_luma_only_stays_in_range():
    rgb = torch.zeros(1, 3, 32, 32)
    rgb[:, 2] = 1  # blue, of little luma
    found = predict(PositionWise(), rgb, torch.ones_like(rgb), luma_only=True).fused
    assert found.min() >= 0
    assert found.max() <= 1


def test_config_gives_options_and_words():
    config = load_config("demo", ["eval.crop=[40,50]", "eval.scales=[0.5,1]", "eval.flip=true"])
    assert inference_options(config.eval) == {
        "crop": (40, 50), "stride": pytest.approx(2 / 3), "scales": (0.5, 1.0), "flip": True,
        "luma_only": False,
    }  # fmt: skip
    words = "sliding window 40x50, stride 0.667, scales 0.5 1, with mirrored input"
    assert describe_inference(config.eval) == words
    luma = load_config("demo", ["eval.luma_only=true"]).eval
    assert inference_options(luma)["luma_only"]
    assert "luma" in describe_inference(luma)
    assert describe_inference(load_config("demo").eval) == "whole image, scale 1, not mirrored"
