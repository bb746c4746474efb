"""The layouts in which MFNet, FMB, PST900, MSRS and users' own pairs come, each as a Plan."""

from collections.abc import Sequence
from pathlib import PurePosixPath

from dataloader.dataset import shorten
from dataloader.prepare.plan import (
    SPLITS,
    Plan,
    SourcePair,
    check_listed,
    find_folders,
    match,
    read_lists,
    require_folders,
    stems_in,
)
from dataloader.prepare.source import Source
from utils.errors import InputError

COUNTS = {  # pairs as published; PST900's papers train on 597 or on all 606
    "mfnet": {"train": (784,), "val": (392,), "test": (393,)},
    "fmb": {"train": (1220,), "test": (280,)},
    "pst900": {"train": (606, 597), "test": (288,)},
    "msrs": {"train": (1083,), "test": (361,)},
}
_SPLIT_FOLDERS = {  # rgb, thermal, label below train/ and test/
    "fmb": ("Visible", "Infrared", "Label"),
    "pst900": ("rgb", "thermal", "labels"),
    "msrs": ("vi", "ir", "Segmentation_labels"),
}
_USUAL_NAMES = {  # of a user's own folders, letters in any case
    "rgb": ("RGB", "Visible", "vis", "vi", "color", "images"),
    "thermal": ("Modal", "thermal", "Infrared", "ir", "tir", "lwir", "nir"),
    "label": ("Label", "labels", "mask", "masks", "Segmentation_labels", "annotations"),
}


def plan_mfnet(source: Source) -> Plan:
    """MFNet: images/ of four channels, labels/, and the official lists beside them.

    The mirrored copies (*_flip) are dropped from files and lists: training mirrors by itself.
    """
    folders = require_folders(source, ("images", "labels"), "MFNet's archive")
    images, labels = (stems_in(source, folders[name]) for name in ("images", "labels"))
    root = PurePosixPath(folders["images"]).parent.as_posix()
    lists = {
        split: [stem for stem in stems if not _is_mirrored(stem)]
        for split, stems in read_lists(source, root).items()
    }
    if "train" not in lists or "test" not in lists:
        raise InputError(
            f"{source.path}: the lists train.txt, val.txt and test.txt of MFNet's authors belong "
            f"into the folder of images/; found: {', '.join(lists) or 'none'}"
        )
    pairs = {
        stem: SourcePair(stem, file, file, labels[stem])
        for stem, file in images.items()
        if stem in labels
    }
    check_listed(source, pairs, lists)
    listed = {stem for stems in lists.values() for stem in stems}
    left_out = [stem for stem in images if stem not in listed]
    mirrored = sum(map(_is_mirrored, left_out))
    plan = Plan(pairs, lists)
    plan.keep(listed.__contains__)
    if mirrored:
        plan.notes.append(f"{mirrored} mirrored copies (*_flip) left out: training mirrors itself")
    if len(left_out) > mirrored:
        unlisted = [stem for stem in left_out if not _is_mirrored(stem)]
        plan.notes.append(f"{len(unlisted)} images are in no list: {shorten(unlisted)}")
    return plan


def plan_train_test(source: Source, kind: str, *, use_raw: bool = False) -> Plan:
    """FMB, PST900 and MSRS: train/ and test/, each with folders of rgb, thermal and labels.

    Both are mixed into one; a name that is in both gets its split in front.

    Args:
        use_raw: PST900's thermal_raw/ (16 bits) instead of its thermal/.
    """
    names = list(_SPLIT_FOLDERS[kind])
    if use_raw:
        names[1] = "thermal_raw"
    splits = ("train", "test")
    wanted = [f"{split}/{name}" for split in splits for name in names]
    folders = require_folders(source, wanted, f"{kind.upper()}'s archive")
    found = {
        split: match(source, *(folders[f"{split}/{name}"] for name in names)) for split in splits
    }
    shared = found["train"].keys() & found["test"].keys()
    plan = Plan({}, {})
    for split, pairs in found.items():
        stems = {old: f"{split}_{old}" if old in shared else old for old in pairs}
        plan.pairs |= {new: pairs[old]._replace(stem=new) for old, new in stems.items()}
        plan.lists[split] = list(stems.values())
    if shared:
        plan.notes.append(
            f"{len(shared)} names are in train/ and in test/; they became train_... and test_..."
        )
    return plan


