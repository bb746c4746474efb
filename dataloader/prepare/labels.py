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
    """What a set's labels hold: class indices, or the colours of drawings."""

    indices: list[int]
    colors: list[tuple[int, int, int]]  # RGB; empty where labels are indices


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

    One channel of indices, also in three equal ones; a PNG with a colour table: by colour where
    all its colours are the palette's, else its indices; a drawing in the palette's colours, RGB or
    BGR.

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
    if header.mode in ("P", "1"):
        label = _read_pixels(path).astype(np.uint8)
        if header.mode == "P":
            label = _by_color_table(path, label, palette)
    elif header.mode in ("RGB", "RGBA"):
        label = _from_drawing(path, read_rgb(path), palette)
    else:
        label = read_label(path)
    return (label > 0).astype(np.uint8) if is_binary else label


def find_values(paths: Iterable[Path], *, is_binary: bool = False) -> LabelValues:
    """What labels of unknown classes hold; black comes first among colours, 255 is left out.

    Raises:
        InputError: unreadable, too many colours, or only 0 and 255 without is_binary.
    """
    colors: set[tuple[int, int, int]] = set()
    indices: set[int] = set()
    for path in paths:
        image = read_rgb(path) if read_header(path).mode in ("RGB", "RGBA") else None
        if image is None or is_binary or _is_grey(image):
            label = read_any_label(path, (), is_binary=is_binary)
            indices.update(np.unique(label).tolist())
        else:
            colors.update(map(tuple, np.unique(image.reshape(-1, 3), axis=0).tolist()))
        if len(colors) > _MOST_COLORS:
            raise InputError(
                f"the masks up to {path} hold more than {_MOST_COLORS} colours; they were resized "
                "or compressed: get the originals, or name the palette with --config"
            )
    if colors:
        colors |= {(index, index, index) for index in indices}
        return LabelValues([], sorted(colors))
    if indices == {0, UNKNOWN_LABEL}:
        raise InputError(
            "all labels hold 0 and 255 alone, and 255 means unknown; if it is the object here, "
            "prepare it with --binary"
        )
    return LabelValues(sorted(indices - {UNKNOWN_LABEL}), [])


def _read_pixels(path: Path) -> np.ndarray:
    try:
        with Image.open(path) as image:
            return np.asarray(image)
    except UnidentifiedImageError as error:
        raise InputError(f"image {path} cannot be decoded: no image; copy it again") from error
    except (OSError, SyntaxError, ValueError) as error:
        raise InputError(f"image {path} cannot be decoded: {error}; copy it again") from error


def _by_color_table(path: Path, indices: np.ndarray, palette: Palette) -> np.ndarray:
    label = decolorize(read_rgb(path), palette)
    return label if len(palette) and (label != UNKNOWN_LABEL).all() else indices


def _from_drawing(path: Path, image: np.ndarray, palette: Palette) -> np.ndarray:
    label = decolorize(image, palette)
    for drawing in (image, image[..., ::-1]):
        found = decolorize(drawing, palette)
        if (found != UNKNOWN_LABEL).all():
            return found
    if _is_grey(image):
        return np.ascontiguousarray(image[..., 0])
    foreign = label == UNKNOWN_LABEL
    color = ", ".join(map(str, image[foreign][0]))
    raise InputError(
        f"label {path} has {foreign.sum()} pixels in colours that are no class's, the first "
        f"({color}); the palette is that of the config: correct it there or the drawing"
    )


def _is_grey(image: np.ndarray) -> bool:
    return bool((image == image[..., :1]).all())
