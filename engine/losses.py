"""The joint loss: segmentation, fusion and expert balance (method, Sec. 7)."""

from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from configs.schema import LossConfig
from models.cmfs import CMFSOutput
from models.ops.sobel import sobel
from utils.image import rgb_to_ycbcr

IGNORED_LABEL = 255


class Batch(Protocol):
    """What the loss needs of a batch; see dataloader.packing.Sample."""

    rgb: Tensor  # (B, 3, H, W) in [0, 1]
    thermal: Tensor  # (B, 3, H, W) in [0, 1]
    label: Tensor  # (B, H, W) int64, 255 = ignored
    valid: Tensor  # (B, H, W) bool, False where padded


class PixelCounts(NamedTuple):
    """How many pixels the means of the loss run over; each () float64."""

    labelled: Tensor  # with a class
    valid: Tensor  # not padded
    inside: Tensor  # whose 3x3 neighbourhood is not padded


def count_pixels(batch: Batch) -> PixelCounts:
    """The counts of a batch; 0 where it has no such pixel."""
    masks = (batch.label != IGNORED_LABEL, batch.valid, _inside(batch.valid))
    return PixelCounts(*(mask.sum(dtype=torch.float64) for mask in masks))


def joint_loss(
    output: CMFSOutput, batch: Batch, config: LossConfig, counts: PixelCounts | None = None
) -> dict[str, Tensor]:
    """All parts of the loss, unweighted, and their weighted sum as "total"; each (), float32.

    Keys: total, segmentation, fusion, intensity, gradient, color, balance, where "fusion" is the
    weighted sum of the three after it. All means run over valid pixels only.

    Args:
        counts: where this batch is a part of a step, the mean of the parts' counts. The mean of the
            parts' losses is then the loss of the whole, however unevenly padding and unknown labels
            are spread over the parts. The balance loss alone is each part's own.
    """
    with torch.autocast(output.logits.device.type, enabled=False):
        visible, thermal = fusion_targets(
            batch.rgb, batch.thermal, batch.valid, config.rgb_gamma, config.thermal_contrast
        )
        fused = output.fused.float()
        parts = {
            "segmentation": segmentation_loss(output.logits.float(), batch.label),
            "intensity": intensity_loss(fused, visible, thermal, batch.valid),
            "gradient": gradient_loss(fused, visible, thermal, batch.valid),
            "color": color_loss(fused, visible, batch.valid),
            "balance": output.balance_loss.float(),
        }
        if counts is not None:
            shares = zip(count_pixels(batch), counts, strict=True)
            labelled, valid, inside = ((own / mean.clamp_min(1e-9)).float() for own, mean in shares)
            parts["segmentation"] = parts["segmentation"] * labelled
            parts["intensity"] = parts["intensity"] * valid
            parts["gradient"] = parts["gradient"] * inside
            parts["color"] = parts["color"] * valid
    parts["fusion"] = (
        config.intensity_weight * parts["intensity"]
        + config.gradient_weight * parts["gradient"]
        + config.color_weight * parts["color"]
    )
    parts["total"] = (
        config.segmentation_weight * parts["segmentation"]
        + config.fusion_weight * parts["fusion"]
        + config.balance_weight * parts["balance"]
    )
    return parts


def fusion_targets(
    rgb: Tensor, thermal: Tensor, valid: Tensor, rgb_gamma: float, thermal_contrast: float
) -> tuple[Tensor, Tensor]:
    """V = rgb ** rgb_gamma, and T = thermal with its contrast scaled about the image's mean grey.

    rgb, thermal: (B, 3, H, W) in [0, 1]; valid: (B, H, W) -> the same shapes, in [0, 1]. The mean
    grey of an image is taken over its valid pixels.
    """
    if thermal_contrast != 1:
        mask = valid[:, None].to(thermal.dtype)
        count = (mask.sum((1, 2, 3), keepdim=True) * thermal.shape[1]).clamp_min(1)
        mean = (thermal * mask).sum((1, 2, 3), keepdim=True) / count
        thermal = (mean + thermal_contrast * (thermal - mean)).clamp(0, 1)
    return rgb if rgb_gamma == 1 else rgb**rgb_gamma, thermal


def segmentation_loss(logits: Tensor, label: Tensor) -> Tensor:
    """Cross-entropy over labelled pixels; 0 (with a graph) where no pixel is labelled."""
    total = F.cross_entropy(logits, label, ignore_index=IGNORED_LABEL, reduction="sum")
    return total / (label != IGNORED_LABEL).sum().clamp_min(1)


def intensity_loss(fused: Tensor, visible: Tensor, thermal: Tensor, valid: Tensor) -> Tensor:
    """|F − max(V, T)|₁."""
    return _valid_mean((fused - torch.maximum(visible, thermal)).abs(), valid)


def gradient_loss(fused: Tensor, visible: Tensor, thermal: Tensor, valid: Tensor) -> Tensor:
    """½(|∇x F − ∇x J|₁ + |∇y F − ∇y J|₁), J the larger Sobel gradient of V and T, with its sign.

    Pixels whose 3x3 neighbourhood touches padding are left out: their gradient is the padding's.
    """
    inside = _inside(valid)
    loss = fused.new_zeros(())
    for of_fused, of_visible, of_thermal in zip(
        sobel(fused), sobel(visible), sobel(thermal), strict=True
    ):
        larger = torch.where(of_visible.abs() >= of_thermal.abs(), of_visible, of_thermal)
        loss = loss + 0.5 * _valid_mean((of_fused - larger).abs(), inside)
    return loss


def color_loss(fused: Tensor, visible: Tensor, valid: Tensor) -> Tensor:
    """|Cb_F − Cb_V|₁ + |Cr_F − Cr_V|₁."""
    difference = (rgb_to_ycbcr(fused) - rgb_to_ycbcr(visible)).abs()
    return _valid_mean(difference[:, 1:2], valid) + _valid_mean(difference[:, 2:3], valid)


def _inside(valid: Tensor) -> Tensor:
    """(B, H, W) bool -> (B, H, W) float, 1 where a pixel and its neighbours are valid, else 0."""
    return -F.max_pool2d(-valid[:, None].float(), 3, stride=1, padding=1)[:, 0]


def _valid_mean(x: Tensor, valid: Tensor) -> Tensor:
    """Mean of (B, C, H, W) over channels and valid pixels (B, H, W); 0 where there are none."""
    mask = valid[:, None].to(x.dtype)
    return (x * mask).sum() / (mask.sum() * x.shape[1]).clamp_min(1)
