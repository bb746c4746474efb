"""What is wrong with a set in its place: lists, files, labels, duplicates, registration."""

import hashlib
import logging
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from configs.schema import DataConfig
from dataloader.dataset import PairFiles, files_by_stem, find_files, read_pair, read_split, shorten
from dataloader.prepare.summary import count_classes
from dataloader.registration import Shift, common_shift, far_pairs, measure_shift
from dataloader.transforms import Pair
from utils.errors import InputError
from utils.image import UNKNOWN_LABEL

log = logging.getLogger(__name__)

SPLITS = ("train", "val", "test")  # each pair belongs to one of them
PARTS = ("test_day", "test_night")  # they divide test
_FEW_PIXELS = 100  # of a class in a list


class Finding(NamedTuple):
    """One thing that is wrong (error) or odd (warning)."""

    is_error: bool
    text: str


@dataclass
class Report:
    """All that was seen of a set."""

    lists: dict[str, list[str]] = field(default_factory=dict)  # stems by list
    findings: list[Finding] = field(default_factory=list)
    has_labels: bool = True
    pixels: dict[str, np.ndarray] = field(default_factory=dict)  # by stem: (256,) of label values
    sizes: dict[str, tuple[int, int]] = field(default_factory=dict)  # by stem: height, width
    shifts: dict[str, Shift] = field(default_factory=dict)  # by stem

    def error(self, text: str) -> None:
        self.findings.append(Finding(True, text))

    def warn(self, text: str) -> None:
        self.findings.append(Finding(False, text))

    def count(self, *, errors: bool) -> int:
        return sum(finding.is_error == errors for finding in self.findings)


def check_lists(data: DataConfig) -> Report:
    """Lists, folders and names, without opening an image; quick enough for every start.

    A pair in two of train, val and test is an error, a val.txt that is absent a warning.

    Raises:
        InputError: the folder is absent or has no list at all.
    """
    root, report = Path(data.path).expanduser(), Report()
    if not root.is_dir():
        raise InputError(
            f"dataset folder {root} does not exist; datasets/README.md says what it is"
        )
    if not any((root / f"{name}.txt").is_file() for name in SPLITS):
        raise InputError(f"{root} has none of the lists train.txt, val.txt and test.txt")
    report.has_labels = (root / data.label_folder).is_dir()
    for name in SPLITS + PARTS:
        if (root / f"{name}.txt").is_file():
            try:
                report.lists[name] = read_split(root, name)
            except InputError as error:
                report.error(str(error))
    if report.has_labels and not (root / "val.txt").is_file():
        report.warn(
            "no val.txt, which training needs: python tools/prepare_dataset.py "
            f"--val-fraction 0.1 custom {root}"
        )
    _check_membership(report)
    for name in SPLITS:
        if name in report.lists:
            try:
                find_files(data, report.lists[name], need_labels=False)
            except InputError as error:
                report.error(f"{name}: {error}")
    return report


def refuse_bad_lists(data: DataConfig) -> None:
    """check_lists at the start of a training: its warnings go to the log.

    Raises:
        InputError: its first error.
    """
    for finding in check_lists(data).findings:
        if finding.is_error:
            raise InputError(finding.text)
        log.warning("%s", finding.text)


def check_dataset(
    data: DataConfig,
    *,
    most_shift: float,
    on_start: Callable[[int], object] | None = None,
    on_pair: Callable[[], object] | None = None,
) -> Report:
    """check_lists, and every listed pair: it opens, fits, has classes in range, is no duplicate.

    Args:
        most_shift: pixels between rgb and thermal beyond which a set or a pair is warned of.
        on_start, on_pair: called with the number of pairs, and after each, for a progress bar.
    """
    data = data.model_copy(update={"ignore_background": False})  # else 0 would read as 255
    report = check_lists(data)
    files = _readable_files(data, report)
    if on_start is not None:
        on_start(len(files))
    hashes: dict[tuple[str, bytes], list[str]] = {}
    for stem, pair_files in files.items():
        try:
            pair = read_pair(pair_files, data)
        except InputError as error:
            report.error(str(error))
        else:
            _check_pair(report, stem, pair, hashes)
        if on_pair is not None:
            on_pair()
    _check_duplicates(report, hashes)
    if report.has_labels and report.pixels:
        _check_classes_seen(report, data)
    _check_registration(report, most_shift)
    return report


def _check_membership(report: Report) -> None:
    """Train, val and test are disjoint; test_day and test_night lie in test."""
    where: dict[str, str] = {}
    shared: dict[tuple[str, str], list[str]] = {}
    for name in SPLITS:
        for stem in report.lists.get(name, ()):
            if stem in where:
                shared.setdefault((where[stem], name), []).append(stem)
            where[stem] = name
    for (first, second), stems in shared.items():
        report.error(
            f"leakage: {len(stems)} names are in {first}.txt and in {second}.txt: {shorten(stems)}"
        )
    for name in PARTS:
        foreign = [s for s in report.lists.get(name, ()) if s not in report.lists.get("test", ())]
        if foreign:
            report.error(f"{name}.txt lists what test.txt does not: {shorten(foreign)}")


