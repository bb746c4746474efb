"""Archives in each data set's own layout, with every flaw that real ones have, to the standard."""

import errno
import io
import json
import os
import re
import shlex
import shutil
import stat
import subprocess
import sys
import unicodedata
import zipfile
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from configs import load_config
from dataloader.dataset import SegmentationPairs, read_split
from dataloader.prepare import writer
from dataloader.prepare.validation import choose
from dataloader.prepare.writer import part_folder
from tools import check_dataset, prepare_dataset
from utils.errors import InputError
from utils.image import read_rgb, thermal_to_uint8

SIZE = (36, 44)
MFNET = {"train": ("00001D", "00002N", "00003D"), "val": ("00004N",), "test": ("00005D", "00006N")}


def png(image):
    """Bytes of (H, W), (H, W, 3) RGB or (H, W, 4) of 8 or 16 bits as PNG."""
    if image.ndim == 3:
        image = cv2.cvtColor(
            image, cv2.COLOR_RGB2BGR if image.shape[2] == 3 else cv2.COLOR_RGBA2BGRA
        )
    return cv2.imencode(".png", image)[1].tobytes()


def palette_png(indices, palette):
    image = Image.fromarray(indices, "P")
    image.putpalette(np.asarray(palette, np.uint8).ravel().tolist())
    data = io.BytesIO()
    image.save(data, "PNG")
    return data.getvalue()


def picture(key, channels=3):
    """A picture of its own for every key."""
    rng = np.random.default_rng(list(str(key).encode()))
    shape = (*SIZE, channels) if channels else SIZE
    return rng.integers(0, 256, shape, np.uint8)


def classes(key, count=9):
    """A label with classes below count, a row of 255."""
    label = picture(f"label {key}", 0) % count
    label[-1] = 255
    return label


def zipped(path, files):
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


def unpacked(path, files):
    for name, data in files.items():
        file = path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


def mfnet_files(lists=MFNET, root="ir_seg_dataset/"):
    """As MFNet's authors give it: RGB + T, mirrored copies, lists that name both."""
    files = {f"{root}visualization/readme.txt": "", "__MACOSX/._x.png": b"", f"{root}.DS_Store": ""}
    for split, stems in lists.items():
        names = [*stems, *(f"{stem}_flip" for stem in stems)] if split == "train" else stems
        for name in names:
            image, label = (
                picture(name.removesuffix("_flip"), 4),
                classes(name.removesuffix("_flip")),
            )
            if name.endswith("_flip"):
                image, label = image[:, ::-1], label[:, ::-1]
            files[f"{root}images/{name}.png"] = png(image)
            files[f"{root}labels/{name}.png"] = png(label)
        files[f"{root}{split}.txt"] = "\n".join(names)
    return files


def split_files(names, stems=None, count=9, root="Set/"):
    """Folders below train/ and test/, as in FMB, PST900 and MSRS."""
    stems = stems or {"train": ("a", "b", "c", "d"), "test": ("e", "f")}
    files = {}
    for split, listed in stems.items():
        for stem in listed:
            key = f"{split} {stem}"
            images = (picture(key), picture(f"{key} thermal", 0), classes(key, count))
            for name, image in zip(names, images, strict=True):
                files[f"{root}{split}/{name}/{stem}.png"] = png(image)
    return files


FMB = ("Visible", "Infrared", "Label")
PST900 = ("rgb", "thermal", "labels")
MSRS = ("vi", "ir", "Segmentation_labels")


def prepare(*arguments):
    prepare_dataset.main([str(argument) for argument in arguments])


def raises(message):
    return pytest.raises(InputError, match=message)


def pairs_of(out, config, split="train"):
    data = load_config(config, [f"data.dataset_path={out}"]).data
    return SegmentationPairs(data, split)


def content(folder):
    return {
        path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }


