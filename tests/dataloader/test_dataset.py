"""Split lists and samples: every trap of a data folder has its stated behaviour."""

import os

import cv2
import numpy as np
import pytest
import torch

from configs import load_config
from dataloader.dataset import Sample, SampleKey, SegmentationPairs, read_split, seeded_generator
from dataloader.transforms import RandomScaleCropMirror
from utils.errors import InputError
from utils.image import write_png

STEMS = ("a", "b", "c", "d")
SIZE = (36, 40)


def label_of(index):
    """Classes 0 to 8, a stripe of 255, and a corner that tells the images apart."""
    label = np.tile(np.arange(SIZE[1]) % 9, (SIZE[0], 1)).astype(np.uint8)
    label[-3:] = 255
    label[0, 0] = index
    return label


@pytest.fixture
def root(tmp_path):
    """A set of four pairs in MFNet's classes: 2 train, 1 val, 1 test."""
    folder = tmp_path / "Set"
    for index, stem in enumerate(STEMS):
        rng = np.random.default_rng(index)
        write_png(folder / "RGB" / f"{stem}.png", rng.integers(0, 256, (*SIZE, 3), np.uint8))
        write_png(folder / "Modal" / f"{stem}.png", rng.integers(0, 256, SIZE, np.uint8))
        write_png(folder / "Label" / f"{stem}.png", label_of(index))
    for split, names in (("train", "a\nb\n"), ("val", "c\n"), ("test", "d\n")):
        (folder / f"{split}.txt").write_text(names)
    return folder


def data_config(root, *overrides):
    return load_config("mfnet", [f"data.dataset_path={root}", *overrides]).data


def pairs(root, *overrides, split="train", **options):
    return SegmentationPairs(data_config(root, *overrides), split, **options)


def raises(message):
    return pytest.raises(InputError, match=message)


def test_sample(root):
    dataset = pairs(root)
    assert len(dataset) == 2
    assert dataset.has_labels
    for index, sample in enumerate(dataset):
        assert isinstance(sample, Sample)
        assert sample.name == dataset.names[index] == STEMS[index]
        rgb = cv2.imread(str(root / "RGB" / f"{sample.name}.png"))[..., ::-1] / 255
        thermal = cv2.imread(str(root / "Modal" / f"{sample.name}.png"), 0) / 255
        assert sample.rgb.dtype == sample.thermal.dtype == torch.float32
        np.testing.assert_allclose(sample.rgb.numpy(), rgb.transpose(2, 0, 1), atol=1e-7)
        np.testing.assert_allclose(sample.thermal.numpy(), np.stack([thermal] * 3), atol=1e-7)
        assert sample.label.dtype == torch.int64
        np.testing.assert_array_equal(sample.label.numpy(), label_of(index))
        assert sample.valid.dtype == torch.bool
        assert sample.valid.shape == SIZE
        assert sample.valid.all()
        assert all(part.is_contiguous() for part in sample[:4])


def test_background_is_ignored_on_request(root):
    label = pairs(root, "data.ignore_background=true")[0].label
    expected = np.where(label_of(0) == 0, 255, label_of(0))
    np.testing.assert_array_equal(label.numpy(), expected)


@pytest.mark.parametrize("used", ["rgb", "thermal"])
def test_withheld_modality_is_mid_grey(root, used):
    both, sample = pairs(root)[0], pairs(root, f"data.modalities={used}")[0]
    withheld = "thermal" if used == "rgb" else "rgb"
    assert torch.equal(getattr(sample, used), getattr(both, used))
    assert getattr(sample, withheld).shape == (3, *SIZE)
    assert (getattr(sample, withheld) == 0.5).all()


def test_transform_follows_seed_epoch_and_index(root):
    transform = RandomScaleCropMirror((32, 32), (1.3, 1.5), use_mirror=True)
    first = pairs(root, transform=transform, seed=1)
    other_seed = pairs(root, transform=transform, seed=2)
    shown = {}
    for epoch in range(4):
        again = pairs(root, transform=transform, seed=1)[SampleKey(epoch, 0)]
        sample = first[SampleKey(epoch, 0)]
        assert torch.equal(sample.rgb, again.rgb)
        assert sample.rgb.shape == (3, 32, 32)
        shown[epoch] = sample.rgb
        shown[10 + epoch] = other_seed[SampleKey(epoch, 0)].rgb
    assert len({image.numpy().tobytes() for image in shown.values()}) == 8
    assert torch.equal(first[0].rgb, shown[0])


def test_seeded_generators_differ_in_every_number():
    keys = [(s, e, i) for s in (1, 2) for e in (0, 1, 2) for i in (0, 1, 2)]
    draws = {torch.rand(1, generator=seeded_generator(*key)).item() for key in keys}
    assert len(draws) == len(keys)


