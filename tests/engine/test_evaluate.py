"""Loops to metrics, with networks whose answers are known."""

from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from configs import load_config
from engine.evaluate import evaluate_fusion, evaluate_segmentation
from utils.errors import InputError
from utils.fusion_metrics import fusion_metrics

CPU = torch.device("cpu")
CONFIG = load_config("demo")
NAMES = CONFIG.data.class_names  # background, person, car, cone, kerb


class Batch(NamedTuple):
    rgb: Tensor
    thermal: Tensor
    label: Tensor
    name: list[str]

    def to(self, device):
        return Batch(*(x.to(device) for x in self[:3]), self.name)


class ReadsRed(nn.Module):
    """The class is the red channel times 10; fused is the thermal image."""

    def forward(self, rgb, thermal):
        segmentation = (rgb[:, 0] * 10).round().long()
        logits = nn.functional.one_hot(segmentation, len(NAMES)).permute(0, 3, 1, 2) * 20.0
        return SimpleNamespace(logits=logits, fused=thermal)


MODEL = ReadsRed().eval()


def batch(*segmentations: Tensor, label: Tensor | None = None, names: str = "") -> Batch:
    """Images on which ReadsRed answers the segmentations; labels are the same if not given."""
    segmentation = torch.stack(segmentations)
    rgb = (segmentation / 10)[:, None].repeat(1, 3, 1, 1)
    generator = torch.Generator().manual_seed(len(names))
    thermal = torch.rand(len(segmentations), 1, *rgb.shape[-2:], generator=generator)
    label = segmentation.clone() if label is None else label
    return Batch(rgb, thermal.repeat(1, 3, 1, 1), label, names.split())


def constant(value: int) -> Tensor:
    return torch.full((32, 40), value)


def test_perfect_answers_leave_absent_classes_undefined():
    loader = [batch(constant(0), constant(1), names="a b"), batch(constant(2), names="c")]
    found = evaluate_segmentation(MODEL, loader, CONFIG, CPU)
    expected = {"background": 1.0, "person": 1.0, "car": 1.0, "cone": None, "kerb": None}
    assert found["class_iou"] == expected
    assert found["class_accuracy"] == expected
    for key in ("miou", "miou_without_background", "mean_accuracy", "pixel_accuracy"):
        assert found[key] == 1, key
    assert found["frequency_weighted_iou"] == 1
    assert (found["classes_in_mean"], found["images"]) == (3, 3)


def test_counts_are_of_the_whole_split_not_means_of_images():
    """3 of 4 pixels of class 1 are found over two images, one pixel of class 0 is called 1."""
    first, second = constant(0), constant(0)
    label = torch.full((2, 32, 40), 255)
    label[0, 0, :4] = torch.tensor([1, 1, 1, 0])
    first[0, :4] = torch.tensor([1, 1, 0, 1])
    label[1, 0, :1] = 1
    second[0, 0] = 1
    found = evaluate_segmentation(
        MODEL, [batch(first, second, label=label, names="a b")], CONFIG, CPU
    )
    assert found["class_iou"]["person"] == pytest.approx(3 / 5)
    assert found["class_iou"]["background"] == 0
    assert found["miou"] == pytest.approx(3 / 10)
    assert found["miou_without_background"] == pytest.approx(3 / 5)
    assert found["pixel_accuracy"] == pytest.approx(3 / 5)
    assert found["class_accuracy"]["person"] == pytest.approx(3 / 4)


def test_ignored_background_is_not_scored():
    """Its pixels have label 255; calling others background still counts against those."""
    config = CONFIG.model_copy(
        update={"data": CONFIG.data.model_copy(update={"ignore_background": True})}
    )
    answer, label = constant(1), constant(1)
    answer[:16] = 0
    label[16:24] = 255
    loader = [batch(answer, label=label[None], names="a")]
    found = evaluate_segmentation(MODEL, loader, config, CPU)
    assert found["class_iou"]["background"] is None
    assert found["class_accuracy"]["background"] is None
    assert found["class_iou"]["person"] == pytest.approx(1 / 3)
    assert found["miou"] == found["miou_without_background"] == pytest.approx(1 / 3)
    assert found["classes_in_mean"] == 1


def test_groups_are_scored_apart():
    wrong = batch(
        constant(1), constant(2), label=torch.stack([constant(1), constant(3)]), names="a b"
    )
    loader = [wrong, batch(constant(0), names="c")]
    groups = {"day": {"a", "elsewhere"}, "night": {"b", "c"}}
    found = evaluate_segmentation(MODEL, loader, CONFIG, CPU, groups=groups)
    assert found["pixel_accuracy"] == pytest.approx(2 / 3)
    assert found["day"]["class_iou"]["person"] == 1
    assert (found["day"]["pixel_accuracy"], found["day"]["images"]) == (1, 1)
    assert (found["night"]["pixel_accuracy"], found["night"]["images"]) == (0.5, 2)
    assert found["night"]["class_iou"]["person"] is None
    whole = evaluate_segmentation(MODEL, loader, CONFIG, CPU)
    assert {key: found[key] for key in whole} == whole


