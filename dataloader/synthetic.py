"""Drawn RGB-thermal road scenes with exact labels, in which neither modality alone is enough.

People are warm but hide in the dark, in glare and in fog; cones and kerbs have the road's own
temperature and show in rgb only; warm machines, windows and manholes are no people; on hot days
people are as warm as the street. All sizes are relative: any image from 32x32 on.
"""

import json
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dataloader.scenery.camera import render_rgb, render_thermal
from dataloader.scenery.canvas import Canvas
from dataloader.scenery.items import draw_items, place_items
from dataloader.scenery.street import (
    Street,
    choose_weather,
    paint_ground,
    paint_houses,
    paint_kerbs,
    paint_sky,
)
from utils.errors import InputError
from utils.image import write_png

SPLITS = ("train", "val", "test")
_VERSION = 1  # of the drawing; a folder drawn by another version is not the same data set
_DESCRIPTION = "scenes.json"  # what a folder of drawn scenes was drawn from
_FOLDERS = ("RGB", "Modal", "Label")  # in the order of a Scene's fields


class Scene(NamedTuple):
    """One registered pair with its label."""

    rgb: np.ndarray  # (H, W, 3) uint8
    thermal: np.ndarray  # (H, W) uint8, warmer is brighter
    label: np.ndarray  # (H, W) uint8 in 0..4


def is_night(index: int) -> bool:
    """Every second scene is at night, so that each list of scenes holds both."""
    return index % 2 == 1


def draw_scene(index: int, *, height: int, width: int, seed: int) -> Scene:
    """Draw scene number index of a seed; it does not depend on what was drawn before.

    Raises:
        InputError: a side below 32 pixels, a negative index or seed.
    """
    if min(height, width) < 32:
        raise InputError(f"a scene is at least 32x32 pixels, got {height}x{width}")
    if min(index, seed) < 0:
        raise InputError(f"index and seed are 0 or more, got index {index}, seed {seed}")
    rng = np.random.default_rng([seed, index])
    weather = choose_weather(rng, is_night(index))
    street = Street(
        height,
        width,
        half_road=rng.uniform(1.9, 2.9),
        horizon=rng.uniform(0.33, 0.4),
        vanishing=rng.uniform(0.35, 0.65),
        bend=rng.uniform(-0.12, 0.12),
    )
    canvas = Canvas(height, width)
    paint_sky(canvas, street, weather, rng)
    paint_ground(canvas, street, weather, rng)
    paint_houses(canvas, street, weather, rng)
    paint_kerbs(canvas, street, weather, rng)
    draw_items(canvas, place_items(street, rng), weather, rng)
    looks = canvas.looks()
    thermal = render_thermal(looks[..., 3], rng)
    return Scene(render_rgb(canvas, looks, street, weather, rng), thermal, canvas.label())


def write_dataset(
    folder: Path,
    *,
    counts: Mapping[str, int],
    height: int,
    width: int,
    seed: int,
    on_scene: Callable[[], object] | None = None,
) -> bool:
    """Draw a data set in the standard layout: folder/{RGB,Modal,Label}/00000D.png and lists.

    The folder appears whole or not at all. test_day.txt and test_night.txt divide test.txt.

    Args:
        counts: scenes per split, of train, val and test; a split of 0 gets no list.
        on_scene: called after each scene, for a progress bar.
    Returns:
        False where exactly this data set was there already, and nothing was done.
    Raises:
        InputError: counts without any scene or of an unknown split, too small a size, a folder
            that holds anything else or that cannot be made.
    """
    unknown = sorted(set(counts) - set(SPLITS))
    if unknown or min(counts.values(), default=0) < 0 or not sum(counts.values()):
        raise InputError(
            f"counts must give 0 or more scenes of {', '.join(SPLITS)}, and one at least; "
            f"got {dict(counts)}"
        )
    lists = _split_lists(counts)
    description = {
        "version": _VERSION,
        "counts": {split: counts.get(split, 0) for split in SPLITS},
        "height": height,
        "width": width,
        "seed": seed,
    }
    folder = folder.resolve()
    if _is_drawn(folder, description, lists):
        return False
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        aside = tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent)
    except OSError as error:
        raise InputError(f"cannot write into {folder.parent}: {error.strerror}") from error
    with aside as path:
        drawn = Path(path) / folder.name
        drawn.mkdir()
        for index, stem in enumerate(_all_stems(lists)):
            scene = draw_scene(index, height=height, width=width, seed=seed)
            for name, image in zip(_FOLDERS, scene, strict=True):
                write_png(drawn / name / f"{stem}.png", image)
            if on_scene is not None:
                on_scene()
        for name, stems in lists.items():
            (drawn / f"{name}.txt").write_text("".join(f"{stem}\n" for stem in stems))
        (drawn / _DESCRIPTION).write_text(json.dumps(description, indent=1) + "\n")
        try:
            drawn.replace(folder)  # works onto nothing and onto an empty folder
        except OSError as error:
            if _is_drawn(folder, description, lists):  # another process was faster
                return False
            raise InputError(f"cannot put the scenes at {folder}: {error.strerror}") from error
    return True


def _split_lists(counts: Mapping[str, int]) -> dict[str, list[str]]:
    """Stems by list name; they end with D (day) or N (night), as MFNet's do."""
    lists, start = {}, 0
    for split in SPLITS:
        indices = range(start, start + counts.get(split, 0))
        lists[split] = [f"{index:05d}{'N' if is_night(index) else 'D'}" for index in indices]
        start = indices.stop
    lists["test_day"] = [stem for stem in lists["test"] if stem.endswith("D")]
    lists["test_night"] = [stem for stem in lists["test"] if stem.endswith("N")]
    return {name: stems for name, stems in lists.items() if stems}


def _all_stems(lists: Mapping[str, list[str]]) -> list[str]:
    return [stem for split in SPLITS for stem in lists.get(split, [])]


def _is_drawn(folder: Path, description: dict[str, object], lists: Mapping[str, list[str]]) -> bool:
    """Whether folder holds exactly these scenes; False if it is absent or empty."""
    if folder.is_dir() and not any(folder.iterdir()) or not folder.exists():
        return False
    advice = "choose another folder, or remove this one to have it drawn again"
    try:
        found = json.loads((folder / _DESCRIPTION).read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{folder} exists and holds no drawn scenes; {advice}") from error
    if found != description:
        raise InputError(
            f"{folder} holds other scenes, {json.dumps(found)}, than asked for, "
            f"{json.dumps(description)}; {advice}"
        )
    files = [folder / f"{name}.txt" for name in lists]
    files += [folder / name / f"{stem}.png" for stem in _all_stems(lists) for name in _FOLDERS]
    missing = [file for file in files if not file.is_file()]
    if missing:
        raise InputError(f"{len(missing)} files are missing, the first {missing[0]}; {advice}")
    return True