@pytest.mark.parametrize("cache", ["ram", "none"])
def test_cache(root, cache):
    dataset = pairs(root, f"data.cache={cache}", "data.ignore_background=true")
    first = dataset[0]
    first.rgb.fill_(0)  # what a caller does to a sample does not reach the cache
    (root / "RGB" / "a.png").unlink()
    if cache == "ram":
        again = dataset[0]
        assert again.rgb.mean() > 0.4
        assert torch.equal(again.label, first.label)
    else:
        with raises(r"a\.png cannot be read"):
            dataset[0]


def test_train_on_val(root):
    assert pairs(root, "data.train_on_val=true").names == ["a", "b", "c"]
    assert pairs(root, "data.train_on_val=true", split="val").names == ["c"]
    (root / "val.txt").write_text("b\n")
    with raises("train.txt and val.txt together: listed more than once: b"):
        pairs(root, "data.train_on_val=true")


@pytest.mark.parametrize(
    "text", ["a\nb", "\n a \n\nb\n\n", "a.png\nb.JPG\n", "a\r\nb\r\n", "\ufeffa\nb\n"], ids=repr
)
def test_lists_as_people_write_them(root, text):
    (root / "train.txt").write_bytes(text.encode())
    assert read_split(root, "train") == ["a", "b"]


def test_a_dot_in_a_stem_is_no_suffix(root):
    (root / "test_day.txt").write_text("seq.0001\nseq.0002.png\n")
    assert read_split(root, "test_day") == ["seq.0001", "seq.0002"]


@pytest.mark.parametrize("line", ["../Other/a", "RGB/a.png", "/etc/a", "..", r"..\a"])
def test_listed_names_cannot_leave_the_folder(root, line):
    (root / "train.txt").write_text(f"b\n{line}\n")
    with raises("no plain file name; list names without their folder"):
        pairs(root)


@pytest.mark.parametrize("text", ["", "\n  \n"])
def test_empty_list(root, text):
    (root / "test.txt").write_text(text)
    with raises(r"test\.txt is empty"):
        pairs(root, split="test")


def test_name_twice(root):
    (root / "train.txt").write_text("a\nb\na.png\n")
    with raises(r"train\.txt: listed more than once: a; "):
        pairs(root)


def test_list_that_is_no_text(root):
    (root / "train.txt").write_bytes(b"\xff\xfe\x00a")
    with raises(r"train\.txt cannot be read as a text"):
        pairs(root)


def test_missing_list_names_the_way_out(root):
    (root / "val.txt").unlink()
    with raises(r"val\.txt does not exist; .*tools/prepare_dataset\.py --val-fraction"):
        pairs(root, split="val")
    (root / "train.txt").unlink()
    with raises(r"val\.txt does not exist; nor does train\.txt, .* not trained"):
        pairs(root, split="val")
    with raises(r"train\.txt does not exist; it lists"):
        pairs(root)


def test_missing_folders_name_the_config_field(root):
    with raises("dataset folder .*nowhere does not exist; .*--set data.dataset_path"):
        pairs(root.parent / "nowhere")
    for folder, field in (("RGB", "rgb"), ("Modal", "thermal"), ("Label", "label")):
        (root / folder).rename(root / "Other")
        with raises(f"folder .*{folder} does not exist; .*data.{field}_folder"):
            pairs(root)
        assert len(pairs(root, f"data.{field}_folder=Other")) == 2
        (root / "Other").rename(root / folder)


def test_all_missing_files_are_reported_at_once(root):
    (root / "Modal" / "b.png").unlink()
    (root / "Label" / "a.png").unlink()
    with raises("2 files of 2 listed pairs are missing: Modal/b, Label/a; add them"):
        pairs(root)
    (root / "train.txt").write_text("".join(f"x{index:02}\n" for index in range(13)))
    with raises("39 files of 13 .* RGB/x00, .*, RGB/x09 and 29 more; ") as error:
        pairs(root)
    assert str(error.value).count("RGB/x") == 10


@pytest.mark.parametrize("suffix", [".jpg", ".JPEG", ".bmp", ".TIF", ".tiff", ".PNG"])
def test_files_are_found_by_stem(root, suffix):
    (root / "Modal" / "a.png").unlink()
    grey = np.full(SIZE, 90, np.uint8)
    data = cv2.imencode(suffix.lower(), grey)[1].tobytes()
    (root / "Modal" / f"a{suffix}").write_bytes(data)
    (root / "Modal" / "a.txt").write_text("no image")
    assert torch.allclose(pairs(root)[0].thermal, torch.tensor(90 / 255), atol=0.01)


