"""Draw the curves of one or many runs into a picture.

    python tools/plot_run.py experiment/MFNet/exp
    python tools/plot_run.py experiment/MFNet/exp experiment/MFNet/bf16 --out compare.png

One panel each: the loss, its segmentation and fusion parts, the validation's mIoU, the learning
rate, the speed; one colour a run. Losses and speed are means over a fiftieth of the run. Reads
metrics.jsonl and, for the mIoU, the TensorBoard files beside it.
"""

import argparse
import itertools
import json
import math
import sys
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np

if __name__ == "__main__":  # started as a file: the project's packages lie one folder up
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from engine.charts import spread, ticks
from utils.cli import Parser, run_main
from utils.errors import InputError
from utils.image import write_png

PANELS = {
    "loss": "loss",
    "loss_segmentation": "segmentation loss",
    "loss_fusion": "fusion loss",
    "val/miou": "validation mIoU",
    "lr": "learning rate",
    "images_per_s": "images/s",
}
COLUMNS = 2
PANEL_H, PANEL_W = 360, 640  # pixels
LEFT, RIGHT, TOP, BOTTOM = 80, 20, 36, 36  # margins of a panel
COLORS = (
    (31, 119, 180), (214, 39, 40), (44, 160, 44), (148, 103, 189), (255, 127, 14), (23, 190, 207),
    (140, 86, 75), (227, 119, 194),
)  # fmt: skip
BLACK, GREY = (0, 0, 0), (220, 220, 220)
FONT = cv2.FONT_HERSHEY_SIMPLEX


class Curve(NamedTuple):
    """One run's values of one kind."""

    steps: np.ndarray  # (N,)
    values: np.ndarray  # (N,)


class Run(NamedTuple):
    """What is drawn of a run."""

    name: str
    curves: dict[str, Curve]  # by the keys of PANELS


def main(arguments: list[str] | None = None) -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run's folder")
    parser.add_argument(
        "--out", type=Path, help="PNG file (default: curves.png in the first run's folder)"
    )
    options = parser.parse_args(arguments)
    out = options.out or options.runs[0] / "curves.png"
    if out.suffix.lower() != ".png":
        raise InputError(f"--out must end in .png, got {out}")
    write_png(out, draw_runs([read_run(folder) for folder in options.runs]))
    print(out)


