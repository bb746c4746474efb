"""Images on disk and on screen: read, write, colour maps, contact sheets, YCbCr."""

import functools
import logging
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import Tensor

from utils.errors import InputError
from utils.files import write_whole

log = logging.getLogger(__name__)

Palette = Sequence[Sequence[int]]  # RGB of class 0, 1, ...
UNKNOWN_LABEL = 255  # label value of a pixel without a class

_JPEG, _PNG = b"\xff\xd8", b"\x89PNG"  # how such a file begins
# By a format's first bytes: what begins its last block of pixels, what comes after that block.
_LAST_BLOCKS = {_JPEG: (b"\xff\xda", b"\xff\xd9"), _PNG: (b"IDAT", b"IEND")}
_TITLE_ROW = 28  # pixels
_GAP = 4  # pixels between the pictures of a sheet


def read_rgb(path: str | Path) -> np.ndarray:
    """Read a visible image: (H, W, 3) uint8, RGB; grey is repeated, 16 bits are rounded to 8.

    Pixels are taken as stored: an EXIF orientation is not applied, to keep pairs registered.

    Raises:
        InputError: unreadable, or a fourth channel that is no opaque alpha.
    """
    image = _drop_alpha(_decode(_read_bytes(path), path), path)
    if image.dtype == np.uint16:
        image = np.rint(image / 257).astype(np.uint8)  # 65535 is 255; undoes to_uint16
    return cv2.cvtColor(image, cv2.COLOR_GRAY2RGB if image.ndim == 2 else cv2.COLOR_BGR2RGB)


def read_thermal(path: str | Path) -> np.ndarray:
    """Read a thermal image: (H, W) uint8, the luma where the file has three channels.

    16 bits are converted by thermal_to_uint8, which is logged once.

    Raises:
        InputError: unreadable, or a fourth channel that is no opaque alpha.
    """
    image = _drop_alpha(_decode(_read_bytes(path), path), path)
    if image.ndim == 3:
        image = cv2.cvtColor(image, cv2.COLOR_BGR2GRAY)
    if image.dtype == np.uint16:
        _warn_once(
            "16-bit thermal images are converted to 8 bits: the 1st to 99th percentile of each "
            "image becomes 0 to 255"
        )
        image = thermal_to_uint8(image)
    return image


def read_label(path: str | Path, palette: Palette = ()) -> np.ndarray:
    """Read a label: (H, W) uint8 class indices.

    Args:
        palette: colours of the classes, so that the error can say whether a colour drawing
            follows them.
    Raises:
        InputError: unreadable, a JPEG, a colour table, more than one channel, or a value above 255.
    """
    data = _read_bytes(path)
    image = _decode(data, path)
    if data.startswith(_JPEG):
        raise InputError(
            f"label {path} is a JPEG, whose compression changes class values; get it as PNG"
        )
    bits, has_table = _depth(data)
    if has_table:
        raise InputError(
            f"label {path} is an image with a colour table; tools/prepare_dataset.py custom makes "
            f"a set whose labels hold its indices"
        )
    if image.ndim == 2 and bits < 8:
        image = image // (255 // (2**bits - 1))  # OpenCV stretches what has fewer bits to 0..255
    if image.ndim == 3:
        found = _describe_color_label(image[..., 2::-1], palette)
        raise InputError(
            f"label {path} has {image.shape[2]} channels, a label has one of class indices; {found}"
        )
    if image.max() > 255:
        raise InputError(f"label {path} holds {image.max()}; class indices end at 255 (unknown)")
    return image.astype(np.uint8, copy=False)


def thermal_to_uint8(image: np.ndarray) -> np.ndarray:
    """Stretch an image's 1st to 99th percentile to 0..255; what lies outside is clipped.

    image: (H, W), any real dtype. An image of one value becomes 0.
    """
    low, high = np.percentile(image, (1, 99))
    scaled = (image - low) * (255 / max(high - low, 1e-6))
    return np.clip(np.rint(scaled), 0, 255).astype(np.uint8)


