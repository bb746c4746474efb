"""From a pair of images to class probabilities and a fused image: whole, in windows, in several
scales, mirrored.

    model, config = load_model("best.pth", device="cpu")
    rgb, thermal = pair_to_tensors(read_rgb("a.png"), read_thermal("b.png"))
    prediction = predict(model, rgb, thermal)
"""

import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from configs.schema import EvalConfig
from utils.errors import InputError
from utils.image import rgb_to_ycbcr, ycbcr_to_rgb

SMALLEST_SIDE = 32  # pixels; the encoder's last stride


class Prediction(NamedTuple):
    """What predict() gives, float32, at the size of its input."""

    probabilities: Tensor  # (B, classes, H, W), 1 in sum over the classes
    fused: Tensor  # (B, 3, H, W) in [0, 1]

    @property
    def segmentation(self) -> Tensor:
        """(B, H, W) int64: the most probable class."""
        return self.probabilities.argmax(1)


def pair_to_tensors(
    rgb: np.ndarray, thermal: np.ndarray, device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor]:
    """(H, W, 3) and (H, W) uint8 -> a batch of one: (1, 3, H, W) twice, float32 in [0, 1].

    Raises:
        InputError: the two differ in size.
    """
    if rgb.shape[:2] != thermal.shape[:2]:
        sizes = [f"{image.shape[1]}x{image.shape[0]}" for image in (rgb, thermal)]
        raise InputError(
            f"rgb is {sizes[0]} and thermal {sizes[1]}; a registered pair has one size"
        )
    tensors = (torch.from_numpy(np.atleast_3d(image)).to(device) for image in (rgb, thermal))
    rgb_batch, thermal_batch = (x.permute(2, 0, 1)[None].float() / 255 for x in tensors)
    return rgb_batch, thermal_batch.repeat(1, 3, 1, 1)


@torch.inference_mode()
def predict(
    model: nn.Module,
    rgb: Tensor,
    thermal: Tensor,
    *,
    crop: tuple[int, int] | None = None,
    stride: float = 2 / 3,
    scales: Sequence[float] = (1.0,),
    flip: bool = False,
    luma_only: bool = False,
) -> Prediction:
    """Run the network on a batch, in float32 whatever autocast says.

    Args:
        model: CMFS in evaluation mode, on the images' device.
        rgb, thermal: (B, 3, H, W) in [0, 1].
        crop: height and width of a sliding window; None, or a window that covers the image, runs
            the whole image at once.
        stride: step of the window as a fraction of crop. Where windows overlap they are averaged
            with weights that fall towards each window's edge, so that no seam shows.
        scales: the input is resized (bilinear) by each of them; probabilities are averaged at the
            input's own size. fused comes from scale 1, or is averaged where 1 is not among them.
        flip: average with the mirrored input.
        luma_only: fused keeps the colours of rgb (Cb and Cr) and takes only its luma from the
            network; what then lies outside [0, 1] is clipped.
    Raises:
        InputError: the image, scaled, is smaller than 32x32.
        FloatingPointError: the network gives numbers that are not finite.
        ValueError: the model is in training mode.
    """
    if model.training:
        raise ValueError("predict() takes a model in evaluation mode; call model.eval() first")
    with torch.autocast(rgb.device.type, enabled=False):
        views = {s: _predict_at(model, rgb, thermal, s, crop, stride, flip) for s in scales}
    fused = [views[1.0].fused] if 1.0 in views else [view.fused for view in views.values()]
    image = _mean(fused)
    if luma_only:
        image = _with_colors_of(rgb.float(), image)
    prediction = Prediction(_mean([view.probabilities for view in views.values()]), image)
    if not torch.stack([x.isfinite().all() for x in prediction]).all():
        raise FloatingPointError(
            "the network's output is not finite: its weights are damaged, or its training has "
            "diverged; take an earlier checkpoint, or train with a lower train.lr"
        )
    return prediction


def withhold(rgb: Tensor, thermal: Tensor, modalities: str) -> tuple[Tensor, Tensor]:
    """The pair as a network of one modality was trained with: the other one is mid-grey.

    Args:
        modalities: data.modalities.
    """
    if modalities == "rgb":
        thermal = torch.full_like(thermal, 0.5)
    elif modalities == "thermal":
        rgb = torch.full_like(rgb, 0.5)
    return rgb, thermal


def use_tf32(is_used: bool) -> None:
    """Let GPUs multiply float32 in TF32, or not; for the whole process. The CPU does not change."""
    torch.set_float32_matmul_precision("high" if is_used else "highest")
    torch.backends.cudnn.allow_tf32 = is_used


