"""The images that a network does best and worst on, predicted again as pictures for a report."""

from collections.abc import Mapping
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from configs import Config
from engine.inference import inference_options, predict
from utils.image import UNKNOWN_LABEL, colorize, error_map, to_uint8


class Sample(Protocol):
    """What is needed of one pair; see dataloader.packing.Sample."""

    rgb: Tensor  # (3, H, W) in [0, 1]
    thermal: Tensor  # (3, H, W) in [0, 1]
    label: Tensor  # (H, W) int64, 255 = ignored


class Pairs(Protocol):
    """A dataset that knows its names; see dataloader.dataset.SegmentationPairs."""

    names: list[str]

    def __getitem__(self, index: int) -> Sample: ...


class PictureRow(NamedTuple):
    """One image in all its forms."""

    name: str
    caption: str
    pictures: dict[str, np.ndarray]  # by title; (H, W, 3) uint8


def best_and_worst(scores: Mapping[str, float | None], count: int) -> tuple[list[str], list[str]]:
    """The names of the `count` highest scores, falling, and of the lowest, rising.

    No name is in both; undefined scores are left out.
    """
    defined = {name: score for name, score in scores.items() if score is not None}
    ranked = sorted(defined, key=lambda name: (-defined[name], name))
    half = min(count, (len(ranked) + 1) // 2)
    return ranked[:half], ranked[: half - 1 : -1][:count]


def draw_extremes(
    model: nn.Module,
    pairs: Pairs,
    config: Config,
    device: torch.device,
    *,
    scores: Mapping[str, float | None],
    metric: str,
    count: int = 4,
) -> tuple[list[PictureRow], list[PictureRow]]:
    """The `count` best images and the `count` worst.

    Each as rgb, thermal, fused, prediction and, where there is a label, truth and error map.

    Args:
        model: in evaluation mode, on `device`.
        scores: one for each name of `pairs`, more is better.
        metric: what they are, for the captions.
    """
    best, worst = (
        _draw_rows(model, pairs, config, device, {n: f"{metric} {scores[n]:.4f}" for n in names})
        for names in best_and_worst(scores, count)
    )
    return best, worst


def _draw_rows(
    model: nn.Module,
    pairs: Pairs,
    config: Config,
    device: torch.device,
    captions: Mapping[str, str],
) -> list[PictureRow]:
    """The named images, in order."""
    places = {name: index for index, name in enumerate(pairs.names)}
    rows = []
    for name, caption in captions.items():
        sample = pairs[places[name]]
        inputs = (x[None].to(device) for x in (sample.rgb, sample.thermal))
        prediction = predict(model, *inputs, **inference_options(config.eval))
        segmentation = prediction.segmentation[0].byte().cpu().numpy()
        images = (sample.rgb, sample.thermal, prediction.fused[0])
        pictures = dict(zip(("rgb", "thermal", "fused"), map(to_uint8, images), strict=True))
        pictures["prediction"] = colorize(segmentation, config.data.palette)
        label = sample.label.byte().numpy()
        if (label != UNKNOWN_LABEL).any():
            pictures["truth"] = colorize(label, config.data.palette)
            pictures["error"] = error_map(pictures["rgb"], segmentation, label)
        rows.append(PictureRow(name, caption, pictures))
    return rows
