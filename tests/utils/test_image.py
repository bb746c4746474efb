"""Images: what is read and written, every unreadable file named, drawings, colour space."""

import logging
import struct
import zlib

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from utils import image as image_module
from utils.errors import InputError
from utils.image import (
    colorize,
    contact_sheet,
    decolorize,
    error_map,
    overlay,
    read_label,
    read_rgb,
    read_thermal,
    rgb_to_ycbcr,
    thermal_to_uint8,
    to_uint8,
    to_uint16,
    write_png,
    ycbcr_to_rgb,
)

PALETTE = ((0, 0, 0), (64, 0, 128), (64, 64, 0))


def noise(*shape, dtype=np.uint8):
    high = np.iinfo(dtype).max
    return np.random.default_rng(0).integers(0, high, shape, dtype, endpoint=True)


def encode(path, image):
    path.write_bytes(cv2.imencode(path.suffix, image)[1].tobytes())
    return path


def test_png_round_trip_and_channel_order(tmp_path):
    color, grey = noise(7, 5, 3), noise(7, 5)
    write_png(tmp_path / "new" / "folder" / "color.png", color)
    write_png(tmp_path / "grey.png", grey)
    np.testing.assert_array_equal(read_rgb(tmp_path / "new/folder/color.png"), color)
    np.testing.assert_array_equal(read_thermal(tmp_path / "grey.png"), grey)
    np.testing.assert_array_equal(read_label(tmp_path / "grey.png"), grey)
    stored = cv2.imread(str(tmp_path / "new/folder/color.png"), cv2.IMREAD_UNCHANGED)
    np.testing.assert_array_equal(stored[..., ::-1], color)
    assert sorted(p.name for p in tmp_path.rglob("*") if p.is_file()) == ["color.png", "grey.png"]


def test_mirrored_view_is_written_as_seen(tmp_path):
    color, grey = noise(4, 6, 3)[:, ::-1], noise(4, 6)[:, ::-1]
    for name, image, read in (("a", color, read_rgb), ("b", grey, read_label)):
        write_png(tmp_path / f"{name}.png", image)
        np.testing.assert_array_equal(read(tmp_path / f"{name}.png"), image)


def test_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    write_png(path, noise(4, 4))
    before = path.read_bytes()

    def full_disk(self, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(path), "replace", full_disk)
    with pytest.raises(InputError, match=r"a\.png: No space left"):
        write_png(path, noise(9, 9))
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]


@pytest.mark.parametrize("bits", [1, 4, 8])
def test_a_label_bmp_of_few_bits_has_a_colour_table(tmp_path, bits):
    """OpenCV would give the table's grey, 0 and 255, for the classes 0 and 1."""
    path = tmp_path / "a.bmp"
    Image.fromarray(np.eye(8, dtype=np.uint8)).save(path)
    data = bytearray(path.read_bytes())
    assert data[28] == 8
    data[28] = bits
    path.write_bytes(data)
    if bits == 8:
        np.testing.assert_array_equal(read_label(path), np.eye(8))
    else:
        with pytest.raises(InputError, match=r"a\.bmp is an image with a colour table"):
            read_label(path)


def test_write_into_a_file_as_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write"):
        write_png(tmp_path / "file" / "a.png", noise(4, 4))


@pytest.mark.parametrize("image", [np.zeros((4, 4)), noise(4, 4, 4), noise(4)], ids=str)
def test_write_refuses_other_arrays(tmp_path, image):
    with pytest.raises(ValueError, match="uint8"):
        write_png(tmp_path / "a.png", image)
    assert not any(tmp_path.iterdir())


def test_rgb_of_a_grey_file_is_repeated(tmp_path):
    grey = noise(5, 6)
    rgb = read_rgb(encode(tmp_path / "a.png", grey))
    np.testing.assert_array_equal(rgb, np.repeat(grey[..., None], 3, 2))


def test_rgb_of_16_bits(tmp_path):
    deep = noise(5, 6, 3, dtype=np.uint16)
    rgb = read_rgb(encode(tmp_path / "a.png", deep))
    np.testing.assert_array_equal(rgb, np.rint(deep[..., ::-1] / 257))


