"""Segmentation metrics of a whole split from one confusion matrix of 64-bit counts."""

from typing import Any

import torch
from torch import Tensor

from utils.distributed import reduce_sum


class ConfusionMatrix:
    """Counts of (label, prediction) pairs, kept on the device of the tensors it is given.

    Nothing in update() waits for a GPU; a value outside the classes is then named where the counts
    are read, by reduce() or compute(). On a CPU update() names it at once.

    Args:
        num_classes: classes 0 … num_classes - 1.
        ignore_index: label value that is not counted.
        device: where the counts begin; they follow the tensors of update().
    """

    def __init__(
        self, num_classes: int, ignore_index: int = 255, *, device: torch.device | str = "cpu"
    ) -> None:
        self.num_classes = num_classes
        self.ignore_index = ignore_index
        self.counts = torch.zeros(num_classes, num_classes, dtype=torch.int64, device=device)
        # least and greatest value seen: (2, 2), rows for label and prediction
        self._extremes = torch.zeros(2, 2, dtype=torch.int64, device=device)

    def update(self, prediction: Tensor, label: Tensor) -> None:
        """Count the pixels of one batch; both (..., H, W) of any integer dtype.

        Raises:
            ValueError: shapes differ, or a value lies outside the classes.
        """
        if prediction.shape != label.shape:
            raise ValueError(
                f"prediction {tuple(prediction.shape)} and label {tuple(label.shape)} differ"
            )
        if label.numel() == 0:
            return
        self.counts = self.counts.to(label.device)
        self._extremes = self._extremes.to(label.device)
        is_counted = label != self.ignore_index
        pairs = torch.stack([label.long(), prediction.long()]).masked_fill_(~is_counted, 0)
        least, greatest = pairs.flatten(1).aminmax(dim=1)
        self._extremes[:, 0] = torch.minimum(self._extremes[:, 0], least)
        self._extremes[:, 1] = torch.maximum(self._extremes[:, 1], greatest)
        if label.device.type == "cpu":
            self._check_values()
        labels, predictions = pairs.clamp_(0, self.num_classes - 1)
        # A table for each row of pixels: on a GPU additions to one place wait for each other.
        places = (labels * self.num_classes + predictions).view(-1, label.shape[-1])
        tables = places.new_zeros(len(places), self.num_classes**2)
        tables.scatter_add_(1, places, is_counted.reshape(places.shape).long())
        self.counts += tables.sum(0).view_as(self.counts)

    def reduce(self) -> None:
        """Sum the counts over all ranks, in place; raises what update() left open."""
        self._check_values()
        reduce_sum(self.counts)

    def compute(self) -> dict[str, Any]:
        """Every metric, as Python numbers in [0, 1]; None where undefined.

        A class without a labelled pixel has no IoU and no accuracy and is left out of the means.
        Keys: class_iou, class_accuracy (lists in class order), miou, miou_without_background,
        mean_accuracy, pixel_accuracy, frequency_weighted_iou, classes_in_mean, confusion.

        Raises:
            ValueError: what update() left open.
        """
        self._check_values()
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

    def _check_values(self) -> None:
        for name, extremes in zip(("label", "prediction"), self._extremes.tolist(), strict=True):
            for value in extremes:
                if not 0 <= value < self.num_classes:
                    raise ValueError(f"{name} {value} is outside 0 … {self.num_classes - 1}")


def _listed(values: Tensor, is_defined: Tensor) -> list[float | None]:
    pairs = zip(values.tolist(), is_defined.tolist(), strict=True)
    return [value if defined else None for value, defined in pairs]


def _mean(values: Tensor) -> float | None:
    return values.mean().item() if len(values) else None
