"""One page of HTML for each evaluation: everything in one file, for any browser, without script."""

import base64
import html
from collections.abc import Mapping, Sequence
from typing import Any

import cv2
import numpy as np
import yaml

from engine.charts import curves, heat_map, histogram
from engine.extremes import PictureRow
from engine.tables import UNDEFINED, facts_of, fusion_rows, segmentation_rows, shared_facts

_WIDTH = 320  # pixels of each picture, at most
_PHOTOS = ("rgb", "thermal", "fused", "error")  # JPEG; maps of classes are PNG, in exact colours
_STYLE = """
body { font: 14px/1.5 system-ui, sans-serif; color: #222; max-width: 1400px; margin: 2em auto;
       padding: 0 1em; }
table { border-collapse: collapse; margin: 1em 0; }
th, td { padding: .2em .7em; border-bottom: 1px solid #ddd; text-align: right; }
th:first-child, td:first-child { text-align: left; }
thead th { border-bottom: 2px solid #888; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 0 1em; }
dt { color: #666; } dd { margin: 0; overflow-wrap: anywhere; }
svg { font: 12px system-ui, sans-serif; margin: .5em; } svg .title { font-weight: 600; }
.pair { margin: 1em 0; } .pictures { display: flex; flex-wrap: wrap; gap: 4px; }
figure { margin: 0; width: 220px; } figure img { width: 100%; display: block; }
figcaption { color: #666; font-size: 12px; }
.key { display: inline-block; width: .9em; height: .9em; margin-right: .4em;
       border: 1px solid #999; vertical-align: -.1em; }
.wide { overflow-x: auto; } pre { background: #f5f5f5; padding: 1em; overflow-x: auto; }
"""


def segmentation_report(
    result: Mapping[str, Any], best: Sequence[PictureRow], worst: Sequence[PictureRow]
) -> str:
    """The page of one eval.json: facts, classes, confusion, images' scores, best and worst."""
    header, rows = segmentation_rows(result)
    names = list(result["class_iou"])
    by_image = result["by_image"].values()
    charts = [
        histogram(f"{title} of each image", [row[key] for row in by_image], (0, 1))
        for title, key in (("mIoU", "miou"), ("pixel accuracy", "pixel_accuracy"))
    ]
    return _page(
        f"Segmentation: {result['dataset']}, {result['split']}",
        _facts(facts_of(result) | {"SHA-256": result["checkpoint_sha256"]}),
        _section("Scores", _table(header, rows), _legend(result)),
        _section(
            "Confusion",
            "<p>Percent of each true class's pixels; pixels without a label are left out.</p>",
            f'<div class="wide">{heat_map(result["confusion"], names)}</div>',
        ),
        _section("Images", *charts),
        _section("Worst images", _ERROR_KEY, *map(_pictures, worst)),
        _section("Best images", _ERROR_KEY, *map(_pictures, best)),
        _config(result),
    )


def fusion_report(
    result: Mapping[str, Any],
    ranked_by: str,
    best: Sequence[PictureRow],
    worst: Sequence[PictureRow],
) -> str:
    """The page of one vision.json; ranked_by: the metric that says which images are best."""
    header, means, images = fusion_rows(result)
    charts = [
        histogram(metric, [row[metric] for row in result["images"].values()])
        for metric in result["mean"]
    ]
    table = _table(["image", *header[1:]], images)
    return _page(
        f"Fusion: {result['dataset']}, {result['split']}",
        _facts(facts_of(result) | {"SHA-256": result["checkpoint_sha256"]}),
        _section(
            "Means", f"<p>Protocol {html.escape(result['protocol'])}.</p>", _table(header, [means])
        ),
        _section("Images", *charts),
        _section(f"Lowest {ranked_by}", _legend(result), _ERROR_KEY, *map(_pictures, worst)),
        _section(f"Highest {ranked_by}", _legend(result), _ERROR_KEY, *map(_pictures, best)),
        _section("Every image", f"<details><summary>table</summary>{table}</details>"),
        _config(result),
    )