def test_jpeg_and_bmp_and_tiff(tmp_path):
    smooth = np.tile(np.arange(0, 240, 10, dtype=np.uint8), (24, 1))
    for suffix, tolerance in ((".jpg", 6), (".bmp", 0), (".tif", 0)):
        read = read_thermal(encode(tmp_path / f"a{suffix}", smooth))
        assert np.abs(read.astype(int) - smooth).max() <= tolerance, suffix


def test_opaque_alpha_is_dropped(tmp_path):
    bgra = noise(5, 6, 4)
    bgra[..., 3] = 255
    np.testing.assert_array_equal(read_rgb(encode(tmp_path / "a.png", bgra)), bgra[..., 2::-1])


@pytest.mark.parametrize("read", [read_rgb, read_thermal])
def test_fourth_channel_with_content_is_an_error(tmp_path, read):
    with pytest.raises(InputError, match=r"a\.png has a fourth channel.*prepare_dataset.py mfnet"):
        read(encode(tmp_path / "a.png", noise(5, 6, 4)))


def test_thermal_of_three_channels(tmp_path):
    grey = noise(5, 6)
    equal = np.repeat(grey[..., None], 3, 2)
    np.testing.assert_array_equal(read_thermal(encode(tmp_path / "a.png", equal)), grey)
    red = np.zeros((2, 2, 3), np.uint8)
    red[..., 2] = 200
    assert (read_thermal(encode(tmp_path / "b.png", red)) == 60).all()  # 0.299 * 200


def test_thermal_of_16_bits_follows_the_stated_rule_and_says_so_once(tmp_path, caplog):
    image_module._warn_once.cache_clear()
    deep = (20000 + 10 * np.arange(10000)).astype(np.uint16).reshape(100, 100)
    deep[0, 0], deep[-1, -1] = 0, 65535  # dead pixels do not set the range
    path = encode(tmp_path / "a.png", deep)
    with caplog.at_level(logging.WARNING):
        first, second = read_thermal(path), read_thermal(path)
    assert [record.message for record in caplog.records] == [
        "16-bit thermal images are converted to 8 bits: the 1st to 99th percentile of each image "
        "becomes 0 to 255"
    ]
    np.testing.assert_array_equal(first, second)
    low, high = np.percentile(deep, (1, 99))
    expected = np.clip((deep - low) / (high - low) * 255, 0, 255)
    assert np.abs(first - expected).max() <= 0.5
    assert (first == 0).mean() > 0.009
    assert (first == 255).mean() > 0.009


def test_thermal_of_8_bits_is_unchanged_and_silent(tmp_path, caplog):
    image_module._warn_once.cache_clear()
    narrow = (100 + noise(20, 20) % 5).astype(np.uint8)
    np.testing.assert_array_equal(read_thermal(encode(tmp_path / "a.png", narrow)), narrow)
    assert not caplog.records


@pytest.mark.filterwarnings("error")
def test_thermal_stretch_of_one_value():
    assert (thermal_to_uint8(np.full((4, 4), 30000, np.uint16)) == 0).all()


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_labels_of_few_bits_hold_indices(tmp_path, bits):
    """OpenCV would stretch them: 1 of a mask of 1 bit to 255, which means unknown."""
    label = np.random.default_rng(0).integers(0, 2**bits, (7, 13), dtype=np.uint8)
    stream = np.unpackbits(label[..., None], axis=2)[..., 8 - bits :].reshape(7, -1)
    rows = b"".join(b"\0" + row.tobytes() for row in np.packbits(stream, axis=1))
    header = struct.pack(">IIBBBBB", 13, 7, bits, 0, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    data = b"".join(
        struct.pack(">I", len(content)) + kind + content
        + struct.pack(">I", zlib.crc32(kind + content))
        for kind, content in chunks
    )  # fmt: skip
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + data)
    assert (read_label(tmp_path / "a.png") == label).all()


