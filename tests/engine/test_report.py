"""The pages of HTML: what they show, that they need no other file, how a browser draws them."""

import base64
from html.parser import HTMLParser

import cv2
import numpy as np
import pytest
import torch

from configs import load_config
from engine.extremes import PictureRow
from engine.report import curves_report, fusion_report, segmentation_report
from utils.image import read_rgb
from utils.segmentation_metrics import ConfusionMatrix

CONFIG = load_config("demo")
NAMES = CONFIG.data.class_names
VOID = {"meta", "img", "br"}


class Page(HTMLParser):
    """The text of each section, its pictures by their description, and every tag and address."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.classes: list[str] = []
        self.addresses: list[str] = []
        self.pictures: dict[str, np.ndarray] = {}
        self.cells: list[str] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(page)
        assert self._open == [], "a tag is left open"

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        values = dict(attributes)
        self.classes.append(values.get("class"))
        self.addresses += [v for k, v in attributes if k in ("src", "href", "data", "srcset")]
        if tag == "img":
            data = base64.b64decode(values["src"].partition("base64,")[2])
            image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
            self.pictures[values["alt"]] = image[..., ::-1]
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        self.text += data
        if self._open and self._open[-1] in ("td", "th"):
            self.cells.append(data)


@pytest.fixture
def run() -> dict:
    return {
        "dataset": "Demo", "split": "test", "checkpoint": "a/best.pth",
        "checkpoint_sha256": "0123456789ab" + 52 * "c", "trained_on": "Demo",
        "train_on_val": False, "text_prior": "orthogonal <stand-in>", "modalities": "both",
        "modalities_in_training": "both", "git_commit": "f00d", "protocol": "cddfuse",
        "note": "a & b", "config": CONFIG.model_dump(mode="json"),
    }  # fmt: skip


@pytest.fixture
def segmentation(run) -> dict:
    """Of a split without class 3: half of class 1 is called 2."""
    label = torch.tensor([[0, 1, 2, 4]]).repeat(32, 10)
    prediction = label.clone()
    prediction[:16][label[:16] == 1] = 2
    matrix = ConfusionMatrix(len(NAMES))
    matrix.update(prediction, label)
    scores = matrix.compute()
    for key in ("class_iou", "class_accuracy"):
        scores[key] = dict(zip(NAMES, scores[key], strict=True))
    by_image = {"a": {"miou": 0.25, "pixel_accuracy": 0.5}, "b": {"miou": 1, "pixel_accuracy": 1}}
    return {**run, **scores, "images": 2, "by_image": by_image, "night": {**scores, "images": 1}}


@pytest.fixture
def fusion(run) -> dict:
    images = {"a": {"EN": 6.5, "Qabf": 0.2, "CC": None}, "b": {"EN": 7.5, "Qabf": 0.4, "CC": 0.5}}
    return {**run, "mean": {"EN": 7.0, "Qabf": 0.3, "CC": 0.5}, "images": images}


def row(name: str, *, width: int = 80) -> PictureRow:
    """A photo of noise, and a map of classes in vertical stripes of 16 pixels."""
    noise = np.random.default_rng(0).integers(0, 256, (60, width, 3), np.uint8)
    classes = np.arange(width) // 16 % len(NAMES)
    stripes = np.array(CONFIG.data.palette, np.uint8)[classes][None].repeat(60, 0)
    return PictureRow(name, "mIoU 0.5", {"rgb": cv2.blur(noise, (9, 9)), "truth": stripes})


def check_alone(page: Page) -> None:
    """It asks for no other file and runs nothing."""
    assert all(address.startswith("data:image/") for address in page.addresses)
    assert not {"script", "link", "iframe", "object"} & set(page.tags)


def test_segmentation(segmentation):
    text = segmentation_report(segmentation, [row("b")], [row("a")])
    page = Page(text)
    check_alone(page)
    for part in (
        "Segmentation: Demo, test", "orthogonal <stand-in>", "f00d", "a & b", "cddfuse",
        segmentation["checkpoint_sha256"], "a/best.pth", "Worst images", "Best images",
        "palette:", "protocol: cddfuse",
    ):  # fmt: skip
        assert part in page.text, part
    rows = [page.cells[i : i + 3] for i in range(0, len(page.cells), 3)]
    assert rows[0] == ["percent", "all", "night"]
    assert ["IoU person", "50.00", "50.00"] in rows
    assert [f"IoU {NAMES[3]}", "–", "–"] in rows
    assert f"{NAMES[1]} called {NAMES[2]}: 160 pixels, 50.00 %" in page.text
    assert page.classes.count("confusion") == 1
    assert page.classes.count("histogram") == 2
    assert page.classes.count("key") == len(NAMES)
    assert list(page.pictures) == ["rgb of a", "truth of a", "rgb of b", "truth of b"]
    assert (page.pictures["truth of a"] == row("a").pictures["truth"]).all()
    difference = page.pictures["rgb of a"].astype(int) - row("a").pictures["rgb"]
    assert np.abs(difference).mean() < 5


def test_fusion(fusion):
    page = Page(fusion_report(fusion, "Qabf", [row("b")], [row("a")]))
    check_alone(page)
    assert page.classes.count("histogram") == 3
    assert page.classes.count("key") == 2 * len(NAMES), "colours of the maps, above each group"
    for part in ("Highest Qabf", "Lowest Qabf", "Protocol cddfuse", "CC (1 undefined)"):
        assert part in page.text, part
    assert page.cells[:8] == [
        "mean of", "EN", "Qabf", "CC", "2 images", "7.0000", "0.3000", "0.5000",
    ]  # fmt: skip
    assert page.cells[12:16] == ["a", "6.5000", "0.2000", "–"]


def test_large_pictures_are_scaled_and_maps_keep_their_colours(segmentation):
    text = segmentation_report(segmentation, [row("b", width=1000)], [])
    truth = Page(text).pictures["truth of b"]
    assert truth.shape == (19, 320, 3)
    colors = {tuple(color) for color in truth.reshape(-1, 3).tolist()}
    assert colors == {tuple(color) for color in CONFIG.data.palette}
    assert len(text) < 200_000


def test_curves_of_epochs(segmentation):
    charts = {"mean": {"mIoU": [0.25, 0.5]}, "IoU": {"car": [None, 0.125], "<b>": [0, 1]}}
    page = Page(
        curves_report("By epoch", dict.fromkeys(["epoch-5", "epoch-10"], segmentation), charts)
    )
    check_alone(page)
    assert page.classes.count("curves") == 2
    assert page.cells == [
        "epoch", "mIoU", "car", "<b>", "5", "0.2500", "–", "0.0000", "10", "0.5000", "0.1250",
        "1.0000",
    ]  # fmt: skip
    assert "car, 10: 0.125" in page.text
    assert "cddfuse" in page.text
    assert segmentation["checkpoint"] not in page.text, "there are several"


def test_a_browser_draws_it(segmentation, browser, tmp_path):
    """Of the page's picture: the colours of the class map, the bars, the matrix's diagonal."""
    path, picture = tmp_path / "report.html", tmp_path / "page.png"
    path.write_text(
        segmentation_report(segmentation, [row("b")], [row("a")]),
        encoding="utf-8",
    )
    browser(path, f"--screenshot={picture}")
    colors, counts = np.unique(read_rgb(picture).reshape(-1, 3), axis=0, return_counts=True)
    seen = {tuple(c): n for c, n in zip(colors.tolist(), counts.tolist(), strict=True)}
    for color in CONFIG.data.palette:
        assert seen.get(tuple(color), 0) > 1000, color
    assert seen.get((0x1F, 0x77, 0xB4), 0) > 500, "bars of the histograms"
    assert seen.get((8, 48, 107), 0) > 3 * 500, "cells of 100 %"