def _readable_files(data: DataConfig, report: Report) -> dict[str, PairFiles]:
    """The files of every listed pair that has all of them, each pair once."""
    root = Path(data.path).expanduser()
    names = [data.rgb_folder, data.thermal_folder] + [data.label_folder] * report.has_labels
    columns = [files_by_stem(root / n) if (root / n).is_dir() else {} for n in names]
    stems = dict.fromkeys(stem for name in SPLITS for stem in report.lists.get(name, ()))
    found = {}
    for stem in stems:
        paths = [column.get(stem, []) for column in columns]
        if all(len(path) == 1 for path in paths):
            found[stem] = PairFiles(*(path[0] for path in paths), *[None] * (not report.has_labels))
    return found


def _check_pair(
    report: Report, stem: str, pair: Pair, hashes: dict[tuple[str, bytes], list[str]]
) -> None:
    report.sizes[stem] = pair.label.shape
    is_flat = False
    for name, image in (("rgb", pair.rgb), ("thermal", pair.thermal)):
        if image.min() == image.max():
            report.warn(f"{name} of {stem} is constant (all {image.min()}): it shows nothing")
            is_flat = True
        else:
            hashes.setdefault((name, _hash(image)), []).append(stem)
    if report.has_labels:
        report.pixels[stem] = np.bincount(pair.label.ravel(), minlength=256)
        if (pair.label == UNKNOWN_LABEL).all():
            report.warn(f"label of {stem} is unknown (255) everywhere: it teaches nothing")
    shift = None if is_flat else measure_shift(pair.rgb, pair.thermal)
    if shift is not None:
        report.shifts[stem] = shift


def _hash(image: np.ndarray) -> bytes:
    """The same for an image and its mirror image, as MFNet's *_flip copies are."""
    both = (image, image[:, ::-1])
    return min(hashlib.blake2b(np.ascontiguousarray(x), digest_size=16).digest() for x in both)


def _check_duplicates(report: Report, hashes: Mapping[tuple[str, bytes], list[str]]) -> None:
    """The same image in two splits is leakage, an error; twice in one is a warning."""
    where = {stem: name for name in reversed(SPLITS) for stem in report.lists.get(name, ())}
    groups: dict[tuple[str, ...], list[str]] = {}
    for (name, _), stems in hashes.items():
        if len(stems) > 1:
            groups.setdefault(tuple(stems), []).append(name)
    for stems, names in groups.items():
        places = ", ".join(f"{where[stem]}/{stem}" for stem in stems[:10])
        text = f"the same {' and '.join(names)}, perhaps mirrored: {places}"
        if len({where[stem] for stem in stems}) > 1:
            report.error(f"leakage: {text}")
        else:
            report.warn(text)


def _check_classes_seen(report: Report, data: DataConfig) -> None:
    """Classes that a list never or hardly shows, by the lists that lack them."""
    lists = {name: stems for name, stems in report.lists.items() if name in SPLITS}
    counts = {name: count_classes(report.pixels, stems)[:, 0] for name, stems in lists.items()}
    never: dict[tuple[str, ...], list[str]] = {}
    for value, class_name in enumerate(data.class_names):
        lacking = tuple(name for name in lists if not counts[name][value])
        if lacking:
            never.setdefault(lacking, []).append(f"{value} {class_name}")
        for name in lists:
            if 0 < counts[name][value] < _FEW_PIXELS:
                report.warn(
                    f"{value} {class_name} has {counts[name][value]} pixels in {name}: no score "
                    "of it will mean much"
                )
    for lacking, classes in never.items():
        place = "any list" if len(lacking) == len(lists) else " or ".join(lacking)
        report.warn(f"never seen in {place}: {', '.join(classes)}")


def _check_registration(report: Report, most_shift: float) -> None:
    common = common_shift(report.shifts)
    if common is not None and common[0].length > most_shift:
        shift, number = common
        report.warn(
            f"thermal lies about {shift} of rgb (median of {number} pairs): the set looks "
            "unregistered"
        )
        return
    far = far_pairs(report.shifts, most_shift)
    if far:
        shown = [f"{stem} ({shift})" for stem, shift in far.items()]
        report.warn(f"thermal seems to lie beside rgb in {len(far)} pairs: {shorten(shown)}")


def sizes_of(report: Report, name: str) -> Counter:
    """Pairs of a list by (height, width)."""
    return Counter(report.sizes[stem] for stem in report.lists[name] if stem in report.sizes)