def write_png(path: str | Path, image: np.ndarray) -> None:
    """Write (H, W) or (H, W, 3) RGB, uint8 or uint16, as PNG: aside first, then renamed.

    Folders are made.

    Raises:
        InputError: the folder or disk does not take it; a file that was there stays.
    """
    path = Path(path)
    is_color = image.ndim == 3 and image.shape[2] == 3
    if image.dtype not in (np.uint8, np.uint16) or not (is_color or image.ndim == 2):
        raise ValueError(
            f"a PNG takes (H, W) or (H, W, 3), uint8 or uint16, got {image.shape} {image.dtype} "
            f"for {path}"
        )
    pixels = cv2.cvtColor(image, cv2.COLOR_RGB2BGR) if is_color else np.ascontiguousarray(image)
    data = cv2.imencode(".png", pixels)[1].tobytes()
    write_whole(path, data)


def colorize(label: np.ndarray, palette: Palette) -> np.ndarray:
    """Draw class indices (H, W) uint8 in their colours: (H, W, 3) uint8 RGB; unknown is black."""
    colors = np.zeros((256, 3), np.uint8)
    colors[: len(palette)] = palette
    return colors[label]


def decolorize(image: np.ndarray, palette: Palette) -> np.ndarray:
    """Class indices (H, W) uint8 of a drawing (H, W, 3) in exact colours; 255 = no such colour.

    It turns colour drawings into labels (for drawings in BGR order: image[..., ::-1]):

        write_png(path, decolorize(read_rgb(path), load_config("mfnet").data.palette))
    """
    label = np.full(image.shape[:2], UNKNOWN_LABEL, np.uint8)
    for index, color in enumerate(palette):
        label[(image == np.asarray(color, image.dtype)).all(-1)] = index
    return label


def overlay(rgb: np.ndarray, color: np.ndarray, alpha: float = 0.5) -> np.ndarray:
    """Blend two (H, W, 3) uint8 images: alpha of color on (1 - alpha) of rgb, rounded."""
    return cv2.addWeighted(rgb, 1 - alpha, color, alpha, 0)


def error_map(rgb: np.ndarray, prediction: np.ndarray, label: np.ndarray) -> np.ndarray:
    """Where a segmentation is wrong: red; right: the image in grey, dimmed; no label: black.

    rgb: (H, W, 3) uint8; prediction, label: (H, W) uint8. Gives (H, W, 3) uint8.
    """
    grey = cv2.cvtColor(rgb, cv2.COLOR_RGB2GRAY) // 2 + 32
    drawn = np.repeat(grey[..., None], 3, axis=2)
    drawn[prediction != label] = (230, 30, 30)
    drawn[label == UNKNOWN_LABEL] = 0
    return drawn


def contact_sheet(
    rows: Sequence[Sequence[np.ndarray]], titles: Sequence[str], *, cell_width: int = 320
) -> np.ndarray:
    """One picture of many: a row of titles, then rows of images scaled to one width.

    Args:
        rows: images (H, W, 3) or (H, W) uint8, as many in each row as there are titles; the images
            of a row have one size.
        cell_width: pixels of each column.
    Returns:
        (height, width, 3) uint8 on white.
    """
    width = len(titles) * (cell_width + _GAP) - _GAP
    header = np.full((_TITLE_ROW, width, 3), 255, np.uint8)
    for column, title in enumerate(titles):
        place = (column * (cell_width + _GAP) + 4, _TITLE_ROW - 9)
        cv2.putText(header, title, place, cv2.FONT_HERSHEY_SIMPLEX, 0.5, (0, 0, 0), 1, cv2.LINE_AA)
    strips = [header]
    for row in rows:
        if len(row) != len(titles):
            raise ValueError(f"a row has {len(row)} images for {len(titles)} titles")
        height = max(1, round(row[0].shape[0] * cell_width / row[0].shape[1]))
        strip = np.full((height + _GAP, width, 3), 255, np.uint8)
        for column, image in enumerate(row):
            left = column * (cell_width + _GAP)
            cell = cv2.resize(image, (cell_width, height), interpolation=cv2.INTER_AREA)
            strip[:height, left : left + cell_width] = cell if cell.ndim == 3 else cell[..., None]
        strips.append(strip)
    return np.concatenate(strips)


def to_uint8(image: Tensor) -> np.ndarray:
    """(3, H, W) in [0, 1], on any device -> (H, W, 3) uint8, rounded; what lies outside is clipped.

    One channel gives (H, W, 1).
    """
    pixels = image.detach().float().clamp(0, 1).mul(255).round().to(torch.uint8)
    return np.ascontiguousarray(pixels.permute(1, 2, 0).cpu().numpy())


