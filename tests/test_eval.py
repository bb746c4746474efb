"""eval.py and eval_vision.py on drawn scenes: what they write, print and refuse."""

import importlib
import json
import logging
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from configs import dump_config, load_config
from engine.checkpoint import save_checkpoint
from engine.tables import UNDEFINED
from models import build_model
from utils.cli import run_main
from utils.image import read_label, read_rgb
from utils.run_folder import RunFolder

ROOT = Path(__file__).resolve().parents[1]
SCORES = (
    "miou", "miou_without_background", "pixel_accuracy", "mean_accuracy", "classes_in_mean",
    "frequency_weighted_iou", "class_iou", "class_accuracy", "images", "confusion",
)  # fmt: skip


@pytest.fixture(autouse=True)
def _logging_stays_as_it_was():
    """The scripts give the root logger a handler; later tests shall not see it."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> list[Path]:
    """Two demo networks of one random start; the second never answers background."""
    torch.manual_seed(3)
    config = load_config("demo", ["train.crop=[64,96]"])
    model, folder = build_model(config), tmp_path_factory.mktemp("checkpoints")
    *_, bias = (p for name, p in model.segmentation_head.named_parameters() if "bias" in name)
    assert bias.shape == (5,)
    paths = [folder / "first.pth", folder / "second.pth"]
    for path, background in zip(paths, (0.0, -1e3), strict=True):
        torch.nn.init.constant_(bias[:1], background)
        save_checkpoint(path, model=model, config=config, epoch=5, step=20)
    return paths


@pytest.fixture
def run(checkpoints, demo_config, tmp_path) -> RunFolder:
    """A run folder with epoch-5.pth, epoch-10.pth and best.pth, and its config as a file."""
    folder = RunFolder(demo_config)
    folder.checkpoints.mkdir(parents=True)
    shutil.copy(checkpoints[0], folder.epoch_checkpoint(5))
    shutil.copy(checkpoints[1], folder.epoch_checkpoint(10))
    shutil.copy(checkpoints[0], folder.best_checkpoint)
    (tmp_path / "demo.yaml").write_text(dump_config(demo_config))
    return folder


def call(script: str, run: RunFolder, monkeypatch, *arguments: str) -> None:
    config = run.path.parents[2] / "demo.yaml"
    monkeypatch.setattr(sys, "argv", [f"{script}.py", "-n", str(config), "-d", "cpu", *arguments])
    importlib.import_module(script).main()


def refused(script: str, run: RunFolder, monkeypatch, capsys, *arguments: str) -> str:
    """The one line of an ending with code 2."""
    with pytest.raises(SystemExit) as stop:
        run_main(lambda: call(script, run, monkeypatch, *arguments))
    assert stop.value.code == 2
    line = capsys.readouterr().err
    assert line.startswith("error: ")
    assert line.count("\n") == 1
    return line


def read_json(path: Path):
    return json.loads(path.read_text(encoding="utf-8"))


def stems(folder: Path) -> list[str]:
    return sorted(path.stem for path in folder.glob("*.png"))


def listed(demo_dataset: Path, split: str = "test") -> list[str]:
    return sorted((demo_dataset / f"{split}.txt").read_text().split())


def test_eval_writes_json_table_and_pictures(run, demo_dataset, demo_config, monkeypatch, capsys):
    call("eval", run, monkeypatch, "-e", "best", "--note", "drawn scenes")
    folder = run.eval_folder("best")
    assert {path.name for path in folder.iterdir()} == {
        "eval.json", "table.md", "report.html", "segmentation", "color", "overlay",
    }  # fmt: skip
    result = read_json(folder / "eval.json")
    assert set(SCORES) <= result.keys()
    assert tuple(result["class_iou"]) == demo_config.data.class_names
    assert result["images"] == 2
    assert result["checkpoint"] == run.best_checkpoint.as_posix()
    assert len(result["checkpoint_sha256"]) == 64
    assert result["text_prior"].startswith("orthogonal")
    for part in ("whole image", "scale 1,", "not mirrored", "trained on train,", "both", "on test"):
        assert part in result["protocol"]
    assert result["train_on_val"] is False
    table = (folder / "table.md").read_text(encoding="utf-8")
    assert "orthogonal" in table
    assert "drawn scenes" in table
    assert f"{100 * result['miou']:.2f}" in table
    assert table in capsys.readouterr().out
    for name in ("segmentation", "color", "overlay"):
        assert stems(folder / name) == listed(demo_dataset)


def test_eval_scores_the_pictures_that_it_writes(run, demo_dataset, demo_config, monkeypatch):
    """IoU from the written class indices and the labels on disk is that of eval.json."""
    call("eval", run, monkeypatch, "-e", "10")
    folder = run.eval_folder("epoch-10")
    names = listed(demo_dataset)
    found = np.stack([read_label(folder / "segmentation" / f"{name}.png") for name in names])
    label = np.stack([read_label(demo_dataset / "Label" / f"{name}.png") for name in names])
    assert found.shape[1:] == (64, 96)
    result = read_json(folder / "eval.json")
    for index, name in enumerate(demo_config.data.class_names):
        union = ((found == index) | (label == index)) & (label != 255)
        both = (found == index) & (label == index)
        expected = both.sum() / union.sum() if union.any() else None
        assert result["class_iou"][name] == (expected and pytest.approx(expected)), name
    defined = [iou for iou in result["class_iou"].values() if iou is not None]
    assert result["miou"] == pytest.approx(sum(defined) / len(defined))
    assert result["classes_in_mean"] == len(defined)


def test_pictures_have_the_palette_and_leave_class_0_bare(
    run, demo_dataset, demo_config, monkeypatch
):
    call("eval", run, monkeypatch, "-e", "best")
    folder, name = run.eval_folder("best"), listed(demo_dataset)[0]
    segmentation = read_label(folder / "segmentation" / f"{name}.png")
    color, cover = (read_rgb(folder / kind / f"{name}.png") for kind in ("color", "overlay"))
    rgb = read_rgb(demo_dataset / "RGB" / f"{name}.png")
    assert (color == np.array(demo_config.data.palette, np.uint8)[segmentation]).all()
    expected = np.where(segmentation[..., None] == 0, rgb, (rgb / 2 + color / 2).round())
    assert np.abs(cover - expected).max() <= 1


def test_several_checkpoints_give_a_summary(run, monkeypatch, capsys):
    call("eval", run, monkeypatch, "-e", "5-", "--tables-only")
    printed = capsys.readouterr().out
    summary = (run.path / "eval" / "summary.md").read_text(encoding="utf-8")
    assert summary in printed
    for name in ("epoch-5", "epoch-10"):
        folder = run.eval_folder(name)
        assert {path.name for path in folder.iterdir()} == {"eval.json", "table.md", "report.html"}
        row = next(line for line in summary.splitlines() if line.startswith(f"| {name} "))
        assert f"{100 * read_json(folder / 'eval.json')['miou']:.2f}" in row
    first, second = (read_json(run.eval_folder(f"epoch-{n}") / "eval.json") for n in (5, 10))
    assert first["class_iou"]["background"] != second["class_iou"]["background"]
    assert second["class_iou"]["background"] == 0, "the second network never answers it"


def test_another_split_does_not_replace_the_results_of_test(run, demo_dataset, monkeypatch):
    call("eval", run, monkeypatch, "-e", "best", "--split", "val")
    assert not run.eval_folder("best").exists()
    folder = run.eval_folder("best-val")
    assert stems(folder / "color") == listed(demo_dataset, "val")
    assert "on val" in read_json(folder / "eval.json")["protocol"]


def test_windows_scales_and_mirroring_are_in_the_protocol(run, monkeypatch):
    options = ["eval.crop=[32,64]", "eval.scales=[0.8,1]", "eval.flip=true"]
    call("eval", run, monkeypatch, "--tables-only", "--set", *options)
    result = read_json(run.eval_folder("best") / "eval.json")
    assert "window 32x64, stride 0.667, scales 0.8 1, with mirrored" in result["protocol"]
    call("eval", run, monkeypatch, "--tables-only")
    assert read_json(run.eval_folder("best") / "eval.json")["class_iou"] != result["class_iou"]


@pytest.mark.parametrize("from_lists", [True, False])
def test_day_and_night(run, demo_dataset, tmp_path, monkeypatch, from_lists):
    data = tmp_path / "data"
    shutil.copytree(demo_dataset, data)
    for part in ("day", "night"):
        (data / f"test_{part}.txt").unlink(missing_ok=True)
    names = [*listed(demo_dataset), *listed(demo_dataset, "val")]
    if from_lists:
        (data / "test_day.txt").write_text("\n".join(names[:3]))
        (data / "test_night.txt").write_text(names[3])
        counts = {"day": 3, "night": 1}
    else:
        counts = {part: sum(name.endswith(letter) for name in names)
                  for part, letter in (("day", "D"), ("night", "N"))}  # fmt: skip
    (data / "test.txt").write_text("\n".join(names))
    call("eval", run, monkeypatch, "--tables-only", "--set", f"data.dataset_path={data}")
    result = read_json(run.eval_folder("best") / "eval.json")
    for part, count in counts.items():
        if count:
            assert result[part]["images"] == count
            assert set(SCORES) <= result[part].keys()
        else:
            assert part not in result
    assert result["images"] == 4
    header = (run.eval_folder("best") / "table.md").read_text(encoding="utf-8")
    assert "| all" in header
    assert all(("| " + part in header) == bool(count) for part, count in counts.items())


def test_an_undefined_class_is_null_in_json_and_a_dash_in_the_table(
    run, demo_dataset, tmp_path, monkeypatch
):
    """Labels and answers without background: it is neither scored nor in the mean."""
    data = tmp_path / "data"
    shutil.copytree(demo_dataset, data)
    for path in (data / "Label").iterdir():
        label = read_label(path)
        label[label == 0] = 255
        cv2.imwrite(str(path), label)
    options = ["--tables-only", "--set", f"data.dataset_path={data}"]
    call("eval", run, monkeypatch, "-e", "10", *options)
    folder = run.eval_folder("epoch-10")
    result = read_json(folder / "eval.json")
    assert result["class_iou"]["background"] is None
    lines = (folder / "table.md").read_text(encoding="utf-8").splitlines()
    row = next(line for line in lines if line.startswith("| IoU background"))
    assert row.split("|")[2].strip() == UNDEFINED
    row = next(line for line in lines if line.startswith("| classes in the mIoU"))
    assert row.split("|")[2].strip() == str(result["classes_in_mean"])
    assert result["classes_in_mean"] <= 4


def test_vision_writes_fused_images_metrics_and_sheet(run, demo_dataset, monkeypatch, capsys):
    call("eval_vision", run, monkeypatch, "-e", "best")
    folder, names = run.vision_folder("best"), listed(demo_dataset)
    assert {path.name for path in folder.iterdir()} == {
        "fused", "vision.json", "table.md", "report.html", "sheet.png",
    }  # fmt: skip
    assert stems(folder / "fused") == names
    assert read_rgb(folder / "fused" / f"{names[0]}.png").shape == (64, 96, 3)
    result = read_json(folder / "vision.json")
    assert result["protocol"] == "cddfuse"
    assert result["text_prior"].startswith("orthogonal")
    assert sorted(result["images"]) == names
    assert {"EN", "SD", "MI", "VIF", "SSIM"} <= result["mean"].keys()
    for metric, mean in result["mean"].items():
        values = [row[metric] for row in result["images"].values()]
        assert mean == pytest.approx(sum(values) / len(values)), metric
    printed = capsys.readouterr().out
    assert f"{result['mean']['EN']:.4f}" in printed
    assert f"{result['images'][names[1]]['EN']:.4f}" in (folder / "table.md").read_text("utf-8")
    sheet = read_rgb(folder / "sheet.png")
    assert sheet.shape[1] > 4 * 200
    assert sheet.shape[0] > 2 * 200


def test_16_bits_are_of_the_same_image_and_the_same_metrics(run, demo_dataset, monkeypatch):
    folder, name = run.vision_folder("best"), listed(demo_dataset)[0]
    images, metrics = [], []
    for bits in ("8", "16"):
        call("eval_vision", run, monkeypatch, "--bits", bits)
        file = folder / "fused" / f"{name}.png"
        images.append(cv2.imread(str(file), cv2.IMREAD_UNCHANGED))
        metrics.append(read_json(folder / "vision.json")["mean"])
    assert [image.dtype for image in images] == [np.uint8, np.uint16]
    assert (np.rint(images[1] / 257) == images[0]).all()
    assert (read_rgb(folder / "fused" / f"{name}.png") == images[0][..., ::-1]).all()
    assert metrics[0] == metrics[1]


def test_vision_metrics_are_of_the_png(run, demo_dataset, monkeypatch):
    """Entropy from the written file is that of vision.json."""
    call("eval_vision", run, monkeypatch)
    folder, name = run.vision_folder("best"), listed(demo_dataset)[0]
    grey = cv2.cvtColor(cv2.imread(str(folder / "fused" / f"{name}.png")), cv2.COLOR_BGR2GRAY)
    share = np.bincount(grey.ravel(), minlength=256) / grey.size
    entropy = -(share[share > 0] * np.log2(share[share > 0])).sum()
    found = read_json(folder / "vision.json")["images"][name]
    assert found["EN"] == pytest.approx(entropy, abs=1e-6)
    assert found["SD"] == pytest.approx(grey.std(), abs=1e-6)


@pytest.fixture
def unlabelled(demo_dataset, tmp_path) -> Path:
    """Three pairs of different odd sizes, one a JPEG, without labels."""
    data = tmp_path / "data"
    for name, (height, width), suffix in [
        ("road", (45, 61), ".jpg"), ("hall", (33, 70), ".png"), ("yard", (64, 32), ".png"),
    ]:  # fmt: skip
        for folder in ("RGB", "Modal"):
            source = next((demo_dataset / folder).iterdir())
            image = cv2.resize(cv2.imread(str(source)), (width, height))
            (data / folder).mkdir(parents=True, exist_ok=True)
            cv2.imwrite(str(data / folder / f"{name}{suffix}"), image)
    (data / "test.txt").write_text("road\nhall\nyard\n")
    return data


def test_vision_takes_odd_sizes_and_no_labels(run, unlabelled, monkeypatch):
    call("eval_vision", run, monkeypatch, "--set", f"data.dataset_path={unlabelled}")
    folder = run.vision_folder("best")
    sizes = {
        name: read_rgb(folder / "fused" / f"{name}.png").shape[:2]
        for name in stems(folder / "fused")
    }
    assert sizes == {"road": (45, 61), "hall": (33, 70), "yard": (64, 32)}
    assert read_json(folder / "vision.json")["images"].keys() == sizes.keys()


def test_vision_summary(run, monkeypatch, capsys):
    call("eval_vision", run, monkeypatch, "-e", "5-10")
    summary = (run.path / "vision" / "summary.md").read_text(encoding="utf-8")
    assert summary in capsys.readouterr().out
    assert [line[:10] for line in summary.splitlines() if "epoch" in line] == [
        "| epoch-5 ", "| epoch-10",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("count", "expected"),
    [(3, "abc"), (4, "abcd"), (12, "abcdefghijkl"), (23, "acegikmoqsuw")],
)
def test_the_sheet_spreads_over_the_list(count, expected):
    names = list("abcdefghijklmnopqrstuvwxyz"[:count])
    picked = importlib.import_module("eval_vision").evenly_picked(names, 12)
    assert "".join(picked) == expected


def test_eval_needs_labels(run, unlabelled, monkeypatch, capsys):
    line = refused("eval", run, monkeypatch, capsys, "--set", f"data.dataset_path={unlabelled}")
    assert "Label" in line


@pytest.mark.parametrize("script", ["eval", "eval_vision"])
class TestRefused:
    def test_another_class_count(self, script, run, monkeypatch, capsys):
        options = ["data.name=Other", f"experiment_path={run.path}",
                   "data.class_names=[a,b]", "data.palette=[[0,0,0],[1,1,1]]"]  # fmt: skip
        line = refused(
            script, run, monkeypatch, capsys, "-e", str(run.best_checkpoint), "--set", *options
        )
        assert "Demo with 5 classes" in line
        assert "Other has 2" in line

    def test_truncated_checkpoint(self, script, run, monkeypatch, capsys):
        path = run.best_checkpoint
        path.write_bytes(path.read_bytes()[:-1000])
        assert str(path) in refused(script, run, monkeypatch, capsys, "-e", "best")

    def test_missing_checkpoint_lists_what_there_is(self, script, run, monkeypatch, capsys):
        line = refused(script, run, monkeypatch, capsys, "-e", "7")
        assert "epoch-5, epoch-10, best" in line

    def test_unreadable_image_keeps_what_was_written(
        self, script, run, demo_dataset, tmp_path, monkeypatch, capsys
    ):
        data = tmp_path / "data"
        shutil.copytree(demo_dataset, data)
        name = (data / "test.txt").read_text().split()[-1]
        (data / "RGB" / f"{name}.png").write_bytes(b"\x89PNG no image")
        options = [f"data.dataset_path={data}", "eval.batch_size=1"]
        line = refused(script, run, monkeypatch, capsys, "--set", *options)
        assert f"{name}.png" in line
        written = [p for p in run.path.rglob("*.png") if p.parent.name in ("color", "fused")]
        assert [path.stem for path in written] == (data / "test.txt").read_text().split()[:-1]


def test_the_report_shows_the_best_and_the_worst_image(run, demo_dataset, monkeypatch):
    """Each once, the worst first, with its own score; all pictures are inside the file."""
    call("eval", run, monkeypatch, "-e", "best")
    folder = run.eval_folder("best")
    by_image = read_json(folder / "eval.json")["by_image"]
    assert sorted(by_image) == listed(demo_dataset)
    worst, best = sorted(by_image, key=lambda name: by_image[name]["miou"])
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert page.index(f"<b>{worst}</b>") < page.index(f"<b>{best}</b>")
    for name in (worst, best):
        assert f"<b>{name}</b> mIoU {by_image[name]['miou']:.4f}" in page
        for title in ("rgb", "thermal", "fused", "prediction", "truth", "error"):
            assert page.count(f'alt="{title} of {name}"') == 1
    assert page.count("<img ") == page.count('src="data:image/') == 12


def test_a_browser_shows_the_reports(run, demo_config, look_at, monkeypatch):
    """Every part of each page is drawn and no other file is asked for; see the fixture look_at."""
    for script in ("eval", "eval_vision"):
        call(script, run, monkeypatch, "-e", "5-")
    page = look_at(run.eval_folder("epoch-5") / "report.html")
    result = read_json(run.eval_folder("epoch-5") / "eval.json")
    names = list(result["by_image"])
    titles = ("rgb", "thermal", "fused", "prediction", "truth", "error")
    assert page["images"] == {f"{t} of {n}": [96, 64] for n in names for t in titles}
    assert page["charts"] == ["confusion", "histogram", "histogram"]
    assert not page["requests"]
    assert not page["is_too_wide"]
    classes = [f"IoU {name}" for name in demo_config.data.class_names]
    for part in (
        "Segmentation: Demo, test", "Scores", "Confusion", "Worst images", "Best images",
        *classes, f"{100 * result['miou']:.2f}", result["checkpoint_sha256"],
        result["git_commit"] or "unknown", result["protocol"], result["text_prior"],
        *(f"{name} mIoU {row['miou']:.4f}" for name, row in result["by_image"].items()),
    ):  # fmt: skip
        assert part in page["text"], part

    page = look_at(run.vision_folder("epoch-5") / "report.html")
    result = read_json(run.vision_folder("epoch-5") / "vision.json")
    assert page["charts"] == ["histogram"] * len(result["mean"])
    assert len(page["images"]) == 12
    assert all(page["images"].values())
    assert not page["requests"]
    for part in ("Protocol cddfuse", "Lowest Qabf", f"{result['mean']['EN']:.4f}"):
        assert part in page["text"], part

    for folder, charts in ((run.path / "eval", 2), (run.path / "vision", len(result["mean"]))):
        page = look_at(folder / "summary.html")
        assert page["charts"] == ["curves"] * charts
        assert "by epoch" in page["title"]


def test_the_score_of_an_image_is_its_own(run, demo_dataset, monkeypatch):
    """From a split of that image alone comes the same number."""
    call("eval", run, monkeypatch, "-e", "10", "--tables-only")
    by_image = read_json(run.eval_folder("epoch-10") / "eval.json")["by_image"]
    for name in listed(demo_dataset):
        (demo_dataset / "one.txt").write_text(name)
        call("eval", run, monkeypatch, "-e", "10", "--tables-only", "--split", "one")
        alone = read_json(run.eval_folder("epoch-10-one") / "eval.json")
        for key, value in by_image[name].items():
            assert alone[key] == pytest.approx(value), (name, key)
    (demo_dataset / "one.txt").unlink()


@pytest.mark.parametrize("script", ["eval", "eval_vision"])
def test_several_epochs_give_their_curves(script, run, monkeypatch):
    call(script, run, monkeypatch, "-e", "5-")
    kind = {"eval": "eval", "eval_vision": "vision"}[script]
    page = (run.path / kind / "summary.html").read_text(encoding="utf-8")
    assert "<polyline" in page
    for epoch in (5, 10):
        result = read_json(run.path / kind / f"epoch-{epoch}" / f"{kind}.json")
        value = result["miou"] if script == "eval" else result["mean"]["EN"]
        assert f"<td>{epoch}</td>" in page
        assert f"<td>{value:.4f}</td>" in page


@pytest.mark.parametrize("script", ["eval", "eval_vision"])
class TestScoredOnce:
    """A second call reads what the first one wrote, unless anything differs."""

    @pytest.fixture
    def scored(self, script, run, monkeypatch):
        """Call the script; gives the names of the checkpoints that were really scored."""
        module, opened = importlib.import_module(script), []
        real = module.load_model
        monkeypatch.setattr(
            module,
            "load_model",
            lambda path, **more: opened.append(path.stem) or real(path, **more),
        )

        def call_and_tell(*arguments: str) -> list[str]:
            opened.clear()
            call(script, run, monkeypatch, *arguments)
            return list(opened)

        return call_and_tell

    def test_epochs_that_are_there_are_only_read(self, script, run, scored, capsys):
        assert scored("-e", "10") == ["epoch-10"]
        first = capsys.readouterr().out.partition("# ")[2]
        assert scored("-e", "10") == []
        assert capsys.readouterr().out.partition("# ")[2] == first
        assert scored("-e", "5-") == ["epoch-5"]
        assert "epoch-10" in capsys.readouterr().out.split("by checkpoint")[-1]
        assert scored("-e", "5-", "--again") == ["epoch-5", "epoch-10"]

    def test_anything_new_is_scored(self, script, run, scored, monkeypatch):
        kind = {"eval": "eval", "eval_vision": "vision"}[script]
        scored("-e", "10")
        assert scored("-e", "10", "--set", "eval.flip=true") == ["epoch-10"]
        assert scored("-e", "10") == ["epoch-10"], "the config is the first one again"
        shutil.copy(run.epoch_checkpoint(5), run.epoch_checkpoint(10))
        assert scored("-e", "10") == ["epoch-10"], "another file has that name"
        monkeypatch.setattr("engine.results.git_commit", lambda: "another")
        assert scored("-e", "10") == ["epoch-10"]
        file = run.path / kind / "epoch-10" / f"{kind}.json"
        file.write_text(file.read_text()[:-40])
        assert scored("-e", "10") == ["epoch-10"], "the file is cut short"
        assert scored("-e", "10") == []

    def test_changed_files_and_code_are_scored(
        self, script, run, scored, demo_dataset, monkeypatch
    ):
        assert scored("-e", "10") == ["epoch-10"]
        for folder in ("RGB", "Modal", "Label"):
            image = next((demo_dataset / folder).glob(f"{listed(demo_dataset)[0]}.*"))
            times = image.stat()
            os.utime(image, ns=(times.st_atime_ns, times.st_mtime_ns + 1_000_000_000))
            assert scored("-e", "10") == ["epoch-10"], folder
        monkeypatch.setattr("engine.results.code_sha256", lambda: "edited")
        assert scored("-e", "10") == ["epoch-10"]
        assert scored("-e", "10") == []
        kind, folder = {"eval": ("eval", "overlay"), "eval_vision": ("vision", "fused")}[script]
        next((run.path / kind / "epoch-10" / folder).iterdir()).unlink()
        assert scored("-e", "10") == ["epoch-10"], "a picture is gone"
        assert scored("-e", "10") == []

    def test_a_changed_list_is_scored(self, script, run, scored, demo_dataset):
        split, names = demo_dataset / "some.txt", listed(demo_dataset, "train")
        split.write_text("\n".join(names[:2]))
        assert scored("--split", "some") == ["best"]
        split.write_text("\n".join(names[1:3]))
        assert scored("--split", "some") == ["best"]
        kind, folder = {"eval": ("eval", "overlay"), "eval_vision": ("vision", "fused")}[script]
        assert stems(run.path / kind / "best-some" / folder) == names[1:3]
        assert scored("--split", "some") == []
        split.unlink()


def test_pictures_that_are_missing_are_a_reason_to_score(run, monkeypatch, demo_dataset):
    call("eval", run, monkeypatch, "--tables-only")
    assert not (run.eval_folder("best") / "color").exists()
    call("eval", run, monkeypatch)
    assert stems(run.eval_folder("best") / "color") == listed(demo_dataset)


RANK = """
import os, sys
import eval, eval_vision, predict
ports, arguments, pairs = (text.split("|") for text in sys.argv[1:])
scripts = (eval, arguments), (eval_vision, arguments), (predict, pairs)
for port, (script, given) in zip(ports, scripts, strict=True):
    os.environ["MASTER_PORT"] = port
    sys.argv = [script.__name__, *given]
    script.main()
