"""Images in the forms that only archives hold: four channels, masks in colours or as a drawing."""

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError  # OpenCV makes colours of a colour table's indices

from utils.errors import InputError
from utils.image import UNKNOWN_LABEL, Palette, decolorize, read_label, read_rgb

_MOST_COLORS = 64  # more in a set of masks: they were resized or compressed, not drawn


class Header(NamedTuple):
    """What a file says of its pixels; mode as Pillow names it ("" if no image)."""

    mode: str
    format: str
    size: tuple[int, int]  # height, width


class LabelValues(NamedTuple):
    """What labels hold: class indices, or the RGB colours of drawings."""

    indices: set[int]
    colors: set[tuple[int, int, int]]


def read_header(path: Path) -> Header:
    """The form of an image, without its pixels; all empty where it cannot be told."""
    try:
        with Image.open(path) as image:
            return Header(image.mode, image.format or "", image.size[::-1])
    except (OSError, SyntaxError, ValueError):
        return Header("", "", (0, 0))


def read_rgb_thermal(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Split an image of MFNet: (H, W, 3) uint8 RGB and (H, W) uint8 thermal, the fourth channel.

    Raises:
        InputError: unreadable, or not of four channels.
    """
    if read_header(path).mode not in ("RGBA", ""):
        raise InputError(
            f"image {path} has no fourth channel; MFNet's images hold thermal there: use the "
            "authors' archive, or `custom` for folders of separate images"
        )
    image = _read_pixels(path)
    return np.ascontiguousarray(image[..., :3]), np.ascontiguousarray(image[..., 3])


def read_any_label(path: Path, palette: Palette, *, is_binary: bool = False) -> np.ndarray:
    """Read a label in any form that archives have: (H, W) uint8 class indices.

    One channel of indices, also in three equal ones; a PNG with a colour table (its indices, or by
    colour where the table is the palette in another order); a drawing in the palette's colours,
    RGB or BGR.

    Args:
        is_binary: every value but 0 is class 1.
    Raises:
        InputError: unreadable, a JPEG, a colour that is not in the palette.
    """
    header = read_header(path)
    if header.format == "JPEG":
        raise InputError(
            f"label {path} is a JPEG, whose compression changes class values; get it as PNG"
        )
    if header.mode == "1":
        label = _read_pixels(path).astype(np.uint8)
    elif header.mode == "P":
        label = _from_color_table(path, palette)
    elif header.mode in ("RGB", "RGBA"):
        label = _from_drawing(path, read_rgb(path), palette)
    else:
        label = read_label(path)
    return (label > 0).astype(np.uint8) if is_binary else label


def values_of(path: Path, *, is_binary: bool = False) -> LabelValues:
    """What one label of unknown classes holds.

    Raises:
        InputError: unreadable, or too many colours.
    """
    image = read_rgb(path) if read_header(path).mode in ("RGB", "RGBA") else None
    if image is None or is_binary or _is_grey(image):
        label = read_any_label(path, (), is_binary=is_binary)
        return LabelValues(set(np.unique(label).tolist()), set())
    colors = np.unique(image.reshape(-1, 3), axis=0)
    _check_color_count(len(colors), f"mask {path} holds")
    return LabelValues(set(), set(map(tuple, colors.tolist())))


def merge_values(values: Iterable[LabelValues]) -> LabelValues:
    """What a set's labels hold together; 255 is no class unless labels are drawings.

    Raises:
        InputError: too many colours, or 0 and 255 alone.
    """
    indices: set[int] = set()
    colors: set[tuple[int, int, int]] = set()
    for value in values:
        indices |= value.indices
        colors |= value.colors
    if colors:
        colors |= {(index, index, index) for index in indices}
        _check_color_count(len(colors), "the masks together hold")
        return LabelValues(set(), colors)
    if indices == {0, UNKNOWN_LABEL}:
        raise InputError(
            "all labels hold 0 and 255 alone, and 255 means unknown; if it is the object here, "
            "prepare the set with --binary"
        )
    return LabelValues(indices - {UNKNOWN_LABEL}, set())


def _check_color_count(count: int, who: str) -> None:
    if count > _MOST_COLORS:
        raise InputError(
            f"{who} more than {_MOST_COLORS} colours; they were resized or compressed: get the "
            "originals, or name the palette with --config"
        )


def _read_pixels(path: Path) -> np.ndarray:
    try:
        with Image.open(path) as image:
            return np.asarray(image)
    except UnidentifiedImageError as error:
        raise InputError(f"image {path} cannot be decoded: no image; copy it again") from error
    except (OSError, SyntaxError, ValueError) as error:
        raise InputError(f"image {path} cannot be decoded: {error}; copy it again") from error


def _from_color_table(path: Path, palette: Palette) -> np.ndarray:
    """The indices as stored, or by colour where an image editor put the palette in its own order.

    That is the case if all entries at the beginning, as many as there are classes, are classes'
    colours; the table decides, not what an image uses of it.
    """
    indices = _read_pixels(path)
    with Image.open(path) as image:
        table = np.reshape(image.getpalette(), (-1, 3)).astype(np.uint8)
    head = decolorize(table[None, : len(palette)], palette)
    if not len(palette) or (head == UNKNOWN_LABEL).any() or indices.max() >= len(table):
        return indices
    return _from_drawing(path, table[indices], palette)


def _from_drawing(path: Path, image: np.ndarray, palette: Palette) -> np.ndarray:
    for drawing in (image, image[..., ::-1]):
        found = decolorize(drawing, palette)
        if (found != UNKNOWN_LABEL).all():
            return found
    if _is_grey(image):
        return np.ascontiguousarray(image[..., 0])
    foreign = decolorize(image, palette) == UNKNOWN_LABEL
    color = ", ".join(map(str, image[foreign][0]))
    raise InputError(
        f"label {path} has {foreign.sum()} pixels in colours that are no class's, the first "
        f"({color}); the palette is that of the config: correct it there or the drawing"
    )


def _is_grey(image: np.ndarray) -> bool:
    return bool((image == image[..., :1]).all())
