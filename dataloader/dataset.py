"""From a split list on disk to samples: find the files, read, check and transform them."""

import hashlib
import os
from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset

from configs.schema import DataConfig
from dataloader.augment import paste_box
from dataloader.packing import NamedPair, Sample, pack, unpack
from dataloader.transforms import Pair, Transform
from utils.errors import InputError
from utils.image import UNKNOWN_LABEL, read_label, read_rgb, read_thermal

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff"})
_SHOWN_NAMES = 10  # of a long list in an error


class SampleKey(NamedTuple):
    """What a sampler asks for: image `index`, transformed as epoch `epoch` transforms it."""

    epoch: int
    index: int


class PairFiles(NamedTuple):
    """Where one pair lies."""

    rgb: Path
    thermal: Path
    label: Path | None  # None in a set without labels


class SegmentationPairs(Dataset[Sample]):
    """The pairs of one split.

    With data.cache = ram each process keeps what it has decoded, 5 bytes a pixel (1.5 MB a pair of
    480x640); with workers every worker comes to hold the whole split.

    Args:
        split: name of a list, such as "train", "val", "test" or "test_day".
        transform: applied with a generator seeded by (seed, epoch, index), so that a sample is
            the same in every process; None leaves the pair as it is.
        cutmix: share of the samples that get a box of another pair of the split, drawn by the
            same generator; with a transform that gives one size.
        need_labels: False allows a set without a label folder; its labels are all 255.
    Raises:
        InputError: a missing folder, list or file, a bad list; on access a bad image or label.
    """

    def __init__(
        self,
        config: DataConfig,
        split: str,
        transform: Transform | None = None,
        *,
        seed: int = 0,
        cutmix: float = 0.0,
        need_labels: bool = True,
    ) -> None:
        self.config = config
        self.transform = transform
        self.cutmix = cutmix
        self.seed = seed
        self.names = read_names(config, split)
        self.files = find_files(config, self.names, need_labels=need_labels)
        self._cache: dict[int, Pair] = {}
        read_thermal(self.files[0].thermal)  # a 16-bit set is announced here, not by each worker

    @property
    def has_labels(self) -> bool:
        return self.files[0].label is not None

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the names, sizes and times of change of all its files."""
        digest = hashlib.sha256()
        for files in self.files:
            for path in filter(None, files):
                stat = path.stat()
                digest.update(f"{path.name} {stat.st_size} {stat.st_mtime_ns}\n".encode())
        return digest.hexdigest()

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, key: SampleKey | int) -> Sample:
        """One sample; a plain index means epoch 0."""
        pair, name = self.transformed(key)
        return Sample(*unpack(pack(pair), self.config.modalities), name)

    def __getitems__(self, keys: Sequence[SampleKey | int]) -> list[NamedPair | InputError]:
        """A batch's pairs, for PairLoader; an InputError comes as a value, in their place.

        DataLoader would raise one from a worker with the worker's traceback as its message.
        """
        try:
            return [self.transformed(key) for key in keys]
        except InputError as error:
            return [error]

    def transformed(self, key: SampleKey | int) -> NamedPair:
        """One pair before it becomes numbers; a plain index means epoch 0."""
        epoch, index = key if isinstance(key, tuple) else (0, key)
        pair = self.read(index)
        if self.transform is not None:
            generator = seeded_generator(self.seed, epoch, index)
            pair = self.transform(pair, generator)
            if self.cutmix > torch.rand((), generator=generator):
                other = self.read(int(torch.randint(len(self), (), generator=generator)))
                pair = paste_box(pair, self.transform(other, generator), generator)
        return NamedPair(pair, self.names[index])

    def read(self, index: int) -> Pair:
        """One pair as it is stored."""
        pair = self._cache.get(index)
        if pair is None:
            pair = read_pair(self.files[index], self.config)
            if self.config.cache == "ram":
                self._cache[index] = pair
        return pair


def read_names(config: DataConfig, split: str) -> list[str]:
    """The stems of a split; with train_on_val, "train" is train.txt and val.txt together."""
    folder = Path(config.path).expanduser()
    if not folder.is_dir():
        raise InputError(
            f"dataset folder {folder} does not exist; put the data there (datasets/README.md) or "
            "say where it is: --set data.dataset_path=..."
        )
    names = read_split(folder, split)
    if split == "train" and config.train_on_val:
        names += read_split(folder, "val")
        _check_unique(names, f"{folder / 'train.txt'} and val.txt together")
    return names


def read_split(folder: Path, split: str) -> list[str]:
    """The stems that folder/<split>.txt lists, one a line; an image suffix is dropped.

    Raises:
        InputError: no such list, an empty one, a name twice or with a folder in it.
    """
    path = folder / f"{split}.txt"
    if not path.is_file():
        if split == "val" and not (folder / "train.txt").is_file():
            way_out = "nor does train.txt, to take it from: this set can be tested on, not trained"
        elif split == "val":
            command = f"tools/prepare_dataset.py --val-fraction 0.1 custom {folder}"
            way_out = (
                f"divide train.txt (with --config FILE.yaml in front of custom, too, where its "
                f"folders have names of their own) with {command}"
            )
        else:
            way_out = "it lists the split's file names without suffix, one a line"
        raise InputError(f"{path} does not exist; {way_out}")
    return read_list(path)


def read_list(path: Path) -> list[str]:
    """The stems that a text file lists, one a line; an image suffix is dropped.

    Raises:
        InputError: no such file, an empty one, a name twice or with a folder in it.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read as a text in UTF-8: {error}") from error
    names = [_to_stem(line.strip()) for line in lines if line.strip()]
    if not names:
        raise InputError(f"{path} is empty; it lists file names without suffix, one a line")
    outside = [name for name in names if "/" in name or "\\" in name or name in (".", "..")]
    if outside:
        raise InputError(
            f"{path}: '{outside[0]}' is no plain file name; list names without their folder"
        )
    _check_unique(names, str(path))
    return names


