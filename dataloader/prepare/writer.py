"""Write a planned set beside its place and put it there when it is whole."""

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import numpy as np

from configs.schema import DataConfig
from dataloader.dataset import PairFiles, check_classes, check_size, files_by_stem, shorten
from dataloader.prepare.labels import read_any_label, read_header, read_rgb_thermal
from dataloader.prepare.plan import Plan, SourcePair
from dataloader.prepare.source import BadFile, Source
from dataloader.prepare.validation import write_list
from utils.errors import InputError
from utils.image import read_rgb, read_thermal, write_png

try:
    import fcntl
except ImportError:  # not on Windows, where two runs at once are not told apart
    fcntl = None

DESCRIPTION = "dataset.json"  # in a prepared set: what it was made from, and its counts


class Style(NamedTuple):
    """How files are written."""

    use_links: bool = False  # links to files of the source that need no change, not copies
    is_binary: bool = False  # every label value but 0 is class 1


def is_prepared(out: Path, description: Mapping[str, Any], plan: Plan, data: DataConfig) -> bool:
    """Whether out holds exactly this set; False where it is absent or empty.

    Raises:
        InputError: out holds anything else, or files of the set are missing.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    advice = "remove it to have it prepared again, or choose another folder with --out"
    try:
        found = json.loads((out / DESCRIPTION).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{out} exists and was not prepared by this tool; {advice}") from error
    if {key: found.get(key) for key in description} != dict(description):
        raise InputError(f"{out} was prepared from another source or with other options; {advice}")
    skipped = set(found.get("skipped", ()))
    missing = [
        f"{folder.name}/{stem}"
        for folder, stems in _present(out, plan, data).items()
        for stem in plan.pairs
        if stem not in stems and stem not in skipped
    ]
    missing += [name for name in _list_names(plan) if not (out / name).is_file()]
    if missing:
        raise InputError(f"{out} lacks {len(missing)} of its files: {shorten(missing)}; {advice}")
    return True


@contextmanager
def part_folder(out: Path, description: Mapping[str, Any]) -> Iterator[Path]:
    """The folder beside out in which it grows; what an interrupted run of the same left stays.

    Raises:
        InputError: another process works in it.
    """
    part = out.with_name(f".{out.name}.part")
    try:
        part.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot write into {out.parent}: {error.strerror}") from error
    with open(part / DESCRIPTION, "a+", encoding="utf-8") as marker:
        _lock(marker, out)
        marker.seek(0)
        text = json.dumps(description, indent=1)
        if marker.read() != text:
            _clear(part)
            marker.truncate(0)
            marker.write(text)
            marker.flush()
        yield part


def write_pairs(
    source: Source,
    plan: Plan,
    part: Path,
    data: DataConfig,
    style: Style,
    *,
    on_pair: Callable[[], object],
) -> dict[str, str]:
    """Write the images that part does not hold yet.

    Returns:
        What is wrong with each pair that cannot be used, by stem; the others are written.
    Raises:
        InputError: the disk does not take a file; what is written stays for the next run.
    """
    for aside in part.glob("*/.*"):  # of a run that was killed while it wrote
        aside.unlink()
    present = list(_present(part, plan, data).values())
    problems = {}
    for stem, pair in plan.pairs.items():
        if not all(stem in stems for stems in present):
            try:
                _write_pair(source, pair, part, data, style)
            except BadFile as error:
                problems[stem] = str(error)
        on_pair()
    return problems


def finish(part: Path, out: Path, plan: Plan, description: Mapping[str, Any]) -> None:
    """Write the lists and the description, and rename part to out."""
    for name, stems in plan.all_lists().items():
        write_list(part / f"{name}.txt", stems)
    text = json.dumps(description, indent=1, ensure_ascii=False)
    (part / DESCRIPTION).write_text(text + "\n", encoding="utf-8")
    try:
        part.replace(out)
    except OSError as error:
        raise InputError(f"cannot put the set at {out}: {error.strerror}") from error


class _Images(NamedTuple):
    """One pair as it was read and checked."""

    rgb: np.ndarray  # (H, W, 3) uint8
    thermal: np.ndarray  # (H, W) uint8
    label: np.ndarray | None  # (H, W) uint8


def _write_pair(
    source: Source, pair: SourcePair, part: Path, data: DataConfig, style: Style
) -> None:
    """Check one pair and write its files; BadFile if it cannot be used."""
    files = [file for file in pair[1:] if file]
    with source.fetch(files) as fetched:
        paths = PairFiles(*fetched, *[None] * (3 - len(fetched)))
        is_one_file = pair.rgb == pair.thermal
        try:
            images = _read_images(paths, data, style, is_one_file=is_one_file)
        except InputError as error:
            raise BadFile(str(error)) from error
        is_deep = read_header(paths.thermal).mode.startswith("I")  # 16 bits
        must_be_written = (
            is_one_file,
            is_one_file or is_deep,
            paths.label is None or style.is_binary or read_header(paths.label).mode != "L",
        )
        folders = (data.rgb_folder, data.thermal_folder, data.label_folder)
        for folder, path, image, is_new in zip(
            folders, paths, images, must_be_written, strict=True
        ):
            if image is not None and is_new:
                write_png(part / folder / f"{pair.stem}.png", image)
            elif image is not None:
                _place(path, part / folder, pair.stem, style.use_links)


def _read_images(paths: PairFiles, data: DataConfig, style: Style, *, is_one_file: bool) -> _Images:
    """Read and check a pair; InputError says what is wrong with it."""
    if is_one_file:
        rgb, thermal = read_rgb_thermal(paths.rgb)
    else:
        rgb, thermal = read_rgb(paths.rgb), read_thermal(paths.thermal)
        check_size(paths.thermal, thermal, paths.rgb, rgb)
    if paths.label is None:
        return _Images(rgb, thermal, None)
    label = read_any_label(paths.label, data.palette, is_binary=style.is_binary)
    check_size(paths.label, label, paths.rgb, rgb)
    check_classes(label, paths.label, data.num_classes)
    return _Images(rgb, thermal, label)


def _place(path: Path, folder: Path, stem: str, use_links: bool) -> None:
    """Copy or link a file as folder/stem, its suffix in lower case: aside first, then renamed."""
    target = folder / f"{stem}{path.suffix.lower()}"
    aside = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        folder.mkdir(exist_ok=True)
        if use_links:
            aside.symlink_to(path.resolve())
        else:
            shutil.copyfile(path, aside)
        aside.replace(target)
    except OSError as error:
        raise InputError(f"cannot write {target}: {error.strerror}") from error


def _present(root: Path, plan: Plan, data: DataConfig) -> dict[Path, set[str]]:
    """The stems that each folder of a set holds."""
    names = [data.rgb_folder, data.thermal_folder]
    names += [data.label_folder] if plan.has_labels else []
    folders = [root / name for name in names]
    return {f: set(files_by_stem(f)) if f.is_dir() else set() for f in folders}


def _list_names(plan: Plan) -> list[str]:
    return [f"{name}.txt" for name in plan.lists]


def _lock(file: TextIO, out: Path) -> None:
    """Hold the file for this process until it is closed."""
    if fcntl is None:
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise InputError(f"another process prepares {out}; wait for its end") from error
    except OSError:  # a file system without locks
        pass


def _clear(part: Path) -> None:
    """Remove what a run with another source or other options left."""
    for path in part.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != DESCRIPTION:
            path.unlink()