def test_labels_that_hold_no_indices_are_named(tmp_path):
    cv2.imwrite(str(tmp_path / "a.jpg"), np.zeros((8, 8), np.uint8))
    with pytest.raises(InputError, match=r"label .*a\.jpg is a JPEG, whose compression changes"):
        read_label(tmp_path / "a.jpg")
    indexed = Image.fromarray(np.eye(8, dtype=np.uint8), mode="P")
    indexed.putpalette([0, 0, 0, 255, 0, 0])
    indexed.save(tmp_path / "b.png")
    with pytest.raises(InputError, match=r"a colour table; .*prepare_dataset.py custom"):
        read_label(tmp_path / "b.png")


def test_label_of_16_bits(tmp_path):
    label = np.array([[0, 3], [8, 255]], np.uint16)
    read = read_label(encode(tmp_path / "a.png", label))
    assert read.dtype == np.uint8
    np.testing.assert_array_equal(read, label)
    label[0, 0] = 1000
    with pytest.raises(InputError, match=r"b\.png holds 1000"):
        read_label(encode(tmp_path / "b.png", label))


@pytest.mark.parametrize(
    ("image", "palette", "message"),
    [
        (colorize(noise(6, 6) % 3, PALETTE), PALETTE, r"are those of data.palette: .*decolorize"),
        (colorize(noise(6, 6) % 3, PALETTE)[..., ::-1], PALETTE, "data.palette in BGR order"),
        (np.full((6, 6, 3), (9, 8, 7), np.uint8), PALETTE, r"\[9, 8, 7\] is not in data.palette"),
        (np.full((6, 6, 3), 2, np.uint8), PALETTE, "all three are equal: save one"),
        (noise(6, 6, 3), (), "decolorize makes indices of it, given its palette"),
    ],
    ids=["palette", "bgr", "foreign", "equal", "no palette"],
)
def test_color_label_is_an_error_that_says_what_it_is(tmp_path, image, palette, message):
    write_png(tmp_path / "a.png", image)
    with pytest.raises(InputError, match=rf"label .*a\.png has 3 channels.*{message}"):
        read_label(tmp_path / "a.png", palette)


def truncated(suffix):
    data = cv2.imencode(suffix, noise(40, 40, 3))[1].tobytes()
    return data[: len(data) // 2]


@pytest.mark.parametrize("read", [read_rgb, read_thermal, read_label])
@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("absent.png", None),
        ("empty.png", b""),
        ("text.png", b"no image at all"),
        ("cut.png", truncated(".png")),
        ("cut.jpg", truncated(".jpg")),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_unreadable_file_is_named_in_one_line(tmp_path, capfd, read, name, content):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=rf"{name} (is empty|cannot be)") as error:
        read(tmp_path / name)
    assert "\n" not in str(error.value)
    if name.startswith("cut"):
        assert capfd.readouterr().err == ""  # the decoder has not added lines of its own


def test_bytes_after_the_end_of_a_jpeg_are_harmless(tmp_path):
    path = encode(tmp_path / "a.jpg", noise(16, 16))
    whole = read_thermal(path)
    path.write_bytes(path.read_bytes() + b"\0" * 500)
    np.testing.assert_array_equal(read_thermal(path), whole)


def test_float_image_is_an_error(tmp_path):
    path = encode(tmp_path / "a.tiff", np.ones((4, 4), np.float32))
    with pytest.raises(InputError, match=r"a\.tiff holds float32"):
        read_thermal(path)


def test_colorize_and_back():
    label = np.array([[0, 1, 2], [2, 1, 255]], np.uint8)
    drawing = colorize(label, PALETTE)
    assert drawing.dtype == np.uint8
    assert drawing[0].tolist() == [list(color) for color in PALETTE]
    assert drawing[1, 2].tolist() == [0, 0, 0]
    np.testing.assert_array_equal(decolorize(drawing[:, :2], PALETTE), label[:, :2])
    assert decolorize(np.full((1, 1, 3), 77, np.uint8), PALETTE) == 255


def test_overlay():
    rgb, color = np.full((2, 2, 3), 100, np.uint8), np.full((2, 2, 3), 201, np.uint8)
    assert (overlay(rgb, color, alpha=0.0) == 100).all()
    assert (overlay(rgb, color, alpha=1.0) == 201).all()
    assert (overlay(rgb, color, alpha=0.25) == 125).all()


