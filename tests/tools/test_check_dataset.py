"""A set's flaws, one by one and together: each is found, named and counted, and nothing else is."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

from dataloader.registration import common_shift, measure_shift
from tools import check_dataset
from utils.errors import InputError
from utils.image import write_png

SIZE = (96, 128)
LISTS = {"train": "abcdef", "val": "gh", "test": "ij"}


def scene(key, shift=(0, 0)):
    """rgb (H, W, 3) and thermal (H, W) with edges in common; thermal lies shift right and down."""
    rng = np.random.default_rng(ord(key))
    height, width = SIZE[0] + 40, SIZE[1] + 40
    regions = cv2.GaussianBlur(rng.normal(size=(height, width)).astype(np.float32), (0, 0), 5) > 0
    levels = [np.where(regions, *rng.integers(30, 225, 2)) for _ in range(2)]
    noisy = [np.clip(level + rng.normal(0, 4, level.shape), 0, 255) for level in levels]
    right, down = shift
    rgb = noisy[0][20:-20, 20:-20].astype(np.uint8)
    thermal = noisy[1][20 - down : -20 - down, 20 - right : -20 - right].astype(np.uint8)
    return np.stack([rgb, rgb // 2, 255 - rgb], -1), thermal


def write_pair(folder, stem, key=None, shift=(0, 0)):
    rgb, thermal = scene(key or stem, shift)
    write_png(folder / "RGB" / f"{stem}.png", rgb)
    write_png(folder / "Modal" / f"{stem}.png", thermal)
    label = np.tile((np.arange(SIZE[1]) // 8 % 9).astype(np.uint8), (SIZE[0], 1))
    label[:4] = 255
    write_png(folder / "Label" / f"{stem}.png", label)


@pytest.fixture
def root(tmp_path):
    """Ten good pairs in MFNet's classes."""
    folder = tmp_path / "MFNet_small"
    for split, stems in LISTS.items():
        for stem in stems:
            write_pair(folder, stem)
        (folder / f"{split}.txt").write_text("\n".join(stems))
    return folder


def check(*arguments):
    """Run the check; returns whether it passed."""
    try:
        check_dataset.main([str(argument) for argument in arguments])
    except InputError as error:
        assert re.search(r"\d+ errors and \d+ warnings, see above$", str(error)), error
        return False
    return True


def findings(printed):
    """(errors, warnings) of what was printed."""
    lines = printed.splitlines()
    return tuple(
        [line.removeprefix(mark).strip() for line in lines if line.startswith(mark)]
        for mark in ("ERROR", "warning")
    )


def expect(root, capsys, *, errors=(), warnings=()):
    """The check finds exactly these (regular expressions, in any order)."""
    is_fine = check(root)
    found = findings(capsys.readouterr().out)
    assert is_fine == (not errors)
    for texts, patterns in zip(found, (errors, warnings), strict=True):
        assert len(texts) == len(patterns), texts
        for pattern in patterns:
            assert any(re.search(pattern, text) for text in texts), (pattern, texts)


def test_a_good_set(root, capsys):
    assert check(root)
    printed = capsys.readouterr().out
    assert findings(printed) == ([], [])
    assert "MFNet_small: checked as mfnet" in printed
    counts = re.search(r"1 car +(.*)", printed).group(1).split()
    car = (SIZE[0] - 4) * 16
    assert counts == [f"{6 * car:,}", "6", f"{2 * car:,}", "2", f"{2 * car:,}", "2"]
    assert re.search(r"train +6 +6 +96x128", printed)
    assert "fine: no errors, 0 warnings" in printed


def test_everything_is_reported_in_one_run(root, capsys):
    (root / "RGB" / "a.png").unlink()
    (root / "Modal" / "g.png").write_bytes((root / "Modal" / "g.png").read_bytes()[:-500])
    (root / "RGB" / "b.png").write_bytes(b"")
    write_png(root / "Modal" / "c.png", np.zeros((96, 127), np.uint8))
    write_png(root / "Label" / "d.png", np.full(SIZE, 12, np.uint8))
    write_png(root / "Label" / "e.png", np.full((*SIZE, 3), 64, np.uint8))
    expect(
        root,
        capsys,
        errors=[
            "train: .*1 files of 6 listed pairs are missing: RGB/a",
            r"Modal/g\.png cannot be decoded",
            r"RGB/b\.png is empty",
            r"Modal/c\.png is 96x127 but .* is 96x128",
            r"Label/d\.png holds 12 \(12288 pixels\)",
            r"Label/e\.png has 3 channels",
        ],
    )