"""


def test_two_ranks_give_the_same_as_one(run, demo_dataset, tmp_path, monkeypatch):
    """Of three images one rank has two, the other one; all scripts, the first epoch scored yet."""
    names = listed(demo_dataset, "train")[:3]
    (demo_dataset / "three.txt").write_text("\n".join(names))
    for script in ("eval", "eval_vision"):
        call(script, run, monkeypatch, "-e", "5-", "--split", "three")
    folders = run.eval_folder("epoch-10-three"), run.vision_folder("epoch-10-three")
    files = [
        folder / name for folder, name in zip(folders, ("eval.json", "vision.json"), strict=True)
    ]
    expected, expected_vision = map(read_json, files)
    for folder in folders:
        shutil.rmtree(folder)
    pairs = ["--checkpoint", str(run.epoch_checkpoint(10)), "--out", str(tmp_path / "predicted")]
    for kind, source in (("rgb", "RGB"), ("thermal", "Modal")):
        (tmp_path / kind).mkdir()
        pairs += [f"--{kind}", str(tmp_path / kind)]
        for name in names:
            shutil.copy(demo_dataset / source / f"{name}.png", tmp_path / kind)
    scored = ["-n", str(tmp_path / "demo.yaml"), "-e", "5-", "--split", "three"]
    with socket.socket() as first, socket.socket() as second, socket.socket() as third:
        ports = []
        for probe in (first, second, third):
            probe.bind(("localhost", 0))
            ports.append(str(probe.getsockname()[1]))
    texts = ["|".join(ports), *("|".join([*given, "-d", "cpu"]) for given in (scored, pairs))]
    command = [sys.executable, "-c", RANK, *texts]
    shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "OMP_NUM_THREADS": "1",
              "MASTER_ADDR": "localhost"}  # fmt: skip
    ranks = [
        subprocess.Popen(
            command, cwd=ROOT, env={**os.environ, **shared, "RANK": rank, "LOCAL_RANK": rank},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in "01"
    ]  # fmt: skip
    printed = []
    for rank in ranks:
        out, err = rank.communicate(timeout=120)
        assert rank.returncode == 0, err[-2000:]
        printed.append(out)
        assert ("epoch-5.pth has been scored already" in err + out) == (len(printed) == 1)
    (demo_dataset / "three.txt").unlink()
    assert "# Segmentation" in printed[0]
    assert "# Fusion" in printed[0]
    assert "3 pairs written" in printed[0]
    assert printed[1] == "", "the second rank prints"
    assert stems(tmp_path / "predicted" / "overlay") == names
    assert stems(folders[0] / "color") == stems(folders[1] / "fused") == names
    found, found_vision = map(read_json, files)
    for key in (*SCORES, "by_image"):
        assert found[key] == expected[key], key
    assert found_vision["images"].keys() == expected_vision["images"].keys()
    for name, row in expected_vision["images"].items():
        assert found_vision["images"][name] == pytest.approx(row, rel=1e-4), name
    assert (folders[0] / "report.html").is_file()
    assert (folders[1] / "sheet.png").is_file()
