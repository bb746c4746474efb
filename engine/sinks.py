"""Where the fused images and class maps of predict.py go: pictures, or two videos."""

import contextlib
from pathlib import Path

import numpy as np

from engine.results import (
    SEGMENTATION_FOLDERS,
    PictureWriter,
    draw_segmentation,
    write_segmentation,
)
from utils.image import Palette, write_png
from utils.video import VideoWriter


class PictureSink:
    """fused/, segmentation/ (class indices), color/, overlay/ <name>.png; use it as a context.

    Attributes:
        places: the folders that it writes to.
    """

    def __init__(self, folder: Path, palette: Palette) -> None:
        self.places = [folder / kind for kind in ("fused", *SEGMENTATION_FOLDERS)]
        self._folder, self._palette = folder, palette
        self._writer = PictureWriter()

    def __enter__(self) -> "PictureSink":
        self._writer.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._writer.__exit__(*error)

    def write(
        self, name: str, rgb: np.ndarray, fused: np.ndarray, segmentation: np.ndarray
    ) -> None:
        """Write one pair's pictures soon.

        rgb: (H, W, 3) uint8; fused: (H, W, 3) uint8 or uint16; segmentation: (H, W) uint8.
        """
        self._writer.submit(write_png, self._folder / "fused" / f"{name}.png", fused)
        self._writer.submit(
            write_segmentation, self._folder, name, rgb, segmentation, self._palette
        )


class VideoSink:
    """fused.mp4 and overlay.mp4, frame by frame; use it as a context.

    Attributes:
        places: the files that it writes.
    """

    def __init__(self, folder: Path, palette: Palette, frames_per_s: float) -> None:
        self.places = [folder / "fused.mp4", folder / "overlay.mp4"]
        self._palette = palette
        self._fused, self._overlay = (VideoWriter(path, frames_per_s) for path in self.places)
        self._both = contextlib.ExitStack()  # the other one ends, too, where one fails

    def __enter__(self) -> "VideoSink":
        for writer in (self._overlay, self._fused):
            self._both.enter_context(writer)
        return self

    def __exit__(self, *error: object) -> None:
        self._both.__exit__(*error)

    def write(
        self, name: str, rgb: np.ndarray, fused: np.ndarray, segmentation: np.ndarray
    ) -> None:
        """Add one frame to each; shapes as PictureSink's, fused uint8."""
        _, cover = draw_segmentation(rgb, segmentation, self._palette)
        self._fused.write(fused)
        self._overlay.write(cover)