def test_names_in_two_lists(root, capsys):
    (root / "val.txt").write_text("g\nh\na\nb")
    (root / "test.txt").write_text("i\nj\ng")
    (root / "test_day.txt").write_text("i\na")
    expect(
        root,
        capsys,
        errors=[
            r"leakage: 2 names are in train\.txt and in val\.txt: a, b",
            r"leakage: 1 names are in val\.txt and in test\.txt: g",
            r"test_day\.txt lists what test\.txt does not: a",
        ],
    )


@pytest.mark.parametrize("how", ["copy", "mirrored", "as BMP", "thermal only"])
def test_the_same_image_in_two_splits(root, capsys, how):
    for folder in ("RGB", "Modal"):
        image = cv2.imread(str(root / folder / "a.png"), cv2.IMREAD_UNCHANGED)
        if how == "mirrored":
            image = image[:, ::-1]
        if how == "as BMP":
            (root / folder / "i.png").unlink()
            cv2.imwrite(str(root / folder / "i.bmp"), image)
        elif how != "thermal only" or folder == "Modal":
            cv2.imwrite(str(root / folder / "i.png"), image)
    what = "thermal" if how == "thermal only" else "rgb and thermal"
    expect(root, capsys, errors=[f"leakage: the same {what}, perhaps mirrored: train/a, test/i"])


def test_the_same_image_twice_in_a_list(root, capsys):
    write_pair(root, "b", key="a")
    expect(root, capsys, warnings=["^the same rgb and thermal, .*: train/a, train/b"])


def test_images_and_labels_that_show_nothing(root, capsys):
    for stem in "ai":  # alike, but that is no leakage
        write_png(root / "Modal" / f"{stem}.png", np.full(SIZE, 17, np.uint8))
    write_png(root / "RGB" / "b.png", np.zeros((*SIZE, 3), np.uint8))
    write_png(root / "Label" / "c.png", np.full(SIZE, 255, np.uint8))
    expect(
        root,
        capsys,
        warnings=[
            r"thermal of a is constant \(all 17\)",
            "thermal of i is constant",
            r"rgb of b is constant \(all 0\)",
            "label of c is unknown",
        ],
    )


def test_classes_that_are_never_or_hardly_seen(root, capsys):
    for stems, gone in (("ij", 8), ("gh", 8), ("abcdefghij", 6), ("ghij", 7)):
        for stem in stems:
            path = root / "Label" / f"{stem}.png"
            label = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
            label[label == gone] = 0
            write_png(path, label)
    label[50, 50:53] = 7
    write_png(root / "Label" / "j.png", label)
    expect(
        root,
        capsys,
        warnings=[
            "never seen in any list: 6 guardrail",
            "never seen in val or test: 8 bump",
            "never seen in val: 7 color cone",
            "7 color cone has 3 pixels in test",
        ],
    )


@pytest.mark.parametrize("shift", [(12, 0), (0, -11), (-9, 7)], ids=str)
def test_a_set_out_of_registration(root, capsys, shift):
    for stem in "abcdefghij":
        write_pair(root, stem, shift=shift)
    sides = ("right" if shift[0] > 0 else "left", "down" if shift[1] > 0 else "up")
    assert check(root)  # a hint is no error
    printed = capsys.readouterr().out
    (warning,) = findings(printed)[1]
    found = re.search(r"about ([\d.]+) px (\w+) and ([\d.]+) px (\w+) of rgb", warning)
    for size, side, number, name in zip(shift, sides, found.groups()[::2], found.groups()[1::2],
                                        strict=True):  # fmt: skip
        assert abs(float(number) - abs(size)) < 0.6
        assert not size or side == name
    assert check(root, "--max-shift", 30)
    assert findings(capsys.readouterr().out)[1] == []


