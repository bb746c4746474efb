"""What a set on disk holds: pixels by class, and a sheet of pairs to look at."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from configs.schema import DataConfig
from dataloader.dataset import PairFiles
from dataloader.prepare.labels import read_header
from utils.image import (
    UNKNOWN_LABEL,
    colorize,
    contact_sheet,
    overlay,
    read_label,
    read_rgb,
    read_thermal,
)

SHEET_PAIRS = 12


class Summary(NamedTuple):
    """Counts of one set."""

    pixels: dict[str, np.ndarray]  # by stem: (256,) int64, pixels of each label value
    sizes: Counter  # images by (height, width)


def summarize(files: Mapping[str, PairFiles]) -> Summary:
    """Read every label once; a pair without one counts for its size alone."""
    pixels, sizes = {}, Counter()
    for stem, pair in files.items():
        if pair.label is None:
            sizes[read_header(pair.rgb).size] += 1
            continue
        label = read_label(pair.label)
        pixels[stem] = np.bincount(label.ravel(), minlength=256)
        sizes[label.shape] += 1
    return Summary(pixels, sizes)


def count_classes(pixels: Mapping[str, np.ndarray], stems: Iterable[str]) -> np.ndarray:
    """(256, 2) int64: pixels of each label value over the stems, and images that hold it."""
    counts = np.zeros((256, 2), np.int64)
    for stem in stems:
        if stem in pixels:
            counts[:, 0] += pixels[stem]
            counts[:, 1] += pixels[stem] > 0
    return counts


def class_table(
    lists: Mapping[str, Sequence[str]], pixels: Mapping[str, np.ndarray], names: Sequence[str]
) -> list[str]:
    """Lines of a table: class, then pixels and images of each list; "-" where never seen."""
    counts = {name: count_classes(pixels, stems) for name, stems in lists.items()}
    rows = [["class"] + [f"{name} {what}" for name in lists for what in ("pixels", "images")]]
    values = [*enumerate(names), (UNKNOWN_LABEL, "unknown")]
    for value, name in values:
        cells = [number for table in counts.values() for number in table[value]]
        if value == UNKNOWN_LABEL and not any(cells):
            continue
        rows.append([f"{value:3d} {name}"] + [f"{number:,}" if number else "-" for number in cells])
    return align(rows)


def align(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of equal length as lines: the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
        lines.append("  ".join([row[0].ljust(widths[0]), *cells[1:]]).rstrip())
    return lines


def draw_sheet(
    files: Mapping[str, PairFiles], pixels: Mapping[str, np.ndarray], data: DataConfig
) -> np.ndarray:
    """rgb, thermal and labels on rgb of 12 pairs, in which every class is seen if any has it.

    Class 0 is left as it is, unknown pixels become white. Returns (height, width, 3) uint8.
    """
    titles = ["rgb", "thermal"] + (["labels on rgb"] if pixels else [])
    rows = []
    for stem in _choose_pairs(list(files), pixels):
        pair = files[stem]
        rgb = read_rgb(pair.rgb)
        row = [rgb, read_thermal(pair.thermal)]
        if pair.label is not None:
            row.append(draw_label(rgb, read_label(pair.label), data))
        rows.append(row)
    return contact_sheet(rows, titles)


def draw_label(rgb: np.ndarray, label: np.ndarray, data: DataConfig) -> np.ndarray:
    """Classes from 1 on in their colours over rgb (H, W, 3) uint8; unknown pixels in white."""
    color = colorize(label, data.palette)
    color[label == UNKNOWN_LABEL] = 255
    drawn = overlay(rgb, color, alpha=0.6)
    drawn[label == 0] = rgb[label == 0]
    return drawn


def _choose_pairs(stems: list[str], pixels: Mapping[str, np.ndarray]) -> list[str]:
    """Of each class, the rarest first, the image with most of it; then evenly over the set."""
    chosen: list[str] = []
    totals = count_classes(pixels, stems)
    for value in sorted(range(1, UNKNOWN_LABEL), key=lambda value: totals[value, 1]):
        if totals[value, 1] and len(chosen) < SHEET_PAIRS:
            best = max(pixels, key=lambda stem: pixels[stem][value])
            chosen += [best] if best not in chosen else []
    rest = [stem for stem in stems if stem not in chosen]
    wanted = min(SHEET_PAIRS - len(chosen), len(rest))
    chosen += [rest[index * len(rest) // wanted] for index in range(wanted)]
    return sorted(chosen)


def files_of(root: Path, stems: Iterable[str], data: DataConfig) -> dict[str, PairFiles]:
    """The files of prepared pairs by stem, from folders that hold exactly one for each."""
    columns = {}
    for name in (data.rgb_folder, data.thermal_folder, data.label_folder):
        folder = root / name
        paths = sorted(folder.iterdir()) if folder.is_dir() else []
        columns[name] = {path.stem: path for path in paths}
    return {
        stem: PairFiles(*(columns[name].get(stem) for name in columns)) for stem in sorted(stems)
    }
