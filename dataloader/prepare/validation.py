"""A validation list out of a training list: the same images for a seed, on any machine."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

from dataloader.dataset import read_split
from utils.errors import InputError
from utils.files import write_whole

WHOLE_LIST = "train_and_val"  # name of the list that keeps what train.txt was


def choose(stems: Sequence[str], fraction: float, seed: int) -> list[str]:
    """A fraction of the stems, one at least and not all, in their own order.

    Each stem is drawn by its own hash: the choice does not depend on the order of the list, and
    a few more images leave it nearly as it was.

    Raises:
        InputError: a fraction that is not between 0 and 1, or fewer than two stems.
    """
    if not 0 < fraction < 1:
        raise InputError(f"a fraction for a list must lie between 0 and 1, got {fraction:g}")
    if len(stems) < 2:
        raise InputError(f"{len(stems)} pair cannot be divided into two lists")
    count = min(max(round(len(stems) * fraction), 1), len(stems) - 1)
    drawn = set(sorted(stems, key=lambda stem: _draw(stem, seed))[:count])
    return [stem for stem in stems if stem in drawn]


def divide_train_list(folder: Path, fraction: float, seed: int) -> tuple[int, int, bool]:
    """Divide folder/train.txt into train.txt and val.txt; train_and_val.txt keeps the whole.

    Interrupted at any point, the same call completes it; once done, it changes nothing.

    Returns:
        Pairs in train.txt, pairs in val.txt, whether anything was done.
    Raises:
        InputError: no train.txt, or a val.txt that is not the one of this fraction and seed.
    """
    has_whole = (folder / f"{WHOLE_LIST}.txt").is_file()
    whole = read_split(folder, WHOLE_LIST if has_whole else "train")
    val = choose(whole, fraction, seed)
    train = [stem for stem in whole if stem not in set(val)]
    if (folder / "val.txt").is_file():
        lists = read_split(folder, "train"), read_split(folder, "val")
        if not has_whole or lists != (train, val):
            raise InputError(
                f"{folder / 'val.txt'} exists already and is another choice; remove it, and put "
                f"{WHOLE_LIST}.txt, if there is one, back as train.txt, to choose again"
            )
        return len(train), len(val), False
    write_list(folder / f"{WHOLE_LIST}.txt", whole)
    write_list(folder / "train.txt", train)
    write_list(folder / "val.txt", val)
    return len(train), len(val), True


def write_list(path: Path, stems: Sequence[str]) -> None:
    """Write a list, one stem a line."""
    write_whole(path, "".join(f"{stem}\n" for stem in stems))


def _draw(stem: str, seed: int) -> bytes:
    return hashlib.sha256(f"{seed}/{stem}".encode()).digest()