def to_uint16(image: Tensor) -> np.ndarray:
    """(3, H, W) in [0, 1] -> (H, W, 3) uint16, 1 is 65535; see to_uint8."""
    pixels = image.detach().float().clamp(0, 1).permute(1, 2, 0).cpu().numpy()
    return np.rint(pixels.astype(np.float64) * 65535).astype(np.uint16)


def rgb_to_ycbcr(rgb: Tensor) -> Tensor:
    """BT.601 full range: (B, 3, H, W) RGB in [0, 1] -> Y, Cb, Cr in [0, 1], grey at 0.5; linear."""
    red, green, blue = rgb.unbind(1)
    luma = 0.299 * red + 0.587 * green + 0.114 * blue
    return torch.stack((luma, 0.5 + (blue - luma) / 1.772, 0.5 + (red - luma) / 1.402), 1)


def ycbcr_to_rgb(ycbcr: Tensor) -> Tensor:
    """The inverse of rgb_to_ycbcr; what lies outside [0, 1] is not clipped."""
    luma, blue_difference, red_difference = ycbcr.unbind(1)
    red = luma + 1.402 * (red_difference - 0.5)
    blue = luma + 1.772 * (blue_difference - 0.5)
    green = (luma - 0.299 * red - 0.114 * blue) / 0.587
    return torch.stack((red, green, blue), 1)


def _read_bytes(path: str | Path) -> bytes:
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise InputError(f"image {path} cannot be read: {error.strerror}") from error
    if not data:
        raise InputError(f"image {path} is empty (0 bytes); copy it again")
    return data


def _depth(data: bytes) -> tuple[int, bool]:
    """Bits a channel of a PNG or BMP and whether its values are rows of a colour table.

    A grey BMP has a table, too, in which each of its 8 bits stands for itself. (8, False) for other
    formats.
    """
    if data.startswith(b"BM"):
        bits = int.from_bytes(data[28:30], "little")
        return bits, bits < 8
    if not data.startswith(_PNG) or len(data) < 26:
        return 8, False
    return data[24], data[25] == 3


def _decode(data: bytes, path: str | Path) -> np.ndarray:
    """The stored pixels: (H, W), (H, W, 3) BGR or (H, W, 4), of 8 or 16 bits."""
    image = None
    if not _is_cut_short(data):
        try:
            image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
        except cv2.error as error:
            log.debug("%s: %s", path, error)
    if image is None:
        raise InputError(f"image {path} cannot be decoded: cut short or no image; copy it again")
    if image.dtype not in (np.uint8, np.uint16):
        raise InputError(f"image {path} holds {image.dtype}; save it with 8 or 16 bits a channel")
    return image


def _is_cut_short(data: bytes) -> bool:
    """Whether a PNG or JPEG ends inside its pixels: OpenCV pads such a JPEG with grey."""
    for signature, (begin, end) in _LAST_BLOCKS.items():
        if data.startswith(signature):
            end_at = data.rfind(end)
            return data.find(begin, max(end_at, 0)) >= 0  # from the end on: only the file's tail
    return False


def _drop_alpha(image: np.ndarray, path: str | Path) -> np.ndarray:
    if image.ndim == 2 or image.shape[2] == 3:
        return image
    if (image[..., 3] != np.iinfo(image.dtype).max).any():
        raise InputError(
            f"image {path} has a fourth channel that is no opaque alpha; files of the original "
            "MFNet hold thermal there: tools/prepare_dataset.py mfnet splits them"
        )
    return np.ascontiguousarray(image[..., :3])


def _describe_color_label(image: np.ndarray, palette: Palette) -> str:
    """What a label (H, W, 3) RGB seems to be, and the way out."""
    if (image == image[..., :1]).all():
        return "all three are equal: save one of them"
    how = "utils.image.decolorize makes indices of it"
    if palette and (decolorize(image, palette) != UNKNOWN_LABEL).all():
        return f"its colours are those of data.palette: {how}"
    if palette and (decolorize(image[..., ::-1], palette) != UNKNOWN_LABEL).all():
        return f"its colours are those of data.palette in BGR order: {how} after [..., ::-1]"
    if not palette:
        return f"if it is a colour drawing, {how}, given its palette"
    colors = np.unique(image.reshape(-1, 3), axis=0)
    foreign = next(color for color in colors.tolist() if color not in [list(c) for c in palette])
    return f"its colour {foreign} is not in data.palette: {how}, given the palette it was drawn in"


@functools.cache
def _warn_once(message: str) -> None:
    log.warning(message)
