"""Train, score and export on real pairs, a few steps on a CPU, through the scripts a user types."""

import json
import subprocess
import sys
from pathlib import Path

import cv2
import pytest

ROOT = Path(__file__).resolve().parents[1]
SMALL = [
    "model.size=demo", "model.text_prior=orthogonal", "model.pretrained=none", "train.max_steps=2",
    "train.batch_size=2", "train.crop=[96,128]", "train.warmup_epochs=0", "data.num_workers=0",
]  # fmt: skip


def run(script, *arguments, expect=0):
    result = subprocess.run(
        [sys.executable, script, *arguments],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == expect, f"{result.stdout}\n{result.stderr}"
    return result


def few_pairs(source: Path, target: Path, counts: dict[str, int]) -> Path:
    """A folder that links to a set's images, with the first stems of each list."""
    target.mkdir()
    for folder in source.iterdir():
        if folder.is_dir():
            (target / folder.name).symlink_to(folder.resolve())
    for split, count in counts.items():
        stems = (source / f"{split}.txt").read_text().split()[:count]
        (target / f"{split}.txt").write_text("\n".join(stems) + "\n")
    return target


@pytest.fixture
def settings(tmp_path):
    def make(dataset, *more):
        return ["--set", f"data.dataset_path={dataset}", f"experiment_path={tmp_path}", *SMALL,
                *more]  # fmt: skip

    return make


@pytest.mark.slow
def test_msrs_from_training_to_pictures(shared_data, tmp_path, settings):
    dataset = few_pairs(shared_data / "MSRS", tmp_path / "MSRS", {"train": 4, "val": 1, "test": 2})
    stems = (dataset / "test.txt").read_text().split()
    options = settings(dataset)
    run("train.py", "-n", "msrs", "-d", "cpu", *options)
    run("eval.py", "-n", "msrs", "-d", "cpu", "-e", "last", *options)
    run("eval_vision.py", "-n", "msrs", "-d", "cpu", "-e", "last", *options)

    folder = tmp_path / "MSRS" / "exp"
    result = json.loads((folder / "eval/epoch-last/eval.json").read_text())
    assert result["images"] == 2
    assert 0 <= result["miou"] <= 1
    assert "orthogonal" in result["text_prior"]
    assert "orthogonal" in (folder / "eval/epoch-last/table.md").read_text()
    vision = json.loads((folder / "vision/epoch-last/vision.json").read_text())
    assert sorted(vision["images"]) == sorted(stems)
    assert vision["mean"]["EN"] > 0
    for stem in stems:
        fused = cv2.imread(str(folder / f"vision/epoch-last/fused/{stem}.png"))
        assert fused.shape == (480, 640, 3)
        label = cv2.imread(str(folder / f"eval/epoch-last/segmentation/{stem}.png"), -1)
        assert label.shape == (480, 640)
        assert label.max() < 9
    assert cv2.imread(str(folder / "vision/epoch-last/sheet.png")) is not None


@pytest.mark.slow
def test_a_set_of_one_s_own(shared_data, tmp_path, settings):
    """Crop and weed: grey images of 648x483, three classes, a config of the user's own."""
    counts = {"train": 2, "val": 1, "test": 1}
    dataset = few_pairs(shared_data / "CWFID", tmp_path / "CWFID", counts)
    config = tmp_path / "weeds.yaml"
    config.write_text(
        "data:\n  name: Weeds\n  class_names: [soil, crop, weed]\n"
        "  palette: [[0, 0, 0], [0, 255, 0], [255, 0, 0]]\n"
    )
    options = settings(dataset)
    run("train.py", "-n", str(config), "-d", "cpu", *options)
    run("eval.py", "-n", str(config), "-d", "cpu", "-e", "best", *options)
    result = json.loads((tmp_path / "Weeds/exp/eval/best/eval.json").read_text())
    assert set(result["class_iou"]) == {"soil", "crop", "weed"}


@pytest.mark.parametrize("name", ["MFNet_mini", "PST900_mini", "TNO_target"])
def test_a_set_without_a_validation_list_names_the_way_out(shared_data, settings, name):
    config = {"M": "mfnet", "P": "pst900", "T": "mfnet"}[name[0]]
    options = settings(shared_data / name)
    result = run("train.py", "-n", config, "-d", "cpu", *options, expect=2)
    lines = result.stderr.strip().splitlines()
    assert lines[-1].startswith("error: ")
    assert "val.txt" in lines[-1]
    assert "tools/prepare_dataset.py --val-fraction" in lines[-1]