def plan_custom(source: Source, *, rgb: str | None, thermal: str | None, label: str | None) -> Plan:
    """A user's two or three folders below one root; lists beside them are taken over.

    Without lists all pairs train, or, without labels, all are in test.txt.

    Args:
        rgb, thermal, label: names of the folders; None looks for the usual ones.
    """
    given = [PurePosixPath(name) for name in (rgb, thermal, label) if name]
    if len(set(given)) < len(given):
        raise InputError(
            f"--rgb, --thermal and --label must be different folders, got "
            f"{', '.join(map(str, given))}"
        )
    folders = _find_custom_folders(source, rgb, thermal)
    root = _root_of(folders)
    label_folder = _find_label_folder(source, root, label)
    pairs = match(source, *folders.values(), label_folder)
    lists = read_lists(source, root) or {"train" if label_folder else "test": list(pairs)}
    check_listed(source, pairs, lists)
    plan = Plan(pairs, lists)
    listed = {stem for stems in lists.values() for stem in stems}
    if len(listed) < len(pairs):
        unlisted = [stem for stem in pairs if stem not in listed]
        plan.notes.append(f"{len(unlisted)} pairs are in no list: {shorten(unlisted)}")
        plan.keep(listed.__contains__)
    if label_folder is None:
        plan.notes.append("no labels: the set can be fused and predicted, not trained on or scored")
    return plan


def count_problems(plan: Plan, kind: str) -> list[str]:
    """Where the numbers of pairs differ from the published ones."""
    got = {split: len(plan.lists.get(split, ())) for split in SPLITS}
    return [
        f"{split} has {got[split]} pairs, published are {' or '.join(map(str, expected))}"
        for split, expected in COUNTS.get(kind, {}).items()
        if got[split] not in expected
    ]


def _is_mirrored(stem: str) -> bool:
    return stem.endswith("_flip")


def _find_custom_folders(source: Source, rgb: str | None, thermal: str | None) -> dict[str, str]:
    rgb_names, thermal_names = _candidates("rgb", rgb), _candidates("thermal", thermal)
    for rgb_name in rgb_names:
        for thermal_name in thermal_names:
            folders = find_folders(source, (rgb_name, thermal_name))
            if folders is not None:
                return folders
    tops = sorted({str(PurePosixPath(file).parent) for file in source.sizes})
    raise InputError(
        f"{source.path} has no folders {'|'.join(rgb_names)} and {'|'.join(thermal_names)} side by "
        f"side; name them with --rgb and --thermal; it holds {shorten(tops) or 'nothing'}"
    )


def _find_label_folder(source: Source, root: str, label: str | None) -> str | None:
    """The folder of labels below root; None where the usual names are absent."""
    prefix = "" if root == "." else f"{root}/"
    folders = {PurePosixPath(file).parent.as_posix() for file in source.sizes}
    by_name = {folder.lower(): folder for folder in folders}
    for name in _candidates("label", label):
        if (prefix + name).lower() in by_name:
            return by_name[(prefix + name).lower()]
    if label is not None:
        raise InputError(f"{source.path} has no folder {prefix}{label}; --label names the masks'")
    return None


def _candidates(role: str, given: str | None) -> Sequence[str]:
    return _USUAL_NAMES[role] if given is None else (given.strip("/"),)


def _root_of(folders: dict[str, str]) -> str:
    """The folder below which the found folders lie by their wanted names."""
    wanted, found = next(iter(folders.items()))
    return found[: len(found) - len(wanted)].rstrip("/") or "."