@pytest.mark.parametrize("put", [zipped, unpacked])
def test_mfnet(tmp_path, capsys, put):
    source = put(tmp_path / ("mfnet.zip" if put is zipped else "mfnet"), mfnet_files())
    out = tmp_path / "datasets" / "MFNet"
    prepare("mfnet", source, "--out", out)
    for split, stems in MFNET.items():
        dataset = pairs_of(out, "mfnet", split)
        assert tuple(dataset.names) == stems
        for stem, sample in zip(stems, dataset, strict=True):
            stored = picture(stem, 4)
            rgb = (sample.rgb * 255).round().numpy().transpose(1, 2, 0)
            np.testing.assert_array_equal(rgb, stored[..., :3])
            np.testing.assert_array_equal((sample.thermal[0] * 255).round(), stored[..., 3])
            np.testing.assert_array_equal(sample.label, classes(stem))
    assert read_split(out, "test_day") == ["00005D"]
    assert read_split(out, "test_night") == ["00006N"]
    assert len(list(out.rglob("*.png"))) == 3 * 6 + 1
    made = json.loads((out / "dataset.json").read_text())
    assert made["pairs"] == {"train": 3, "val": 1, "test": 2}
    expected = sum(int((classes(stem) == 1).sum()) for stem in MFNET["train"])
    assert made["pixels"]["train"]["car"] == expected
    assert made["pixels"]["train"]["unknown"] == 3 * SIZE[1]
    sheet = read_rgb(out / "contact_sheet.png")
    assert sheet.shape[1] > 3 * 320
    assert sheet.shape[0] > 6 * 200
    printed = capsys.readouterr()
    assert "3 mirrored copies" in printed.out
    assert "train has 3 pairs, published are 784" in printed.err
    assert not list(out.parent.glob(".*"))

    before = content(out), out.stat().st_mtime_ns
    prepare("mfnet", source, "--out", out)
    assert "was there already" in capsys.readouterr().out
    assert (content(out), out.stat().st_mtime_ns) == before