def test_two_files_of_one_stem(root):
    write_png(root / "RGB" / "b.tiff.png", np.zeros(SIZE, np.uint8))  # its stem is b.tiff
    assert len(pairs(root)) == 2
    (root / "RGB" / "b.JPG").write_bytes(b"")
    with raises(r"RGB holds b\.JPG and b\.png: two files of one name"):
        pairs(root)


@pytest.mark.parametrize("folder", ["Modal", "Label"])
def test_sizes_that_differ(root, folder):
    write_png(root / folder / "a.png", np.zeros((36, 41), np.uint8))
    with raises(rf"{folder}.a\.png is 36x41 but .*RGB.a\.png is 36x40"):
        pairs(root)[0]


def test_label_outside_the_classes(root):
    label = label_of(0)
    label[5, :7], label[6, :2] = 9, 254
    write_png(root / "Label" / "a.png", label)
    with raises(r"a\.png holds 9 \(7 pixels\), 254 \(2 pixels\); .* classes 0 to 8, and 255"):
        pairs(root)[0]
    assert pairs(root)[1].name == "b"


def test_color_label_is_compared_with_the_configs_palette(root):
    palette = np.array(data_config(root).palette, np.uint8)
    write_png(root / "Label" / "a.png", palette[label_of(0) % 9])
    with raises(r"a\.png has 3 channels.*those of data.palette.*decolorize"):
        pairs(root)[0]


def test_unreadable_images_are_named_on_access(root):
    (root / "RGB" / "b.png").write_bytes(b"")
    dataset = pairs(root)
    assert dataset[0].name == "a"
    with raises(r"RGB.b\.png is empty"):
        dataset[1]


def test_set_without_labels(root):
    os.rename(root / "Label", root.parent / "Label")
    with raises("Label does not exist"):
        pairs(root, split="test")
    dataset = pairs(root, split="test", need_labels=False)
    assert not dataset.has_labels
    assert (dataset[0].label == 255).all()
    assert dataset[0].label.shape == SIZE
    assert dataset[0].valid.all()


def test_one_missing_label_is_an_error_even_where_labels_are_optional(root):
    (root / "Label" / "d.png").unlink()
    with raises("missing: Label/d;"):
        pairs(root, split="test", need_labels=False)


def test_16_bit_set_is_announced_when_it_is_opened(root, caplog):
    from utils import image

    image._warn_once.cache_clear()
    deep = np.linspace(20000, 30000, SIZE[0] * SIZE[1]).astype(np.uint16).reshape(SIZE)
    (root / "Modal" / "a.png").write_bytes(cv2.imencode(".png", deep)[1].tobytes())
    dataset = pairs(root)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert dataset[0].thermal.min() == 0
    assert dataset[0].thermal.max() == 1
    assert len(caplog.records) == 1


REAL_SETS = {  # name: (config, overrides, split, pairs, size of the first)
    "MSRS": ("msrs", [], "train", 181, (480, 640)),
    "MFNet_mini": ("mfnet", [], "test", 2, (120, 160)),
    "PST900_mini": ("pst900", [], "train", 4, (720, 1280)),
    "RoadScene": ("mfnet", [], "test", 30, (346, 609)),
    "CWFID": (
        "demo",
        [
            "data.class_names=[soil,crop,weed]",
            "data.palette=[[0,0,0],[0,255,0],[255,0,0]]",
        ],
        "val",
        4,
        (483, 648),
    ),
}


@pytest.mark.parametrize("name", REAL_SETS)
def test_real_sets(shared_data, name):
    base, overrides, split, count, size = REAL_SETS[name]
    config = load_config(base, [f"data.dataset_path={shared_data / name}", *overrides])
    dataset = SegmentationPairs(config.data, split, need_labels=name != "RoadScene")
    assert len(dataset) == count
    for index in (0, count - 1):
        sample = dataset[index]
        height, width = sample.label.shape
        assert sample.rgb.shape == sample.thermal.shape == (3, height, width)
        assert index or (height, width) == size
        for image in (sample.rgb, sample.thermal):
            assert 0 <= image.min() < image.max() <= 1
            assert image.std() > 0.02
        values = set(sample.label.unique().tolist())
        if name == "RoadScene":
            assert values == {255}
        else:
            assert len(values - {255}) > 1
            assert values <= {*range(config.data.num_classes), 255}
        is_grey = torch.equal(sample.rgb[0], sample.rgb[2])
        assert is_grey == (name == "CWFID")


@pytest.mark.parametrize(
    ("name", "way_out"),
    [
        ("MFNet_mini", "--val-fraction"),
        ("PST900_mini", "--val-fraction"),
        ("RoadScene", "not trained"),
    ],
)
def test_real_sets_without_val_show_the_error(shared_data, name, way_out):
    config = load_config("mfnet", [f"data.dataset_path={shared_data / name}"])
    with raises(rf"val\.txt does not exist; .*{way_out}"):
        SegmentationPairs(config.data, "val")