def find_files(config: DataConfig, names: Sequence[str], *, need_labels: bool) -> list[PairFiles]:
    """The files of listed stems, by stem whatever their suffix; nothing is opened.

    Raises:
        InputError: a folder or file that is missing, or two files of one stem.
    """
    root = Path(config.path).expanduser()
    fields = ["rgb_folder", "thermal_folder", "label_folder"]
    if not need_labels and not (root / config.label_folder).is_dir():
        fields.remove("label_folder")
    missing, columns = [], []
    for field in fields:
        folder = root / getattr(config, field)
        if not folder.is_dir():
            raise InputError(
                f"folder {folder} does not exist; put the images there or set data.{field}"
            )
        by_stem = files_by_stem(folder)
        for name in names:
            if len(by_stem.get(name, ())) > 1:
                both = " and ".join(sorted(path.name for path in by_stem[name]))
                raise InputError(f"{folder} holds {both}: two files of one name; remove one")
        missing += [f"{folder.name}/{name}" for name in names if name not in by_stem]
        columns.append([by_stem[name][0] for name in names if name in by_stem])
    if missing:
        raise InputError(
            f"{root}: {len(missing)} files of {len(names)} listed pairs are missing: "
            f"{shorten(missing)}; add them or take their names off the list"
        )
    if "label_folder" not in fields:
        columns.append([None] * len(names))
    return [PairFiles(*paths) for paths in zip(*columns, strict=True)]


def read_pair(files: PairFiles, config: DataConfig) -> Pair:
    """Decode one pair and check it; background becomes 255 where config says to ignore it.

    Raises:
        InputError: unreadable, sizes that differ, or a label with values that are no class.
    """
    rgb, thermal = read_rgb(files.rgb), read_thermal(files.thermal)
    check_size(files.thermal, thermal, files.rgb, rgb)
    if files.label is None:
        label = np.full_like(thermal, UNKNOWN_LABEL)
    else:
        label = read_label(files.label, config.palette)
        check_size(files.label, label, files.rgb, rgb)
        check_classes(label, files.label, config.num_classes)
    if config.ignore_background:
        label[label == 0] = UNKNOWN_LABEL
    return Pair(rgb, thermal, label, np.ones_like(label))


def seeded_generator(*numbers: int) -> torch.Generator:
    """A generator whose draws follow from the numbers, each 0 or more, alone."""
    state = np.random.SeedSequence(numbers).generate_state(1)
    return torch.Generator().manual_seed(int(state[0]))


def _to_stem(line: str) -> str:
    stem, suffix = os.path.splitext(line)
    return stem if suffix.lower() in IMAGE_SUFFIXES else line


def files_by_stem(folder: Path) -> dict[str, list[Path]]:
    """The images of a folder; a stem with several files stays with all of them."""
    files: dict[str, list[Path]] = {}
    for path in folder.iterdir():
        is_hidden = path.name.startswith(".")  # macOS leaves "._x.png" on foreign disks
        if path.suffix.lower() in IMAGE_SUFFIXES and not is_hidden:
            files.setdefault(path.stem, []).append(path)
    return files


def shorten(names: Sequence[str]) -> str:
    """The first ten names and how many more there are, for a message."""
    rest = len(names) - _SHOWN_NAMES
    return ", ".join(names[:_SHOWN_NAMES]) + (f" and {rest} more" if rest > 0 else "")


def _check_unique(names: Sequence[str], source: str) -> None:
    repeated = [name for name, count in Counter(names).items() if count > 1]
    if repeated:
        raise InputError(f"{source}: listed more than once: {shorten(repeated)}; keep one of each")


def check_size(path: Path, image: np.ndarray, rgb_path: Path, rgb: np.ndarray) -> None:
    """Raise InputError where an image (H, W) or (H, W, 3) has another size than its rgb."""
    if image.shape != rgb.shape[:2]:
        got, expected = (f"{shape[0]}x{shape[1]}" for shape in (image.shape, rgb.shape))
        raise InputError(
            f"{path} is {got} but {rgb_path} is {expected} (height x width); the images of a pair "
            "must be registered, of one size"
        )


def check_classes(label: np.ndarray, path: Path, num_classes: int) -> None:
    """Raise InputError where a label (H, W) holds a value that is neither a class nor 255."""
    if (label + np.uint8(1)).max() > num_classes:  # 255 wraps round to 0; far faster than masks
        wrong = label[(label >= num_classes) & (label != UNKNOWN_LABEL)]
        values, counts = np.unique(wrong, return_counts=True)
        found = [f"{value} ({count} pixels)" for value, count in zip(values, counts, strict=True)]
        raise InputError(
            f"label {path} holds {shorten(found)}; data.class_names has classes 0 to "
            f"{num_classes - 1}, and 255 is unknown"
        )
