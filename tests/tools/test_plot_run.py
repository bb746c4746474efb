"""Curves: what is read, where it is drawn, and what is no run."""

import json
import math

import cv2
import numpy as np
import pytest

from tools import plot_run
from tools.plot_run import COLORS, Curve, draw_panel, main, read_run, smooth, ticks
from utils.errors import InputError
from utils.log import TensorBoard


@pytest.fixture
def run_folder(tmp_path):
    """A run of 100 steps, logged each, and validated four times."""

    def make(name: str, slope: float = 0.01):
        folder = tmp_path / "Demo" / name
        folder.mkdir(parents=True)
        lines = [
            {"step": step, "epoch": 1, "loss": 2 - slope * step, "loss_segmentation": 1.0,
             "lr": 1e-3, "images_per_s": 5.0}
            for step in range(1, 101)
        ]  # fmt: skip
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / "metrics.jsonl").write_text(text + '{"step": 101, "lo')
        board = TensorBoard(folder / "tb")
        for step in (25, 50, 75, 100):
            board.scalars({"val/miou": step / 200}, step)
        board.close()
        return folder

    return make


def test_a_run_is_read_with_its_validation(run_folder):
    run = read_run(run_folder("exp"))
    assert run.name == "Demo/exp"
    assert run.curves["lr"].steps.tolist() == list(range(1, 101))
    loss = run.curves["loss"]
    assert len(loss.steps) == 99, "means over two neighbours"
    assert loss.values[0] == pytest.approx(2 - 0.015) and loss.steps[0] == 1.5
    assert run.curves["val/miou"].steps.tolist() == [25, 50, 75, 100]
    assert run.curves["val/miou"].values == pytest.approx([0.125, 0.25, 0.375, 0.5])
    assert "loss_fusion" not in run.curves


def test_the_picture_shows_every_run_in_its_colour(run_folder, tmp_path, capsys):
    folders = [run_folder(name, slope) for name, slope in (("exp", 0.01), ("other", 0.005))]
    main([*map(str, folders), "--out", str(tmp_path / "curves.png")])
    assert capsys.readouterr().out.strip() == str(tmp_path / "curves.png")
    picture = cv2.cvtColor(cv2.imread(str(tmp_path / "curves.png")), cv2.COLOR_BGR2RGB)
    assert picture.shape == (3 * 360 + 12 + 44, 1280, 3)
    loss = picture[56 : 56 + 360, :640]
    for color in COLORS[:2]:
        assert (loss == color).all(-1).sum() > 200
    assert not (picture == COLORS[2]).all(-1).any()


def test_a_curve_goes_where_its_values_are():
    steps = np.arange(0.0, 101.0)
    panel = draw_panel("loss", [Curve(steps, 3 - steps / 50)])
    rows, columns = np.nonzero((panel == COLORS[0]).all(-1))
    falling = np.polyfit(columns, rows, 1)[0]
    height, width = 360 - plot_run.TOP - plot_run.BOTTOM, 640 - plot_run.LEFT - plot_run.RIGHT
    assert falling == pytest.approx(height / width, rel=0.02), "from corner to corner"


def test_values_that_are_not_finite_are_left_out():
    panel = draw_panel("loss", [Curve(np.arange(4.0), np.array([1, math.nan, 2, math.inf]))])
    assert (panel == COLORS[0]).all(-1).any()
    draw_panel("loss", [Curve(np.arange(2.0), np.array([math.nan, math.nan])), None])


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        (1, 480, [0, 100, 200, 300, 400, 500]),
        (-0.3, 0.31, [-0.4, -0.3, -0.2, -0.1, 0, 0.1, 0.2, 0.3, 0.4]),
        (6e-5, 6.1e-5, None),
        (1e9, 3e9, None),
    ],
)
def test_ticks_are_round_and_enclose_the_values(low, high, expected):
    found = ticks(low, high)
    assert found[0] <= low + 1e-9 * abs(low) and found[-1] >= high - 1e-9 * abs(high)
    assert 3 <= len(found) <= 9
    if expected is not None:
        assert len(expected) > 8 or found == pytest.approx(expected)


def test_one_value_still_makes_a_panel():
    panel = draw_panel("mIoU", [Curve(np.array([5.0]), np.array([0.0]))])
    assert (panel == COLORS[0]).all(-1).any()


def test_smoothing_keeps_short_curves():
    curve = Curve(np.arange(3.0), np.arange(3.0))
    assert smooth(curve, 0) is curve


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "holds no metrics.jsonl"),
        ("", "has not logged a step"),
        ("<html>\n", "is no metrics"),
        ('{"loss": 1.0}\n', "is no metrics.*'step'"),
        ('["loss"]\n', "is no metrics"),
        ('{"step": 1, "loss": "low"}\n', "is no metrics"),
        ('{"step": 1, "lo\xff', "is no metrics"),
    ],
)
def test_what_is_no_run_is_said(tmp_path, content, message):
    if content is not None:
        (tmp_path / "metrics.jsonl").write_text(content, encoding="latin-1")
    with pytest.raises(InputError, match=message):
        main([str(tmp_path)])
    assert not (tmp_path / "curves.png").exists()