def curves_report(
    title: str, results: Mapping[str, Mapping[str, Any]], charts: Mapping[str, Mapping]
) -> str:
    """Scores over epochs.

    Args:
        results: eval.json or vision.json by checkpoint, epoch-N, rising.
        charts: title of a chart -> name of a line -> a value for each checkpoint, or None.
    """
    epochs = [int(name.removeprefix("epoch-")) for name in results]
    drawn = [curves(f"{name} by epoch", epochs, series) for name, series in charts.items()]
    rows = [
        [f"{epoch}", *(_number(v[i]) for lines in charts.values() for v in lines.values())]
        for i, epoch in enumerate(epochs)
    ]
    header = ["epoch", *(name for series in charts.values() for name in series)]
    facts = shared_facts(next(iter(results.values())))
    return _page(
        title,
        _facts(facts),
        _section("Curves", *drawn),
        _section("Values", _table(header, rows)),
    )


_ERROR_KEY = "<p>Error: wrong pixels are red, pixels without a label black.</p>"


def _facts(facts: Mapping[str, str]) -> str:
    lines = (
        f"<dt>{html.escape(name)}</dt><dd>{html.escape(fact)}</dd>" for name, fact in facts.items()
    )
    return f"<dl>{''.join(lines)}</dl>"


def _config(result: Mapping[str, Any]) -> str:
    text = yaml.safe_dump(result["config"], sort_keys=False, allow_unicode=True)
    return _section(
        "Config", f"<details><summary>all values</summary><pre>{html.escape(text)}</pre></details>"
    )


def _legend(result: Mapping[str, Any]) -> str:
    """The colours of the class maps."""
    data = result["config"]["data"]
    keys = (
        f'<span class="key" style="background:rgb({r},{g},{b})"></span>{html.escape(name)} &ensp;'
        for name, (r, g, b) in zip(data["class_names"], data["palette"], strict=True)
    )
    return f"<p>{''.join(keys)}</p>"


def _pictures(row: PictureRow) -> str:
    figures = (
        f'<figure><img alt="{html.escape(title)} of {html.escape(row.name)}" '
        f'src="{_data_uri(image, is_photo=title in _PHOTOS)}">'
        f"<figcaption>{html.escape(title)}</figcaption></figure>"
        for title, image in row.pictures.items()
    )
    return (
        f'<div class="pair"><b>{html.escape(row.name)}</b> {html.escape(row.caption)}'
        f'<div class="pictures">{"".join(figures)}</div></div>'
    )


def _data_uri(image: np.ndarray, *, is_photo: bool) -> str:
    """(H, W, 3) uint8 -> a picture inside the page, at most _WIDTH wide."""
    height, width = image.shape[:2]
    if width > _WIDTH:
        size = (_WIDTH, max(1, round(height * _WIDTH / width)))
        way = cv2.INTER_AREA if is_photo else cv2.INTER_NEAREST
        image = cv2.resize(image, size, interpolation=way)
    suffix, kind = (".jpg", "jpeg") if is_photo else (".png", "png")
    data = cv2.imencode(suffix, cv2.cvtColor(image, cv2.COLOR_RGB2BGR))[1]
    return f"data:image/{kind};base64,{base64.b64encode(data.tobytes()).decode()}"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
    body = "".join(
        f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>" for row in rows
    )
    return (
        f'<div class="wide"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _section(title: str, *blocks: str) -> str:
    return f"<section><h2>{html.escape(title)}</h2>{''.join(blocks)}</section>"


def _page(title: str, *blocks: str) -> str:
    title = html.escape(title)
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f"<style>{_STYLE}</style></head>\n<body><h1>{title}</h1>\n" + "\n".join(blocks)
    ) + "\n</body></html>\n"


def _number(value: float | None) -> str:
    return UNDEFINED if value is None else f"{value:.4f}"
