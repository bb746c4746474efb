"""Best and worst images, by scores and networks that are known."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from configs import load_config
from engine.extremes import best_and_worst, draw_extremes
from utils.image import colorize

CONFIG = load_config("demo")


class SaysCar(nn.Module):
    """Class 2 everywhere; fused is the thermal image."""

    def forward(self, rgb, thermal):
        logits = torch.zeros(len(rgb), 5, *rgb.shape[2:])
        logits[:, 2] = 9
        return SimpleNamespace(logits=logits, fused=thermal)


class Pairs:
    """Images of the brightness index / 10; the label is the class of the same index."""

    names = ("zero", "one", "two", "none")

    def __getitem__(self, index):
        rgb = torch.full((3, 32, 40), index / 10)
        label = torch.full((32, 40), index if index < 3 else 255)
        return SimpleNamespace(rgb=rgb, thermal=1 - rgb, label=label)


@pytest.mark.parametrize(
    ("scores", "best", "worst"),
    [
        ([0.3, 0.9, 0.1, 0.5, 0.7], "be", "ca"),
        ([0.3, 0.9, 0.1], "ba", "c"),
        ([0.3], "a", ""),
        ([None, 0.2, None, 0.8], "d", "b"),
        ([0.5, 0.5, 0.5, 0.5], "ab", "dc"),
        ([None], "", ""),
    ],
)
def test_no_name_is_among_the_best_and_the_worst(scores, best, worst):
    found = best_and_worst(dict(zip("abcde", scores, strict=False)), 2)
    assert ["".join(names) for names in found] == [best, worst]


def test_rows_hold_every_form_of_an_image():
    scores = {"zero": 0.25, "one": 0.0, "two": 1.0, "none": None}
    best, worst = draw_extremes(
        SaysCar().eval(), Pairs(), CONFIG, torch.device("cpu"),
        scores=scores, metric="mIoU", count=2,
    )  # fmt: skip
    assert [row.name for row in best] == ["two", "zero"]
    assert [row.name for row in worst] == ["one"]
    assert worst[0].caption == "mIoU 0.0000"
    pictures = worst[0].pictures
    assert list(pictures) == ["rgb", "thermal", "fused", "prediction", "truth", "error"]
    assert (pictures["rgb"] == 26).all()
    assert (pictures["thermal"] == 230).all()
    assert (pictures["fused"] == 230).all()
    palette = np.array(CONFIG.data.palette)
    assert (pictures["prediction"] == palette[2]).all()
    assert (pictures["truth"] == palette[1]).all()
    assert (pictures["error"] == (230, 30, 30)).all()
    assert not (best[0].pictures["error"] == (230, 30, 30)).any()


def test_without_a_label_there_is_no_truth():
    scores = {"none": 0.5}
    best, _ = draw_extremes(
        SaysCar().eval(), Pairs(), CONFIG, torch.device("cpu"), scores=scores, metric="Qabf"
    )
    assert list(best[0].pictures) == ["rgb", "thermal", "fused", "prediction"]
    expected = colorize(np.full((32, 40), 2, np.uint8), CONFIG.data.palette)
    assert (best[0].pictures["prediction"] == expected).all()