def test_a_split_without_labels_is_undefined_not_zero():
    loader = [batch(constant(0), label=constant(255)[None], names="a")]
    found = evaluate_segmentation(MODEL, loader, CONFIG, CPU)
    assert found["miou"] is None
    assert found["pixel_accuracy"] is None
    assert found["classes_in_mean"] == 0


def test_every_batch_is_handed_on_with_its_prediction():
    loader = [batch(constant(0), constant(1), names="a b"), batch(constant(2), names="c")]
    seen = []
    for evaluate in (evaluate_segmentation, evaluate_fusion):
        evaluate(
            MODEL, loader, CONFIG, CPU,
            on_prediction=lambda b, p: seen.append((b.name, p.segmentation[:, 0, 0].tolist())),
        )  # fmt: skip
    assert seen == [(["a", "b"], [0, 1]), (["c"], [2])] * 2


def test_options_of_the_config_reach_the_prediction():
    config = load_config("demo", ["eval.crop=[32,32]", "eval.flip=true", "eval.scales=[1,2]"])
    sizes = []
    handle = MODEL.register_forward_hook(lambda _, inputs, __: sizes.append(inputs[0].shape[-2:]))
    evaluate_segmentation(MODEL, [batch(constant(0), names="a")], config, CPU)
    handle.remove()
    assert set(sizes) == {(32, 32)}
    assert len(sizes) == 2 * (2 + 3 * 4)  # mirrored or not, 2 windows at scale 1, 12 at scale 2


def test_too_small_an_image_is_named():
    small = batch(constant(0)[:16], names="tiny_one")
    with pytest.raises(InputError, match="tiny_one: .*40x16"):
        evaluate_segmentation(MODEL, [small], CONFIG, CPU)


@pytest.mark.parametrize("protocol", ["cddfuse", "strict"])
def test_fusion_metrics_are_those_of_the_written_bytes(protocol):
    config = load_config("demo", [f"eval.protocol={protocol}"])
    stripes = constant(1)
    stripes[:, ::3] = 4
    loader = [batch(stripes, stripes.flip(0), names="b a"), batch(stripes.flip(1), names="c")]
    found = evaluate_fusion(MODEL, loader, config, CPU)
    assert list(found["images"]) == ["a", "b", "c"]
    single = loader[1]
    rgb, thermal = ((x * 255).round().to(torch.uint8) for x in (single.rgb, single.thermal))
    expected = fusion_metrics(rgb, thermal[:, :1], thermal, protocol=protocol)
    assert found["images"]["c"].keys() == expected.keys()
    for metric, value in expected.items():
        has_value = bool(value.isfinite())
        goal = pytest.approx(value.item()) if has_value else None
        assert found["images"]["c"][metric] == goal, metric
        known = [x for x in (row[metric] for row in found["images"].values()) if x is not None]
        mean = pytest.approx(sum(known) / len(known)) if known else None
        assert found["mean"][metric] == mean, metric


def test_an_undefined_fusion_metric_is_none_and_left_out_of_the_mean():
    """An image with a side below 41 is too small for the scales of VIF."""
    small, large = torch.zeros(32, 48).long(), torch.zeros(48, 48).long()
    for segmentation in (small, large):
        segmentation[:, ::3] = 4
    loader = [batch(small, names="small"), batch(large, names="large")]
    found = evaluate_fusion(MODEL, loader, CONFIG, CPU)
    assert found["images"]["small"]["VIF"] is None
    assert found["mean"]["VIF"] == found["images"]["large"]["VIF"]
    assert found["images"]["small"]["EN"] is not None


def test_a_withheld_modality_is_kept_from_the_network_alone():
    """What is fused from one modality is scored against both that were recorded."""

    class Sees(nn.Module):
        def forward(self, rgb, thermal):
            seen.append((rgb, thermal))
            return MODEL(rgb, thermal)

    seen, handed_on = [], []
    images = batch(constant(1), constant(2), names="a b")
    config = load_config("demo", ["data.modalities=rgb"])
    found = evaluate_fusion(
        Sees().eval(), [images], config, CPU, on_prediction=lambda b, _: handed_on.append(b)
    )
    ((rgb, thermal),) = seen
    assert torch.equal(rgb, images.rgb) and (thermal == 0.5).all()
    assert torch.equal(handed_on[0].thermal, images.thermal)
    to_bytes = [x.mul(255).round().byte() for x in (images.rgb, images.thermal[:, :1])]
    grey = torch.full_like(to_bytes[0], 128)
    truth = fusion_metrics(*to_bytes, grey, protocol=config.eval.protocol)
    assert found["images"]["a"]["MSE"] == pytest.approx(float(truth["MSE"][0]))