def inference_options(config: EvalConfig) -> dict[str, Any]:
    """The keyword arguments of predict() that a config asks for."""
    return config.model_dump(include={"crop", "stride", "scales", "flip", "luma_only"})


def describe_inference(config: EvalConfig) -> str:
    """The same in words, for tables."""
    parts = ["whole image"]
    if config.crop is not None:
        height, width = config.crop
        parts = [f"sliding window {height}x{width}, stride {config.stride:.3g}"]
    parts.append(
        f"scale{'s' * (len(config.scales) > 1)} {' '.join(f'{s:g}' for s in config.scales)}"
    )
    parts.append("with mirrored input" if config.flip else "not mirrored")
    if config.luma_only:
        parts.append("fused in luma, colour of the visible image")
    return ", ".join(parts)


def _predict_at(
    model: nn.Module,
    rgb: Tensor,
    thermal: Tensor,
    scale: float,
    crop: tuple[int, int] | None,
    stride: float,
    flip: bool,
) -> Prediction:
    """One scale, back at the input's size."""
    size = rgb.shape[-2:]
    scaled = [round(side * scale) for side in size]
    if min(scaled) < SMALLEST_SIDE:
        raise InputError(
            f"an image of {size[1]}x{size[0]} at scale {scale:g} is {scaled[1]}x{scaled[0]}; the "
            f"network takes {SMALLEST_SIDE}x{SMALLEST_SIDE} and more: enlarge the image"
        )
    rgb, thermal = (_resize(image.float(), scaled) for image in (rgb, thermal))
    prediction = _predict_windows(model, rgb, thermal, crop, stride)
    if flip:
        mirrored = _predict_windows(model, rgb.flip(-1), thermal.flip(-1), crop, stride)
        prediction = Prediction(
            *((x + y.flip(-1)) / 2 for x, y in zip(prediction, mirrored, strict=True))
        )
    return Prediction(*(_resize(x, size) for x in prediction))


def _predict_windows(
    model: nn.Module,
    rgb: Tensor,
    thermal: Tensor,
    crop: tuple[int, int] | None,
    stride: float,
) -> Prediction:
    """The whole image, or the weighted mean of windows that cover it."""
    size = rgb.shape[-2:]
    crop = tuple(map(min, crop, size)) if crop else tuple(size)
    if crop == tuple(size):
        return _forward(model, rgb, thermal)
    ramps = [_ramp(side, rgb) for side in crop]
    weight = ramps[0][:, None] * ramps[1]
    weights, sums = rgb.new_zeros(size), None
    starts = (_window_starts(*sides, stride) for sides in zip(size, crop, strict=True))
    for top, left in itertools.product(*starts):
        window = (..., slice(top, top + crop[0]), slice(left, left + crop[1]))
        outputs = _forward(model, rgb[window], thermal[window])
        if sums is None:
            sums = Prediction(*(x.new_zeros(*x.shape[:2], *size) for x in outputs))
        for total, output in zip(sums, outputs, strict=True):
            total[window] += weight * output
        weights[window] += weight
    return Prediction(*(total / weights for total in sums))


def _forward(model: nn.Module, rgb: Tensor, thermal: Tensor) -> Prediction:
    output = model(rgb, thermal)
    return Prediction(output.logits.float().softmax(1), output.fused.float())


def _window_starts(size: int, crop: int, stride: float) -> list[int]:
    """Where windows begin along a side: evenly spread, at most stride * crop apart."""
    step = max(1, int(crop * stride))
    last = size - crop
    count = math.ceil(last / step)
    return [round(index * last / count) for index in range(count)] + [last]


def _ramp(length: int, like: Tensor) -> Tensor:
    """(length,): rising from the edges to 1 in the middle, above 0 everywhere."""
    distance = torch.arange(1, length + 1, dtype=like.dtype, device=like.device)
    return torch.minimum(distance, distance.flip(0)) / math.ceil(length / 2)


def _with_colors_of(rgb: Tensor, fused: Tensor) -> Tensor:
    """(B, 3, H, W): Y of fused, Cb and Cr of rgb."""
    ycbcr = torch.cat((rgb_to_ycbcr(fused)[:, :1], rgb_to_ycbcr(rgb)[:, 1:]), 1)
    return ycbcr_to_rgb(ycbcr).clamp(0, 1)


def _resize(image: Tensor, size: Sequence[int]) -> Tensor:
    if tuple(image.shape[-2:]) == tuple(size):
        return image
    return F.interpolate(image, tuple(size), mode="bilinear", align_corners=False)


def _mean(tensors: list[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.stack(tensors).mean(0)
