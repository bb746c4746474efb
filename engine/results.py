"""What evaluation leaves on disk: pictures, JSON, tables in Markdown."""

import hashlib
import json
import os
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from configs import Config
from engine.inference import describe_inference
from models import CMFS
from utils.environment import git_commit
from utils.errors import InputError
from utils.image import Palette, colorize, overlay, write_png

UNDEFINED = "–"
_WAITING_PICTURES = 32  # held in memory at most


class PictureWriter:
    """Writes pictures in threads while the next ones are computed; use it as a context.

    What a call raises is raised again by a later submit() or at the end.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(max_workers=4)
        self._waiting: deque[Future[None]] = deque()

    def __enter__(self) -> "PictureWriter":
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        self._pool.shutdown(wait=True)  # on an error, too: what was computed is written
        while self._waiting and error is None:
            self._waiting.popleft().result()

    def submit(self, write: Callable[..., None], *arguments: Any) -> None:
        """Call write(*arguments) soon."""
        self._waiting.append(self._pool.submit(write, *arguments))
        if len(self._waiting) > _WAITING_PICTURES:
            self._waiting.popleft().result()


def write_segmentation(
    folder: Path, name: str, rgb: np.ndarray, segmentation: np.ndarray, palette: Palette
) -> None:
    """Write segmentation/ (class indices), color/ and overlay/ <name>.png; class 0 covers nothing.

    rgb: (H, W, 3) uint8; segmentation: (H, W) uint8.
    """
    color = colorize(segmentation, palette)
    cover = np.where(segmentation[..., None] == 0, rgb, color)
    write_png(folder / "segmentation" / f"{name}.png", segmentation)
    write_png(folder / "color" / f"{name}.png", color)
    write_png(folder / "overlay" / f"{name}.png", overlay(rgb, cover))


def describe_run(
    path: Path, model: CMFS, stored: Config, config: Config, split: str
) -> dict[str, Any]:
    """What a result was made from.

    Args:
        stored: the config of the checkpoint's run.
        config: the present one, of the data that is scored.
    """
    return {
        "dataset": config.data.name,
        "split": split,
        "checkpoint": path.as_posix(),
        "checkpoint_sha256": _sha256(path),
        "trained_on": stored.data.name,
        "train_on_val": stored.data.train_on_val,
        "text_prior": model.text_prior.source,
        "modalities": config.data.modalities,
        "modalities_in_training": stored.data.modalities,
        "git_commit": git_commit(),
    }


def describe_scoring(result: Mapping[str, Any], config: Config) -> str:
    """How the numbers of a segmentation came about, in one line; result: see describe_run."""
    lists = "train and val" if result["train_on_val"] else "train"
    background = "not scored" if config.data.ignore_background else "scored as any other"
    return (
        f"{describe_inference(config.eval)}; trained on {lists}, scored on {result['split']}; "
        f"modalities: {result['modalities']}; one confusion matrix over the split at the labels' "
        f"own size, 255 left out, class 0 {background}; classes without a labelled pixel are left "
        f"out of the mean"
    )


def segmentation_table(result: Mapping[str, Any]) -> str:
    """eval.json as a page of Markdown; IoU and accuracy in percent."""
    columns = {"all": result, **{g: result[g] for g in ("day", "night") if g in result}}
    rows = [
        [label, *(_percent(scores[key]) for scores in columns.values())]
        for label, key in (
            ("mIoU", "miou"),
            ("mIoU without background", "miou_without_background"),
            ("mean accuracy", "mean_accuracy"),
            ("pixel accuracy", "pixel_accuracy"),
            ("frequency-weighted IoU", "frequency_weighted_iou"),
        )
    ]
    rows += [
        [f"IoU {name}", *(_percent(scores["class_iou"][name]) for scores in columns.values())]
        for name in result["class_iou"]
    ]
    rows += [
        [f"accuracy {name}", *(_percent(x["class_accuracy"][name]) for x in columns.values())]
        for name in result["class_accuracy"]
    ]
    for label, key in (("classes in the mIoU", "classes_in_mean"), ("images", "images")):
        rows.append([label, *(str(scores[key]) for scores in columns.values())])
    return _page(
        f"Segmentation: {result['dataset']}, {result['split']}",
        _facts(result),
        markdown_table(["percent", *columns], rows),
    )


def fusion_table(result: Mapping[str, Any]) -> str:
    """vision.json as a page of Markdown: the means, then every image."""
    means = [f"{len(result['images'])} images", *map(_number, result["mean"].values())]
    rows = [[name, *map(_number, row.values())] for name, row in result["images"].items()]
    return _page(
        f"Fusion: {result['dataset']}, {result['split']}",
        _facts(result),
        markdown_table(["mean of", *result["mean"]], [means]),
        markdown_table(["image", *result["mean"]], rows),
    )


def segmentation_summary(results: Mapping[str, Mapping[str, Any]]) -> str:
    """One line per checkpoint."""
    first = next(iter(results.values()))
    rows = [
        [
            name,
            _percent(result["miou"]),
            _percent(result["miou_without_background"]),
            _percent(result["pixel_accuracy"]),
            str(result["classes_in_mean"]),
            *map(_percent, result["class_iou"].values()),
        ]
        for name, result in results.items()
    ]
    header = ["checkpoint", "mIoU", "without background", "pixel accuracy", "classes in the mIoU"]
    return _page(
        f"Segmentation by checkpoint: {first['dataset']}, {first['split']}",
        _facts(first, of_checkpoint=False),
        markdown_table([*header, *(f"IoU {name}" for name in first["class_iou"])], rows),
        "best.pth was chosen on the val split; a choice by a table of the test split is none that "
        "results may be reported from.",
    )


def fusion_summary(results: Mapping[str, Mapping[str, Any]]) -> str:
    """One line of means per checkpoint."""
    first = next(iter(results.values()))
    rows = [[name, *map(_number, result["mean"].values())] for name, result in results.items()]
    return _page(
        f"Fusion by checkpoint: {first['dataset']}, {first['split']}",
        _facts(first, of_checkpoint=False),
        markdown_table(["checkpoint", *first["mean"]], rows),
    )


def fusion_comparison(result: Mapping[str, Any]) -> str:
    """The scores of several methods on one set of images, a line each; see tools/score_fusion.py.

    result: {"protocol", "rgb", "thermal", "git_commit", "methods": {name: {"mean", "images"}}}.
    """
    methods = result["methods"]
    means = {name: method["mean"] for name, method in methods.items()}
    rows = [[name, *map(_number, mean.values())] for name, mean in means.items()]
    first = next(iter(methods))
    facts = {
        "protocol": result["protocol"],
        "mean of": f"{len(methods[first]['images'])} images",
        "rgb": result["rgb"],
        "thermal": result["thermal"],
        "commit": result["git_commit"] or "unknown",
    }
    return _page(
        "Fusion by method",
        _list(facts),
        markdown_table(["method", *means[first]], rows),
    )


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns padded to one width, so that it reads well in a terminal, too."""
    cells = [list(header), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    widths = [max(3, *map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        "| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |"
        for row in cells
    ]
    return "\n".join([lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]])


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write JSON aside, then rename; InputError where the disk does not take it."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a text aside, then rename; InputError where the disk does not take it."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside.write_text(text, encoding="utf-8")
        aside.replace(path)
    except OSError as error:
        aside.unlink(missing_ok=True)
        raise InputError(f"cannot write {path}: {error.strerror}") from error


def _page(title: str, *blocks: str) -> str:
    return "\n\n".join([f"# {title}", *blocks]) + "\n"


def _facts(result: Mapping[str, Any], *, of_checkpoint: bool = True) -> str:
    """The lines that a number must not be quoted without."""
    lists = "train.txt + val.txt" if result["train_on_val"] else "train.txt"
    facts = {
        "checkpoint": f"{result['checkpoint']} (SHA-256 {result['checkpoint_sha256'][:12]})",
        "trained on": f"{result['trained_on']} {lists}",
        "text prior": result["text_prior"],
        "protocol": result["protocol"],
        "inference": result.get("inference"),
        "modalities": result["modalities"],
        "commit": result["git_commit"] or "unknown",
        "note": result.get("note"),
    }
    if result["modalities"] != result["modalities_in_training"]:
        facts["modalities"] += f" (trained with {result['modalities_in_training']})"
    if not of_checkpoint:
        del facts["checkpoint"]
    return _list(facts)


def _list(facts: Mapping[str, str | None]) -> str:
    return "\n".join(f"- {name}: {fact}" for name, fact in facts.items() if fact)


def _percent(share: float | None) -> str:
    return UNDEFINED if share is None else f"{100 * share:.2f}"


def _number(value: float | None) -> str:
    return UNDEFINED if value is None else f"{value:.4f}"


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
