"""What evaluation leaves on disk: pictures and JSON, and whether that is there already."""

import json
from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from configs import Config
from engine.inference import describe_inference
from models import CMFS
from utils.download import file_sha256
from utils.environment import code_sha256, git_commit
from utils.files import write_whole
from utils.image import Palette, colorize, overlay, write_png

SEGMENTATION_FOLDERS = ("segmentation", "color", "overlay")
_WAITING_PICTURES = 32  # held in memory at most


class PictureWriter:
    """Writes pictures in threads while the next ones are computed; use it as a context.

    What a call raises is raised again by a later submit() or at the end.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(max_workers=4)
        self._waiting: deque[Future[None]] = deque()

    def __enter__(self) -> "PictureWriter":
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        self._pool.shutdown(wait=True)  # on an error, too: what was computed is written
        while self._waiting and error is None:
            self._waiting.popleft().result()

    def submit(self, write: Callable[..., None], *arguments: Any) -> None:
        """Call write(*arguments) soon."""
        self._waiting.append(self._pool.submit(write, *arguments))
        if len(self._waiting) > _WAITING_PICTURES:
            self._waiting.popleft().result()


def draw_segmentation(
    rgb: np.ndarray, segmentation: np.ndarray, palette: Palette
) -> tuple[np.ndarray, np.ndarray]:
    """Class indices in colour, and over the image, where class 0 covers nothing.

    rgb: (H, W, 3) uint8; segmentation: (H, W) uint8. Gives (H, W, 3) uint8 twice.
    """
    color = colorize(segmentation, palette)
    return color, overlay(rgb, np.where(segmentation[..., None] == 0, rgb, color))


def write_segmentation(
    folder: Path, name: str, rgb: np.ndarray, segmentation: np.ndarray, palette: Palette
) -> None:
    """Write segmentation/ (class indices), color/ and overlay/ <name>.png; see above."""
    color, cover = draw_segmentation(rgb, segmentation, palette)
    for kind, picture in zip(SEGMENTATION_FOLDERS, (segmentation, color, cover), strict=True):
        write_png(folder / kind / f"{name}.png", picture)


def describe_task(path: Path, config: Config, split: str, **more: Any) -> dict[str, Any]:
    """What a result follows from, known before the checkpoint is opened.

    config: the present one, of the data that is scored; more: what else the result follows from.
    """
    return {
        "dataset": config.data.name,
        "split": split,
        "checkpoint": path.as_posix(),
        "checkpoint_sha256": file_sha256(path),
        "modalities": config.data.modalities,
        "git_commit": git_commit(),
        "code_sha256": code_sha256(),
        **more,
        "config": config.model_dump(mode="json"),
    }


def describe_model(model: CMFS, stored: Config) -> dict[str, Any]:
    """What a result owes to the checkpoint; stored: the config of its run."""
    return {
        "trained_on": stored.data.name,
        "train_on_val": stored.data.train_on_val,
        "text_prior": model.text_prior.source,
        "modalities_in_training": stored.data.modalities,
    }


def finished_result(
    path: Path,
    task: Mapping[str, Any],
    names_key: str,
    names: Collection[str],
    picture_folders: Collection[str],
) -> dict[str, Any] | None:
    """The result that a file holds, where it is that of the same task and whole; else None.

    Args:
        path: eval.json or vision.json, which is written last of all files of a checkpoint.
        task: see describe_task; every item must agree.
        names_key: where the result lists its images, which must be `names`.
        picture_folders: those beside `path` that must hold a picture of each of them.
    """
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(result, dict) or any(result.get(key) != task[key] for key in task):
        return None
    listed = result.get(names_key)
    if not isinstance(listed, dict) or listed.keys() != set(names):
        return None
    pictures = (
        path.parent / folder / f"{name}.png" for folder in picture_folders for name in names
    )
    return result if all(picture.is_file() for picture in pictures) else None


def describe_scoring(result: Mapping[str, Any], config: Config) -> str:
    """How the numbers of a segmentation came about, in one line.

    result: what describe_task and describe_model say, and the scored modalities.
    """
    lists = "train and val" if result["train_on_val"] else "train"
    background = "not scored" if config.data.ignore_background else "scored as any other"
    return (
        f"{describe_inference(config.eval)}; trained on {lists}, scored on {result['split']}; "
        f"modalities: {result['modalities']}; one confusion matrix over the split at the labels' "
        f"own size, 255 left out, class 0 {background}; classes without a labelled pixel are left "
        f"out of the mean"
    )


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write JSON whole; InputError where the disk does not take it."""
    text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False)
    write_whole(path, text + "\n")


def remove_other_pictures(target: Path, folders: Iterable[str], names: Iterable[str]) -> None:
    """Delete what an earlier evaluation, of other images, left in a result's folders."""
    stems = set(names)
    for folder in folders:
        for picture in (target / folder).glob("*.png"):
            if picture.stem not in stems:
                picture.unlink(missing_ok=True)
