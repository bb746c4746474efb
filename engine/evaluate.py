"""Loops over a loader: segmentation to IoU, fusion to its metrics; every rank takes its share."""

import math
from collections.abc import (
    Callable,
    Collection,
    Container,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from tqdm import tqdm

from configs import Config
from engine.feed import PackedBatch
from engine.inference import Prediction, inference_options, predict, withhold
from engine.memory import explained_full_evaluation
from utils.distributed import gather_objects, is_main_process
from utils.errors import InputError
from utils.fusion_metrics import fusion_metrics
from utils.segmentation_metrics import ConfusionMatrix


class Batch(Protocol):
    """What evaluation needs of a batch on the device; see dataloader.packing.Sample."""

    rgb: Tensor  # (B, 3, H, W) in [0, 1]
    thermal: Tensor  # (B, 3, H, W) in [0, 1]
    label: Tensor  # (B, H, W) int64, 255 = ignored
    name: list[str]  # stems


Row = dict[str, float | None]  # the scores of one image; None where undefined
OnPrediction = Callable[[Batch, Prediction], None]  # both on the device


def evaluate_segmentation(
    model: nn.Module,
    loader: Iterable[PackedBatch],
    config: Config,
    device: torch.device,
    *,
    groups: Mapping[str, Container[str]] | None = None,
    by_image: bool = False,
    on_prediction: OnPrediction | None = None,
) -> dict[str, Any]:
    """Score a whole split from one confusion matrix over all ranks.

    Args:
        model: in evaluation mode, on `device`.
        groups: names of parts of the split (day, night) and the stems in each.
        by_image: score every image alone, too.
        on_prediction: called with each of this rank's batches.
    Returns:
        The same on every rank: what ConfusionMatrix.compute() gives, with class_iou and
        class_accuracy by class name, and the number of images; and for each group, under its
        name, the same again. With by_image, "by_image" holds {"miou", "pixel_accuracy"} by stem.
    """
    whole, parts = "", dict(groups or {})
    matrices = {
        name: ConfusionMatrix(config.data.num_classes, device=device) for name in (whole, *parts)
    }
    names: list[str] = []
    alone: dict[str, ConfusionMatrix] = {}
    for batch, prediction in _predictions(model, loader, config, device):
        segmentation = prediction.segmentation
        matrices[whole].update(segmentation, batch.label)
        for row, name in enumerate(batch.name):
            counting = [matrices[part] for part, stems in parts.items() if name in stems]
            if by_image:
                alone[name] = ConfusionMatrix(config.data.num_classes, device=device)
                counting.append(alone[name])
            for matrix in counting:
                matrix.update(segmentation[row], batch.label[row])
        names += batch.name
        if on_prediction is not None:
            on_prediction(batch, prediction)
    names = [name for rank in gather_objects(names) for name in rank]
    scores = {}
    for part, matrix in matrices.items():
        matrix.reduce()
        count = sum(part == whole or name in parts[part] for name in names)
        scores[part] = {**_by_class_name(matrix.compute(), config), "images": count}
    scores = {**scores.pop(whole), **scores}
    if by_image:
        scores["by_image"] = _merge_ranks(
            {name: _of_one_image(matrix.compute()) for name, matrix in alone.items()}
        )
    return scores


def evaluate_fusion(
    model: nn.Module,
    loader: Iterable[PackedBatch],
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
    rows: dict[str, Row] = {}
    for batch, prediction in _predictions(model, loader, config, device):
        images = map(_to_bytes, (batch.rgb, batch.thermal, prediction.fused))
        rows |= score_fused(batch.name, *images, protocol=config.eval.protocol)
        if on_prediction is not None:
            on_prediction(batch, prediction)
    images = _merge_ranks(rows)
    return {"mean": mean_row(images.values()), "images": images}


def score_fused(
    names: Sequence[str], rgb: Tensor, thermal: Tensor, fused: Tensor, *, protocol: str
) -> dict[str, Row]:
    """Fusion metrics of a batch by image; see utils.fusion_metrics for tensors and protocols."""
    columns = fusion_metrics(rgb, thermal[:, :1], fused, protocol=protocol)
    table = torch.stack(list(columns.values()), 1).tolist()  # one transfer for all metrics
    return {
        name: dict(zip(columns, map(_finite_or_none, row), strict=True))
        for name, row in zip(names, table, strict=True)
    }


def mean_row(rows: Collection[Row]) -> Row:
    """Every metric's mean over the images for which it is defined; None where for none."""
    metrics = next(iter(rows), {})
    return {metric: _mean(row[metric] for row in rows) for metric in metrics}


def _predictions(
    model: nn.Module, loader: Iterable[PackedBatch], config: Config, device: torch.device
) -> Iterator[tuple[Batch, Prediction]]:
    options = inference_options(config.eval)
    is_hidden = None if is_main_process() else True  # None: hidden where there is no terminal
    for packed in tqdm(loader, unit="batch", leave=False, disable=is_hidden):
        batch = packed.to(device)
        count, _, *size = batch.rgb.shape
        pair = withhold(batch.rgb, batch.thermal, config.data.modalities)
        try:
            with explained_full_evaluation(count, tuple(size), device):
                prediction = predict(model, *pair, **options)
        except InputError as error:
            raise InputError(f"{', '.join(batch.name)}: {error}") from error
        yield batch, prediction


def _merge_ranks(rows: dict[str, Row]) -> dict[str, Row]:
    """The rows of all ranks, in the order of their names, on every rank."""
    return dict(sorted(item for part in gather_objects(rows) for item in part.items()))


def _of_one_image(scores: dict[str, Any]) -> Row:
    return {key: scores[key] for key in ("miou", "pixel_accuracy")}


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