def test_one_pair_out_of_registration(root, capsys):
    write_pair(root, "e", shift=(0, 15))
    warning = r"thermal seems to lie beside rgb in 1 pairs: e \(.*1[45]\.\d px down\)"
    expect(root, capsys, warnings=[warning])


def test_shift_of_large_and_of_tiny_images():
    rgb, thermal = (cv2.resize(x, (1280, 960), interpolation=cv2.INTER_LINEAR)
                    for x in scene("x", (3, -2)))  # fmt: skip
    shift = measure_shift(rgb, thermal)
    assert abs(shift.right - 30) < 2
    assert abs(shift.down + 20) < 2
    assert measure_shift(rgb[:31, :31], thermal[:31, :31]) is None
    assert common_shift({"a": shift}) is None


def test_missing_lists(root, capsys):
    (root / "val.txt").unlink()
    expect(root, capsys, warnings=[f"no val.txt.*--val-fraction 0.1 custom {root}"])
    (root / "train.txt").write_text("../a\n")
    expect(root, capsys, errors=["no plain file name"], warnings=["no val.txt"])
    for name in ("train", "test"):
        (root / f"{name}.txt").unlink()
    with pytest.raises(InputError, match="none of the lists train.txt, val.txt and test.txt"):
        check_dataset.main([str(root)])


def test_quick_opens_no_image(root, capsys):
    (root / "RGB" / "a.png").write_bytes(b"")
    assert check(root, "--quick")
    (root / "RGB" / "a.png").unlink()
    assert not check(root, "--quick")
    assert findings(capsys.readouterr().out)[0] == [
        f"train: {root}: 1 files of 6 listed pairs are missing: RGB/a; add them or take their "
        "names off the list"
    ]


def test_a_set_without_labels(root, capsys):
    shutil.rmtree(root / "Label")
    (root / "val.txt").unlink()
    expect(root, capsys)
    folder = root.rename(root.with_name("Mine"))
    assert check(folder)
    assert "a set of its own without labels" in capsys.readouterr().out


def test_which_config_a_folder_gets(root, tmp_path, capsys):
    mine = tmp_path / "mine"
    shutil.copytree(root, mine)
    assert check(mine)
    assert "checked as a set of its own with the 9 classes" in capsys.readouterr().out
    assert not check(mine, "--config", "pst900")
    assert "classes 0 to 4" in capsys.readouterr().out
    (mine / "config.yaml").write_text(
        "data: {name: Mine, class_names: [a, b], palette: [[0, 0, 0], [1, 1, 1]]}"
    )
    assert not check(mine)
    assert "classes 0 to 1" in capsys.readouterr().out
    (mine / "Label").rename(mine / "Masks")
    assert check(mine, "--config", "mfnet", "--set", "data.label_folder=Masks")
    assert "mine: checked as mfnet" in capsys.readouterr().out
    with pytest.raises(InputError, match="did you mean 'mfnet'"):
        check_dataset.main(["mfnett"])
    with pytest.raises(InputError, match="--config goes with a folder"):
        check_dataset.main(["mfnet", "--config", "fmb"])


def test_command_line(root):
    """0 and a table for a good set; 2 and one line on stderr for another."""
    results = []
    for _ in range(2):
        command = [sys.executable, check_dataset.__file__, str(root), "--quick"]
        results.append(subprocess.run(command, capture_output=True, text=True, check=False))
        (root / "RGB" / "a.png").unlink(missing_ok=True)
    assert [result.returncode for result in results] == [0, 2]
    assert results[0].stderr == ""
    assert results[1].stderr == f"error: {root}: 1 errors and 0 warnings, see above\n"


@pytest.mark.parametrize("name", ["MFNet_mini", "PST900_mini", "TNO_target", "RoadScene"])
def test_real_sets_have_no_errors(shared_data, capsys, name):
    assert check(shared_data / name)
    errors, warnings = findings(capsys.readouterr().out)
    assert errors == []
    has_labels = Path(shared_data / name / "Label").is_dir()
    assert any("no val.txt" in text for text in warnings) == has_labels
    assert not any("unregistered" in text for text in warnings)