def test_contact_sheet():
    red = np.zeros((30, 40, 3), np.uint8)
    red[..., 0] = 200
    sheet = contact_sheet(
        [[red, np.full((30, 40), 90, np.uint8)], [np.full((10, 40), 7, np.uint8), red[:10]]],
        ["rgb", "thermal"],
        cell_width=80,
    )
    assert sheet.dtype == np.uint8
    assert sheet.shape == (28 + (60 + 4) + (20 + 4), 80 + 4 + 80, 3)
    header, first, second = sheet[:28], sheet[28:88], sheet[92:112]
    assert (header[:, :84] < 100).any()  # both titles are there
    assert (header[:, 84:] < 100).any()
    assert (first[:, :80] == (200, 0, 0)).all()
    assert (first[:, 84:] == 90).all()
    assert (second[:, :80] == 7).all()
    assert (second[:, 84:] == (200, 0, 0)).all()
    assert (sheet[28:, 80:84] == 255).all()
    with pytest.raises(ValueError, match="1 images for 2 titles"):
        contact_sheet([[red]], ["rgb", "thermal"])


def test_to_uint8_rounds_and_clips():
    values = torch.tensor([-0.5, 0.0, 1.4 / 255, 1.6 / 255, 1.0, 1.5])
    image = values.expand(3, 2, 6).clone().requires_grad_()
    pixels = to_uint8(image)
    assert pixels.shape == (2, 6, 3)
    assert pixels.dtype == np.uint8
    assert pixels[0, :, 1].tolist() == [0, 0, 1, 2, 255, 255]
    assert pixels.flags.c_contiguous


def test_to_uint8_keeps_channels_apart():
    pixels = to_uint8(torch.tensor([0.2, 0.4, 0.6])[:, None, None].expand(3, 4, 5))
    assert (pixels == (51, 102, 153)).all()


@pytest.mark.parametrize(
    ("color", "expected"),
    [
        ((1, 1, 1), (1, 0.5, 0.5)),
        ((0.25, 0.25, 0.25), (0.25, 0.5, 0.5)),
        ((1, 0, 0), (0.299, 0.5 - 0.168736, 1)),
        ((0, 1, 0), (0.587, 0.5 - 0.331264, 0.5 - 0.418688)),
        ((0, 0, 1), (0.114, 1, 0.5 - 0.081312)),
    ],
    ids=str,
)
def test_ycbcr_of_known_colors(color, expected):
    rgb = torch.tensor(color, dtype=torch.float32).view(1, 3, 1, 1).expand(2, 3, 4, 5)
    result = rgb_to_ycbcr(rgb)
    assert result.shape == (2, 3, 4, 5)
    expected = torch.tensor(expected, dtype=torch.float32).view(1, 3, 1, 1).expand(2, 3, 4, 5)
    torch.testing.assert_close(result, expected, atol=1e-6, rtol=0)


def test_ycbcr_is_differentiable():
    rgb = torch.rand(2, 3, 2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(rgb_to_ycbcr, rgb)


def test_16_bits_are_written_whole(tmp_path):
    """1 is 65535, values between are rounded, and the file keeps all 16 bits."""
    image = torch.tensor([[0.0, 1.0, 0.5, 2.0]]).repeat(3, 1, 1)
    image[2] = 1 / 65535
    pixels = to_uint16(image)
    assert pixels.dtype == np.uint16
    assert pixels[0].tolist() == [
        [0, 0, 1],
        [65535, 65535, 1],
        [32768, 32768, 1],
        [65535, 65535, 1],
    ]
    write_png(tmp_path / "deep.png", pixels)
    stored = cv2.imread(str(tmp_path / "deep.png"), cv2.IMREAD_UNCHANGED)
    np.testing.assert_array_equal(stored[..., ::-1], pixels)


def test_ycbcr_comes_back():
    rgb = torch.rand(2, 3, 5, 7, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(ycbcr_to_rgb(rgb_to_ycbcr(rgb)), rgb)


def test_error_map():
    rgb = np.full((1, 4, 3), 100, np.uint8)
    found = error_map(rgb, np.array([[0, 1, 2, 3]], np.uint8), np.array([[0, 2, 2, 255]], np.uint8))
    assert found[0].tolist() == [[82, 82, 82], [230, 30, 30], [82, 82, 82], [0, 0, 0]]
