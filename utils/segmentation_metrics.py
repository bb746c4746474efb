"""Segmentation metrics of a whole split from one confusion matrix of 64-bit counts."""

from typing import Any

import torch
from torch import Tensor

from utils.distributed import reduce_sum


class ConfusionMatrix:
    """Counts of (label, prediction) pairs, kept on the device of the tensors it is given.

    Args:
        num_classes: classes 0 … num_classes - 1.
        ignore_index: label value that is not counted.
    """

    def __init__(self, num_classes: int, ignore_index: int = 255) -> None:
        self.num_classes = num_classes
        self.ignore_index = ignore_index
        self.counts = torch.zeros(num_classes, num_classes, dtype=torch.int64)

    def to(self, device: torch.device | str) -> "ConfusionMatrix":
        """Move the counts; update() does so by itself."""
        self.counts = self.counts.to(device)
        return self

    def update(self, prediction: Tensor, label: Tensor) -> None:
        """Count the pixels of one batch; both (..., H, W) of any integer dtype.

        Raises:
            ValueError: shapes differ, or a value lies outside the classes.
        """
        if prediction.shape != label.shape:
            raise ValueError(
                f"prediction {tuple(prediction.shape)} and label {tuple(label.shape)} differ"
            )
        counted = label != self.ignore_index
        label, prediction = label[counted].long(), prediction[counted].long()
        for name, values in (("label", label), ("prediction", prediction)):
            outside = values[(values < 0) | (values >= self.num_classes)]
            if len(outside):
                raise ValueError(
                    f"{name} {outside[0].item()} is outside 0 … {self.num_classes - 1}"
                )
        pairs = torch.bincount(label * self.num_classes + prediction, minlength=self.num_classes**2)
        self.counts = self.counts.to(pairs.device) + pairs.view_as(self.counts)

    def reduce(self) -> None:
        """Sum the counts over all ranks, in place."""
        reduce_sum(self.counts)

    def compute(self) -> dict[str, Any]:
        """Every metric, as Python numbers in [0, 1]; None where undefined.

        A class without a labelled pixel has no IoU and no accuracy and is left out of the means.
        Keys: class_iou, class_accuracy (lists in class order), miou, miou_without_background,
        mean_accuracy, pixel_accuracy, frequency_weighted_iou, classes_in_mean, confusion.
        """
        counts = self.counts.double().cpu()
        hits, labelled, predicted = counts.diag(), counts.sum(1), counts.sum(0)
        iou = hits / (labelled + predicted - hits)
        accuracy = hits / labelled
        is_defined = labelled > 0
        total = labelled.sum()
        foreground = is_defined.clone()
        foreground[0] = False
        return {
            "class_iou": _listed(iou, is_defined),
            "class_accuracy": _listed(accuracy, is_defined),
            "miou": _mean(iou[is_defined]),
            "miou_without_background": _mean(iou[foreground]),
            "mean_accuracy": _mean(accuracy[is_defined]),
            "pixel_accuracy": _mean((hits.sum() / total)[None]) if total > 0 else None,
            "frequency_weighted_iou": (
                ((labelled / total) * iou)[is_defined].sum().item() if total > 0 else None
            ),
            "classes_in_mean": int(is_defined.sum()),
            "confusion": self.counts.tolist(),
        }


def _listed(values: Tensor, is_defined: Tensor) -> list[float | None]:
    pairs = zip(values.tolist(), is_defined.tolist(), strict=True)
    return [value if defined else None for value, defined in pairs]


def _mean(values: Tensor) -> float | None:
    return values.mean().item() if len(values) else None
