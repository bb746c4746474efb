"""The first validation images, and what the network makes of them, as pictures."""

from collections.abc import Mapping
from typing import NamedTuple

import cv2
import numpy as np
import torch
from torch import Tensor

from configs import Config
from engine.inference import Prediction, withhold
from engine.inside import look_inside
from engine.step import NamedBatch
from models import CMFS
from utils.image import colorize, contact_sheet, to_uint8

_COUNT = 4
_TITLES = ("rgb", "thermal", "fused", "prediction", "truth")


class Pictures(NamedTuple):
    """By name; empty where no image was seen."""

    sheets: Mapping[str, np.ndarray]  # (H, W, 3) uint8
    histograms: Mapping[str, np.ndarray]  # (N,) float


class Examples:
    """Keeps the first images of a validation; call it with each batch and its prediction."""

    def __init__(self, config: Config) -> None:
        self._palette = config.data.palette
        self._modalities = config.data.modalities
        self._crop = config.eval.crop or (None, None)  # what fits into the memory at once
        self._rows: list[list[np.ndarray]] = []
        self._inputs: list[tuple[Tensor, Tensor]] = []  # (1, 3, H, W) each, on the CPU

    def __call__(self, batch: NamedBatch, prediction: Prediction) -> None:
        for index in range(min(len(batch.name), _COUNT - len(self._rows))):
            images = (batch.rgb[index], batch.thermal[index], prediction.fused[index])
            labels = (prediction.segmentation[index], batch.label[index])
            maps = [colorize(x.to(torch.uint8).cpu().numpy(), self._palette) for x in labels]
            self._rows.append([*map(to_uint8, images), *maps])
            corner = (slice(index, index + 1), slice(None), *map(slice, self._crop))
            pair = withhold(batch.rgb[corner], batch.thermal[corner], self._modalities)
            self._inputs.append(tuple(image.cpu() for image in pair))

    def draw(self, model: CMFS, device: torch.device) -> Pictures:
        """Inputs and outputs, every stage's text gate as a heat map, and the spread of log10 dt.

        Gates are black at 0, yellow at 1, and their least and largest value is written on them; dt
        is that of the first image. Where eval.crop is set, both are those of an image's upper left
        corner of that size.
        """
        if not self._rows:
            return Pictures({}, {})
        insides = [
            look_inside(model, rgb.to(device), thermal.to(device)) for rgb, thermal in self._inputs
        ]
        sheets = {"examples": contact_sheet(self._rows, _TITLES)}
        stages = [f"gate of stage {stage}" for stage in range(len(insides[0].gates))]
        if stages:
            gates = [
                [to_uint8(rgb[0]), *(_gate_map(g.numpy(), tuple(rgb.shape[2:])) for g in x.gates)]
                for (rgb, _), x in zip(self._inputs, insides, strict=True)
            ]
            sheets["text_gates"] = contact_sheet(gates, ["rgb", *stages])
        histograms = {f"dt_log10/{part}": x.log10().numpy() for part, x in insides[0].dt.items()}
        return Pictures(sheets, histograms)


def _gate_map(values: np.ndarray, size_hw: tuple[int, int]) -> np.ndarray:
    """A heat map with its range on it: early gates differ by less than the eye can see."""
    picture = heat_map(values, size_hw)
    text = f"{values.min():.3f} {values.max():.3f}"
    cv2.putText(picture, text, (3, 12), cv2.FONT_HERSHEY_SIMPLEX, 0.35, (255, 255, 255), 1)
    return picture


def heat_map(values: np.ndarray, size_hw: tuple[int, int]) -> np.ndarray:
    """(h, w) in [0, 1] -> (H, W, 3) uint8, every value a field of one colour."""
    grey = np.round(values.clip(0, 1) * 255).astype(np.uint8)
    grey = cv2.resize(grey, size_hw[::-1], interpolation=cv2.INTER_NEAREST)
    return cv2.cvtColor(cv2.applyColorMap(grey, cv2.COLORMAP_INFERNO), cv2.COLOR_BGR2RGB)
