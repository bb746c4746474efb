"""Loops over a loader: segmentation to IoU, fusion to its metrics; every rank takes its share."""

import math
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from tqdm import tqdm

from configs import Config
from engine.inference import Prediction, inference_options, predict
from utils.distributed import gather_objects, is_main_process
from utils.errors import InputError
from utils.fusion_metrics import fusion_metrics
from utils.segmentation_metrics import ConfusionMatrix


class Batch(Protocol):
    """What evaluation needs of a batch; see dataloader.dataset.Sample."""

    rgb: Tensor  # (B, 3, H, W) in [0, 1]
    thermal: Tensor  # (B, 3, H, W) in [0, 1]
    label: Tensor  # (B, H, W) int64, 255 = ignored
    name: list[str]  # stems


OnPrediction = Callable[[Batch, Prediction], None]  # the batch on the CPU, the rest on the device


def evaluate_segmentation(
    model: nn.Module,
    loader: Iterable[Batch],
    config: Config,
    device: torch.device,
    *,
    groups: Mapping[str, Container[str]] | None = None,
    on_prediction: OnPrediction | None = None,
) -> dict[str, Any]:
    """Score a whole split from one confusion matrix over all ranks.

    Args:
        model: in evaluation mode, on `device`.
        groups: names of parts of the split (day, night) and the stems in each.
        on_prediction: called with each of this rank's batches.
    Returns:
        The same on every rank: what ConfusionMatrix.compute() gives, with class_iou and
        class_accuracy by class name, and the number of images; and for each group, under its
        name, the same again.
    """
    whole, parts = "", dict(groups or {})
    matrices = {
        name: ConfusionMatrix(config.data.num_classes).to(device) for name in (whole, *parts)
    }
    names: list[str] = []
    for batch, prediction in _predictions(model, loader, config, device):
        segmentation, label = prediction.segmentation, batch.label.to(device, non_blocking=True)
        matrices[whole].update(segmentation, label)
        for part, stems in parts.items():
            rows = [row for row, name in enumerate(batch.name) if name in stems]
            if rows:
                matrices[part].update(segmentation[rows], label[rows])
        names += batch.name
        if on_prediction is not None:
            on_prediction(batch, prediction)
    names = [name for rank in gather_objects(names) for name in rank]
    scores = {}
    for part, matrix in matrices.items():
        matrix.reduce()
        count = sum(part == whole or name in parts[part] for name in names)
        scores[part] = {**_by_class_name(matrix.compute(), config), "images": count}
    return {**scores.pop(whole), **scores}


def evaluate_fusion(
    model: nn.Module,
    loader: Iterable[Batch],
    config: Config,
    device: torch.device,
    *,
    on_prediction: OnPrediction | None = None,
) -> dict[str, Any]:
    """Fusion metrics of every image of a split, at its own size, on the uint8 that a PNG holds.

    Returns:
        The same on every rank: "images", metrics by stem, and "mean" over the images for which a
        metric is defined; None where it is not.
    """
    rows: dict[str, dict[str, float | None]] = {}
    for batch, prediction in _predictions(model, loader, config, device):
        rgb, thermal, fused = (
            _to_bytes(image.to(device)) for image in (batch.rgb, batch.thermal, prediction.fused)
        )
        columns = fusion_metrics(rgb, thermal[:, :1], fused, protocol=config.eval.protocol)
        table = torch.stack(list(columns.values()), 1).tolist()  # one transfer for all metrics
        for name, row in zip(batch.name, table, strict=True):
            rows[name] = dict(zip(columns, map(_finite_or_none, row), strict=True))
        if on_prediction is not None:
            on_prediction(batch, prediction)
    images = {name: row for part in gather_objects(rows) for name, row in part.items()}
    images = dict(sorted(images.items()))
    metrics = next(iter(images.values()), {})
    mean = {metric: _mean(row[metric] for row in images.values()) for metric in metrics}
    return {"mean": mean, "images": images}


def _predictions(
    model: nn.Module, loader: Iterable[Batch], config: Config, device: torch.device
) -> Iterator[tuple[Batch, Prediction]]:
    options = inference_options(config.eval)
    is_hidden = None if is_main_process() else True  # None: hidden where there is no terminal
    for batch in tqdm(loader, unit="batch", leave=False, disable=is_hidden):
        rgb, thermal = (x.to(device, non_blocking=True) for x in (batch.rgb, batch.thermal))
        try:
            prediction = predict(model, rgb, thermal, **options)
        except InputError as error:
            raise InputError(f"{', '.join(batch.name)}: {error}") from error
        yield batch, prediction


def _by_class_name(scores: dict[str, Any], config: Config) -> dict[str, Any]:
    named = {
        key: dict(zip(config.data.class_names, scores[key], strict=True))
        for key in ("class_iou", "class_accuracy")
    }
    return {**scores, **named}


def _to_bytes(images: Tensor) -> Tensor:
    """[0, 1] -> uint8, as utils.image.to_uint8 rounds."""
    return images.clamp(0, 1).mul(255).round().to(torch.uint8)


def _finite_or_none(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _mean(values: Iterable[float | None]) -> float | None:
    defined = [value for value in values if value is not None]
    return math.fsum(defined) / len(defined) if defined else None