def test_mfnet_lists_and_files_that_do_not_fit(tmp_path, capsys):
    files = mfnet_files()
    files["ir_seg_dataset/images/09999D.png"] = files["ir_seg_dataset/labels/09999D.png"] = b""
    prepare("mfnet", zipped(tmp_path / "a.zip", files), "--out", tmp_path / "A")
    assert "1 images are in no list: 09999D" in capsys.readouterr().out
    del files["ir_seg_dataset/labels/00002N.png"]
    with raises(r"b\.zip: 1 listed names have no files: 00002N \(train\.txt\)"):
        prepare("mfnet", zipped(tmp_path / "b.zip", files), "--out", tmp_path / "B")
    for split in MFNET:
        del files[f"ir_seg_dataset/{split}.txt"]
    with raises(r"the lists train\.txt, val\.txt and test\.txt of MFNet's authors.*found: none"):
        prepare("mfnet", zipped(tmp_path / "c.zip", files), "--out", tmp_path / "C")
    with raises("the set has its own val.txt; leave out --val-fraction"):
        prepare("mfnet", tmp_path / "a.zip", "--out", tmp_path / "D", "--val-fraction", 0.1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["A", "a.zip", "b.zip", "c.zip"]


BAD = {  # what is wrong in MFNet's archive: (file below the root, its content, the message)
    "three channels": ("images", png(picture("x")), "has no fourth channel"),
    "class 9": ("labels", png(np.full(SIZE, 9, np.uint8)), r"holds 9 \(1584 pixels\)"),
    "other size": ("labels", png(np.zeros((36, 45), np.uint8)), "is 36x45 but .* is 36x44"),
    "foreign colour": ("labels", png(picture("y")), "pixels in colours that are no class's"),
    "cut image": ("images", png(picture("z", 4))[:-600], "cannot be decoded"),
    "cut label": ("labels", png(picture("z", 0))[:-600], "cannot be decoded"),
    "empty": ("images", b"", "cannot be decoded"),
    "text": ("labels", b"<html>", "cannot be decoded"),
    "16-bit label": ("labels", png(np.full(SIZE, 300, np.uint16)), "holds 300"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_pair(tmp_path, capsys, case):
    folder, data, message = BAD[case]
    files = mfnet_files()
    files[f"ir_seg_dataset/{folder}/00002N.png"] = data
    source, out = zipped(tmp_path / "mfnet.zip", files), tmp_path / "MFNet"
    with raises(rf"{folder}/00002N\.png.*{message}.*was not made.*--skip-bad") as error:
        prepare("mfnet", source, "--out", out)
    assert str(source) in str(error.value)
    assert "\n" not in str(error.value)
    assert not out.exists()
    prepare("mfnet", source, "--out", out, "--skip-bad")
    assert "1 of 6 pairs left out" in capsys.readouterr().err
    assert pairs_of(out, "mfnet").names == ["00001D", "00003D"]
    assert json.loads((out / "dataset.json").read_text())["skipped"] == ["00002N"]
    prepare("mfnet", source, "--out", out, "--skip-bad")
    assert "was there already" in capsys.readouterr().out


def test_every_bad_pair_is_named(tmp_path, capsys):
    files = mfnet_files()
    for stem in ("00001D", "00006N"):
        files[f"ir_seg_dataset/labels/{stem}.png"] = png(np.full(SIZE, 77, np.uint8))
    with raises(r"00001D\.png holds 77.*and 1 more pairs"):
        prepare("mfnet", unpacked(tmp_path / "mfnet", files), "--out", tmp_path / "MFNet")
    assert re.search(r"bad pair 00006N: .*holds 77", capsys.readouterr().err)


def test_fmb_is_mixed(tmp_path, capsys):
    source = zipped(tmp_path / "FMB.zip", split_files(FMB, count=15))
    out = tmp_path / "FMB"
    prepare("fmb", source, "--out", out)
    assert {path.name for path in out.iterdir() if path.is_dir()} == set(FMB)
    assert pairs_of(out, "fmb").names == ["a", "b", "c", "d"]
    assert pairs_of(out, "fmb", "test").names == ["e", "f"]
    for folder in FMB:
        assert len(list((out / folder).iterdir())) == 6
    printed = capsys.readouterr()
    assert "train has 4 pairs, published are 1220; is the download whole?" in printed.err
    assert "test has 2 pairs, published are 280" in printed.err
    assert "--val-fraction 0.1 custom" in printed.out
    with raises("train has 4 pairs, published are 1220; test has 2 pairs"):
        prepare("fmb", source, "--out", tmp_path / "Other", "--strict")


def test_names_in_both_splits_are_kept_apart(tmp_path, capsys):
    stems = {"train": ("a", "b"), "test": ("b", "c")}
    source = zipped(tmp_path / "FMB.zip", split_files(FMB, stems))
    prepare("fmb", source, "--out", tmp_path / "FMB")
    assert "1 names are in train/ and in test/" in capsys.readouterr().out
    for split, stem, key in (("train", "train_b", "train b"), ("test", "test_b", "test b")):
        assert stem in read_split(tmp_path / "FMB", split)
        np.testing.assert_array_equal(
            read_rgb(tmp_path / "FMB" / "Visible" / f"{stem}.png"), picture(key)
        )


def test_pst900_raw_thermal(tmp_path):
    files = split_files(PST900, count=5)
    raw = {}
    for name in [name for name in files if "/thermal/" in name]:
        raw[Path(name).stem] = picture(name, 0).astype(np.uint16) * 20 + 21000
        files[name.replace("/thermal/", "/thermal_raw/")] = png(raw[Path(name).stem])
    source = zipped(tmp_path / "PST900_RGBT_Dataset.zip", files)
    prepare("pst900", source, "--out", tmp_path / "AGC")
    prepare("pst900", source, "--out", tmp_path / "Raw", "--thermal-raw")
    for stem, image in raw.items():
        stored = cv2.imread(str(tmp_path / "Raw" / "Modal" / f"{stem}.png"), cv2.IMREAD_UNCHANGED)
        assert stored.dtype == np.uint8
        np.testing.assert_array_equal(stored, thermal_to_uint8(image))
        agc = cv2.imread(str(tmp_path / "AGC" / "Modal" / f"{stem}.png"), cv2.IMREAD_UNCHANGED)
        split = "test" if stem in "ef" else "train"
        np.testing.assert_array_equal(agc, picture(f"{split} {stem} thermal", 0))
    assert len(pairs_of(tmp_path / "Raw", "pst900")) == 4
    with raises("--thermal-raw is for pst900, not msrs"):
        prepare("msrs", source, "--thermal-raw")


def test_msrs_with_suffixes_as_people_write_them(tmp_path):
    stems = {"train": ("1D", "2N"), "test": ("3D", "4N")}
    files = split_files(MSRS, stems, root="MSRS-main/")
    jpeg = cv2.imencode(".jpg", picture("x", 0))[1].tobytes()
    del files["MSRS-main/train/ir/1D.png"]
    files["MSRS-main/train/ir/1D.JPG"] = jpeg
    files["MSRS-main/train/vi/1D.PNG"] = files.pop("MSRS-main/train/vi/1D.png")
    files["MSRS-main/detection/vi/1D.png"] = b"no part of it"
    out = tmp_path / "MSRS"
    prepare("msrs", zipped(tmp_path / "MSRS-main.zip", files), "--out", out, "--val-fraction", 0.5)
    assert (out / "Modal" / "1D.jpg").read_bytes() == jpeg  # as it was, not compressed again
    assert (out / "RGB" / "1D.png").is_file()
    assert sorted(read_split(out, "train") + read_split(out, "val")) == ["1D", "2N"]
    assert read_split(out, "test_night") == ["4N"]


def test_missing_files_are_all_named(tmp_path):
    files = split_files(MSRS)
    del files["Set/train/ir/b.png"], files["Set/train/Segmentation_labels/c.png"]
    with raises("2 files are missing for 4 names: Set/train/ir/b, Set/train/Segm.*/c; "):
        prepare("msrs", zipped(tmp_path / "MSRS.zip", files), "--out", tmp_path / "MSRS")


def test_another_layout_says_what_there_is(tmp_path):
    source = zipped(tmp_path / "x.zip", split_files(MSRS))
    with raises(r"is not FMB's archive: it has no folders train/Visible.*; it holds Set"):
        prepare("fmb", source, "--out", tmp_path / "FMB")
    (tmp_path / "download").mkdir()
    shutil.copy(source, tmp_path / "download" / "MSRS.zip")
    with raises(r"is not MFNet's archive.*unpack MSRS\.zip or give it as SRC"):
        prepare("mfnet", tmp_path / "download", "--out", tmp_path / "MFNet")
    files = {f"{copy}/{name}": b"" for copy in "ab" for name in split_files(MSRS)}
    with raises("holds a/Set/train/vi and b/Set/train/vi, two data sets; give the folder of one"):
        prepare("msrs", zipped(tmp_path / "y.zip", files), "--out", tmp_path / "MSRS")


@pytest.mark.parametrize("name", ["../evil.png", "a/../../evil.png", "/evil.png", r"..\evil.png",
                                  "C:/evil.png"])  # fmt: skip
def test_path_traversal_is_refused(tmp_path, name):
    folder = tmp_path / "inside"
    folder.mkdir()
    source = zipped(folder / "mfnet.zip", mfnet_files() | {name: png(picture("evil"))})
    with raises(r"holds '.*evil\.png', a path that leaves its folder"):
        prepare("mfnet", source, "--out", folder / "MFNet")
    assert [path.name for path in tmp_path.rglob("*")] == ["inside", "mfnet.zip"]


def test_links_in_an_archive_are_refused(tmp_path):
    source = zipped(tmp_path / "mfnet.zip", mfnet_files())
    link = zipfile.ZipInfo("ir_seg_dataset/images/00009D.png")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(source, "a") as archive:
        archive.writestr(link, "/etc/passwd")
    with raises("holds 'ir_seg_dataset/images/00009D.png', a link"):
        prepare("mfnet", source, "--out", tmp_path / "MFNet")


def test_damaged_archives(tmp_path):
    data = zipped(tmp_path / "whole.zip", mfnet_files()).read_bytes()
    (tmp_path / "cut.zip").write_bytes(data[: len(data) // 2])
    with raises(r"cut\.zip is no whole zip archive"):
        prepare("mfnet", tmp_path / "cut.zip", "--out", tmp_path / "MFNet")
    first = picture("00001D", 4)
    place = data.index(png(first)) + 300
    (tmp_path / "bit.zip").write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
    with raises(r"bit\.zip/ir_seg_dataset/images/00001D\.png is damaged \(Bad CRC"):
        prepare("mfnet", tmp_path / "bit.zip", "--out", tmp_path / "MFNet")
    with raises(r"x\.rar does not exist"):
        prepare("mfnet", tmp_path / "x.rar")
    (tmp_path / "x.rar").write_bytes(b"Rar!")
    with raises(r"x\.rar: only \.zip is read as it is"):
        prepare("mfnet", tmp_path / "x.rar")


def custom_files(rgb="RGB", thermal="Modal", label="Label", stems=("a", "b", "c", "d")):
    files = {}
    for stem in stems:
        files[f"{rgb}/{stem}.png"] = png(picture(stem))
        files[f"{thermal}/{stem}.png"] = png(picture(f"{stem} thermal", 0))
        files[f"{label}/{stem}.png"] = png(classes(stem, 4))
    return files


def test_custom_names_with_blanks_and_unicode(tmp_path):
    stems = ("Nacht 1", "über – 夜", "ok")
    decomposed = [unicodedata.normalize("NFD", stem) for stem in stems]
    assert decomposed[1] != stems[1]
    files = custom_files("My RGB", "thermal", "masks", decomposed)
    out = tmp_path / "Prepared sets" / "Größe 1"
    prepare(
        "custom", zipped(tmp_path / "my.zip", files), "--rgb", "My RGB", "--out", out,
        "--test-fraction", 0.3, "--val-fraction", 0.5,
    )  # fmt: skip
    lists = {split: read_split(out, split) for split in ("train", "val", "test")}
    assert sorted(sum(lists.values(), [])) == sorted(stems)
    config = load_config(str(out / "config.yaml"))
    assert config.data.class_names == ("background", "class 1", "class 2", "class 3")
    assert config.data.path == str(out)
    for split, listed in lists.items():
        dataset = SegmentationPairs(config.data, split)
        assert dataset.names == listed
        np.testing.assert_array_equal(
            dataset[0].label, classes(unicodedata.normalize("NFD", listed[0]), 4)
        )
    check_dataset.main([str(out)])


def test_custom_takes_lists_over(tmp_path, capsys):
    files = custom_files() | {"train.txt": "b\na.png", "test.txt": "c"}
    prepare("custom", unpacked(tmp_path / "my", files), "--out", tmp_path / "Mine")
    assert read_split(tmp_path / "Mine", "train") == ["b", "a"]
    assert read_split(tmp_path / "Mine", "test") == ["c"]
    assert "1 pairs are in no list: d" in capsys.readouterr().out
    with raises("c is in train.txt and in test.txt"):
        files["train.txt"] += "\nc"
        prepare("custom", unpacked(tmp_path / "other", files), "--out", tmp_path / "Other")


def test_custom_without_labels(tmp_path, capsys):
    files = {name: data for name, data in custom_files("vi", "ir").items() if "Label" not in name}
    out = tmp_path / "Pairs"
    prepare("custom", unpacked(tmp_path / "my", files), "--out", out)
    assert read_split(out, "test") == ["a", "b", "c", "d"]
    assert not (out / "train.txt").exists()
    assert not (out / "Label").exists()
    assert "no labels: the set can be fused" in capsys.readouterr().out
    assert read_rgb(out / "contact_sheet.png").shape[1] == 2 * 320 + 4


def test_custom_folders_that_are_not_found(tmp_path):
    source = unpacked(tmp_path / "my", custom_files("cam0", "cam1"))
    with raises(
        "has no folders RGB.*name them with --rgb and --thermal; it holds Label, cam0, cam1"
    ):
        prepare("custom", source, "--out", tmp_path / "Mine")
    with raises("has no folder masks; --label"):
        prepare("custom", source, "--rgb", "cam0", "--thermal", "cam1", "--label", "masks")
    prepare("custom", source, "--rgb", "cam0", "--thermal", "cam1", "--out", tmp_path / "Mine")
    assert len(read_split(tmp_path / "Mine", "train")) == 4


@pytest.mark.parametrize("name", [" a", "a ", "a.png", "a\nb"], ids=repr)
def test_names_that_a_list_cannot_hold(tmp_path, name):
    source = zipped(tmp_path / "my.zip", custom_files(stems=(name, "b")))
    with raises("a list cannot hold the name .*rename its files"):
        prepare("custom", source, "--out", tmp_path / "Mine")


PALETTE = [(0, 0, 0), (64, 0, 128), (64, 64, 0), (0, 128, 192)]  # MFNet's first four


def test_masks_in_every_form(tmp_path):
    """Drawings in RGB and BGR, colour tables in two orders, three equal channels, one bit."""
    files = {}
    indices = {stem: picture(f"{stem} label", 0) % 4 for stem in "abcdef"}
    indices["c"][indices["c"] < 3] = 0
    indices["f"] %= 2
    colors = np.array(PALETTE, np.uint8)
    order = np.array([2, 0, 3, 1])
    voc = [(0, 0, 0), (128, 0, 0), (0, 128, 0), PALETTE[1]]  # its fourth is a class's colour, too
    masks = {
        "a": png(colors[indices["a"]]),
        "b": png(np.ascontiguousarray(colors[indices["b"]][..., ::-1])),
        "c": palette_png(indices["c"], voc),
        "d": palette_png(np.argsort(order)[indices["d"]].astype(np.uint8), colors[order]),
        "e": png(np.repeat(indices["e"][..., None], 3, 2)),
    }
    bits = io.BytesIO()
    Image.fromarray(indices["f"] > 0).save(bits, "PNG")
    masks["f"] = bits.getvalue()
    for stem, mask in masks.items():
        files[f"RGB/{stem}.png"] = png(picture(stem))
        files[f"Modal/{stem}.png"] = png(picture(stem, 0))
        files[f"Label/{stem}.png"] = mask
    out = tmp_path / "Mine"
    prepare("custom", zipped(tmp_path / "m.zip", files), "--out", out, "--config", "mfnet")
    for sample in pairs_of(out, "mfnet"):
        np.testing.assert_array_equal(sample.label, indices[sample.name], err_msg=sample.name)
    assert not (out / "config.yaml").exists()


def test_colours_become_classes(tmp_path):
    drawn = [(200, 10, 10), (0, 0, 0), (10, 10, 200)]
    files = custom_files()
    indices = {stem: picture(stem, 0) % 3 for stem in "abcd"}
    for stem, index in indices.items():
        files[f"Label/{stem}.png"] = png(np.array(drawn, np.uint8)[index])
    out = tmp_path / "Drawn"
    prepare("custom", zipped(tmp_path / "m.zip", files), "--out", out)
    data = load_config(str(out / "config.yaml")).data
    assert data.palette == ((0, 0, 0), (10, 10, 200), (200, 10, 10))
    for sample in SegmentationPairs(data, "train"):
        np.testing.assert_array_equal(sample.label, np.array([2, 0, 1])[indices[sample.name]])


def test_masks_of_0_and_255(tmp_path):
    files = custom_files()
    for stem in "abcd":
        files[f"Label/{stem}.png"] = png((picture(stem, 0) > 99).astype(np.uint8) * 255)
    source = zipped(tmp_path / "m.zip", files)
    with raises("all labels hold 0 and 255 alone.*--binary"):
        prepare("custom", source, "--out", tmp_path / "Mine")
    prepare("custom", source, "--out", tmp_path / "Mine", "--binary")
    data = load_config(str(tmp_path / "Mine" / "config.yaml")).data
    for sample in SegmentationPairs(data, "train"):
        np.testing.assert_array_equal(sample.label, picture(sample.name, 0) > 99)


def test_masks_that_cannot_be_labels(tmp_path):
    files = custom_files()
    del files["Label/a.png"]
    files["Label/a.jpg"] = cv2.imencode(".jpg", classes("a", 4))[1].tobytes()
    with raises(r"Label/a\.jpg is a JPEG, whose compression changes class values"):
        prepare("custom", zipped(tmp_path / "m.zip", files), "--out", tmp_path / "Mine")
    noisy = custom_files() | {"Label/a.png": png(picture("noise"))}
    with raises("more than 64 colours; they were resized or compressed"):
        prepare("custom", zipped(tmp_path / "n.zip", noisy), "--out", tmp_path / "Mine")
    flat = {n: png(np.zeros(SIZE, np.uint8)) if "Label" in n else d for n, d in files.items()}
    flat["Label/a.png"] = flat.pop("Label/a.jpg")
    with raises("all labels hold one class alone"):
        prepare("custom", zipped(tmp_path / "o.zip", flat), "--out", tmp_path / "Mine")
    both = custom_files() | {"RGB/a.JPG": b""}
    with raises(r"RGB/a\.JPG and a\.png have one name|RGB/a\.png and a\.JPG have one name"):
        prepare("custom", zipped(tmp_path / "p.zip", both), "--out", tmp_path / "Mine")


def test_links(tmp_path):
    files = custom_files()
    files["Modal/a.png"] = png(picture("deep", 0).astype(np.uint16) * 9)
    source, out = unpacked(tmp_path / "my", files), tmp_path / "Mine"
    prepare("custom", source, "--out", out, "--link")
    assert (out / "RGB" / "a.png").is_symlink()
    assert (out / "RGB" / "a.png").resolve() == (source / "RGB" / "a.png").resolve()
    assert not (out / "Modal" / "a.png").is_symlink()  # 16 bits had to be converted
    assert (out / "Modal" / "b.png").is_symlink()
    assert len(pairs_of(out, "mfnet")) == 4
    with raises("--link needs an unpacked folder"):
        prepare("custom", zipped(tmp_path / "m.zip", files), "--link", "--out", out)


def test_a_stopped_run_goes_on(tmp_path, monkeypatch):
    source, out = zipped(tmp_path / "mfnet.zip", mfnet_files()), tmp_path / "MFNet"
    write_pair, written = writer._write_pair, []

    def stop_at_the_fourth(source, pair, *rest):
        if len(written) == 3:
            raise KeyboardInterrupt
        written.append(pair.stem)
        write_pair(source, pair, *rest)

    monkeypatch.setattr(writer, "_write_pair", stop_at_the_fourth)
    with pytest.raises(KeyboardInterrupt):
        prepare("mfnet", source, "--out", out)
    assert not out.exists()
    part = tmp_path / ".MFNet.part"
    assert len(list((part / "Label").iterdir())) == 3
    (part / "Label" / ".00009D.png.77").write_bytes(b"half a file of a run that was killed")
    monkeypatch.setattr(
        writer, "_write_pair", lambda source, pair, *rest: (
            written.append(pair.stem), write_pair(source, pair, *rest)
        ),
    )  # fmt: skip
    prepare("mfnet", source, "--out", out)
    assert sorted(written) == sorted(sum(MFNET.values(), ()))
    assert not part.exists()
    whole = tmp_path / "Whole"
    prepare("mfnet", source, "--out", whole)
    assert content(out) == content(whole)


def test_a_full_disk_is_no_bad_pair(tmp_path, monkeypatch):
    source, out = zipped(tmp_path / "m.zip", custom_files()), tmp_path / "Mine"
    copy, copied = shutil.copyfile, []

    def copy_until_full(path, aside):
        if len(copied) == 7:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        copied.append(copy(path, aside))

    monkeypatch.setattr(shutil, "copyfile", copy_until_full)
    with raises(r"cannot write .*\.Mine\.part.Modal.c\.png: No space left on device"):
        prepare("custom", source, "--out", out, "--skip-bad")
    assert not out.exists()
    monkeypatch.setattr(shutil, "copyfile", copy)
    prepare("custom", source, "--out", out, "--skip-bad")
    assert read_split(out, "train") == list("abcd")
    (tmp_path / "file").write_text("")
    with raises("cannot write into .*file.*: Not a directory"):
        prepare("custom", source, "--out", tmp_path / "file" / "Mine")


def test_a_part_of_another_source_is_not_mixed_in(tmp_path):
    out, part = tmp_path / "MFNet", tmp_path / ".MFNet.part"
    files = mfnet_files()
    bad = files | {"ir_seg_dataset/images/00006N.png": b""}
    with raises("cannot be decoded"):
        prepare("mfnet", zipped(tmp_path / "a.zip", bad), "--out", out)
    (part / "RGB" / "00001D.png").write_bytes(png(picture("another source")))
    prepare("mfnet", zipped(tmp_path / "b.zip", files), "--out", out)
    np.testing.assert_array_equal(
        read_rgb(out / "RGB" / "00001D.png"), picture("00001D", 4)[..., :3]
    )


@pytest.mark.skipif(os.name == "nt", reason="no file locks there")
def test_two_runs_at_once(tmp_path):
    source, out = zipped(tmp_path / "mfnet.zip", mfnet_files()), tmp_path / "MFNet"
    with part_folder(out, {"version": 1}), raises("another process prepares .*MFNet"):
        prepare("mfnet", source, "--out", out)


def test_what_lies_at_out_is_kept(tmp_path):
    source, out = zipped(tmp_path / "mfnet.zip", mfnet_files()), tmp_path / "MFNet"
    unpacked(out, {"RGB/mine.png": b"precious"})
    with raises("exists and was not prepared by this tool; remove it"):
        prepare("mfnet", source, "--out", out)
    assert content(out) == {Path("RGB/mine.png"): b"precious"}
    (tmp_path / "Empty").mkdir()
    prepare("mfnet", source, "--out", tmp_path / "Empty")
    before = content(tmp_path / "Empty")
    smaller = mfnet_files(MFNET | {"test": ("00005D",)})
    with raises("was prepared from another source or with other options"):
        prepare("mfnet", zipped(tmp_path / "b.zip", smaller), "--out", tmp_path / "Empty")
    assert content(tmp_path / "Empty") == before
    (tmp_path / "Empty" / "Modal" / "00001D.png").unlink()
    with raises("lacks 1 of its files: Modal/00001D; remove it"):
        prepare("mfnet", source, "--out", tmp_path / "Empty")


def standard_set(tmp_path, names="abcdefghij"):
    files = custom_files(stems=names) | {"train.txt": "\n".join(names), "test.txt": "x"}
    return unpacked(tmp_path / "Set", files)


def test_the_error_of_a_set_without_val_gives_a_command_that_mends_it(tmp_path, capsys):
    folder = standard_set(tmp_path)
    with pytest.raises(InputError) as error:
        read_split(folder, "val")
    command = str(error.value).split("tools/prepare_dataset.py ")[1]
    prepare(*shlex.split(command))
    train, val = read_split(folder, "train"), read_split(folder, "val")
    assert len(val) == 1
    assert sorted(train + val) == list("abcdefghij")
    assert read_split(folder, "train_and_val") == list("abcdefghij")
    assert "divided: train 9, val 1" in capsys.readouterr().out
    before = content(folder)
    prepare(*shlex.split(command))
    assert content(folder) == before
    assert "was divided already" in capsys.readouterr().out
    with raises("val.txt exists already and is another choice"):
        prepare("--val-fraction", 0.5, "custom", folder)
    assert content(folder) == before


def test_dividing_is_completed_after_a_stop(tmp_path):
    folder = standard_set(tmp_path)
    prepare("--val-fraction", 0.3, "custom", folder, "--seed", 5)
    done = content(folder)
    (folder / "val.txt").unlink()  # as if it had been killed just before
    prepare("--val-fraction", 0.3, "custom", folder, "--seed", 5)
    assert content(folder) == done


def test_choice_of_validation_pairs():
    stems = [f"{index:03}" for index in range(200)]
    chosen = choose(stems, 0.1, seed=0)
    assert len(chosen) == 20
    assert chosen == sorted(chosen)
    assert set(choose(stems[::-1], 0.1, seed=0)) == set(chosen)
    assert set(choose(stems, 0.1, seed=1)) != set(chosen)
    assert len(set(choose([*stems, "new"], 0.1, seed=0)) - set(chosen)) <= 1
    assert len(choose(["a", "b"], 0.01, seed=0)) == len(choose(["a", "b"], 0.99, seed=0)) == 1
    for fraction in (0, 1, -1, float("nan")):
        with raises("between 0 and 1"):
            choose(stems, fraction, seed=0)
    with raises("1 pair cannot be divided"):
        choose(["a"], 0.5, seed=0)


@pytest.mark.parametrize(
    "option", [("--test-fraction", 0.3), ("--link",), ("--binary",), ("--skip-bad",)], ids=str
)
def test_what_cannot_be_done_in_place_is_refused(tmp_path, option):
    folder = standard_set(tmp_path)
    before = content(folder)
    with raises(f"{option[0]} is of no use to .*Set, which is in its place"):
        prepare("--val-fraction", 0.3, *option, "custom", folder)
    assert content(folder) == before


def test_one_folder_cannot_have_two_roles(tmp_path):
    source = unpacked(tmp_path / "my", custom_files("vi", "ir"))
    with raises("--rgb, --thermal and --label must be different folders, got vi, vi"):
        prepare("custom", source, "--rgb", "vi", "--thermal", "vi/", "--out", tmp_path / "A")
    with raises("must be different folders, got ir, ir"):
        prepare("custom", source, "--thermal", "ir", "--label", "ir", "--out", tmp_path / "A")


def test_another_palette_is_another_set(tmp_path, capsys):
    """Its labels have other indices, though files and options are the same."""
    drawn = [(0, 0, 0), (10, 10, 200), (200, 10, 10)]
    files = custom_files()
    for stem in "abcd":
        files[f"Label/{stem}.png"] = png(np.array(drawn, np.uint8)[picture(stem, 0) % 3])
    source, config, out = unpacked(tmp_path / "my", files), tmp_path / "my.yaml", tmp_path / "Out"

    def configure(*colors):
        config.write_text(
            f"data:\n  name: My\n  class_names: [a, b, c]\n  palette: {[*map(list, colors)]}\n"
        )

    configure(*drawn)
    prepare("custom", source, "--config", config, "--out", out)
    prepare("custom", source, "--config", config, "--out", out)
    assert "was there already" in capsys.readouterr().out
    configure(drawn[0], drawn[2], drawn[1])
    with raises("was prepared from another source or with other options"):
        prepare("custom", source, "--config", config, "--out", out)


def test_the_command_for_a_validation_list_is_of_the_set_that_was_made(tmp_path, capsys):
    files = custom_files("vi", "ir", stems="abcdefghij")
    source, config = unpacked(tmp_path / "my", files), tmp_path / "my.yaml"
    config.write_text(
        "data: {name: My, class_names: [a, b, c, d], rgb_folder: Vis, thermal_folder: IR, "
        "label_folder: Lab, palette: [[0, 0, 0], [9, 0, 0], [0, 9, 0], [0, 0, 9]]}\n"
    )
    out = tmp_path / "a b"
    prepare("custom", source, "--config", config, "--out", out)
    command = capsys.readouterr().out.split("tools/prepare_dataset.py ")[1]
    prepare(*shlex.split(command))
    assert "divided: train 9, val 1" in capsys.readouterr().out
    assert len(read_split(out, "val")) == 1


@pytest.mark.parametrize("kind", ["mfnet", "custom"])
def test_a_set_in_its_place_without_a_fraction(tmp_path, kind):
    folder = standard_set(tmp_path)
    before = content(folder)
    with raises("in the standard layout already; --val-fraction divides its train.txt"):
        prepare(kind, folder)
    assert content(folder) == before


def test_command_line(tmp_path):
    """Exit code 2 and one line for bad input, 0 and the set for good input."""
    source = zipped(tmp_path / "mfnet.zip", mfnet_files())
    script = Path(prepare_dataset.__file__)
    for arguments, code in ((["mfnet", "nowhere.zip"], 2), (["mfnet", str(source)], 0)):
        result = subprocess.run(
            [sys.executable, str(script), *arguments],
            cwd=tmp_path, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert result.returncode == code, result.stderr
        if code:
            assert result.stderr.startswith("error: nowhere.zip does not exist")
            assert result.stderr.count("\n") == 1
    assert (tmp_path / "datasets" / "MFNet" / "train.txt").is_file()
    with raises("invalid choice: 'cityscapes'"):
        prepare("cityscapes", source)
