"""What will be written: which files of a source make which pair, and which list names it."""

import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import NamedTuple

from dataloader.dataset import IMAGE_SUFFIXES, read_split, shorten
from dataloader.prepare.source import Source, archives_in
from utils.errors import InputError

SPLITS = ("train", "val", "test")


class SourcePair(NamedTuple):
    """One pair by its files in the source."""

    stem: str  # its name in the prepared set
    rgb: str
    thermal: str  # the same file as rgb where thermal is its fourth channel
    label: str | None


@dataclass
class Plan:
    """The pairs of a set in the order of its lists."""

    pairs: dict[str, SourcePair]  # by stem
    lists: dict[str, list[str]]  # stems by split; each pair is in one
    notes: list[str] = field(default_factory=list)  # for the user: what was left out or renamed

    @property
    def has_labels(self) -> bool:
        return all(pair.label is not None for pair in self.pairs.values())

    def files(self) -> list[str]:
        """Every file of the source that the plan reads."""
        return sorted({file for pair in self.pairs.values() for file in pair[1:] if file})

    def keep(self, is_wanted: Callable[[str], bool]) -> None:
        """Drop the pairs of other stems; a list that becomes empty goes, too."""
        self.pairs = {stem: pair for stem, pair in self.pairs.items() if is_wanted(stem)}
        kept = {split: [s for s in stems if is_wanted(s)] for split, stems in self.lists.items()}
        self.lists = {split: stems for split, stems in kept.items() if stems}

    def all_lists(self) -> dict[str, list[str]]:
        """The lists by file name, with test_day and test_night where stems end with D or N."""
        test = self.lists.get("test", [])
        lists = {split: self.lists[split] for split in SPLITS if split in self.lists}
        if test and all(stem[-1] in "DN" for stem in test):
            for name, mark in (("test_day", "D"), ("test_night", "N")):
                stems = [stem for stem in test if stem.endswith(mark)]
                lists |= {name: stems} if stems else {}
        return lists


def find_folders(source: Source, wanted: Sequence[str]) -> dict[str, str] | None:
    """Folders such as "train/vi" below one common root, letters in any case; None if absent.

    Returns:
        The wanted path -> the folder's path in the source; of several roots the least deep.
    Raises:
        InputError: two roots of one depth.
    """
    folders = {
        parent.as_posix().lower(): parent.as_posix()
        for file in source.sizes
        for parent in PurePosixPath(file).parents
    }
    end = wanted[0].lower()
    roots = [name[: -len(end)] for name in folders if f"/{name}".endswith(f"/{end}")]
    roots = [root for root in roots if all(root + name.lower() in folders for name in wanted)]
    roots.sort(key=lambda root: root.count("/"))
    if not roots:
        return None
    if len(roots) > 1 and roots[0].count("/") == roots[1].count("/"):
        first, second = (folders[root + wanted[0].lower()] for root in roots[:2])
        raise InputError(
            f"{source.path} holds {first} and {second}, two data sets; give the folder of one"
        )
    return {name: folders[roots[0] + name.lower()] for name in wanted}


def require_folders(source: Source, wanted: Sequence[str], what: str) -> dict[str, str]:
    """find_folders, or an InputError that says what was looked for and what is there."""
    found = find_folders(source, wanted)
    if found is None:
        inside = archives_in(source)
        tops = sorted({file.split("/")[0] for file in source.sizes})
        raise InputError(
            f"{source.path} is not {what}: it has no folders {', '.join(wanted)} side by side; it "
            f"holds {shorten(tops) or 'nothing'}"
            + (f"; unpack {inside[0]} or give it as SRC" if inside else "")
        )
    return found


def stems_in(source: Source, folder: str) -> dict[str, str]:
    """The images right inside a folder of the source: stem (Unicode NFC) -> file.

    Raises:
        InputError: two files of one stem, or a stem that a list cannot hold.
    """
    stems: dict[str, str] = {}
    for file in source.sizes:
        path = PurePosixPath(file)
        if path.parent.as_posix() != folder or path.suffix.lower() not in IMAGE_SUFFIXES:
            continue
        stem = unicodedata.normalize("NFC", path.stem)
        if stem in stems:
            raise InputError(
                f"{source.path}: {stems[stem]} and {path.name} have one name; remove one of them"
            )
        ends_like_image = PurePosixPath(stem).suffix.lower() in IMAGE_SUFFIXES
        if stem != stem.strip() or ends_like_image or "\\" in stem or len(stem.splitlines()) > 1:
            raise InputError(
                f"{source.path}: a list cannot hold the name {stem!r} (blanks around it, a line "
                "break, a backslash or a second suffix); rename its files"
            )
        stems[stem] = file
    return stems


def match(
    source: Source, rgb_folder: str, thermal_folder: str, label_folder: str | None
) -> dict[str, SourcePair]:
    """Pairs by stem from two or three folders.

    Raises:
        InputError: a stem that is not in all of them, no image at all, or what stems_in finds.
    """
    folders = [folder for folder in (rgb_folder, thermal_folder, label_folder) if folder]
    columns = [stems_in(source, folder) for folder in folders]
    stems = sorted(set().union(*columns))
    missing = [
        f"{folder}/{stem}"
        for folder, column in zip(folders, columns, strict=True)
        for stem in stems
        if stem not in column
    ]
    if missing:
        raise InputError(
            f"{source.path}: {len(missing)} files are missing for {len(stems)} names: "
            f"{shorten(missing)}; rgb, thermal and label belong together by name: copy it again, "
            "or remove the files that are left over"
        )
    if not stems:
        raise InputError(f"{source.path}: {', '.join(folders)} hold no images")
    rows = ([column[stem] for column in columns] for stem in stems)
    return {
        stem: SourcePair(stem, row[0], row[1], row[2] if label_folder else None)
        for stem, row in zip(stems, rows, strict=True)
    }


def read_lists(source: Source, folder: str) -> dict[str, list[str]]:
    """The lists train, val and test that lie right in a folder of the source; {} if none."""
    prefix = "" if folder == "." else f"{folder}/"
    lists = {}
    for split in SPLITS:
        file = f"{prefix}{split}.txt"
        if file in source.sizes:
            with source.fetch([file]) as paths:
                stems = read_split(paths[0].parent, split)
            lists[split] = [unicodedata.normalize("NFC", stem) for stem in stems]
    return lists


def check_listed(source: Source, pairs: Mapping[str, object], lists: Mapping[str, list]) -> None:
    """Raise InputError where a list names no pair, or two lists name one."""
    missing = [f"{s} ({split}.txt)" for split in lists for s in lists[split] if s not in pairs]
    if missing:
        raise InputError(
            f"{source.path}: {len(missing)} listed names have no files: {shorten(missing)}; the "
            "archive is not whole: copy it again"
        )
    seen: dict[str, str] = {}
    for split, stems in lists.items():
        for stem in stems:
            if stem in seen:
                raise InputError(
                    f"{source.path}: {stem} is in {seen[stem]}.txt and in {split}.txt; keep it in "
                    "one list"
                )
            seen[stem] = split
