"""Where the fused images and class maps of predict.py go: pictures, or two videos."""

from pathlib import Path

import numpy as np

from engine.results import PictureWriter, draw_segmentation, write_segmentation
from utils.image import Palette, write_png
from utils.video import VideoWriter


class PictureSink:
    """fused/, segmentation/ (class indices), color/, overlay/ <name>.png; use it as a context."""

    def __init__(self, folder: Path, palette: Palette) -> None:
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
    """fused.mp4 and overlay.mp4, frame by frame; use it as a context."""

    def __init__(self, folder: Path, palette: Palette, frames_per_s: float) -> None:
        self._palette = palette
        self._fused = VideoWriter(folder / "fused.mp4", frames_per_s)
        self._overlay = VideoWriter(folder / "overlay.mp4", frames_per_s)

    def __enter__(self) -> "VideoSink":
        return self

    def __exit__(self, *error: object) -> None:
        self._fused.__exit__(*error)
        self._overlay.__exit__(*error)

    def write(
        self, name: str, rgb: np.ndarray, fused: np.ndarray, segmentation: np.ndarray
    ) -> None:
        """Add one frame to each; shapes as PictureSink's, fused uint8."""
        _, cover = draw_segmentation(rgb, segmentation, self._palette)
        self._fused.write(fused)
        self._overlay.write(cover)
