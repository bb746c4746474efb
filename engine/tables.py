"""Results as tables in Markdown, each with what its numbers follow from."""

from collections.abc import Mapping, Sequence
from typing import Any

UNDEFINED = "–"


def segmentation_table(result: Mapping[str, Any]) -> str:
    """eval.json as a page of Markdown; IoU and accuracy in percent."""
    return _page(
        f"Segmentation: {result['dataset']}, {result['split']}",
        _list(facts_of(result)),
        markdown_table(*segmentation_rows(result)),
    )


def segmentation_rows(result: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """eval.json as the header and the rows of a table."""
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
    return ["percent", *columns], rows


def fusion_table(result: Mapping[str, Any]) -> str:
    """vision.json as a page of Markdown: the means, then every image."""
    header, means, images = fusion_rows(result)
    return _page(
        f"Fusion: {result['dataset']}, {result['split']}",
        _list(facts_of(result)),
        markdown_table(header, [means]),
        markdown_table(["image", *header[1:]], images),
    )


def fusion_rows(result: Mapping[str, Any]) -> tuple[list[str], list[str], list[list[str]]]:
    """vision.json as a header, the row of means and a row for each image."""
    means = [f"{len(result['images'])} images", *map(_number, result["mean"].values())]
    rows = [[name, *map(_number, row.values())] for name, row in result["images"].items()]
    return ["mean of", *result["mean"]], means, rows


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
        _list(shared_facts(first)),
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
        _list(shared_facts(first)),
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


def facts_of(result: Mapping[str, Any]) -> dict[str, str]:
    """What a number must not be quoted without, by name."""
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
    return {name: fact for name, fact in facts.items() if fact}


def shared_facts(result: Mapping[str, Any]) -> dict[str, str]:
    """What the results of several checkpoints of one run have in common; see facts_of."""
    return {name: fact for name, fact in facts_of(result).items() if name != "checkpoint"}


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns padded to one width, so that it reads well in a terminal, too."""
    cells = [list(header), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    widths = [max(3, *map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        "| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |"
        for row in cells
    ]
    return "\n".join([lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]])


def _page(title: str, *blocks: str) -> str:
    return "\n\n".join([f"# {title}", *blocks]) + "\n"


def _list(facts: Mapping[str, str]) -> str:
    return "\n".join(f"- {name}: {fact}" for name, fact in facts.items())


def _percent(share: float | None) -> str:
    return UNDEFINED if share is None else f"{100 * share:.2f}"


def _number(value: float | None) -> str:
    return UNDEFINED if value is None else f"{value:.4f}"