def read_run(folder: Path) -> Run:
    """The curves of a run's folder.

    Raises:
        InputError: it holds no metrics.jsonl, or not a single line in it.
    """
    path = folder / "metrics.jsonl"
    if not path.is_file():
        raise InputError(f"{folder} is no run: it holds no metrics.jsonl")
    try:
        curves = _logged(path.read_text(encoding="utf-8"))
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(f"{path} is no metrics.jsonl of train.py: {error!r}") from error
    if not curves:
        raise InputError(f"{path} holds nothing to draw: the run has not logged a step yet")
    for key in ("loss", "loss_segmentation", "loss_fusion", "images_per_s"):
        if key in curves:
            curves[key] = smooth(curves[key], len(curves[key].steps) // 50)
    points = _validation_scores(folder / "tb")
    if points:
        curves["val/miou"] = Curve(*np.array(points, float).T)
    return Run(f"{folder.resolve().parent.name}/{folder.resolve().name}", curves)


def _logged(text: str) -> dict[str, Curve]:
    """The curves of a metrics.jsonl, without a last line that is being written."""
    entries = [json.loads(line) for line in text.split("\n")[:-1]]
    points = {key: [(entry["step"], entry[key]) for entry in entries if key in entry]
              for key in PANELS}  # fmt: skip
    return {key: Curve(*np.array(found, float).T) for key, found in points.items() if found}


def smooth(curve: Curve, width: int) -> Curve:
    """Means over `width` neighbouring values, each at their mean step; 0 and 1 change nothing."""
    if width < 2:
        return curve
    kernel = np.full(width, 1 / width)
    return Curve(*(np.convolve(values, kernel, mode="valid") for values in curve))


def draw_runs(runs: list[Run]) -> np.ndarray:
    """All panels and a legend: (H, W, 3) uint8, RGB."""
    panels = [
        draw_panel(title, [run.curves.get(key) for run in runs]) for key, title in PANELS.items()
    ]
    rows = [np.hstack(panels[i : i + COLUMNS]) for i in range(0, len(panels), COLUMNS)]
    return np.vstack([_legend([run.name for run in runs], rows[0].shape[1]), *rows])


def draw_panel(title: str, curves: list[Curve | None]) -> np.ndarray:
    """One pair of axes with every run's curve in its colour: (PANEL_H, PANEL_W, 3) uint8."""
    panel = np.full((PANEL_H, PANEL_W, 3), 255, np.uint8)
    _write(panel, title, (LEFT, TOP - 12), 0.55)
    finite = [
        Curve(*(column[np.isfinite(curve.values)] for column in curve))
        for curve in curves
        if curve is not None
    ]
    if not any(len(curve.steps) for curve in finite):
        _write(panel, "no values", (PANEL_W // 2 - 40, PANEL_H // 2), 0.5)
        return panel
    x_ticks, y_ticks = (
        ticks(*spread(np.concatenate([curve[axis] for curve in finite]))) for axis in (0, 1)
    )
    frame = (x_ticks[0], x_ticks[-1], y_ticks[0], y_ticks[-1])
    for tick in x_ticks:
        x, _ = _to_pixel(tick, y_ticks[0], frame)
        cv2.line(panel, (x, TOP), (x, PANEL_H - BOTTOM), GREY)
        _write(panel, f"{tick:g}", (x - 4 * len(f"{tick:g}"), PANEL_H - BOTTOM + 18))
    for tick in y_ticks:
        _, y = _to_pixel(x_ticks[0], tick, frame)
        cv2.line(panel, (LEFT, y), (PANEL_W - RIGHT, y), GREY)
        _write(panel, f"{tick:g}", (LEFT - 8 - 8 * len(f"{tick:g}"), y + 4))
    for curve, color in zip(curves, itertools.cycle(COLORS), strict=False):
        if curve is None:
            continue
        points = [
            _to_pixel(step, value, frame)
            for step, value in zip(*curve, strict=True)
            if math.isfinite(value)
        ]
        for point in points if len(points) < 20 else ():
            cv2.circle(panel, point, 3, color, cv2.FILLED, cv2.LINE_AA)
        cv2.polylines(panel, [np.array(points, np.int32).reshape(-1, 1, 2)], False, color, 2,
                      cv2.LINE_AA)  # fmt: skip
    return panel


def _to_pixel(x: float, y: float, frame: tuple[float, float, float, float]) -> tuple[int, int]:
    left, right, bottom, top = frame
    column = LEFT + (x - left) / (right - left) * (PANEL_W - LEFT - RIGHT)
    row = PANEL_H - BOTTOM - (y - bottom) / (top - bottom) * (PANEL_H - TOP - BOTTOM)
    return round(column), round(row)


def _legend(names: list[str], width: int) -> np.ndarray:
    """One line a run."""
    strip = np.full((12 + 22 * len(names), width, 3), 255, np.uint8)
    for index, (name, color) in enumerate(zip(names, itertools.cycle(COLORS), strict=False)):
        y = 18 + 22 * index
        cv2.line(strip, (LEFT, y - 4), (LEFT + 30, y - 4), color, 3, cv2.LINE_AA)
        _write(strip, name, (LEFT + 42, y), 0.5)
    return strip


def _write(image: np.ndarray, text: str, at: tuple[int, int], size: float = 0.42) -> None:
    cv2.putText(image, text, at, FONT, size, BLACK, 1, cv2.LINE_AA)


def _validation_scores(folder: Path) -> list[tuple[int, float]]:
    """Step and mIoU of every validation that the TensorBoard files hold."""
    if not folder.is_dir():
        return []
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder)).Reload()
    if "val/miou" not in events.Tags()["scalars"]:
        return []
    return [(event.step, event.value) for event in events.Scalars("val/miou")]


if __name__ == "__main__":
    run_main(main)
